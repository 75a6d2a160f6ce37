"""Weights in memory: where a layer is cut, that views reassemble it, and what travels when."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from executor.checkpoint import Checkpoint
from executor.families import family_of
from executor.kernels import ExpertWeights
from executor.memory import DeviceMemory
from executor.weight_layout import LayerWeights, Named
from executor.weights import Held, WeightStore
from hrm import MoEModel, Policy
from hrm.catalog import model_config
from hrm.layers import FeedForward
from tests.executor.family_configs import CONFIGS

_PUBLISHED = [
    "dbrx",
    "deepseek-v2-lite",
    "deepseek-v3",
    "gpt-oss-120b",
    "gpt-oss-20b",
    "mixtral-8x22b",
    "mixtral-8x7b",
    "mixtral-demo",
    "olmoe-1b-7b",
    "phi-3.5-moe",
    "qwen3-235b-a22b",
    "qwen3-30b-a3b",
]


@st.composite
def _layers(draw: st.DrawFn, *, dense: bool = True) -> tuple[FeedForward, Named]:
    """Sizes of a layer's experts, with or without biases, and of matrices that travel with them."""
    h, i = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    biases = 2 * i + h if draw(st.booleans()) else 0
    experts = draw(st.integers(1, 9))
    ffn = FeedForward(hidden_size=h, intermediate_size=i, num_experts=experts, top_k=1, expert_other_parameters=biases)
    shapes = draw(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), max_size=5 if dense else 0))
    return ffn, tuple((f"matrix {number}", shape) for number, shape in enumerate(shapes))


_SHARES = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.1, 0.25, 1 / 3, 0.5, 0.9, 1.0]))


def _size(dense: Named) -> int:
    return sum(math.prod(shape) for _, shape in dense)


@settings(max_examples=400, deadline=None)
@given(_layers(), _SHARES, st.booleans())
def test_a_cut_keeps_what_was_asked_to_a_row(sizes: tuple[FeedForward, Named], share: float, whole: bool) -> None:
    """Never more than the share; of experts less by less than a row (or a bias, or an expert), else by a matrix."""
    ffn, dense = sizes
    plan = LayerWeights.cut(ffn, dense, share, whole_experts=whole)
    total = ffn.experts_parameters + _size(dense)
    assert plan.resident + plan.streamed == total
    asked = share * total
    assert 0 <= plan.resident <= asked + 1e-6
    if share == 1:
        assert plan.streamed == 0
    lost = math.floor(asked + 1e-6) - plan.resident
    h, i, size = ffn.hidden_size, ffn.intermediate_size, ffn.expert_parameters
    if plan.resident >= ffn.experts_parameters:
        left = [math.prod(shape) for _, shape in dense]
        ends = [ffn.experts_parameters + sum(left[:n]) for n in range(len(left) + 1)]
        assert plan.resident in ends, "matrices of attention are whole"
        assert lost == 0 or lost < left[ends.index(plan.resident)]
    elif whole:
        assert plan.resident % size == 0 and lost < size
    else:
        inside = plan.resident % size
        if inside < 2 * i * h:
            assert inside % h == 0 and lost < h
        elif inside < 3 * i * h:
            assert (inside - 2 * i * h) % i == 0 and lost < i
        else:
            assert inside == 3 * i * h, "biases are not cut"
            assert lost < ffn.expert_other_parameters


@settings(max_examples=100, deadline=None)
@given(_layers(), _SHARES, _SHARES, st.booleans())
def test_a_larger_share_keeps_no_less(sizes: tuple[FeedForward, Named], one: float, two: float, whole: bool) -> None:
    """What stays grows with the share."""
    ffn, dense = sizes
    low, high = (LayerWeights.cut(ffn, dense, share, whole_experts=whole).resident for share in sorted((one, two)))
    assert low <= high


@pytest.mark.parametrize("name", _PUBLISHED)
def test_published_layers_keep_what_was_asked(name: str) -> None:
    """Of published layers 95 % of the share stay; of the few dense layers that travel with attention, all but a matrix.

    Of a whole model 98 % of the share stay, whatever travels.
    """
    config: dict[str, Any] = dict(model_config(name))
    model = MoEModel.from_config(config, name=name)
    family = family_of(model, AutoConfig.for_model(config.pop("model_type"), **config))
    for travels in (False, True):
        for percent in range(1, 101):
            kept = asked = 0.0
            for kind, count in model.layer_counts.items():
                ffn = model.kinds[kind].ffn
                shapes = family.dense_shapes(model.order.index(kind)).items()
                dense = tuple((key, shape) for key, shape in shapes if travels and len(shape) > 1)
                plan = LayerWeights.cut(ffn, dense, percent / 100)
                wanted = percent / 100 * (ffn.experts_parameters + _size(dense))
                if ffn.routed or not travels:
                    assert plan.resident >= 0.95 * wanted
                else:
                    assert plan.resident >= wanted - max(math.prod(shape) for _, shape in dense)
                kept, asked = kept + count * plan.resident, asked + count * wanted
            assert kept >= 0.98 * asked


def _joined(expert: ExpertWeights) -> torch.Tensor:
    """One expert's weights in the order in which they lie."""
    blocks = [block.reshape(-1) for block in (*expert.gate_up, *expert.down)]
    blocks += [bias for bias in (expert.gate_up_bias, expert.down_bias) if bias is not None]
    return torch.cat(blocks)


@settings(max_examples=200, deadline=None)
@given(_layers(), _SHARES, st.booleans())
@example((FeedForward(hidden_size=3, intermediate_size=2, num_experts=2), ()), 0.25, False)
def test_views_reassemble_the_layer(sizes: tuple[FeedForward, Named], share: float, whole: bool) -> None:
    """Experts, groups of experts, and matrices are views of the two parts, each weight in its place."""
    ffn, dense = sizes
    plan = LayerWeights.cut(ffn, dense, share, whole_experts=whole)
    flat = torch.arange(ffn.experts_parameters + _size(dense), dtype=torch.float64)
    resident, rest = flat[: plan.resident], flat[plan.resident :]
    rows = flat[: ffn.experts_parameters].view(ffn.num_experts, -1)
    for number, expert in enumerate(plan.experts(resident, rest)):
        assert expert is not None
        assert torch.equal(_joined(expert), rows[number])
        assert sum(block.shape[0] for block in expert.gate_up) == 2 * ffn.intermediate_size
        assert sum(block.shape[0] for block in expert.down) == ffn.hidden_size
        assert all(block.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr() for block in expert.gate_up)
    for kept, elsewhere in ((resident, None), (None, rest)):
        for number, expert in enumerate(plan.experts(kept, elsewhere)):
            start, stop = number * ffn.expert_parameters, (number + 1) * ffn.expert_parameters
            here = stop <= plan.resident if elsewhere is None else start >= plan.resident
            assert (expert is not None) == here
            assert expert is None or torch.equal(_joined(expert), rows[number])
    found = []
    for group in plan.groups(resident, rest):
        assert group.first == len(found)
        for n in range(group.count):
            found.append(
                ExpertWeights(
                    [block[n] for block in group.gate_up],
                    [block[n] for block in group.down],
                    None if group.gate_up_bias is None else group.gate_up_bias[n],
                    None if group.down_bias is None else group.down_bias[n],
                )
            )
    assert torch.equal(torch.cat([_joined(expert) for expert in found]), rows.reshape(-1))
    start = ffn.experts_parameters
    matrices = plan.matrices(resident, rest)
    assert list(matrices) == [name for name, _ in dense]
    for name, shape in dense:
        stop = start + math.prod(shape)
        assert torch.equal(matrices[name], flat[start:stop].view(shape))
        start = stop


@settings(max_examples=200, deadline=None)
@given(_layers(), _SHARES, st.integers(1, 12))
def test_pages_tile_what_travels(sizes: tuple[FeedForward, Named], share: float, pages: int) -> None:
    """Pages follow each other without gaps, differ by one element, and an expert's pages are those that carry it."""
    ffn, dense = sizes
    plan = LayerWeights.cut(ffn, dense, share)
    bounds = [plan.bounds(page, pages) for page in range(pages)]
    assert bounds[0][0] == 0 and bounds[-1][1] == plan.streamed
    assert all(before[1] == after[0] for before, after in itertools.pairwise(bounds))
    lengths = [stop - start for start, stop in bounds]
    assert max(lengths) - min(lengths) <= 1
    assert plan.longest_page(pages) == max(lengths)
    size = ffn.expert_parameters
    for expert in range(ffn.num_experts):
        carried = set(range(max(plan.resident, expert * size), (expert + 1) * size))
        for page, (start, stop) in enumerate(bounds):
            hit = bool(carried.intersection(range(plan.resident + start, plan.resident + stop)))
            if hit:
                assert page in plan.pages_of(expert, pages)
        assert bool(plan.pages_of(expert, pages)) == bool(carried)


# -- the store -----------------------------------------------------------------------------------------


def _store(path: Path, share: float, *, system: str, **policy: Any) -> tuple[Checkpoint, WeightStore]:
    checkpoint = Checkpoint.open(path)
    chosen = Policy(batch_size=2, micro_batch_size=2, weights_on_gpu=share, **policy)
    memory = DeviceMemory(1 << 40, torch.device("cpu"))
    return checkpoint, WeightStore(checkpoint, memory, chosen, system=system, positions=32)


def _arrive(store: WeightStore, layer: int, visit: int, pages: int) -> None:
    """Copy a layer's pages into the buffer of a visit, as the link's task does."""
    for page in range(pages):
        where = slice(*store.layers[layer].bounds(page, pages))
        store.slots[visit % store.SLOTS][where].copy_(store.host[layer][where])


@pytest.mark.parametrize("share", [0.0, 0.37, 0.9, 1.0])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3", "dbrx", "qwen3_moe"])
def test_a_store_holds_the_checkpoint(family_folder: Callable[[str], Path], name: str, share: float) -> None:
    """After its pages have come, a layer's experts and its travelling matrices are those on disk."""
    for system, travels in (("moe-lightning", False), ("flexgen", True)):
        on_gpu = {"attention_on_gpu": True} if travels else {}
        checkpoint, store = _store(family_folder(name), share, system=system, **on_gpu)
        for layer, kind in enumerate(checkpoint.local.layers):
            visit = 5 + layer
            _arrive(store, layer, visit, 3)
            flat = torch.empty(kind.ffn.experts_parameters)
            checkpoint.read_experts(layer, flat)
            experts = store.experts(layer, visit)
            assert torch.equal(torch.cat([_joined(expert) for expert in experts if expert]), flat)
            assert (len(store.layers[layer].dense) > 0) == travels
            matrices = store.layers[layer].matrices(store.resident[layer], store.slots[visit % store.SLOTS])
            dense: dict[str, torch.Tensor] = {}
            checkpoint.read_dense(layer, lambda key, tensor, into=dense: into.update({key: tensor.clone()}))
            assert all(torch.equal(matrices[key], dense[key]) for key in matrices)
            assert set(matrices) == {key for key, tensor in dense.items() if travels and tensor.dim() > 1}
            # The layer computes with these very views: what comes with the next visit's pages is what it sees.
            built = store.layer(layer, visit)
            assert store.layer(layer, visit + store.SLOTS) is built
            assert (store.layer(layer, visit + 1) is built) == (not travels)


def test_a_layer_sees_what_travels(family_folder: Callable[[str], Path]) -> None:
    """A travelling layer built before its pages came computes with what they brought."""
    checkpoint, store = _store(family_folder("mixtral"), 0.2, system="flexgen", attention_on_gpu=True)
    _, still = _store(family_folder("mixtral"), 0.2, system="moe-lightning")
    hidden = torch.randn(3, checkpoint.model.hidden_size, generator=torch.Generator().manual_seed(1))
    for layer in range(checkpoint.model.num_layers):
        built = store.layer(layer, 0)
        _arrive(store, layer, 0, 4)
        with torch.inference_mode():
            ours, theirs = built.route(hidden), still.layer(layer, 0).route(hidden)
            assert torch.equal(ours.index, theirs.index) and torch.equal(ours.weight, theirs.weight)
            width = built.attention.attended_size
            attended = torch.randn(2, width, generator=torch.Generator().manual_seed(2))
            assert torch.equal(built.decode_output(attended), still.layer(layer, 0).decode_output(attended))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.55, 0.8, 1.0])
@pytest.mark.parametrize("name", CONFIGS)
def test_whole_experts_make_up_the_share(family_folder: Callable[[str], Path], name: str, share: float) -> None:
    """With experts on the CPU, what rounding leaves in one layer goes to later ones, within the memory of the share.

    That memory is the share of all experts and two buffers of what a layer then streams; rounding makes the buffers
    longer.
    """
    checkpoint, store = _store(family_folder(name), share, system="moe-lightning", ffn_on_gpu=False)
    kept = asked = 0.0
    largest = max(kind.ffn.experts_parameters for kind in checkpoint.local.layers)
    widest = max(kind.ffn.expert_parameters for kind in checkpoint.local.layers)
    for kind, plan in zip(checkpoint.local.layers, store.layers, strict=True):
        kept, asked = kept + plan.resident, asked + share * kind.ffn.experts_parameters
        assert plan.resident % kind.ffn.expert_parameters == 0
        assert kept <= asked + 1e-6
        assert plan.resident // kind.ffn.expert_parameters >= math.floor(share * kind.ffn.num_experts + 1e-9)
    assert asked - kept < (1 + store.SLOTS) * widest
    buffers = sum(slot.numel() for slot in store.slots)
    assert kept + buffers <= asked + store.SLOTS * (1 - share) * largest + 1e-6
    assert store.host_bytes + sum(t.nbytes for t in store.resident) == sum(
        4 * kind.ffn.experts_parameters for kind in checkpoint.local.layers
    )
    for layer, kind in enumerate(checkpoint.local.layers):
        both = zip(store.experts(layer, Held.RESIDENT), store.experts(layer, Held.HOST), strict=True)
        flat = torch.empty(kind.ffn.experts_parameters)
        checkpoint.read_experts(layer, flat)
        found = []
        for here, there in both:
            assert (here is None) != (there is None), "each expert lies in one place"
            found.append(_joined(here or there))  # type: ignore[arg-type]
        assert torch.equal(torch.cat(found), flat)
