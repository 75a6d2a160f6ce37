"""Experts that come to the device on a miss: tokens do not change, and misses are those of the trace's replay."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from executor.checkpoint import Checkpoint
from executor.expert_cache import DeviceExperts
from executor.families import Routed
from executor.families.common import CommonLayer
from executor.generate import generate
from executor.memory import DeviceMemory
from executor.recording import RouteRecorder
from hrm import Hardware, Policy
from hrm.errors import DoesNotFit, HrmError, InvalidValue
from hrm.memory import batch_footprint
from hrm.pipeline import PIECES_IN_FLIGHT, BatchShape
from simulator import simulate
from simulator.experts.cache import CACHE_POLICIES, ExpertCache
from simulator.experts.synthesis import draw_choices
from simulator.experts.trace import RoutingTrace
from simulator.task import Op
from tests.executor.conftest import Prompts

ONLINE = [name for name, policy in CACHE_POLICIES.items() if not policy.looks_ahead]


def some_prompts(checkpoint: Checkpoint, count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    size = checkpoint.model.vocab_size
    return [[rng.randrange(size) for _ in range(rng.randint(1, 20))] for _ in range(count)]


@settings(max_examples=12, deadline=None)
@given(
    slots=st.integers(1, 10), name=st.sampled_from(ONLINE), size=st.integers(1, 5), micro=st.integers(1, 5),
    on_gpu=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_tokens_do_not_depend_on_the_cache(
    tiny: Checkpoint, reference: Callable[[Prompts, int], list[list[int]]],
    slots: int, name: str, size: int, micro: int, on_gpu: bool, seed: int,
) -> None:  # fmt: skip
    """Any number of slots, any policy, any batch: transformers' tokens."""
    prompts = some_prompts(tiny, 5, seed)
    policy = Policy(
        batch_size=size, micro_batch_size=min(micro, size), attention_on_gpu=on_gpu,
        kv_on_gpu=float(on_gpu and seed % 2), expert_slots=slots,
    )  # fmt: skip
    result = generate(tiny, prompts, gen_len=5, policy=policy, device="cpu", link_bandwidth=None, cache_policy=name)
    assert result.outputs == reference(prompts, 5)


def replayed_misses(trace: RoutingTrace, policy: str, slots: int) -> int:
    misses = 0
    for layer in range(trace.num_layers):
        cache = ExpertCache(policy, slots, trace.num_experts)
        misses += sum(not access.hit for active in trace.active(layer=layer) for access in cache.batch(active.tolist()))
    return misses


@pytest.mark.parametrize("name", ONLINE)
def test_misses_are_those_of_the_recorded_trace(tiny: Checkpoint, name: str) -> None:
    """What the executor misses is what a replay of the trace it recorded misses."""
    recorder = RouteRecorder(tiny.local)
    prompts = [prompt[:4] for prompt in some_prompts(tiny, 3)]
    policy = Policy(batch_size=3, micro_batch_size=3, expert_slots=3)
    result = generate(
        tiny, prompts, gen_len=12, policy=policy, device="cpu", link_bandwidth=None, cache_policy=name,
        recorder=recorder,
    )  # fmt: skip
    trace = recorder.trace()
    assert result.expert_cache is not None
    assert result.expert_cache["misses"] == replayed_misses(trace, name, 3)
    active = sum(len(batch) for layer in range(trace.num_layers) for batch in trace.active(layer=layer))
    assert result.expert_cache["accesses"] == active
    assert result.expert_cache["hits"] + result.expert_cache["misses"] == active
    ffn = tiny.model.main_layer.ffn
    assert result.expert_cache["bytes"] == result.expert_cache["misses"] * ffn.expert_parameters * 4


@pytest.mark.parametrize("name", ONLINE)
@pytest.mark.parametrize(("micro", "slots", "skew"), [(1, 4, 0.0), (3, 3, 0.0), (2, 3, 1.0)])
def test_predicted_misses_are_those_of_a_run(
    tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch, name: str, micro: int, slots: int, skew: float
) -> None:
    """Where tokens choose independently, the simulator's bytes of decode are those that the executor counts."""
    count, top_k = tiny.model.num_experts, tiny.model.top_k
    shares = 1 / np.arange(1, count + 1) ** skew
    shares *= top_k / shares.sum()
    numbers = np.random.default_rng(5)

    def route(self: CommonLayer, hidden: torch.Tensor) -> Routed:
        index = torch.from_numpy(draw_choices(shares, top_k, len(hidden), numbers)).long()
        return Routed(self.module.post_attention_layernorm(hidden), index, torch.full(index.shape, 1 / top_k))

    monkeypatch.setattr(CommonLayer, "route", route)
    policy = Policy(batch_size=6, micro_batch_size=micro, expert_slots=slots)
    prompts = [[1 + i] * 8 for i in range(6)]
    result = generate(tiny, prompts, gen_len=60, policy=policy, device="cpu", link_bandwidth=None, cache_policy=name)
    assert result.expert_cache is not None
    model = tiny.model.with_routing(shares.tolist()) if skew else tiny.model
    rates, shape = Hardware.from_catalog("gcp-l4-1x").rates(), BatchShape.uniform(6, micro, 8, 60)
    played = simulate(model, rates, policy, shape, cache_policy=name, exact=True, keep_timeline=True).timeline
    predicted = float(played.bytes[played.schedule.mask(Op.LOAD_E)].sum())
    assert predicted == pytest.approx(result.expert_cache["bytes"], rel=0.06)


@settings(max_examples=60, deadline=None)
@given(slots=st.integers(1, 9), name=st.sampled_from(ONLINE), seed=st.integers(0, 10**6), eager=st.floats(0, 1))
def test_no_slot_is_filled_while_it_is_read(tiny: Checkpoint, slots: int, name: str, seed: int, eager: float) -> None:
    """In whatever order two lanes come to their pieces, as far as they wait, all find their experts' weights."""
    model, numbers = tiny.model, random.Random(seed)
    ffn, each = model.layers[0].ffn, torch.arange(1.0, 1 + model.layers[0].ffn.num_experts)
    host = [(each + 20 * layer).repeat_interleave(ffn.expert_parameters) for layer in range(model.num_layers)]
    memory = DeviceMemory(2**40, torch.device("cpu"))
    cache = DeviceExperts(model, memory, torch.float32, slots=slots, policy=name, host=host)
    visits = [(step, layer, 0) for step in range(8) for layer in range(model.num_layers)]
    tokens = [numbers.choice([1, 1, 3]) for _ in visits]
    choices = [
        torch.tensor([numbers.sample(range(ffn.num_experts), ffn.top_k) for _ in range(count)]) for count in tokens
    ]
    totals = [torch.zeros(count, model.hidden_size) for count in tokens]
    count, pieces = len(visits) * cache.num_pieces, cache.num_pieces
    loaded = computed = 0
    computing = False

    def may_load() -> bool:
        visit, piece = divmod(loaded, pieces)
        return computed > loaded - PIECES_IN_FLIGHT or (piece > 0 and cache.nothing_comes(*visits[visit], piece))

    def may_compute() -> bool:
        visit, piece = divmod(computed, pieces)
        known = piece > 0 and loaded > visit * pieces
        return loaded > computed or (known and cache.nothing_to_compute(*visits[visit], piece))

    while computed < count:
        loads = loaded < count and may_load()
        if loads and (numbers.random() < eager or not (computing or may_compute())):
            visit, piece = divmod(loaded, pieces)
            if piece == 0:
                cache.visit(*visits[visit], choices[visit])
            cache.bring(*visits[visit], piece, lambda target, source: target.copy_(source))
            loaded += 1
        elif not computing:  # what is loaded from here on is loaded while it runs
            assert may_compute()
            computing = True
        else:
            visit, piece = divmod(computed, pieces)
            routed = torch.ones(tokens[visit], model.hidden_size), choices[visit], torch.ones(choices[visit].shape)
            cache.compute(*visits[visit], piece, routed, totals[visit], lambda x: x.chunk(2, dim=-1)[0])
            computed, computing = computed + 1, False
    for (_, layer, _), chosen, total in zip(visits, choices, totals, strict=True):
        sums = ((each[chosen] + 20 * layer) ** 2).sum(dim=1) * model.hidden_size * ffn.intermediate_size
        torch.testing.assert_close(total, sums[:, None].expand_as(total), rtol=1e-4, atol=0.0)


def test_the_timeline_carries_the_bytes_that_were_missed(tiny: Checkpoint) -> None:
    """Bytes of all LoadExperts tasks add up to what the cache says."""
    policy = Policy(batch_size=4, micro_batch_size=2, expert_slots=2)
    result = generate(tiny, some_prompts(tiny, 4), gen_len=6, policy=policy, device="cpu", link_bandwidth=None)
    timeline = result.timelines[0]
    moved = timeline.bytes[timeline.schedule.mask(Op.LOAD_E)].sum()
    assert result.expert_cache is not None and moved == result.expert_cache["bytes"]
    facts = timeline.facts["expert_cache"]
    assert facts == {key: result.expert_cache[key] for key in facts} and facts["misses"] > 0
    assert 0 <= result.expert_cache["stall_s"] <= timeline.makespan


def test_enough_slots_load_every_expert_once(tiny: Checkpoint) -> None:
    """With a slot for each expert, no expert comes twice, over all batches of a job."""
    count = tiny.model.num_experts
    policy = Policy(batch_size=2, micro_batch_size=2, expert_slots=count)
    result = generate(tiny, some_prompts(tiny, 6), gen_len=6, policy=policy, device="cpu", link_bandwidth=None)
    assert result.expert_cache is not None
    assert result.expert_cache["misses"] <= count * tiny.model.num_layers


@settings(max_examples=10, deadline=None)
@given(slots=st.integers(1, 9), size=st.integers(1, 6), parts=st.integers(1, 3), on_gpu=st.booleans())
def test_a_run_fits_its_footprint(tiny: Checkpoint, slots: int, size: int, parts: int, on_gpu: bool) -> None:
    """The footprint's bytes are enough as a budget, and nearly all of them are used."""
    micro = -(-size // parts)
    policy = Policy(batch_size=size, micro_batch_size=micro, attention_on_gpu=on_gpu, expert_slots=slots)
    prompts = [[1 + i] * 9 for i in range(size)]
    groups = tuple((9,) * min(micro, size - first) for first in range(0, size, micro))
    need = batch_footprint(tiny.model, BatchShape(groups, 4), policy)
    budget = int(np.ceil(need.gpu_bytes))
    result = generate(tiny, prompts, gen_len=4, policy=policy, device="cpu", link_bandwidth=None, device_memory=budget)
    assert 0.95 * budget <= result.peak_memory["device_bytes"] <= budget


def test_fewer_slots_are_suggested_when_memory_is_short(tiny: Checkpoint) -> None:
    """The line that says what does not fit names the slots."""
    policy = Policy(batch_size=2, micro_batch_size=2, expert_slots=8)
    with pytest.raises(DoesNotFit, match="--expert-slots"):
        generate(tiny, some_prompts(tiny, 2), gen_len=4, policy=policy, device="cpu", device_memory=100_000)


@pytest.mark.parametrize(("name", "message"), [("min", "future"), ("lfo", "Did you mean 'lfu'|unknown cache policy")])
def test_policies_that_cannot_run_are_refused(tiny: Checkpoint, name: str, message: str) -> None:
    """One line for a policy that needs the future, or that does not exist."""
    policy = Policy(batch_size=2, micro_batch_size=2, expert_slots=2)
    with pytest.raises(HrmError, match=message):
        generate(tiny, some_prompts(tiny, 2), gen_len=4, policy=policy, device="cpu", cache_policy=name)


def test_slots_exclude_other_residency() -> None:
    """Slots and a resident share contradict each other, as do slots below one."""
    with pytest.raises(InvalidValue, match="expert_slots"):
        Policy(batch_size=2, micro_batch_size=2, expert_slots=2, weights_on_gpu=0.5)
    with pytest.raises(InvalidValue, match="expert_slots"):
        Policy(batch_size=2, micro_batch_size=2, expert_slots=0)


def test_popular_experts_lie_on_the_device(tiny: Checkpoint, reference: Callable[[Prompts, int], list]) -> None:
    """With experts where their weights lie, those that a trace shows to be popular are the resident ones."""
    prompts = some_prompts(tiny, 4)
    recorder = RouteRecorder(tiny.local)
    policy = Policy(batch_size=4, micro_batch_size=2, ffn_on_gpu=False, weights_on_gpu=0.5)
    first = generate(tiny, prompts, gen_len=6, policy=policy, device="cpu", link_bandwidth=None, recorder=recorder)
    share = recorder.trace().popularity()
    again = RouteRecorder(tiny.local)
    second = generate(
        tiny, prompts, gen_len=6, policy=policy, device="cpu", link_bandwidth=None, popularity=share, recorder=again
    )
    assert first.outputs == second.outputs == reference(prompts, 6)
    assert (recorder.trace().experts == again.trace().experts).all()


def test_popularity_of_another_model_is_refused(tiny: Checkpoint) -> None:
    """One line for a histogram of other layers or experts."""
    policy = Policy(batch_size=2, micro_batch_size=2, ffn_on_gpu=False, weights_on_gpu=0.5)
    with pytest.raises(InvalidValue, match="popularity"):
        generate(tiny, some_prompts(tiny, 2), gen_len=2, policy=policy, device="cpu", popularity=np.ones((1, 3)))


def test_a_run_that_fails_leaves_an_empty_cache(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an error in mid-run the next job starts from an empty cache and is right."""
    from executor.engine import Executor
    from executor.expert_cache import DeviceExperts

    policy = Policy(batch_size=2, micro_batch_size=2, expert_slots=2)
    executor = Executor(tiny, policy, max_tokens=40, device=torch.device("cpu"), link_bandwidth=None)
    prompts = some_prompts(tiny, 2)
    whole = executor.run(prompts, [4, 4])[0]
    compute, calls = DeviceExperts.compute, []

    def failing(self: DeviceExperts, *args: object) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("stop")
        compute(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(DeviceExperts, "compute", failing)
    with pytest.raises(RuntimeError, match="stop"):
        executor.run(prompts, [4, 4])
    monkeypatch.setattr(DeviceExperts, "compute", compute)
    assert executor.run(prompts, [4, 4])[0] == whole


def test_a_trace_is_saved_with_its_batches(tiny: Checkpoint, tmp_path: Path) -> None:
    """A recorded trace has one batch per micro-batch and pass, and comes back from its file."""
    recorder = RouteRecorder(tiny.local)
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    policy = Policy(batch_size=3, micro_batch_size=2)
    generate(tiny, prompts, gen_len=3, policy=policy, device="cpu", link_bandwidth=None, recorder=recorder)
    trace = recorder.trace()
    assert trace.num_tokens == 9 + 2 * 3 and trace.top_k == tiny.model.top_k
    assert trace.batch_starts is not None and len(trace.batch_starts) == 2 + 2 * 2
    loaded = RoutingTrace.load(trace.save(tmp_path / "routes.npz"))
    assert (loaded.experts == trace.experts).all() and loaded.layers == trace.layers


def test_an_interrupted_recording_is_gone_on_with(tiny: Checkpoint, tmp_path: Path) -> None:
    """Nothing routed writes nothing; a second run's trace goes behind the first one's."""
    file = tmp_path / "routes.npz"
    RouteRecorder(tiny.local).save(file)
    assert not file.exists()
    for append in (False, True):
        recorder = RouteRecorder(tiny.local)
        policy = Policy(batch_size=1, micro_batch_size=1)
        generate(tiny, [[1, 2, 3]], gen_len=2, policy=policy, device="cpu", link_bandwidth=None, recorder=recorder)
        recorder.save(file, append=append)
    trace = RoutingTrace.load(file)
    assert trace.num_tokens == 8 and trace.starts().tolist() == [0, 3, 4, 7]


def test_popularity_and_slots_are_not_mixed(tiny: Checkpoint) -> None:
    """A cache chooses by itself what stays."""
    policy = Policy(batch_size=1, micro_batch_size=1, expert_slots=2)
    share = np.full((tiny.model.num_layers, tiny.model.num_experts), 1 / tiny.model.num_experts)
    with pytest.raises(InvalidValue, match="--popularity"):
        generate(tiny, [[1, 2]], gen_len=2, policy=policy, device="cpu", popularity=share)
