"""Which policies run, and which one is taken when none is given."""

from __future__ import annotations

from dataclasses import replace

import pytest

from executor.placements import check_runnable, choose_policy
from hrm import Hardware, MoEModel, Policy, Workload
from hrm.errors import DoesNotFit, InvalidValue, UnknownName
from hrm.memory import batch_footprint, check_fits
from hrm.pipeline import BatchShape
from hrm.systems import SYSTEMS, check_system

ON_GPU = {"attention_on_gpu": True}


@pytest.mark.parametrize(
    ("system", "values"),
    [
        ("moe-lightning", {}),
        ("moe-lightning", {"weights_on_gpu": 0.3}),
        ("moe-lightning", ON_GPU),
        ("moe-lightning", ON_GPU | {"kv_on_gpu": 0.5, "weights_on_gpu": 1.0}),
        ("moe-lightning", {"ffn_on_gpu": False, "weights_on_gpu": 0.5}),
        ("fastdecode", {}),
        ("flexgen", ON_GPU),
        ("flexgen", ON_GPU | {"kv_on_gpu": 0.5}),
        ("flexgen-c", {"weights_on_gpu": 0.1}),
        ("deepspeed-zero", ON_GPU | {"kv_on_gpu": 1, "micro_batch_size": 4}),
    ],
)
def test_every_system_runs_in_its_own_places(system: str, values: dict) -> None:
    """Each system with what its policy may choose."""
    check_runnable(system)
    check_runnable(system, Policy(**{"batch_size": 4, "micro_batch_size": 2} | values))


@pytest.mark.parametrize(
    ("system", "values", "words"),
    [
        ("moe-lightning", {"kv_on_gpu": 0.5}, "'kv_on_gpu' must be 0 where attention runs on the CPU"),
        ("fastdecode", ON_GPU, "use --attention-on-gpu 0"),
        ("flexgen", {}, "use --attention-on-gpu 1"),
        ("flexgen-c", ON_GPU, "use --attention-on-gpu 0"),
        ("flexgen", ON_GPU | {"ffn_on_gpu": False}, "use --ffn-on-gpu 1"),
        ("deepspeed-zero", ON_GPU | {"kv_on_gpu": 1}, "no micro-batches"),
        ("deepspeed-zero", ON_GPU | {"micro_batch_size": 4}, "'kv_on_gpu' must be 1"),
    ],
)
def test_places_that_a_system_does_not_have_are_refused(system: str, values: dict, words: str) -> None:
    """One line each, with what to type instead."""
    with pytest.raises(InvalidValue, match=words) as caught:
        check_runnable(system, Policy(**{"batch_size": 4, "micro_batch_size": 2} | values))
    assert "\n" not in str(caught.value)


def test_a_misspelt_system_is_answered_with_the_nearest() -> None:
    """An unknown name is told apart from one that cannot run."""
    with pytest.raises(UnknownName, match="Did you mean 'flexgen'"):
        check_runnable("flexgn")


@pytest.fixture(scope="module")
def machine() -> Hardware:
    """A machine without a GPU."""
    return Hardware.from_catalog("cpu-2core")


@pytest.mark.parametrize("budget", [2_600_000, 64 * 2**20])
@pytest.mark.parametrize("system", SYSTEMS)
def test_the_chosen_policy_is_the_systems_own_and_fits(machine: Hardware, system: str, budget: int) -> None:
    """It runs, needs no more than the machine has for the heaviest prompts, and is not larger than the queue."""
    model = MoEModel.from_catalog("mixtral-tiny")
    machine = machine.with_capacity(gpu_bytes=budget)
    workload = Workload.uniform(30, 8)
    policy = choose_policy(system, model, machine, workload, 50)
    check_runnable(system, policy)
    assert policy.batch_size <= 50
    on_gpu = check_system(system).attention_on_gpu
    assert on_gpu is None or policy.attention_on_gpu == on_gpu
    shape = BatchShape.uniform(policy.batch_size, policy.micro_batch_size, 30, 8)
    check_fits(batch_footprint(model, shape, policy, system=system), machine)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_machine_that_is_too_small_is_refused(machine: Hardware, system: str) -> None:
    """No policy fits less memory than the dense weights take."""
    small = machine.with_capacity(gpu_bytes=100_000)
    model = replace(MoEModel.from_catalog("mixtral-tiny"))
    with pytest.raises(DoesNotFit):
        choose_policy(system, model, small, Workload.uniform(30, 8), 50)
