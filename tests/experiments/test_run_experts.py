"""`hrm run` with an expert cache, a gate, recorded routing and popularity."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from simulator.experts.synthesis import draw_choices
from simulator.experts.trace import RoutingTrace

pytest.importorskip("torch")

POLICY = ("--batch-size", 4, "--micro-batch-size", 2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixtral-tiny checkpoint."""
    from executor.checkpoint import make_checkpoint
    from hrm.catalog import model_config

    return make_checkpoint(model_config("mixtral-tiny"), tmp_path_factory.mktemp("checkpoint") / "tiny", seed=3)


@pytest.fixture
def run(hrm: Any, checkpoint: Path) -> Any:
    """Runs `hrm run` on four random prompts."""

    def call(*args: object, policy: Any = POLICY) -> SimpleNamespace:
        base = ("run", "--checkpoint", checkpoint, "--random-prompts", "4,6", "--gen-len", 4, "--ignore-eos")
        return hrm(*base, "--device", "cpu", "--link-bandwidth", "none", *policy, *args)

    return call


def test_a_cache_reports_hits_misses_bytes_and_stalls(run: Any, tmp_path: Path) -> None:
    """The JSON has what the cache did, the table a line, and answers are those without a cache."""
    plain, cached = tmp_path / "plain.jsonl", tmp_path / "cached.jsonl"
    assert run("--out", plain).code == 0
    done = run("--expert-slots", 2, "--cache-policy", "lru", "--out", cached, "--json")
    found = json.loads(done.out)["expert_cache"]
    assert (found["slots"], found["policy"]) == (2, "lru")
    assert found["hits"] + found["misses"] == found["accesses"] > 0
    assert found["miss_rate"] == pytest.approx(found["misses"] / found["accesses"])
    assert found["stall_s"] >= 0 and found["bytes"] > 0
    assert sorted(plain.read_text().splitlines()) == sorted(cached.read_text().splitlines())
    assert "2 slots per layer" in run("--expert-slots", 2).out


def test_routing_is_recorded_and_replayed(run: Any, hrm: Any, tmp_path: Path) -> None:
    """A recorded trace opens in `hrm experts cache`, and the replay misses what the run missed."""
    trace = tmp_path / "routes.npz"
    done = json.loads(run("--expert-slots", 3, "--record-routing", trace, "--json").out)
    assert RoutingTrace.load(trace).num_tokens == 4 * 6 + 3 * 4
    args = ("--trace", trace, "--batch", "recorded", "--slots", 3, "--policy", "inactive-first-lifo", "--json")
    rows = json.loads(hrm("experts", "cache", *args).out)["rows"]
    assert rows[0]["miss_rate"] == pytest.approx(done["expert_cache"]["miss_rate"])


def test_popularity_changes_places_and_not_answers(run: Any, tmp_path: Path) -> None:
    """With a trace, other experts stay on the device, and the answers are the same."""
    trace, one, two = tmp_path / "routes.npz", tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    split = ("--ffn-on-gpu", 0, "--weights-on-gpu", 0.5)
    assert run(*split, "--record-routing", trace, "--out", one).code == 0
    assert run(*split, "--popularity", trace, "--out", two).code == 0
    assert sorted(one.read_text().splitlines()) == sorted(two.read_text().splitlines())


def test_a_gate_reports_what_it_dropped(run: Any) -> None:
    """Static gating counts dropped choices; dynamic gating drops none."""
    static = json.loads(run("--gating", "static", "--capacity-factor", 0.1, "--json").out)["gating"]
    assert static["dropped"] > 0
    dynamic = json.loads(run("--gating", "dynamic", "--json").out)["gating"]
    assert (dynamic["dropped"], dynamic["padded"]) == (0, 0)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--cache-policy", "lru"), "--expert-slots"),
        (("--expert-slots", 0), "expert_slots"),
        (("--expert-slots", 2, "--cache-policy", "min"), "future"),
        (("--expert-slots", 2, "--cache-policy", "lruu"), "Did you mean 'lru'"),
        (("--expert-slots", 2, "--weights-on-gpu", 0.5), "expert_slots"),
        (("--expert-slots", 2, "--system", "flexgen"), "expert cache"),
        (("--expert-slots", 2, "--gating", "dynamic"), "gating"),
        (("--gating", "statik"), "Did you mean 'static'"),
        (("--gating", "static"), "capacity_factor"),
        (("--capacity-factor", 0.5), "--gating"),
        (("--record-routing", "trace.json"), ".npz"),
    ],
)
def test_bad_options_are_one_line(run: Any, args: tuple[object, ...], words: str) -> None:
    """What cannot be is refused in one line that names it."""
    done = run(*args)
    assert done.code == 2 and words in done.err and len(done.err.strip().splitlines()) == 1


def test_the_planner_of_a_run_is_told_the_cache_policy(run: Any) -> None:
    """Without a typed policy the planner may choose a cache and gets its rule; where it may not, that is one line."""
    assert run("--cache-policy", "lru", "--hardware", "cpu-2core", policy=()).code == 0
    done = run("--cache-policy", "lru", "--gating", "dynamic", policy=())
    assert done.code == 2 and "the planner looks at none" in done.err


def test_a_gate_that_does_not_fit_is_one_line(run: Any) -> None:
    """Masks and buffers are counted before the run, and the line says what to do about them."""
    done = run("--gating", "static", "--capacity-factor", 1, "--device-memory", "400KiB")
    assert done.code == 3 and "for static gating" in done.err and "--gating out" in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_a_trace_of_another_model_is_refused(run: Any, tmp_path: Path) -> None:
    """Popularity of other layers or experts is one line."""
    trace = RoutingTrace(experts=np.zeros((3, 1, 1), dtype=int), num_experts=4).save(tmp_path / "other.npz")
    done = run("--ffn-on-gpu", 0, "--popularity", trace)
    assert done.code == 2 and "popularity" in done.err


@pytest.mark.parametrize("command", ["plan", "simulate"])
def test_a_cache_is_planned_by_simulation(hrm: Any, command: str) -> None:
    """Both commands predict a policy with slots; for few requests the plan may choose one."""
    base = ("--model", "qwen3-30b-a3b", "--hardware", "gcp-l4-1x", "--workload", "64,8", "--json")
    found = json.loads(hrm(command, *base, "--batch-size", 2, "--expert-slots", 8).out)
    assert found["policy"]["expert_slots"] == 8
    if command == "plan":
        chosen = json.loads(hrm(command, *base, "--ffn-on-gpu", 1, "--max-batch-size", 2).out)
        assert chosen["policy"]["expert_slots"] > 8 and chosen["search"]["solver"] == "simulation"


_QWEN = ("--model", "qwen3-30b-a3b", "--hardware", "gcp-l4-1x", "--workload", "64,8")
_CACHE = ("--batch-size", 8, "--expert-slots", 32)


@pytest.mark.parametrize("command", ["plan", "simulate"])
def test_predictions_know_policy_and_miss_rate(hrm: Any, command: str) -> None:
    """A worse policy is slower; a miss rate that was measured takes the place of the policy's."""

    def speed(*options: object) -> float:
        found = json.loads(hrm(command, *_QWEN, *_CACHE, *options, "--json").out)
        return float(found["throughput_tok_s"] if command == "simulate" else found["predicted"]["throughput_tok_s"])

    assert speed("--cache-policy", "lru") < speed() < speed("--miss-rate", 0.05)
    assert speed("--miss-rate", 0.05) == pytest.approx(speed("--miss-rate", 0.05, "--cache-policy", "fifo"), rel=0.1)


def test_simulate_says_what_it_takes_the_cache_to_miss(hrm: Any) -> None:
    """Slots, policy and misses per active expert, as a line and in JSON; without a cache there is nothing to say."""
    found = json.loads(hrm("simulate", *_QWEN, *_CACHE, "--cache-policy", "lfu", "--json").out)["expert_cache"]
    assert (found["slots"], found["policy"]) == (32, "lfu") and 0.5 < found["miss_rate"] < 1
    assert "32 slots per layer (inactive-first-lifo)" in hrm("simulate", *_QWEN, *_CACHE).out
    assert json.loads(hrm("simulate", *_QWEN, "--batch-size", 8, "--json").out)["expert_cache"] is None


def test_popular_experts_are_simulated(hrm: Any, tmp_path: Path) -> None:
    """With a trace, a cache misses less; with experts where they lie, more of the work is the GPU's."""
    shares = 8 / (1 + np.arange(128)) / (1 / (1 + np.arange(128))).sum()
    chosen = draw_choices(shares, 8, 400, np.random.default_rng(0))
    trace = RoutingTrace(experts=chosen[:, None], num_experts=128).save(tmp_path / "routes.npz")
    for options in (_CACHE, ("--batch-size", 8, "--ffn-on-gpu", 0, "--weights-on-gpu", 0.2)):
        plain, popular = (
            json.loads(hrm("simulate", *_QWEN, *options, *more, "--json").out)["throughput_tok_s"]
            for more in ((), ("--popularity", trace))
        )
        assert popular > plain


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--cache-policy", "lru"), "--expert-slots"),
        (("--batch-size", 4, "--miss-rate", 0.3), "--expert-slots"),
        ((*_CACHE, "--miss-rate", 1.5), "--miss-rate"),
        ((*_CACHE, "--miss-rate", "nan"), "miss_rate"),
        ((*_CACHE, "--cache-policy", "lruu"), "Did you mean 'lru'"),
        ((*_CACHE, "--popularity", "nowhere.npz"), "nowhere.npz"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "simulate"])
def test_bad_cache_options_are_one_line(hrm: Any, command: str, args: tuple[object, ...], words: str) -> None:
    """Options of a cache without one, and values that make no sense."""
    done = hrm(command, *_QWEN, *args)
    assert done.code == 2 and words in done.err and len(done.err.strip().splitlines()) == 1


def test_a_search_with_a_cache_is_offered_where_there_is_one(hrm: Any) -> None:
    """The line about a missing cache names every option that makes the others valid, and those alone."""
    offers = {
        command: "or --max-batch-size N" in hrm(*command.split(), *_QWEN, "--cache-policy", "lru").err
        for command in ("plan", "simulate", "plan --ffn-on-gpu 0", "plan --objective paper", "plan --batch-size 4")
    }
    assert [command for command, offered in offers.items() if offered] == ["plan"]
    assert hrm("plan", *_QWEN, "--cache-policy", "lru", "--max-batch-size", 2, "--no-advice").code == 0


def test_a_trace_of_other_experts_is_refused_by_predictions(hrm: Any, tmp_path: Path) -> None:
    """One line for a histogram of another number of experts."""
    trace = RoutingTrace(experts=np.zeros((3, 1, 1), dtype=int), num_experts=4).save(tmp_path / "other.npz")
    done = hrm("simulate", *_QWEN, *_CACHE, "--popularity", trace)
    assert done.code == 2 and "--popularity: " in done.err and len(done.err.splitlines()) == 1
    assert "other.npz' is of 4 experts, qwen3-30b-a3b has 128" in done.err


def test_the_planner_takes_the_cache_policy(hrm: Any) -> None:
    """A search that may choose a cache predicts it with the policy and the miss rate that were given."""
    base = (*_QWEN, "--ffn-on-gpu", 1, "--max-batch-size", 2, "--json")
    speeds = [
        json.loads(hrm("plan", *base, *more).out)["predicted"]["throughput_tok_s"]
        for more in (("--miss-rate", 0.9), (), ("--miss-rate", 0.05))
    ]
    assert speeds == sorted(speeds) and speeds[0] < speeds[2]
