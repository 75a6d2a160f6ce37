"""What several test files share: schedules of many shapes, and costs with given durations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from hypothesis import strategies as st

from simulator.costs import Costs
from simulator.schedules import cgopipe, cpu_experts, flexgen, gpu_attention, zero_inference
from simulator.task import Schedule

FAMILIES = ("cgopipe", "overlapped", "gpu-attention", "cpu-experts", "flexgen", "flexgen-c", "zero-inference")
"""All schedules by the names that they carry."""


@st.composite
def shapes(draw, *, prefill: bool | None = None, stream: bool | None = None) -> dict:
    """Arguments of `cgopipe`: 1-4 layers, 1-5 micro-batches, 0-3 steps, streaming or not, prefill or not."""
    with_prefill = draw(st.booleans()) if prefill is None else prefill
    return {
        "num_layers": draw(st.integers(1, 4)),
        "num_micro_batches": draw(st.integers(1, 5)),
        "decode_steps": draw(st.integers(0 if with_prefill else 1, 3)),
        "stream_weights": draw(st.booleans()) if stream is None else stream,
        "prefill": with_prefill,
    }


def schedules(**options) -> st.SearchStrategy[Schedule]:
    """CGOPipe schedules of many shapes."""
    return shapes(**options).map(lambda shape: cgopipe(**shape))


@st.composite
def families(draw, *names: str) -> Callable[..., Schedule]:
    """Builders of every system's schedule with all their options but the steps; or of those named."""
    name = draw(st.sampled_from(names or FAMILIES))
    options: dict = {"num_layers": draw(st.integers(1, 4)), "stream_weights": draw(st.booleans())}
    if name == "zero-inference":
        return partial(zero_inference, **options)
    options["num_micro_batches"] = draw(st.integers(1, 5))
    if name in ("cgopipe", "overlapped"):
        return partial(cgopipe, paged=name == "cgopipe", **options)
    options["stream_kv"] = draw(st.booleans())
    if name == "gpu-attention":
        return partial(gpu_attention, **options)
    if name == "cpu-experts":
        del options["stream_weights"]
        places = ("attention_on_gpu", "resident", "stream_prefill")
        return partial(cpu_experts, **{place: draw(st.booleans()) for place in places}, **options)
    return partial(
        flexgen,
        attention_on_gpu=name == "flexgen",
        num_stages=draw(st.integers(1, options["num_layers"])),
        weight_pieces=draw(st.integers(1, 3)),
        **options,
    )


@st.composite
def any_schedules(draw, *names: str) -> Schedule:
    """Schedules of every system, 0-3 decode steps, with prefill or without; or of those named."""
    prefill = draw(st.booleans())
    return draw(families(*names))(decode_steps=draw(st.integers(0 if prefill else 1, 3)), prefill=prefill)


def costs(
    seconds: Sequence[float],
    demands: Mapping[str, Sequence[float]] | None = None,
    capacities: Mapping[str, float] | None = None,
) -> Costs:
    """Costs with these durations and, if given, demands on shared resources."""
    n = len(seconds)
    return Costs(
        np.asarray(seconds, dtype=float),
        np.zeros(n),
        np.zeros(n),
        {key: np.asarray(value, dtype=float) for key, value in (demands or {}).items()},
        dict(capacities or {}),
    )


def random_seconds(schedule: Schedule, seed: int) -> np.ndarray:
    """Durations that differ wildly by class, by lane and by task; some are zero."""
    rng = np.random.default_rng(seed)
    by_op = rng.choice([0.0, 0.01, 1.0, 1.0, 30.0], size=32)
    by_lane = rng.choice([0.1, 1.0, 1.0, 10.0], size=8)
    each = rng.exponential(size=len(schedule)) * rng.choice([0.0, 1.0, 1.0, 1.0], size=len(schedule))
    return each * by_op[schedule.op] * by_lane[schedule.lane]


def story(text: str) -> Schedule:
    """A schedule from its task lines alone."""
    return Schedule.from_text("schedule story layers=1 micro_batches=1 steps=1\n" + text)
