"""Seconds per call become the rates that give those seconds back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from executor.bench import GEMM_ROWS, HOST_ROWS, SINGLE_ROWS, Bench
from executor.contention import Crowd
from executor.measured_rates import rates_of
from hrm import MoEModel
from hrm.hardware import Curve, Rates
from hrm.operators import pre_attention

MODEL = MoEModel.from_catalog("mixtral-tiny")
CROWD = Crowd(task_s=3e-5, cores=Curve(((1.0, 1.0),)), memory_traffic=2e10, processors=None)
FLOPS = {1.0: 4e6, 4.0: 16e6}


def taken(**changes: float) -> dict[Any, float]:
    """Seconds of every call, as if timed."""
    spent: dict[Any, float] = {("gemm", rows): 1e-3 * rows for rows in GEMM_ROWS}
    spent |= {(name, size): 2e-3 for name in ("experts", "causal", "attention") for size in FLOPS}
    spent |= {("single experts", rows): 5e-3 for rows in SINGLE_ROWS}
    for name in ("dispatch", "attention call", "staging", "read", "host gemm", "transfer"):
        spent[name, 0] = changes.get(name.replace(" ", "_"), 1e-4)
    return spent


def rates(spent: dict[Any, float]) -> Rates:
    """Of a machine without a GPU."""
    bench = SimpleNamespace(
        model=MODEL, cuda=False, apart=False, dtype=torch.float32, experts=MODEL.num_experts, piece_bytes=1000,
        pool=torch.zeros(250), expert_flops=FLOPS, causal_flops=FLOPS, attention_bytes=FLOPS,
    )  # fmt: skip
    bench.tokens_for = lambda rows: Bench.tokens_for(bench, rows)  # type: ignore[arg-type]
    bench.expected_active = lambda tokens: Bench.expected_active(bench, tokens)  # type: ignore[arg-type]
    return rates_of(bench, spent, CROWD)[0]  # type: ignore[arg-type]


def test_work_over_seconds() -> None:
    """Curves are work by time, with what a call costs taken off where a task is charged for it."""
    found = rates(taken(attention_call=5e-4, dispatch=7e-4, staging=1e-6, host_gemm=0.25, transfer=2e-5))
    assert found.gpu_experts.points == tuple((size, pytest.approx(work / 2e-3)) for size, work in FLOPS.items())
    assert found.cpu_attention.points == tuple((size, pytest.approx(work / 1.5e-3)) for size, work in FLOPS.items())
    assert (found.cpu_task_s, found.gpu_attention_s, found.task_s) == (5e-4, 5e-4, 3e-5)
    assert found.gpu_launch_s * sum(op.launches for op in pre_attention(MODEL, 1)) == pytest.approx(7e-4)
    assert found.staging_bandwidth == found.h2d_bandwidth == pytest.approx(1e9)
    assert found.cpu_attention_flops == pytest.approx(2 * HOST_ROWS * MODEL.hidden_size * MODEL.q_size / 0.25)
    assert found.transfer_s == 2e-5


def test_experts_by_themselves_cost_what_they_took_longer() -> None:
    """The rest of the time over what the same experts take together, per active expert; never less than nothing."""
    spent = taken()
    found = rates(spent)
    extra = []
    for wanted in SINGLE_ROWS:
        tokens = max(1, round(wanted * MODEL.num_experts / MODEL.top_k))
        active = MODEL.num_experts * (1 - (1 - MODEL.top_k / MODEL.num_experts) ** tokens)
        flops = 6 * tokens * MODEL.top_k * MODEL.hidden_size * MODEL.intermediate_size
        extra.append((5e-3 - flops / found.gpu_experts.at(tokens * MODEL.top_k / active)) / active)
    assert found.single_expert_s == pytest.approx(sum(extra) / len(extra))
    assert rates(spent | {("single experts", rows): 0.0 for rows in SINGLE_ROWS}).single_expert_s == 0
