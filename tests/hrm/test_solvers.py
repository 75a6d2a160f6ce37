"""The two solvers of the planner's problem: against each other and against exhaustive scans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm import Hardware, MoEModel, Workload, plan
from hrm.affine import Affine
from hrm.paper import paper_problem
from hrm.problem import Problem, Room, grid_sizes, placements, throughput_problem
from hrm.solvers import solve_grid, solve_milp, solved_grid
from hrm.terms import Phase, Placement

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # pulp announces its next version

MODELS = {
    name: MoEModel.from_catalog(name)
    for name in ("mixtral-8x7b", "mixtral-demo", "deepseek-v2-lite", "gpt-oss-20b", "olmoe-1b-7b", "opt-6.7b")
}
MODELS |= {"encoded": MoEModel.from_catalog("nllb-moe-54b"), "shallow": MODELS["mixtral-8x7b"].with_layers(1)}
MACHINES = {
    name: Hardware.from_catalog(name)
    for name in ("gcp-l4-1x", "gcp-t4-1x", "gcp-t4-4x", "a100-40g-1x", "h100-sxm-1x", "v100-node-8x")
}
SMALL, COUNTS = np.array([1.0, 3.0, 16.0, 60.0, 200.0]), np.array([1.0, 2.0, 5.0, 20.0])


def random_instance(seed: int) -> list[Problem]:
    """All placements of a random model on a random machine, scaled so that memory and link may bind."""
    draw = np.random.default_rng(seed)
    model = MODELS[str(draw.choice(sorted(MODELS)))]
    factors = {
        key: float(2.0 ** draw.uniform(-2, 2))
        for key in ("gpu_memory", "cpu_memory", "gpu_speed", "gpu_bandwidth", "cpu_speed", "cpu_bandwidth", "link")
    }
    machine = MACHINES[str(draw.choice(sorted(MACHINES)))].scaled(**factors)
    workload = Workload.uniform(int(draw.integers(1, 600)), int(draw.integers(1, 200)))
    efficiency = str(draw.choice([*machine.rate_sets, "spec"]))
    grids = {"micro_batch": SMALL, "micro_batches": COUNTS}
    rates = machine.rates(efficiency)
    return [throughput_problem(model, machine, rates, workload, place, **grids) for place in placements()]


def random_paper_instance(seed: int) -> list[Problem]:
    """The authors' problem of a random machine and workload."""
    draw = np.random.default_rng(seed)
    name = str(draw.choice(["gcp-l4-1x", "gcp-t4-1x"]))
    machine = MACHINES[name].scaled(
        gpu_memory=float(draw.uniform(0.8, 4)),
        link=float(draw.uniform(0.3, 4)),
        cpu_bandwidth=float(draw.uniform(0.5, 3)),
    )
    workload = Workload.uniform(int(draw.integers(10, 1000)), int(draw.integers(2, 200)))
    grids = {"micro_batch": SMALL, "micro_batches": COUNTS}
    return [paper_problem(MODELS["mixtral-8x7b"], machine, machine.rates("paper"), workload, **grids)]


def check_agreement(problems: Sequence[Problem]) -> bool:
    """Both solvers find nothing, or optima within a thousandth of which each is what its own shares give."""
    grid, milp = solve_grid(problems), solve_milp(problems)
    assert (grid is None) == (milp is None)
    if grid is None or milp is None:
        return False
    assert milp.seconds_per_token == pytest.approx(grid.seconds_per_token, rel=1e-3)
    for found in (grid, milp):
        problem = found.problem
        at = (
            int(np.flatnonzero(problem.micro_batch[:, 0] == found.micro_batch_size)[0]),
            int(np.flatnonzero(problem.micro_batches[0] == found.num_micro_batches)[0]),
        )
        shares = (found.weights_on_gpu, found.kv_on_gpu)
        value = np.broadcast_to(problem.seconds_per_token(*shares), problem.shape)[at]
        assert found.seconds_per_token == pytest.approx(float(value), rel=1e-6)
        assert all(0 <= share <= 1 for share in shares)
        for room in problem.rooms:
            assert np.broadcast_to(room.need.at(*shares), problem.shape)[at] <= room.room * (1 + 1e-6)
    return True


@pytest.mark.parametrize("seed", range(26))
def test_the_solvers_agree_on_runs(seed: int) -> None:
    """Grid and mixed-integer programming agree on a random model, machine and workload, over all placements."""
    check_agreement(random_instance(seed))


@pytest.mark.parametrize("seed", range(8))
def test_the_solvers_agree_on_the_authors_problem(seed: int) -> None:
    """Grid and mixed-integer programming agree on the authors' objective."""
    check_agreement(random_paper_instance(seed))


def test_most_random_instances_can_be_solved() -> None:
    """The instances above are worth comparing: most have an answer, of several placements."""
    solved = [solve_grid(random_instance(seed)) for seed in range(26)]
    found = [x.problem.place for x in solved if x is not None]
    assert len(found) >= 18
    assert len(set(found)) >= 4
    assert sum(solve_grid(random_paper_instance(seed)) is not None for seed in range(8)) >= 6


@pytest.mark.parametrize(
    ("model", "machine"), [("mixtral-8x7b", "gcp-l4-1x"), ("mixtral-8x7b", "gcp-t4-4x"), ("olmoe-1b-7b", "gcp-t4-1x")]
)
def test_plans_of_both_solvers_agree(model: str, machine: str) -> None:
    """The planner's answer does not depend on the solver."""
    question = (MODELS[model], MACHINES[machine], Workload.parse("77,32"))
    grid, milp = (plan(*question, solver=solver, resolution="coarse", max_batch_size=40) for solver in ("grid", "milp"))
    assert milp.estimate.throughput == pytest.approx(grid.estimate.throughput, rel=2e-3)
    assert milp.solver == "milp"


# -- shares --------------------------------------------------------------------------------------------

SCAN = np.unique(np.concatenate([np.linspace(0, 1, 33), [1e-4, 1 - 1e-6]]))


def scan(problem: Problem) -> np.ndarray:
    """Least seconds per token of every size over a dense grid of shares that fit."""
    best = np.full(problem.shape, np.inf)
    ws = SCAN if problem.fixed_weights is None else [problem.fixed_weights]
    cs = SCAN if problem.fixed_kv is None else [problem.fixed_kv]
    for w in ws:
        for c in cs:
            fits = np.broadcast_to(problem.allowed, problem.shape).copy()
            for room in problem.rooms:
                fits &= room.need.at(w, c) <= room.room
            if fits.any():
                seconds = np.broadcast_to(problem.seconds_per_token(w, c), problem.shape)
                best = np.minimum(best, np.where(fits, seconds, np.inf))
    return best


def best_over_kinds(problems: Sequence[Problem]) -> np.ndarray:
    """Least seconds per token of every size over problems that differ in what streams."""
    return np.minimum.reduce([solved_grid(problem).seconds_per_token for problem in problems])


@pytest.mark.parametrize("seed", range(100, 105))
@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("ffn", [False, True])
def test_closed_form_shares_beat_every_scanned_point(seed: int, attention: bool, ffn: bool) -> None:
    """At every size, no shares of a dense scan that fit are faster than those in closed form."""
    group = [
        problem
        for problem in random_instance(seed)
        if (problem.place.attention_on_gpu, problem.place.ffn_on_gpu) == (attention, ffn)
    ]
    scanned, solved = np.minimum.reduce([scan(problem) for problem in group]), best_over_kinds(group)
    assert (solved <= scanned * (1 + 1e-9)).all()


@pytest.mark.parametrize("seed", range(100, 112))
def test_shares_in_closed_form_fit(seed: int) -> None:
    """Every size that the grid calls feasible has shares in [0, 1] that both memories hold, of its own seconds."""
    for problem in random_instance(seed):
        solved = solved_grid(problem)
        feasible = np.isfinite(solved.seconds_per_token)
        w, c = solved.weights_on_gpu, solved.kv_on_gpu
        assert ((w >= 0) & (w <= 1) & (c >= 0) & (c <= 1)).all()
        if problem.fixed_weights is not None:
            assert (w[feasible] == problem.fixed_weights).all()
        if problem.fixed_kv is not None:
            assert (c[feasible] == problem.fixed_kv).all()
        for room in problem.rooms:
            need = np.broadcast_to(room.need.at(w, c), problem.shape)
            assert (need[feasible] <= room.room * (1 + 1e-9)).all()
        seconds = np.broadcast_to(problem.seconds_per_token(w, c), problem.shape)
        assert np.allclose(seconds[feasible], solved.seconds_per_token[feasible], rtol=1e-9)


coefficients = st.integers(-500, 500).map(lambda x: x / 100)


@st.composite
def made_up_problems(draw) -> Problem:
    """One size, experts on the CPU, several random terms: convex in r_w, with room for any share."""
    terms = {}
    for number in range(draw(st.integers(1, 6))):
        slope = draw(coefficients)
        terms[str(number)] = Affine(draw(st.floats(0.1, 5)) + max(0.0, -slope), slope)
    phase = Phase(((draw(st.integers(1, 5)), terms),), floor=Affine(draw(st.floats(0.1, 3))))
    size, need = np.array([[2.0]]), Affine(1.0, draw(st.integers(0, 50)) / 10)
    return Problem(
        place=Placement(ffn_on_gpu=False), micro_batch=size, micro_batches=size, allowed=np.array([[True]]), tokens=4.0,
        phases=((1.0, phase), (draw(st.floats(0, 4)), phase)), rooms=(Room(need, 4.0), Room(Affine(1.0, -0.5), 0.9)),
    )  # fmt: skip


@given(made_up_problems())
@settings(deadline=None, max_examples=80)
def test_the_split_of_experts_is_the_minimum_of_a_convex_function(problem: Problem) -> None:
    """For any terms, the split in closed form is no slower than any of a fine scan."""
    solved = solved_grid(problem)
    fine = np.linspace(0, 1, 2001)
    fits = np.ones_like(fine, dtype=bool)
    for room in problem.rooms:
        fits &= room.need.at(fine, 0.0) <= room.room
    seconds = np.broadcast_to(problem.seconds_per_token(fine, 0.0), fine.shape)[fits]
    assert np.isfinite(solved.seconds_per_token).all() == fits.any()
    if fits.any():
        assert float(solved.seconds_per_token[0, 0]) <= seconds.min() * (1 + 1e-7)


@given(made_up_problems(), made_up_problems())
@settings(deadline=None, max_examples=10)
def test_the_solvers_agree_on_made_up_terms(one: Problem, other: Problem) -> None:
    """Grid and mixed-integer programming agree on terms that no machine has."""
    check_agreement([one, other])


def test_nothing_fits() -> None:
    """Where no size fits, both solvers say so; a bound that is already reached leaves nothing either."""
    problems = random_instance(3)
    none = [replace(x, rooms=tuple(replace(room, room=1.0) for room in x.rooms)) for x in problems]
    assert solve_grid(none) is None
    assert solve_milp(none) is None
    banned = [replace(x, allowed=np.zeros(x.shape, dtype=bool)) for x in problems]
    assert solve_grid(banned) is None
    assert solve_milp(banned) is None


def test_ties_go_to_the_smaller_batch() -> None:
    """Of sizes that are equally fast, the smallest batch is taken."""
    mu, g = np.array([[1.0], [2.0], [4.0]]), np.array([[1.0, 2.0, 3.0]])
    phase = Phase(((1, {"GPU": Affine(mu * g)}),))
    problem = Problem(
        place=Placement(), micro_batch=mu, micro_batches=g, allowed=mu * g >= 2, tokens=mu * g, phases=((1.0, phase),),
        rooms=(Room(Affine(0.0, 1.0), 2.0), Room(Affine(0.0), 1.0)),
    )  # fmt: skip
    found = solve_grid([problem])
    assert found is not None
    assert (found.micro_batch_size, found.num_micro_batches) == (2, 1)


@pytest.mark.parametrize("every_to", [8, 16, 128])
def test_grid_sizes(every_to: int) -> None:
    """Sizes are whole, ascending, complete to `every_to`, and never more than 4/`every_to` apart after that."""
    for largest in (1, 5, every_to, 256, 1024):
        sizes = grid_sizes(largest, every_to=every_to)
        assert sizes[-1] == largest or (largest > every_to and sizes[-1] >= largest * (1 - 4 / every_to))
        few = min(largest, every_to)
        assert sizes[:few].tolist() == list(range(1, few + 1))
        assert (np.diff(sizes[few - 1 :]) <= np.maximum(4, 4 / every_to * sizes[few - 1 : -1])).all()
        assert (sizes == np.round(sizes)).all() and (np.diff(sizes) > 0).all()


def test_placements() -> None:
    """Each pair of places comes with everything that may or may not stream; a wish for a place is kept."""
    every = list(placements())
    assert len(every) == len(set(every)) == (2 + 1) * (1 + 2)
    assert all(x.streams_weights for x in every if not x.ffn_on_gpu)
    assert {x.attention_on_gpu for x in placements(attention_on_gpu=True)} == {True}
    assert {x.ffn_on_gpu for x in placements(ffn_on_gpu=False)} == {False}
