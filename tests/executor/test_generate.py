"""Tokens equal transformers' own, whatever the policy; bad input is refused before anything runs."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from executor.checkpoint import Checkpoint, make_checkpoint
from executor.generate import Executor, generate, pick_device
from hrm import BatchShape, Hardware, Policy, micro_batches
from hrm.catalog import model_config
from hrm.errors import DoesNotFit, InvalidValue, NotBuiltYet
from hrm.memory import batch_footprint
from simulator import build_schedule

Reference = Callable[..., list[list[int]]]


def random_prompts(rng: random.Random, count: int, longest: int) -> list[list[int]]:
    return [[rng.randrange(256) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def random_case(seed: int) -> tuple[list[list[int]], int, Policy]:
    """Batch, micro-batch, number of micro-batches (1, 2, 3, many), residency, uneven prompts."""
    rng = random.Random(seed)
    micro_batches = (1, 2, 3, 6)[seed % 4]
    mu = rng.randint(1, 4)
    batch = max(mu, mu * micro_batches - rng.randrange(mu))
    share = (0.0, 1.0, rng.random(), rng.random(), rng.random() * 0.1)[seed % 5]
    even = seed % 7 == 0
    prompts = random_prompts(rng, batch, 20)
    if even:
        prompts = [[rng.randrange(256) for _ in range(9)] for _ in range(batch)]
    return prompts, rng.randint(1, 6), Policy(batch_size=batch, micro_batch_size=mu, weights_on_gpu=share)


@pytest.mark.parametrize("seed", range(48))
def test_tokens_equal_transformers(tiny: Checkpoint, reference: Reference, seed: int) -> None:
    """Every random policy gives exactly the tokens that transformers generates."""
    prompts, gen_len, policy = random_case(seed)
    pace = None if seed % 2 else 2e9
    result = generate(tiny, prompts, gen_len=gen_len, policy=policy, device="cpu", link_bandwidth=pace)
    assert result.outputs == reference(prompts, gen_len)


def test_more_requests_than_a_batch(tiny: Checkpoint, reference: Reference) -> None:
    """A queue longer than N is answered batch by batch, in the order of the prompts."""
    prompts = random_prompts(random.Random(1), 11, 12)
    seen: list[int] = []
    result = generate(
        tiny,
        prompts,
        gen_len=3,
        policy=Policy(batch_size=4, micro_batch_size=2),
        device="cpu",
        on_batch=lambda batch: seen.extend(batch.requests),
    )
    assert result.outputs == reference(prompts, 3)
    assert sorted(seen) == list(range(11)) and len(result.timelines) == 3


def test_outputs_end_with_the_end_token(tiny: Checkpoint, reference: Reference) -> None:
    """With end tokens given, an output stops at the first of them, inclusive."""
    prompts = random_prompts(random.Random(2), 4, 8)
    full = reference(prompts, 6)
    end = full[0][2]
    policy = Policy(batch_size=4, micro_batch_size=2)
    result = generate(tiny, prompts, gen_len=6, policy=policy, device="cpu", eos_token_ids=[end])
    assert result.outputs == [ids[: ids.index(end) + 1] if end in ids else ids for ids in full]


def test_timeline_is_the_schedule(tiny: Checkpoint) -> None:
    """The measured timeline has the very tasks of the schedule, in order on each lane, none overlapping."""
    prompts = random_prompts(random.Random(3), 6, 8)
    policy = Policy(batch_size=6, micro_batch_size=2, weights_on_gpu=0.3)
    timeline = generate(tiny, prompts, gen_len=3, policy=policy, device="cpu").timelines[0]
    assert timeline.schedule == build_schedule(tiny.model.num_layers, policy, gen_len=3)
    assert timeline.source == "measured" and (timeline.end >= timeline.start).all()
    for task in timeline.schedule:
        for dep in task.deps:
            assert timeline.start[task.id] >= timeline.end[dep]


@pytest.mark.parametrize("share", [0.0, 0.37, 1.0])
def test_device_memory_stays_in_its_budget(tiny: Checkpoint, share: float) -> None:
    """What the planner says a batch needs is enough, is what is used to 1 %, and one layer less is refused."""
    prompts = [[1] * n for n in (9, 9, 5, 3, 12, 1)]
    policy = Policy(batch_size=6, micro_batch_size=2, weights_on_gpu=share)
    groups, _ = micro_batches([len(p) for p in prompts], num_micro_batches=3, micro_batch_size=2)
    shape = BatchShape(tuple(tuple(len(prompts[i]) for i in group) for group in groups), 3)
    budget = int(batch_footprint(tiny.model, shape, share).gpu_bytes) + 1
    result = generate(tiny, prompts, gen_len=3, policy=policy, device="cpu", device_memory=budget)
    assert 0.98 * budget <= result.peak_memory["device_bytes"] <= budget
    with pytest.raises(DoesNotFit, match=r"the budget is .*\. Raise --device-memory"):
        generate(tiny, prompts, gen_len=3, policy=policy, device="cpu", device_memory=int(0.95 * budget))


def test_host_buffers_are_what_the_model_says(tiny: Checkpoint) -> None:
    """Host memory counted by the executor equals the planner's footprint for an even batch."""
    prompts = [[1] * 8] * 6
    policy = Policy(batch_size=6, micro_batch_size=2, weights_on_gpu=0.25)
    result = generate(tiny, prompts, gen_len=4, policy=policy, device="cpu")
    expected = batch_footprint(tiny.model, BatchShape.uniform(6, 2, 8, 4), 0.25).cpu_bytes
    assert result.peak_memory["host_bytes"] == pytest.approx(expected, rel=0.01)


def test_memory_is_given_back_between_batches(tiny: Checkpoint) -> None:
    """Batches of one executor use the same device memory, not more with each batch."""
    policy = Policy(batch_size=2, micro_batch_size=1)
    executor = Executor(tiny, policy, max_tokens=12, device=pick_device("cpu"))
    before = executor.memory.used
    peaks = []
    for _ in range(3):
        executor.run_batch([[[1, 2, 3]], [[4, 5, 6]]], 3)
        peaks.append(executor.memory.peak)
        assert executor.memory.used == before
    assert len(set(peaks)) == 1


def test_auto_policy_asks_the_planner(tiny: Checkpoint, reference: Reference) -> None:
    """With policy "auto" and a machine given, the planner's policy runs within the budget."""
    machine = Hardware.from_catalog("cpu-2core")
    prompts = random_prompts(random.Random(5), 9, 10)
    budget = 2_400_000
    result = generate(tiny, prompts, gen_len=3, hardware=machine, device="cpu", device_memory=budget)
    assert result.outputs == reference(prompts, 3)
    assert result.peak_memory["device_bytes"] <= budget
    assert result.policy.weights_on_gpu < 1


@pytest.mark.parametrize(
    ("prompts", "gen_len", "message"),
    [
        ([], 2, "there are no prompts"),
        ([[1], []], 2, "prompt 1 is empty"),
        ([[1, 256]], 2, r"outside 0\.\.255"),
        ([[1, -1]], 2, r"outside 0\.\.255"),
        ([[1]], 0, "'gen_len' must be >= 1: 0"),
        ([[1] * 511], 2, "prompt 0 has 511 tokens; with gen_len 2 it passes the 512 positions"),
    ],
)
def test_bad_requests_are_refused(tiny: Checkpoint, prompts: list[list[int]], gen_len: int, message: str) -> None:
    """Empty, out-of-vocabulary and over-long prompts are refused in one line."""
    with pytest.raises(InvalidValue, match=message) as caught:
        generate(tiny, prompts, gen_len=gen_len, policy=Policy(batch_size=1, micro_batch_size=1), device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"attention_on_gpu": True}, {"ffn_on_gpu": False}, {"kv_on_gpu": 0.5}])
def test_placements_that_are_not_built_are_refused(tiny: Checkpoint, change: dict[str, float]) -> None:
    """A placement that this version does not run is refused by name, not run as something else."""
    policy = Policy(batch_size=1, micro_batch_size=1, **change)  # type: ignore[arg-type]
    with pytest.raises(NotBuiltYet):
        generate(tiny, [[1, 2]], gen_len=2, policy=policy, device="cpu")


def test_unknown_device_is_refused() -> None:
    """Only cuda and cpu are devices, and cuda only where there is one."""
    with pytest.raises(InvalidValue, match="must be 'cuda' or 'cpu'"):
        pick_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(InvalidValue, match="not available here"):
            pick_device("cuda")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("seed", range(12))
def test_tokens_equal_transformers_on_cuda(tiny: Checkpoint, reference: Reference, seed: int) -> None:
    """On CUDA streams the same tokens come out."""
    prompts, gen_len, policy = random_case(seed)
    result = generate(tiny, prompts, gen_len=gen_len, policy=policy, device="cuda")
    assert result.outputs == reference(prompts, gen_len)


def test_a_later_batch_that_does_not_fit_is_refused_at_once(tiny: Checkpoint) -> None:
    """All batches are checked before the first is run; none of them is answered."""
    prompts = [[1], [2], [1] * 60, [2] * 60]
    policy = Policy(batch_size=2, micro_batch_size=1)
    answered: list[object] = []
    small = int(batch_footprint(tiny.model, BatchShape.uniform(2, 1, 20, 2), 0.0).gpu_bytes)
    with pytest.raises(DoesNotFit, match="batch 2 of 2"):
        generate(tiny, prompts, gen_len=2, policy=policy, device="cpu", device_memory=small, on_batch=answered.append)
    assert answered == []


def test_a_refused_batch_gives_its_memory_back(tiny: Checkpoint) -> None:
    """After a batch that the budget refuses, the executor has what it had before."""
    policy = Policy(batch_size=2, micro_batch_size=1)
    room = int(batch_footprint(tiny.model, BatchShape.uniform(2, 1, 8, 2), 0.0).gpu_bytes)
    executor = Executor(tiny, policy, max_tokens=64, device=pick_device("cpu"), device_memory=room + 20000)
    before = executor.memory.used
    with pytest.raises(DoesNotFit):
        executor.run_batch([[[1] * 60], [[2] * 60]], 2)
    assert executor.memory.used == before
    executor.run_batch([[[1, 2]], [[3]]], 2)


def test_a_machine_of_another_kind_is_refused(tiny: Checkpoint) -> None:
    """The planner is not asked with a GPU machine's file for a run on the CPU."""
    with pytest.raises(InvalidValue, match="describes a machine with a GPU"):
        generate(tiny, [[1]], gen_len=2, hardware=Hardware.from_catalog("gcp-l4-1x"), device="cpu")


def test_bfloat16_tokens_do_not_depend_on_where_weights_lie(tmp_path: Path) -> None:
    """In bfloat16, streamed and resident experts give the same tokens, uneven prompts included."""
    path = make_checkpoint(model_config("mixtral-tiny"), tmp_path / "bf16", dtype="bfloat16")
    prompts = random_prompts(random.Random(9), 6, 12)
    streamed, resident = (
        generate(str(path), prompts, gen_len=4, device="cpu", policy=policy).outputs
        for policy in (
            Policy(batch_size=6, micro_batch_size=3),
            Policy(batch_size=6, micro_batch_size=3, weights_on_gpu=1.0),
        )
    )
    assert streamed == resident and all(len(ids) == 4 for ids in streamed)
