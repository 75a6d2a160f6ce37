"""Expert parallelism: several processes give the output of one, and say what they sent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from executor.expert_parallel import Exchange, ExpertParallel, check_placement, experts_of
from executor.gating import ExpertLoop, Gating, GatingStats, make_gating
from executor.kernels import ExpertWeights
from executor.ranks import Member, Team, launch
from hrm.errors import InvalidValue

_E, _K, _H, _I = 8, 2, 12, 20
_SHARES = {1: (37,), 2: (21, 16), 4: (9, 0, 17, 11)}
"""Tokens of every process; all orders of ranks give the same 37."""
_MIXED = {2: (1, 0, 0, 1, 0, 1, 1, 0), 4: (3, 1, 0, 2, 1, 3, 2, 0)}
"""Placements that are not in order."""
_GATES = {
    "static": ("static", 0.25),
    "uncapped static": ("static", 1.0),
    "tutel": ("tutel", 0.25),
    "adaptive tutel": ("tutel", None),
    "dynamic": ("dynamic", None),
}

Answer = tuple[torch.Tensor, GatingStats, Exchange]


def _gate(name: str) -> Gating:
    kind, factor = _GATES[name]
    return make_gating(kind, capacity_factor=factor)


def _experts(dtype: torch.dtype) -> list[ExpertWeights]:
    g = torch.Generator().manual_seed(1)

    def noise(*size: int) -> torch.Tensor:
        return (torch.randn(*size, generator=g) * size[-1] ** -0.5).to(dtype)

    return [ExpertWeights([noise(_I, _H)], [noise(_H, _I)], noise(_I), noise(_H)) for _ in range(_E)]


def _inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(2)
    weight, index = (torch.rand(37, _E, generator=g) * 4).softmax(-1).topk(_K)
    return torch.randn(37, _H, generator=g).to(dtype), index, weight


def _layer(member: Member, name: str, dtype: torch.dtype, placement: tuple[int, ...] | None) -> Answer:
    """One process's tokens through the layer; runs on every rank."""
    where = check_placement(_E, member.world, placement)
    experts = _experts(dtype)
    mine = ExpertLoop([experts[e] for e in experts_of(member.rank, where)], torch.relu)
    layer = ExpertParallel(mine, _E, placement=placement)
    first = sum(_SHARES[member.world][: member.rank])
    share = slice(first, first + _SHARES[member.world][member.rank])
    x, index, weight = (t[share] for t in _inputs(dtype))
    return layer(x, index, weight, _gate(name))


def _badly(member: Member, num_experts: int, placement: tuple[int, ...] | None) -> str:
    """What a process says to a split that does not work."""
    try:
        ExpertParallel(lambda rows, counts: rows, num_experts, placement=placement)
    except InvalidValue as error:
        return str(error)
    return ""


@pytest.fixture(scope="module", params=[2, 4])
def team(request: pytest.FixtureRequest) -> Iterator[Team]:
    """Processes that serve all tests of one number of ranks."""
    with launch(request.param, device="cpu", timeout_s=60) as found:
        yield found


def _alone(name: str, dtype: torch.dtype) -> tuple[torch.Tensor, GatingStats]:
    """All tokens through all experts in one process."""
    return _gate(name)(*_inputs(dtype), ExpertLoop(_experts(dtype), torch.relu), _E)


@pytest.mark.parametrize("name", _GATES)
def test_one_process_is_the_gate_itself(name: str) -> None:
    """Without torch.distributed the layer is its gate with local experts, and nothing is sent."""
    layer = ExpertParallel(ExpertLoop(_experts(torch.float32), torch.relu), _E)
    out, stats, exchange = layer(*_inputs(torch.float32), _gate(name))
    expected, same = _alone(name, torch.float32)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    assert stats == same and exchange == Exchange()


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["dynamic", "adaptive tutel", "uncapped static"])
def test_output_is_that_of_one_process(team: Team, name: str, dtype: torch.dtype, mixed: bool) -> None:
    """Two and four processes, one of them without tokens, give one process's output under any placement."""
    answers: list[Answer] = team.call(_layer, name, dtype, _MIXED[team.world] if mixed else None)
    whole, _ = _alone("dynamic", dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(torch.cat([a[0] for a in answers]), whole, rtol=0, atol=tolerance)
    assert sum(a[1].choices for a in answers) == 37 * _K
    assert not any(a[1].dropped for a in answers)


@pytest.mark.parametrize("name", ["static", "tutel"])
def test_capped_gates_share_one_capacity(team: Team, name: str) -> None:
    """Every process uses the capacity of the one with most tokens, and gets what it would get alone with it."""
    answers: list[Answer] = team.call(_layer, name, torch.float32, _MIXED[team.world])
    shares = _SHARES[team.world]
    capacity = -(-max(shares) // 4)
    x, index, weight = _inputs(torch.float32)
    first = 0
    for (out, stats, _), tokens in zip(answers, shares, strict=True):
        share = slice(first, first + tokens)
        assert stats.capacity == capacity and stats.rows == _E * capacity
        if tokens:
            kind, factor = _GATES[name][0], capacity / tokens
            alone = make_gating(kind, capacity_factor=min(1.0, factor))
            run = ExpertLoop(_experts(torch.float32), torch.relu)
            expected, same = alone(x[share], index[share], weight[share], run, _E)
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
            assert stats.dropped == same.dropped
        first += tokens


@pytest.mark.parametrize("mixed", [False, True])
def test_bytes_sent_are_those_of_a_hand_count(team: Team, mixed: bool) -> None:
    """Dynamic gating sends each choice of an expert elsewhere there and back once; the others send all their slots."""
    placement = check_placement(_E, team.world, _MIXED[team.world] if mixed else None)
    given = placement if mixed else None
    dynamic = [a[2] for a in team.call(_layer, "dynamic", torch.float32, given)]
    static = [a[2] for a in team.call(_layer, "uncapped static", torch.float32, given)]
    _, index, _ = _inputs(torch.float32)
    of_token = [rank for rank, tokens in enumerate(_SHARES[team.world]) for _ in range(tokens)]
    row = _H * 4
    sent = [[0] * team.world for _ in range(team.world)]
    for source, choices in zip(of_token, index.tolist(), strict=True):
        for e in choices:
            sent[source][placement[e]] += 1
    others = team.world - 1
    for rank, exchange in enumerate(dynamic):
        out = sum(sent[rank]) - sent[rank][rank]
        back = sum(sent[r][rank] for r in range(team.world)) - sent[rank][rank]
        assert exchange == Exchange(out, out * row, back * row, others * (_E // team.world) * 8)
        assert exchange.total == out * row + back * row + exchange.bytes_sizes
    slots = others * (_E // team.world) * max(_SHARES[team.world])
    assert static == [Exchange(slots, slots * row, slots * row, 0)] * team.world
    assert sum(e.total for e in dynamic) < sum(e.total for e in static)


def test_uneven_splits_are_refused(team: Team) -> None:
    """Experts that do not divide evenly, or a placement that does not, are one clear line on every process."""
    assert set(team.call(_badly, 10 if team.world == 4 else 9, None)) == {
        f"{10 if team.world == 4 else 9} experts cannot be split evenly over {team.world} processes; use a number of "
        f"processes that divides {10 if team.world == 4 else 9}."
    }
    crowded = (0,) * 5 + (1,) * 3 if team.world == 2 else (0,) * 3 + (1,) + (2,) * 2 + (3,) * 2
    assert all(
        f"puts {crowded.count(0)} experts on process 0; each of {team.world} takes" in said
        for said in team.call(_badly, _E, crowded)
    )


@pytest.mark.parametrize(
    ("placement", "line"),
    [
        ((0, 1), r"'placement' must name a process for each of 4 experts: 2 given\."),
        ((0, 0, 1, 2), r"'placement' puts 1 experts on process 1; each of 2 takes 2\."),
        ((0, 0, 2, 2), r"'placement' puts 0 experts on process 1; each of 2 takes 2\."),
        ((0, 0, -1, 1), r"'placement' names process -1; there are 0\.\.1\."),
    ],
)
def test_bad_placements_are_refused(placement: tuple[int, ...], line: str) -> None:
    """A placement names a process for every expert, and as many experts for each."""
    with pytest.raises(InvalidValue, match=line):
        check_placement(4, 2, placement)


def test_placements_in_order_by_default() -> None:
    """Without a placement the first experts are on the first process, and so on."""
    placement: Any = check_placement(6, 3)
    assert placement == (0, 0, 1, 1, 2, 2)
    assert experts_of(1, placement) == [2, 3]
