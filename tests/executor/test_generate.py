"""Tokens equal transformers' own, whatever the system and the policy; bad input is refused before anything runs."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from executor.checkpoint import Checkpoint, make_checkpoint
from executor.engine import Executor
from executor.generate import generate
from executor.jobs import batches
from executor.machine import pick_device
from executor.results import Answer
from hrm import BatchShape, Hardware, Policy
from hrm.catalog import model_config
from hrm.errors import DoesNotFit, InvalidValue
from hrm.memory import batch_footprint
from hrm.systems import SYSTEMS, check_system
from simulator.schedules import schedule_builder
from simulator.task import Op
from simulator.timeline import Timeline

Reference = Callable[..., list[list[int]]]
SMALL = Policy(batch_size=2, micro_batch_size=1)


def random_prompts(rng: random.Random, count: int, longest: int) -> list[list[int]]:
    return [[rng.randrange(256) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def cut(outputs: Sequence[list[int]], gen_lens: Sequence[int], ends: Sequence[int]) -> list[list[int]]:
    """Answers up to their length or their end token."""
    found = []
    for ids, gen_len in zip(outputs, gen_lens, strict=True):
        stops = [k + 1 for k, token in enumerate(ids) if token in ends]
        found.append(ids[: min([gen_len, *stops])])
    return found


def random_policy(rng: random.Random, system: str, batch: int) -> Policy:
    """Micro-batches (1, 2, 3, many), residency and places that the system has."""
    traits = check_system(system)
    share = rng.choice((0.0, 1.0, rng.random(), rng.random() * 0.1))
    if traits.single_batch:
        return Policy(
            batch_size=batch, micro_batch_size=batch, weights_on_gpu=share, attention_on_gpu=True, kv_on_gpu=1
        )
    on_gpu = rng.random() < 0.5 if traits.attention_on_gpu is None and system == "moe-lightning" else False
    on_gpu = on_gpu or bool(traits.attention_on_gpu)
    return Policy(
        batch_size=batch,
        micro_batch_size=max(1, batch // rng.choice((1, 2, 3, 6))),
        weights_on_gpu=share,
        attention_on_gpu=on_gpu,
        kv_on_gpu=rng.choice((0.0, 1.0, rng.random())) if on_gpu else 0.0,
    )


def random_case(seed: int) -> dict[str, Any]:
    """A queue of uneven prompts under any system: shorter or longer than a batch, even or early ends, paced or not."""
    rng = random.Random(seed)
    system = list(SYSTEMS)[seed % len(SYSTEMS)]
    policy = random_policy(rng, system, rng.randint(1, 9))
    prompts = random_prompts(rng, rng.choice((1, policy.batch_size, policy.batch_size, 14)), 20)
    if seed % 7 == 0:
        prompts = [[rng.randrange(256) for _ in range(9)] for _ in prompts]
    longest = rng.choice((1, 2, 6, 12))
    own = rng.random() < 0.5
    return {
        "prompts": prompts,
        "gen_len": [rng.randint(1, longest) if own else longest for _ in prompts],
        "policy": policy,
        "system": system,
        "eos_token_ids": range(0, 256, 20) if rng.random() < 0.5 else (),
        "link_bandwidth": rng.choice((None, 2e9)),
        "pinned_weights": None if system.startswith("flexgen") else rng.choice((None, True)),
    }


def check_case(tiny: Checkpoint, reference: Reference, seed: int, device: str) -> None:
    case = random_case(seed)
    lens = case["gen_len"]
    expected = cut(reference(case["prompts"], max(lens)), lens, case["eos_token_ids"])
    answers: list[Answer] = []
    prompts = case.pop("prompts")
    result = generate(tiny, prompts, device=device, on_answers=answers.extend, **case)
    assert result.outputs == expected
    assert {answer.index: answer.output for answer in answers} == dict(enumerate(expected))
    assert len(answers) == len(prompts), "everybody is answered once"


@pytest.mark.parametrize("seed", range(60))
def test_tokens_equal_transformers(tiny: Checkpoint, reference: Reference, seed: int) -> None:
    """Every random policy of every system gives exactly the tokens that transformers generates."""
    check_case(tiny, reference, seed, "cpu")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("seed", range(20))
def test_tokens_equal_transformers_on_cuda(tiny: Checkpoint, reference: Reference, seed: int) -> None:
    """On CUDA streams the same tokens come out."""
    check_case(tiny, reference, seed, "cuda")


_REFILLED = [
    ("moe-lightning", Policy(batch_size=6, micro_batch_size=2, weights_on_gpu=0.3)),
    ("moe-lightning", Policy(batch_size=6, micro_batch_size=2, attention_on_gpu=True, kv_on_gpu=0.5)),
    ("fastdecode", Policy(batch_size=6, micro_batch_size=3)),
    ("flexgen-c", Policy(batch_size=6, micro_batch_size=2, weights_on_gpu=0.2)),
    ("flexgen", Policy(batch_size=6, micro_batch_size=2, attention_on_gpu=True, kv_on_gpu=0.4)),
    ("deepspeed-zero", Policy(batch_size=6, micro_batch_size=6, attention_on_gpu=True, kv_on_gpu=1)),
]


@pytest.mark.parametrize(("system", "policy"), _REFILLED)
def test_freed_places_are_given_to_those_who_wait(
    tiny: Checkpoint, reference: Reference, system: str, policy: Policy
) -> None:
    """With end tokens and long answers, prompts join a batch that is already decoding, and nobody's tokens change."""
    rng = random.Random(8)
    prompts, ends = random_prompts(rng, 17, 20), range(0, 256, 12)
    lens = [rng.randint(20, 44) for _ in prompts]
    seen: list[Timeline] = []
    tokens: list[int] = []
    result = generate(
        tiny,
        prompts,
        gen_len=lens,
        policy=policy,
        system=system,
        device="cpu",
        link_bandwidth=None,
        eos_token_ids=ends,
        on_segment=lambda timeline, shape: seen.append(timeline),
        on_tokens=tokens.append,
    )
    assert result.outputs == cut(reference(prompts, max(lens)), lens, ends)
    joining = [timeline for timeline in seen if timeline.prefill_s and not (timeline.schedule.step > 0).any()]
    assert joining, "some prompts came to others that were decoding"
    assert result.batches == sum(timeline.prefill_s > 0 for timeline in seen) > math.ceil(17 / 6)
    assert result.segments == len(seen)
    assert tokens == sorted(tokens) and tokens[-1] == result.generated_tokens


def test_more_requests_than_a_batch(tiny: Checkpoint, reference: Reference) -> None:
    """A queue longer than N whose answers are equally long is answered batch by batch, in the order of the prompts."""
    prompts = random_prompts(random.Random(1), 11, 12)
    seen: list[list[int]] = []
    result = generate(
        tiny,
        prompts,
        gen_len=3,
        policy=Policy(batch_size=4, micro_batch_size=2),
        device="cpu",
        on_answers=lambda answers: seen.append(sorted(answer.index for answer in answers)),
    )
    assert result.outputs == reference(prompts, 3)
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert result.segments == result.batches == len(result.timelines) == 3


def test_outputs_end_with_the_end_token(tiny: Checkpoint, reference: Reference) -> None:
    """With end tokens given, an output stops at the first of them, inclusive."""
    prompts = random_prompts(random.Random(2), 4, 8)
    full = reference(prompts, 6)
    end = full[0][2]
    policy = Policy(batch_size=4, micro_batch_size=2)
    result = generate(tiny, prompts, gen_len=6, policy=policy, device="cpu", eos_token_ids=[end])
    assert result.outputs == cut(full, [6] * 4, [end])
    assert result.outputs[0][-1] == end and len(result.outputs[0]) <= 3


@pytest.mark.parametrize("system", SYSTEMS)
def test_timeline_is_the_schedule(tiny: Checkpoint, system: str) -> None:
    """The measured timeline has the very tasks of the schedule, in order on each lane, none overlapping."""
    prompts = random_prompts(random.Random(3), 6, 8)
    policy = random_policy(random.Random(5), system, 6)
    result = generate(tiny, prompts, gen_len=3, policy=policy, system=system, device="cpu")
    timeline = result.timelines[0]
    layers, experts = tiny.model.num_layers, tiny.model.num_experts
    assert timeline.schedule == schedule_builder(layers, policy, system=system, weight_pieces=experts)(2)
    assert timeline.source == "measured" and (timeline.end >= timeline.start).all()
    for task in timeline.schedule:
        for dep in task.deps:
            assert timeline.start[task.id] >= timeline.end[dep]
    assert result.prefill_s + result.decode_s == pytest.approx(timeline.makespan)
    assert result.utilization() == pytest.approx(timeline.utilization())
    assert timeline.schedule.mask(Op.SAMPLE).sum() == 3 * policy.num_micro_batches


_BUDGETS = [
    # Nothing rounds: all of it is used, up to the size of a row.
    *[("moe-lightning", 2, {"weights_on_gpu": share}, 0.98) for share in (0.0, 0.37, 0.5, 1.0)],
    *[("moe-lightning", 2, {"weights_on_gpu": 0.3, "kv_on_gpu": share}, 0.98) for share in (0.0, 0.5, 1.0)],
    ("moe-lightning", 2, {"weights_on_gpu": 0.0, "kv_on_gpu": 0.3}, 0.95),
    ("moe-lightning", 4, {"weights_on_gpu": 1.0, "kv_on_gpu": 0.7}, 0.95),
    *[("fastdecode", 3, {"weights_on_gpu": share}, 0.98) for share in (0.0, 0.37, 1.0)],
    *[("flexgen-c", 2, {"weights_on_gpu": share}, 0.95) for share in (0.0, 0.2, 0.9, 0.99, 1.0)],
    *[("flexgen", 2, {"weights_on_gpu": 0.2, "kv_on_gpu": share}, 0.95) for share in (0.0, 0.4, 1.0)],
    ("flexgen", 6, {"weights_on_gpu": 0.99, "kv_on_gpu": 0.4}, 0.95),
    *[("deepspeed-zero", 6, {"weights_on_gpu": share, "kv_on_gpu": 1}, 0.95) for share in (0.0, 0.5, 0.9, 1.0)],
]


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize(("system", "size", "shares", "least"), _BUDGETS)
def test_device_memory_stays_in_its_budget(
    tiny: Checkpoint, even: bool, system: str, size: int, shares: dict[str, float], least: float
) -> None:
    """What the planner says a batch needs is enough, is nearly all used, and less is refused before anything runs."""
    prompts = [[1] * n for n in ((8,) * 6 if even else (9, 9, 5, 3, 12, 1))]
    policy = Policy(batch_size=6, micro_batch_size=size, attention_on_gpu="kv_on_gpu" in shares, **shares)  # type: ignore[arg-type]
    groups = batches([len(p) for p in prompts], policy)[0]
    shape = BatchShape(tuple(tuple(len(prompts[i]) for i in group) for group in groups), 4)
    budget = math.ceil(batch_footprint(tiny.model, shape, policy, system=system).gpu_bytes)

    def run(device_memory: int) -> int:
        result = generate(
            tiny,
            prompts,
            gen_len=4,
            policy=policy,
            system=system,
            device="cpu",
            device_memory=device_memory,
            link_bandwidth=None,
        )
        return result.peak_memory["device_bytes"]

    assert least * budget <= run(budget) <= budget
    with pytest.raises(DoesNotFit, match=r"the budget is .*\. Raise --device-memory"):
        run(int(0.95 * budget))


def test_refilled_places_stay_in_the_budget(tiny: Checkpoint) -> None:
    """A queue with early ends needs no more than its largest batch, whoever comes to run together."""
    rng = random.Random(4)
    prompts, ends = random_prompts(rng, 40, 30), range(0, 256, 12)
    policy = Policy(batch_size=6, micro_batch_size=2, weights_on_gpu=0.3, attention_on_gpu=True, kv_on_gpu=0.5)
    budget = 0
    for groups in batches([len(p) for p in prompts], policy):
        shape = BatchShape(tuple(tuple(len(prompts[i]) for i in group) for group in groups), 24)
        budget = max(budget, math.ceil(batch_footprint(tiny.model, shape, policy).gpu_bytes))
    result = generate(
        tiny,
        prompts,
        gen_len=24,
        policy=policy,
        device="cpu",
        device_memory=budget,
        link_bandwidth=None,
        eos_token_ids=ends,
    )
    assert result.peak_memory["device_bytes"] <= budget and result.batches > 40 / 6


@pytest.mark.parametrize(
    "policy",
    [
        Policy(batch_size=6, micro_batch_size=2, weights_on_gpu=0.25),
        Policy(batch_size=6, micro_batch_size=2, weights_on_gpu=0.25, attention_on_gpu=True),
    ],
)
def test_host_buffers_are_what_the_model_says(tiny: Checkpoint, policy: Policy) -> None:
    """Host memory counted by the executor equals the planner's footprint for an even batch."""
    result = generate(tiny, [[1] * 8] * 6, gen_len=4, policy=policy, device="cpu")
    expected = batch_footprint(tiny.model, BatchShape.uniform(6, 2, 8, 4), policy).cpu_bytes
    assert result.peak_memory["host_bytes"] == pytest.approx(expected, rel=0.01)


def test_memory_is_given_back_between_jobs(tiny: Checkpoint, reference: Reference) -> None:
    """Jobs of one executor use the same device memory, not more with each job, and give the same answers."""
    executor = Executor(tiny, SMALL, max_tokens=12, device=pick_device("cpu"))
    before = executor.memory.used
    prompts, peaks = [[1, 2, 3], [4, 5, 6]], []
    for _ in range(3):
        outputs = executor.run(prompts, [3, 3])[0]
        assert outputs == reference(prompts, 3)
        peaks.append(executor.memory.peak)
        assert executor.memory.used == before
    assert len(set(peaks)) == 1


def test_a_refused_job_gives_its_memory_back(tiny: Checkpoint) -> None:
    """After a job that the budget refuses, the executor has what it had before."""
    room = int(batch_footprint(tiny.model, BatchShape.uniform(2, 1, 8, 2), SMALL).gpu_bytes)
    executor = Executor(tiny, SMALL, max_tokens=64, device=pick_device("cpu"), device_memory=room + 20000)
    before = executor.memory.used
    with pytest.raises(DoesNotFit):
        executor.run([[1] * 60, [2] * 60], [2, 2])
    assert executor.memory.used == before
    executor.run([[1, 2], [3]], [2, 2])


def test_a_failed_task_gives_memory_back(tiny: Checkpoint) -> None:
    """An error in the middle of a segment leaves an executor that can go on."""
    executor = Executor(tiny, SMALL, max_tokens=12, device=pick_device("cpu"))
    before = executor.memory.used

    def fail(op: Op, step: int, seconds: float) -> None:
        if op is Op.SAMPLE:
            raise KeyError("no reason")

    with pytest.raises(KeyError):
        executor.run([[1, 2], [3]], [3, 3], on_done=fail)
    assert executor.memory.used == before
    assert executor.run([[1, 2], [3]], [3, 3])[0] == generate(tiny, [[1, 2], [3]], gen_len=3, policy=SMALL).outputs


def test_a_long_queue_keeps_few_timelines(tiny: Checkpoint) -> None:
    """Sums are over all segments, so that a job's memory does not grow with its length."""
    count = 40
    seen: list[float] = []
    result = generate(
        tiny,
        [[i] for i in range(count)],
        gen_len=1,
        policy=Policy(batch_size=1, micro_batch_size=1, weights_on_gpu=1),
        device="cpu",
        on_segment=lambda timeline, shape: seen.append(timeline.makespan),
    )
    assert result.segments == len(seen) == count > len(result.timelines) > 0
    assert result.prefill_s + result.decode_s == pytest.approx(sum(seen))


@pytest.mark.parametrize("system", SYSTEMS)
def test_auto_policy_asks_the_planner(tiny: Checkpoint, reference: Reference, system: str) -> None:
    """With policy "auto" and a machine given, the policy of the planner or of the system's rule runs in the budget."""
    machine = Hardware.from_catalog("cpu-2core")
    prompts = random_prompts(random.Random(5), 9, 10)
    budget = 2_400_000
    result = generate(tiny, prompts, gen_len=3, system=system, hardware=machine, device="cpu", device_memory=budget)
    assert result.outputs == reference(prompts, 3)
    assert result.peak_memory["device_bytes"] <= budget
    assert result.policy.weights_on_gpu < 1 and result.system == system


@pytest.mark.parametrize(
    ("prompts", "gen_len", "message"),
    [
        ([], 2, "there are no prompts"),
        ([[1], []], 2, "prompt 1 is empty"),
        ([[1, 256]], 2, r"outside 0\.\.255"),
        ([[1, -1]], 2, r"outside 0\.\.255"),
        ([[1]], 0, "'gen_len' must be >= 1: 0"),
        ([[1], [2]], [3, 0], "'gen_len' must be >= 1: 0"),
        ([[1] * 511], 2, "prompt 0 has 511 tokens; with gen_len 2 it passes the 512 positions"),
        ([[1], [1] * 509], [9, 4], "prompt 1 has 509 tokens; with gen_len 4 it passes the 512 positions"),
    ],
)
def test_bad_requests_are_refused(
    tiny: Checkpoint, prompts: list[list[int]], gen_len: int | list[int], message: str
) -> None:
    """Empty, out-of-vocabulary and over-long prompts are refused in one line."""
    with pytest.raises(InvalidValue, match=message) as caught:
        generate(tiny, prompts, gen_len=gen_len, policy=Policy(batch_size=1, micro_batch_size=1), device="cpu")
    assert "\n" not in str(caught.value)


def test_a_length_per_prompt_is_one_per_prompt(tiny: Checkpoint) -> None:
    """Fewer or more lengths than prompts are an error, not a shorter job."""
    with pytest.raises(InvalidValue, match="2 prompts and 1 values of 'gen_len'"):
        generate(tiny, [[1], [2]], gen_len=[3], policy=SMALL, device="cpu")


def test_unknown_device_is_refused() -> None:
    """Only cuda and cpu are devices, and cuda only where there is one."""
    with pytest.raises(InvalidValue, match="must be 'cuda' or 'cpu'"):
        pick_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(InvalidValue, match="not available here"):
            pick_device("cuda")


def test_a_later_batch_that_does_not_fit_is_refused_at_once(tiny: Checkpoint) -> None:
    """All batches are checked before the first is run; none of them is answered."""
    prompts = [[1], [2], [1] * 60, [2] * 60]
    answered: list[object] = []
    small = int(batch_footprint(tiny.model, BatchShape.uniform(2, 1, 20, 2), SMALL).gpu_bytes)
    with pytest.raises(DoesNotFit, match="batch 2 of 2"):
        generate(tiny, prompts, gen_len=2, policy=SMALL, device="cpu", device_memory=small, on_answers=answered.extend)
    assert answered == []


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
