"""The catalog: everything in it loads, by name or by path."""

from __future__ import annotations

import re

import pytest

from hrm import catalog
from hrm.errors import UnknownName

LOADERS = {"hardware": catalog.load_hardware, "models": catalog.load_model, "workloads": catalog.load_workload}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in LOADERS for name in catalog.names(kind)])
def test_every_entry_loads_under_its_name(kind: str, name: str) -> None:
    """Every entry loads and calls itself by its file's name."""
    assert LOADERS[kind](name).name == name


def test_the_contracts_names_are_there() -> None:
    """The names that the papers' main settings go by are in the catalog."""
    assert {"gcp-t4-1x", "gcp-l4-1x", "gcp-t4-2x", "gcp-t4-4x"} <= set(catalog.names("hardware"))
    assert {"mixtral-8x7b", "mixtral-8x22b", "dbrx"} <= set(catalog.names("models"))
    assert "mixtral-8x7b" in catalog.names("models")
    assert {"mtbench", "helm-synthetic-reasoning", "helm-summarization"} <= set(catalog.names("workloads"))


@pytest.mark.parametrize(("kind", "word"), [("hardware", "hardware"), ("models", "model"), ("workloads", "workload")])
def test_an_unknown_name_says_what_kind(kind: str, word: str) -> None:
    """An unknown name is refused as what it was meant to be, with all that are known."""
    with pytest.raises(UnknownName, match=f"unknown {word} 'zzzz'") as caught:
        LOADERS[kind]("zzzz")
    assert all(name in str(caught.value) for name in catalog.names(kind))


@pytest.mark.parametrize(
    ("kind", "name", "meant"),
    [
        ("hardware", "gcp-l4", "gcp-l4-1x"),
        ("hardware", "h100-sxm1x", "h100-sxm-1x"),
        ("hardware", "v100-node", "v100-node-8x"),
        ("models", "deepseek-v2lite", "deepseek-v2-lite"),
        ("models", "qwen3-235b", "qwen3-235b-a22b"),
        ("models", "gptoss-20b", "gpt-oss-20b"),
        ("models", "Mixtral-8x7B-", "mixtral-8x7b"),
        ("workloads", "mt-bench", "mtbench"),
    ],
)
def test_a_misspelt_name_suggests_the_nearest(kind: str, name: str, meant: str) -> None:
    """A name with a slip is answered with the entry that was meant."""
    with pytest.raises(UnknownName, match=f"Did you mean '{meant}'"):
        LOADERS[kind](name)


MACHINES = catalog.names("hardware")


@pytest.mark.parametrize("name", MACHINES)
def test_every_number_of_a_machine_is_sourced(name: str) -> None:
    """Every number says where it comes from, and every published measurement who measured it."""
    machine = catalog.load_hardware(name)
    for level in machine.levels:
        assert level.processor.strip()
        for number in (level.capacity, level.bandwidth, level.peak_flops):
            assert len(number.source) >= 8
            assert number.measured is None or len(number.measured_source) >= 8
    assert all(len(link.bandwidth.source) >= 8 for link in machine.links)
    assert all(len(rates.source) >= 8 for rates in machine.rate_sets.values())
    assert len(machine.title) > len(name)


@pytest.mark.parametrize("name", [name for name in MACHINES if not catalog.load_hardware(name).shared_memory])
def test_numbers_of_machines_with_gpus_are_sane(name: str) -> None:
    """GPUs hold 8 to 200 GB at 0.2 to 6 TB/s and 50 to 1500 TFLOP/s; no link is faster than 1 TB/s or its memories."""
    machine = catalog.load_hardware(name)
    gpu, cpu = machine.gpu, machine.cpu
    assert 8e9 <= float(gpu.capacity) <= 200e9
    assert 200e9 <= float(gpu.bandwidth) <= 6e12
    assert 50e12 <= float(gpu.peak_flops) <= 1.5e15
    assert 30e9 <= float(cpu.capacity) <= 4e12
    assert 20e9 <= float(cpu.bandwidth) <= 1e12
    assert 0.3e12 <= float(cpu.peak_flops) <= 20e12
    for link in machine.links:
        assert 4e9 <= float(link.bandwidth) <= 1e12
        assert float(link.bandwidth) <= machine.num_gpus * float(gpu.bandwidth)
    assert 10 <= float(gpu.peak_flops) / float(gpu.bandwidth) <= 1000  # FLOP per byte
    counted = re.search(r"-(\d)x$", name)
    assert machine.num_gpus == (int(counted[1]) if counted else 1)


@pytest.mark.parametrize("name", MACHINES)
def test_measurements_do_not_beat_the_data_sheet(name: str) -> None:
    """What somebody measured is at most 5 % above the peak that the number states, and at least a third of it."""
    machine = catalog.load_hardware(name)
    numbers = [q for level in machine.levels for q in (level.capacity, level.bandwidth, level.peak_flops)]
    for number in [*numbers, *(link.bandwidth for link in machine.links)]:
        if number.measured is not None:
            assert float(number) / 3 <= number.measured <= 1.05 * float(number)


def test_machines_of_one_kind_agree() -> None:
    """More GPUs of a kind are the same GPU, with a wider link and no less host memory."""
    for few, many in (("gcp-t4-1x", "gcp-t4-2x"), ("gcp-t4-2x", "gcp-t4-4x")):
        one, other = catalog.load_hardware(few), catalog.load_hardware(many)
        assert float(one.gpu.capacity) == float(other.gpu.capacity)
        assert float(one.gpu.bandwidth) == float(other.gpu.bandwidth)
        assert float(one.gpu.peak_flops) == float(other.gpu.peak_flops)
        assert float(one.h2d.bandwidth) <= float(other.h2d.bandwidth)
        assert float(one.cpu.capacity) <= float(other.cpu.capacity)
