"""Tensor parallelism: several processes give the tokens of one, agree bit for bit, and end together."""

from __future__ import annotations

import functools
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from executor.checkpoint import Checkpoint, make_checkpoint
from executor.families import Shard
from executor.generate import generate
from executor.ranks import Member, Team, launch
from executor.sampling import Sampling
from executor.tensor_parallel import generate_on, policy_for, share_of
from hrm import Hardware, Policy
from hrm.errors import DoesNotFit, InvalidValue
from hrm.gating import Gate
from hrm.hardware import Curve
from tests.executor.family_configs import CONFIGS

_PROMPTS = [[(29 * i + 7 * j * j + 3) % 160 for j in range(n)] for i, n in enumerate((13, 5, 20, 9, 2, 11, 7))]
_GEN_LEN = 5
_MODELS: dict[str, dict[str, Any]] = {
    "mixtral": CONFIGS["mixtral"] | {"num_key_value_heads": 4},
    "deepseek_v3": CONFIGS["deepseek_v3"],
    "gpt_oss": CONFIGS["gpt_oss"] | {"num_key_value_heads": 4},
}
_SIZES: dict[str, Any] = {"batch_size": 4, "micro_batch_size": 2, "weights_on_gpu": 0.3}
_SYSTEMS = {
    "attention on the CPU": ("moe-lightning", Policy(**_SIZES)),
    "attention on the GPU": ("moe-lightning", Policy(**_SIZES, attention_on_gpu=True, kv_on_gpu=0.4)),
    "experts on the CPU": ("moe-lightning", Policy(**(_SIZES | {"weights_on_gpu": 0.5}), ffn_on_gpu=False)),
    "flexgen": ("flexgen", Policy(**_SIZES, attention_on_gpu=True)),
    "flexgen-c": ("flexgen-c", Policy(**_SIZES)),
    "fastdecode": ("fastdecode", Policy(**_SIZES)),
    "deepspeed-zero": (
        "deepspeed-zero",
        Policy(batch_size=4, micro_batch_size=4, attention_on_gpu=True, kv_on_gpu=1.0),
    ),
}
_FOUR = ("attention on the CPU", "experts on the CPU", "flexgen")
"""What four ranks run, too."""
_WARM = Sampling(temperature=0.8, top_p=0.9, seed=4)


@pytest.fixture(scope="module", params=[2, 4])
def team(request: pytest.FixtureRequest) -> Iterator[Team]:
    """Processes that serve all tests of one number of ranks."""
    with launch(request.param, device="cpu", timeout_s=60) as found:
        yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A float32 checkpoint per model."""
    base = tmp_path_factory.mktemp("ranks")

    @functools.cache
    def made(name: str) -> Path:
        return make_checkpoint(_MODELS[name], base / name, seed=5)

    return made


@pytest.fixture(scope="module")
def whole(folder: Callable[[str], Path]) -> Callable[..., list[list[int]]]:
    """What one process answers."""

    @functools.cache
    def answer(name: str, sampling: Sampling | None = None, ends: tuple[int, ...] = ()) -> list[list[int]]:
        policy = _SYSTEMS["attention on the CPU"][1]
        result = generate(
            str(folder(name)),
            _PROMPTS,
            gen_len=_GEN_LEN,
            policy=policy,
            device="cpu",
            link_bandwidth=None,
            sampling=sampling,
            eos_token_ids=ends,
        )
        return result.outputs

    return answer


@pytest.mark.parametrize("system", _SYSTEMS)
@pytest.mark.parametrize("model", _MODELS)
def test_tokens_are_those_of_one_process(
    team: Team, folder: Callable[[str], Path], whole: Callable[..., list[list[int]]], model: str, system: str
) -> None:
    """Two and four ranks give the tokens of one process, whatever computes where."""
    if team.world == 4 and system not in _FOUR:
        pytest.skip("two ranks run this one")
    name, policy = _SYSTEMS[system]
    result = generate_on(
        team, folder(model), _PROMPTS, gen_len=_GEN_LEN, policy=policy, system=name, link_bandwidth=None
    )
    assert result.outputs == whole(model)
    assert result.batches == 2


def test_sampled_tokens_and_ends(
    team: Team, folder: Callable[[str], Path], whole: Callable[..., list[list[int]]]
) -> None:
    """Drawn tokens are those of one process, and so are answers that end by themselves; callbacks run here."""
    policy = _SYSTEMS["attention on the CPU"][1]
    drawn = whole("mixtral", _WARM)
    ends = (drawn[0][2], drawn[4][1])
    answers: dict[int, list[int]] = {}
    result = generate_on(
        team,
        folder("mixtral"),
        _PROMPTS,
        gen_len=_GEN_LEN,
        policy=policy,
        link_bandwidth=None,
        sampling=_WARM,
        eos_token_ids=ends,
        on_answers=lambda done: answers.update({answer.index: answer.output for answer in done}),
    )
    assert drawn != whole("mixtral")
    assert result.outputs == whole("mixtral", _WARM, ends)
    assert sum(map(len, result.outputs)) < sum(map(len, drawn))
    assert [answers[i] for i in range(len(_PROMPTS))] == result.outputs


def _sums(member: Member) -> list[tuple[int, float]]:
    """Of several reductions, a check sum of the bits, and the error in units of rounding of the largest partial sum."""
    found = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64):
        for shape in ((1, 64), (37, 640), (2, 600_000)):
            parts = [
                (torch.randn(shape, generator=torch.Generator().manual_seed(rank)) * 8).to(dtype)
                for rank in range(member.world)
            ]
            stacked = torch.stack(parts).double()
            exact = stacked.sum(dim=0)
            # In half precision the sum is rounded once, so that its own size counts.
            scale = stacked.abs().sum(dim=0) if dtype == torch.float32 else exact.abs()
            mine = member.reduce(parts[member.rank].clone())
            error = float(((mine.double() - exact).abs() / scale.clamp(min=1)).max())
            unit = 1.0 if dtype == torch.int64 else torch.finfo(dtype).eps / 2
            found.append((zlib.crc32(mine.view(torch.uint8).numpy().tobytes()), error / unit))
    return found


def test_sums_have_the_same_bits_on_all_ranks(team: Team) -> None:
    """Sums agree bit for bit; in half precision they are rounded once."""
    answers = team.call(_sums)
    assert len(answers) == team.world
    for sums in zip(*answers, strict=True):
        assert len({bits for bits, _ in sums}) == 1
    errors = [error for _, error in answers[0]]
    assert max(errors[:3]) <= team.world - 1
    assert 0 < max(errors[3:9]) <= 1.01
    assert errors[9:] == [0.0] * 3


def _share(member: Member, path: str) -> tuple[int, set[int]]:
    return Checkpoint.open(path, shard=member.shard).local.num_parameters, os.sched_getaffinity(0)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_ranks_hold_their_share(team: Team, folder: Callable[[str], Path]) -> None:
    """A rank holds its part of heads and experts, and keeps to its share of the cores."""
    model = Checkpoint.open(folder("mixtral")).model
    outside = 2 * model.vocab_size * model.hidden_size
    shares = team.call(_share, str(folder("mixtral")))
    for parameters, _ in shares:
        assert parameters - outside <= 1.1 * (model.num_parameters - outside) / team.world
    used = set.union(*(cores for _, cores in shares))
    assert sum(len(cores) for _, cores in shares) == max(len(used), team.world)


def test_mistakes_do_not_end_a_team(
    team: Team, folder: Callable[[str], Path], whole: Callable[..., list[list[int]]], tmp_path: Path
) -> None:
    """What rank 0 refuses the others never hear of; a model that does not split is refused in one line."""
    policy = _SYSTEMS["attention on the CPU"][1]
    with pytest.raises(InvalidValue, match="prompt 0 is empty"):
        generate_on(team, folder("mixtral"), [[]], gen_len=1, policy=policy)
    with pytest.raises(InvalidValue, match="must be 0 where attention runs on the CPU"):
        generate_on(team, folder("mixtral"), [[1]], gen_len=1, policy=replace(policy, kv_on_gpu=0.5))
    olmoe = make_checkpoint(CONFIGS["olmoe"], tmp_path / "olmoe")
    with pytest.raises(InvalidValue, match="does not split over processes"):
        generate_on(team, olmoe, [[1]], gen_len=1, policy=policy)
    result = generate_on(team, folder("mixtral"), _PROMPTS[:2], gen_len=2, policy=policy)
    assert result.outputs == [output[:2] for output in whole("mixtral")[:2]]


def test_cached_experts_are_counted_over_all_ranks(
    team: Team, folder: Callable[[str], Path], whole: Callable[..., list[list[int]]]
) -> None:
    """All ranks miss the same experts and bring their parts: together the bytes of whole experts."""
    policy = Policy(batch_size=4, micro_batch_size=2, expert_slots=2)
    options: dict[str, Any] = {"gen_len": _GEN_LEN, "policy": policy, "link_bandwidth": None}
    alone = generate(str(folder("mixtral")), _PROMPTS, device="cpu", **options)
    result = generate_on(team, folder("mixtral"), _PROMPTS, **options)
    assert result.outputs == alone.outputs == whole("mixtral")
    one, cache = alone.expert_cache, result.expert_cache
    assert one is not None and cache is not None
    assert (cache["accesses"], cache["misses"]) == (one["accesses"], one["misses"])
    assert len(cache["bytes_per_rank"]) == team.world
    assert cache["bytes"] == sum(cache["bytes_per_rank"]) == one["bytes"]


def test_the_planner_is_told_what_a_run_excludes(team: Team, folder: Callable[[str], Path]) -> None:
    """Where a cache is out of the question, the ranks' planner does not choose one; with a gate it leaves room."""
    checkpoint = Checkpoint.open(folder("mixtral"), shard=team.member.shard)
    machine = Hardware.from_catalog("cpu-2core")
    gate = Gate("static", 1.0)
    policy = policy_for(team, checkpoint, [20], 2, hardware=machine, may_cache=False, gate=gate)
    assert policy.expert_slots is None


def test_planned_policies_fit(team: Team, folder: Callable[[str], Path]) -> None:
    """The planner's policy for the ranks of a machine runs within the budget of each rank, and fills it."""
    checkpoint = Checkpoint.open(folder("mixtral"), shard=team.member.shard)
    lengths, budget = [len(prompt) for prompt in _PROMPTS], 700_000
    machine = Hardware.from_catalog("cpu-2core")
    policy = policy_for(team, checkpoint, lengths, _GEN_LEN, hardware=machine, device_memory=budget)
    result = generate_on(
        team, checkpoint, _PROMPTS, gen_len=_GEN_LEN, policy=policy, device_memory=budget, link_bandwidth=None
    )
    assert 0.6 * budget < result.peak_memory["device_bytes"] <= budget


def test_all_ranks_together_must_fit(
    team: Team, folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fits for one rank is refused if it does not for all of them."""
    policy = _SYSTEMS["attention on the CPU"][1]
    result = generate_on(team, folder("mixtral"), _PROMPTS[:1], gen_len=2, policy=policy, link_bandwidth=None)
    monkeypatch.setattr("executor.placements.ram_bytes", lambda: result.peak_memory["host_bytes"])
    with pytest.raises(DoesNotFit, match=f"on each of {team.world} ranks"):
        generate_on(team, folder("mixtral"), _PROMPTS[:1], gen_len=2, policy=policy, link_bandwidth=None)


def test_a_share_of_a_machine() -> None:
    """Half of a machine without a GPU has half of everything; of two GPUs one is left."""
    machine = Hardware.from_catalog("cpu-2core")
    half = share_of(machine, 2)
    assert float(half.cpu.capacity) == float(machine.cpu.capacity) / 2
    assert half.rates().gpu_gemm.peak == machine.rates().gpu_gemm.peak / 2
    assert half.rates().h2d_bandwidth == machine.rates().h2d_bandwidth / 2
    two = Hardware.from_catalog("gcp-t4-2x")
    one = share_of(two, 2)
    assert one.num_gpus == 1 and one.gpu == two.gpu
    assert float(one.h2d.bandwidth) == float(two.h2d.bandwidth) / 2
    with pytest.raises(InvalidValue, match="has 2 GPUs, --tp 4 needs 4"):
        share_of(two, 4)


@pytest.mark.parametrize(("cores", "apart"), [(2, False), (3, False), (4, True), (None, True)])
def test_lanes_of_a_rank_with_one_core_share_it(cores: int | None, apart: bool) -> None:
    """A rank keeps cores for the GPU's lane alone where it gets two; a machine that does not say has enough."""
    machine = Hardware.from_catalog("cpu-2core")
    processors = Curve(((1.0, 1.0), (3.0, 1.8)))
    rates = replace(machine.rates(), gpu_on_own_cores=True, processors=processors)
    facts = {} if cores is None else {"cores": cores}
    found = share_of(replace(machine, facts=facts, rate_sets={"measured": rates}), 2).rates()
    assert (found.gpu_on_own_cores, found.processors) == (apart, processors if apart else None)
    assert found.cores == rates.cores


def test_shards_are_parts(folder: Callable[[str], Path]) -> None:
    """Rows of heads and of experts of all ranks, one after the other, are the tensors on disk."""
    tensors = {}
    for file in sorted(folder("mixtral").glob("*.safetensors")):
        tensors |= load_file(file)
    name = "model.layers.0.self_attn.q_proj.weight"
    found: list[torch.Tensor] = []
    for rank in range(4):
        part = Checkpoint.open(folder("mixtral"), shard=Shard(rank, 4))
        part.read_dense(0, lambda key, t: found.append(t.clone()) if key == name else None)
    assert torch.equal(torch.cat(found), tensors[name])
