"""Figures: what is drawn stands where the model says, and nothing is shown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from hrm import Hardware, MoEModel
from hrm.operators import attention_core, expert_ffn
from hrm.plots import policy_map, roofline
from hrm.roofline import RooflinePoint, attainable, roofline_point

MIXTRAL = MoEModel.from_catalog("mixtral-8x7b")
L4 = Hardware.from_catalog("gcp-l4-1x")


@pytest.fixture(autouse=True)
def no_window(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Draw without a display, and fail where a function would show a window."""
    import matplotlib.pyplot as plt

    matplotlib.use("Agg")

    def show(*args: object, **kwargs: object) -> None:
        raise AssertionError("a plot function must not show a window")

    monkeypatch.setattr(plt, "show", show)
    yield
    plt.close("all")


def ffn(batch: int, kernel: int = 128) -> RooflinePoint:
    return roofline_point(L4, expert_ffn(MIXTRAL, batch), batch=batch, kernel_op=expert_ffn(MIXTRAL, kernel))


def lines(ax: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in ax.lines}


def texts(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.texts]


def test_roofs_have_the_machine_s_bandwidths_and_peaks_and_one_colour_each() -> None:
    ax = roofline(L4)
    roofs = {label.rsplit(" ", 2)[0]: line for label, line in lines(ax).items()}
    assert set(roofs) == {"GPU memory", "link", "CPU memory", "GPU compute", "CPU compute"}
    assert len({line.get_color() for line in roofs.values()}) == 5
    for name, bandwidth, peak in (("GPU memory", 300e9, 242e12), ("link", 16e9, 242e12), ("CPU memory", 100e9, 1.3e12)):
        x, y = roofs[name].get_data()
        np.testing.assert_allclose(y, attainable(peak, bandwidth, np.asarray(x)))
        assert y[-1] == pytest.approx(peak)
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert "FLOP/B" in ax.get_xlabel() and "FLOP/s" in ax.get_ylabel()


def test_gpus_of_a_machine_count_together() -> None:
    four = Hardware.from_catalog("gcp-t4-4x")
    ax = roofline(four)
    peak = next(line for label, line in lines(ax).items() if label.startswith("GPU compute"))
    assert peak.get_ydata()[0] == pytest.approx(4 * float(four.gpu.peak_flops))


def test_points_stand_at_their_intensity_under_the_roofs_and_inside_the_axes() -> None:
    points = [ffn(n) for n in (1, 32, 16384)]
    ax = roofline(L4, points)
    drawn = [tuple(np.ravel(line.get_data())) for line in ax.lines if line.get_linestyle() == "None"]
    assert drawn == [(p.intensity["cpu"], p.attainable_flops) for p in points]
    assert all(ax.get_xlim()[0] < x < ax.get_xlim()[1] and ax.get_ylim()[0] < y < ax.get_ylim()[1] for x, y in drawn)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["experts", "N = 1", "N = 32", "N = 16384"]


@pytest.mark.parametrize(("labels", "text"), [("batch", "N = 16 384"), ("name", "experts")])
def test_labels_stand_beside_points_instead_of_a_legend(labels: Any, text: str) -> None:
    ax = roofline(L4, [ffn(16384)], labels=labels)
    assert text in texts(ax)
    assert len(ax.get_legend().get_texts()) == 5  # the roofs


def test_turning_points_are_marked_where_the_link_meets_cpu_and_kernel() -> None:
    point = ffn(1024)
    ax = roofline(L4, [point], turning=point)
    assert "P1 = 81.25" in texts(ax)
    assert f"P2 = {point.p2:.4g}" in texts(ax)


def test_without_use_for_the_gpu_only_p1_is_marked() -> None:
    point = roofline_point(L4, attention_core(MIXTRAL, 1, 512), batch=1)
    ax = roofline(L4, [point], turning=point)
    assert "P1 = 81.25" in texts(ax)
    assert not any(text.startswith("P2") for text in texts(ax))


def test_measured_tasks_take_the_colour_of_their_memory() -> None:
    measured = pd.DataFrame(
        {
            "name": ["PostAttn", "PostAttn", "CPUAttn"],
            "level": ["gpu", "link", "cpu"],
            "intensity": [4.0, 13.0, 2.0],
            "flops_per_s": [1e11, 1e11, 1e10],
            "share": [0.5, 0.5, 0.1],
        }
    )
    ax = roofline(L4, measured=measured)
    symbols = [line for line in ax.lines if line.get_linestyle() == "None"]
    roofs = {label.rsplit(" ", 2)[0]: line.get_color() for label, line in lines(ax).items() if "/s" in label}
    assert [s.get_markerfacecolor() for s in symbols] == [roofs[x] for x in ("GPU memory", "link", "CPU memory")]
    assert symbols[0].get_marker() == symbols[1].get_marker() != symbols[2].get_marker()
    assert texts(ax).count("50%") == 2


def test_functions_draw_on_the_axes_they_are_given() -> None:
    figure = Figure()
    ax = figure.add_subplot()
    assert roofline(L4, [ffn(8)], ax=ax) is ax
    frame = pd.DataFrame({"a": [1, 2, 1, 2], "b": [1, 1, 2, 2], "v": [0.0, 0.1, 0.2, 1.0], "m": [0, 0, 0, 1]})
    other = figure.add_subplot()
    assert policy_map(frame, "v", ax=other, x="a", y="b", marked="m") is other


def test_policy_map_puts_values_and_dots_in_their_fields() -> None:
    frame = pd.DataFrame({"a": [1, 2, 1], "b": [5, 5, 6], "v": [0.0, 0.25, 1.0], "m": [False, True, False]})
    ax = policy_map(frame, "v", x="a", y="b", marked="m")
    mesh = ax.collections[0]
    values = np.ma.filled(mesh.get_array().astype(float), np.nan)
    np.testing.assert_array_equal(values, [[0.0, 0.25], [1.0, np.nan]])  # nothing fits at (2, 6)
    assert mesh.get_clim() == (0.0, 1.0)
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), [[2, 5]])


def test_the_paper_s_ffn_count_reads_all_experts_and_each_token_once() -> None:
    h1, h2, n_e, k, b = 4096, 14336, 8, 2, 32
    op = expert_ffn(MIXTRAL, b, count="paper")
    assert op.flops == 6 * b * h1 * h2 * k
    assert op.bytes == 2 * b * h1 + 2 * b * h2 + 6 * h1 * h2 * n_e
