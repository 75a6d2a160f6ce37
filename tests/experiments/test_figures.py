"""Figures of the paper, made here: their numbers, the maps over machines, and the files they leave."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.reproduce import FIGURES
from experiments.reproduce.policy_maps import AUTHORS, WHOLE_RUN, authors_policy, fig10, policy_frame
from experiments.reproduce.result import COLUMNS, published
from experiments.reproduce.roofline_figures import attention_points, ffn_points, measured_run
from experiments.rooflines import measured_points, roofline_points
from hrm import Hardware, MoEModel, Workload, plan
from hrm.errors import InvalidConfig


@pytest.mark.parametrize(("name", "quantities"), [("fig4", 3), ("fig5", 6)])
def test_published_roofline_numbers_are_reproduced(name: str, quantities: int) -> None:
    rows = FIGURES[name]().rows
    assert len(rows) == quantities == len(published("moe_lightning_rooflines", name))
    for row in rows:
        assert tuple(row) == COLUMNS
        assert abs(row["error"]) < 1e-4, row["system"]


def test_attention_of_either_cache_stays_left_of_p1_and_on_the_cpu() -> None:
    assert [p.intensity["cpu"] for p in attention_points()] == [2.0, 8.0]
    for point in attention_points() + attention_points(count="exact"):
        assert point.intensity["cpu"] < 81.25
        assert point.bound_by.startswith("CPU")


def test_ffn_moves_from_the_cpu_over_the_link_to_the_kernel_as_the_batch_grows() -> None:
    assert [p.bound_by for p in ffn_points()] == ["CPU memory", "CPU compute", "link", "GPU memory"]
    assert {round(p.p2, 1) for p in ffn_points()} == {599.0}


def test_roofline_points_takes_the_paper_s_counts() -> None:
    mixtral, l4 = MoEModel.from_catalog("mixtral-8x7b"), Hardware.from_catalog("gcp-l4-1x")
    points = roofline_points(mixtral, l4, [1024], micro_batch=128, attention_flops="paper", ffn_bytes="paper")
    by_name = {p.name: p for p in points}
    assert by_name["expert_ffn"].intensity["cpu"] == pytest.approx(252.617, abs=1e-3)
    assert by_name["expert_ffn"].p2 == pytest.approx(599.0, abs=0.01)


def _authors_lp(link: float, scale: float, mu: int, g: int, *, gpu_attention: bool, gen_len: int) -> float:
    """Decode tokens/s of one (μ, G) by linear programming in r_w and the KV share, as the authors state it.

    In units of GB and of milliseconds: in bytes and seconds its coefficients fall below a solver's tolerance.
    """
    from scipy.optimize import linprog

    gb, s, n, l, h1, h2, h_kv, n_e, k = 2.0**30, 512, gen_len, 32, 4096, 14336, 1024, 8, 2
    w, batch = 6.0 * h1 * h2 * n_e / gb, mu * g
    w_o, kv = (4 * h1 * h1 + 4 * h1 * h_kv) * l / gb, 4 * (s + n) * h_kv * l * batch / gb
    core = (mu * (s + n) * 32 * (2 * 128 + 2), (4 * mu * h1 + 4 * mu * (s + n) * h_kv) / gb)
    ffn = g * max(6 * mu * h1 * h2 * k / 600e12, ((2 * mu * h1 + 2 * mu * h2) / gb + w) / 4000)
    on_gpu, on_cpu = g * max(core[0] / 600e12, core[1] / 4000), g * max(core[0] / 1.6e12, core[1] / 100) / scale
    floor = ffn + on_gpu if gpu_attention else max(ffn, on_cpu)
    a = int(gpu_attention)
    # Variables T, r_w, c: the share of the KV cache on the GPU.
    moved, work = 4 * (s + n / 2) * h_kv * batch / gb * a, 2.4 * s * mu * k * (h1 + 3 * h2) / gb
    rows = [
        ([-1e-3 * link, -w, -moved], -w - moved),
        ([0, w * l - 2 * w, 0], 137.6 - w_o - 4 * h1 * batch / gb - a * kv - work - 2 * w),
        ([0, w * l - 2 * w, (4 * s * h_kv * batch - 8 * s * h_kv * mu) / gb],
         137.6 - w_o - 8 * h1 * mu * s / gb - 8 * s * h_kv * mu / gb - work - 2 * w),
        ([0, -w * l - 2 * w, -kv], 160 * scale - w * l - 2 * w - kv - 2 * h1 * batch * s / gb),
    ]  # fmt: skip
    solved = linprog(
        [1, 0, 0],
        A_ub=[row for row, _ in rows],
        b_ub=[bound for _, bound in rows],
        bounds=[(1e3 * floor, None), (0, 1), (0, a)],
    )
    return 0.0 if solved.status else batch * n / (solved.x[0] * 1e-3 * (n - 1) * l)


@pytest.mark.parametrize(("link", "scale"), [(100, 1), (500, 1), (300, 7), (200, 8), (100, 9), (500, 10)])
def test_the_authors_problem_is_solved_as_linear_programming_does(link: float, scale: float) -> None:
    best = authors_policy(link, scale)
    mu, batch = best["micro_batch_size"], best["batch_size"]
    there = _authors_lp(link, scale, mu, batch // mu, gpu_attention=not best["attention_on_cpu"], gen_len=32)
    assert best["throughput_tok_s"] == pytest.approx(there, rel=1e-6)
    for gpu_attention in (False, True):
        for size, count in ((4, 8), (100, 3), (260, 1), (292, 2), (324, 1), (388, 9), (868, 5)):
            other = _authors_lp(link, scale, size, count, gpu_attention=gpu_attention, gen_len=32)
            assert other <= best["throughput_tok_s"] * (1 + 1e-9)


def test_the_authors_map_has_the_shape_that_section_6_3_describes() -> None:
    frame = policy_frame(links_gb_s=(100, 300, 500), cpu_scales=(1, 8, 10), objectives=(AUTHORS,))
    slow_cpu = frame[frame["CPU scaling ratio"] == 1]
    assert (slow_cpu["kv_on_cpu"] == 0).all()  # with no link is it worth it
    assert slow_cpu["weights_on_cpu"].is_monotonic_increasing and slow_cpu["weights_on_cpu"].iloc[-1] > 0.1
    assert frame[frame["CPU scaling ratio"] == 10]["attention_on_cpu"].all()


def test_our_map_is_the_planner_s_and_no_link_beats_cpu_memory() -> None:
    frame = policy_frame(links_gb_s=(100, 500), cpu_scales=(1, 10), objectives=(WHOLE_RUN,))
    at = frame.set_index(["link (GB/s)", "CPU scaling ratio"])
    machine = Hardware.from_catalog("a100-80g-2x").scaled(link=5, cpu_memory=10, cpu_bandwidth=10, cpu_speed=10)
    best = plan(
        MoEModel.from_catalog("mixtral-8x7b"), machine, Workload.parse("512,32"), efficiency="spec",
        resolution="coarse", ffn_on_gpu=True,
    )  # fmt: skip
    assert at.loc[(500, 10), "throughput_tok_s"] == pytest.approx(float(best.estimate.throughput))
    assert at.loc[(500, 10), "attention_on_cpu"] and not at.loc[(100, 1), "attention_on_cpu"]
    assert at.loc[(500, 1), "kv_on_cpu"] == pytest.approx(at.loc[(100, 1), "kv_on_cpu"], abs=0.05)


def test_fig10_reports_progress_and_where_attention_changes_sides() -> None:
    seen: list[tuple[int, int]] = []
    result = fig10(links_gb_s=(100, 500), cpu_scales=(1, 10), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 8) for done in range(1, 9)]
    assert len(result.frame) == 8
    assert [(row["published"], row["predicted"]) for row in result.rows] == [(10.0, 10.0)] * 2
    assert result.note


def test_measured_tasks_stay_under_their_roofs() -> None:
    machine, timeline = measured_run()
    assert float(machine.h2d.bandwidth) == pytest.approx(2e9)
    frame = measured_points(timeline, machine)
    assert {"Prefill", "PreAttn", "CPUAttn", "PostAttn"} <= set(frame["name"])
    assert ((frame["share"] > 0.01) & (frame["share"] < 1)).all()
    mine = frame.set_index(["name", "level"])
    tasks = timeline.to_frame()
    experts = tasks[tasks["op"] == "PostAttn"]
    kernel = mine.loc[("PostAttn", "gpu")]
    assert kernel["intensity"] == pytest.approx(experts["flops"].sum() / experts["bytes"].sum())
    assert kernel["flops_per_s"] == pytest.approx(experts["flops"].sum() / experts["seconds"].sum())
    streamed = tasks[(tasks["op"] == "WPinToG") & (tasks["step"] > 0)]["bytes"].sum()
    assert mine.loc[("PostAttn", "link"), "intensity"] == pytest.approx(experts["flops"].sum() / streamed)
    assert mine.loc[("CPUAttn", "cpu"), "intensity"] == pytest.approx(2.0)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="no measured run"):
        measured_run(tmp_path)


@pytest.mark.parametrize("name", ["fig4", "fig5", "measured-roofline"])
def test_figures_leave_their_numbers_and_their_picture(name: str, tmp_path: Path) -> None:
    result = FIGURES[name]()
    files = result.save(tmp_path / "new")
    assert {file.name for file in files} >= {f"{name}.csv", f"{name}.png"}
    with files[0].open() as file:
        assert len(list(csv.DictReader(file))) == len(result.frame) > 0
    assert files[1].read_bytes().startswith(b"\x89PNG")


def test_fig10_draws_a_map_of_each_share_for_each_problem(tmp_path: Path) -> None:
    result = fig10(links_gb_s=(100, 500), cpu_scales=(1, 10))
    figure = result.figure()
    maps: list[Any] = [ax for ax in figure.axes if ax.get_xlabel()]
    assert len(maps) == 4
    assert np.ma.filled(maps[1].collections[0].get_array().astype(float), np.nan).tolist() == [[0, 1], [0, 1]]
    assert len(result.save(tmp_path)) == 3
