"""The cases of `benchmarks/gpu.py`: systems, residency, places and batch sizes under one cap of device memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from executor.placements import choose_policy
from experiments.validation_cases import Case
from experiments.validation_runs import expected
from hrm import BatchShape, Hardware, MoEModel, Policy, Workload, plan
from hrm.errors import DoesNotFit, HrmError, InvalidValue
from hrm.memory import batch_footprint, kv_cache_bytes, usable_bytes
from hrm.systems import check_system
from hrm.units import format_bytes, parse_bytes

__all__ = ["Cap", "Chosen", "Limits", "case_from", "check_cap", "choose", "holds_a_request", "planning_machine"]

_SYSTEMS = ("moe-lightning", "fastdecode", "flexgen-c", "flexgen", "deepspeed-zero")
_FEWER = 8
_SHARE_STEP = 1 / 64
"""Resident shares that round to the same step are one."""
_HOST_SPARE, _HOST_MOST = 0.95, 0.93
"""Of the host memory that is free, so much goes to requests, pinned buffers taking the rest; and the most of all of
it that a run may use."""


@dataclass(frozen=True)
class Cap:
    """How much of the device's memory a run may use."""

    name: str
    bytes: int | None
    """None: all of it."""

    @classmethod
    def parse(cls, text: str) -> Cap:
        """A size ("16GiB"), or "none"."""
        if text == "none":
            return cls(text, None)
        size = parse_bytes(text)
        if size < 1:
            raise InvalidValue(f"'cap' must be at least one byte, or none: {text!r}")
        return cls(text, size)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What bounds the cases."""

    gen_len: int
    long_gen_len: int
    held: int
    """Bytes of host memory that hold the weights, whatever the policy keeps on the device."""
    most_requests: int | None = None
    longest_s: float = math.inf
    """A case that is predicted to take longer is left out."""
    all_s: float = math.inf
    """So are those at the end, when all before them take longer together."""
    overhead_s: float = 0.0
    """Seconds of a case besides its prefill and decode."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The cases of a cap, and what was left out."""

    cases: tuple[Case, ...]
    seconds: tuple[float, ...]
    """Predicted, of each."""
    left_out: dict[str, str]
    """Name: why."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"cases": [asdict(case) for case in self.cases], "seconds": self.seconds, "left_out": self.left_out}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Chosen:
        """What `to_dict` gave."""
        cases = tuple(case_from(entry) for entry in data["cases"])
        return cls(cases=cases, seconds=tuple(data["seconds"]), left_out=data["left_out"])


def check_cap(model: MoEModel, cap: Cap) -> None:
    """Refuse a cap that does not hold the smallest batch, which needs no probe to be known.

    Raises
    ------
    DoesNotFit
        With what the smallest batch needs.
    """
    need = _least_bytes(model)
    if cap.bytes is not None and need > cap.bytes:
        raise DoesNotFit(
            f"a single request of {model.name}, with its weights on the host, takes {format_bytes(need)} of device "
            "memory."
        )


def holds_a_request(model: MoEModel, cap: Cap) -> bool:
    """Whether a cap passes `check_cap`."""
    return cap.bytes is None or _least_bytes(model) <= cap.bytes


def _least_bytes(model: MoEModel) -> float:
    smallest = Policy(batch_size=1, micro_batch_size=1, attention_on_gpu=False)
    return float(batch_footprint(model, BatchShape(((1,),), 1), smallest).gpu_bytes)


def case_from(entry: dict[str, Any]) -> Case:
    """A case from plain values."""
    return Case(**{**entry, "prompt_lens": tuple(entry["prompt_lens"])})


def planning_machine(machine: Hardware, cap: Cap, link: float | None) -> Hardware:
    """The probed machine as policies for a cap are chosen for it: weights lie in page-locked memory."""
    here = machine.with_capacity(gpu_bytes=cap.bytes).with_pinned_weights()
    return here.with_link(link) if machine.shared_memory else here


def choose(model: MoEModel, machine: Hardware, cap: Cap, link: float | None, limits: Limits) -> Chosen:
    """Cases for a cap, the most telling ones first.

    Every system runs with the policy that its own rule chooses. Prompts are as long as those of MTBench; where systems
    are compared that pad, all are padded. Then the planned policy is changed: fewer requests, nothing resident, as
    much resident as fits, attention on the GPU, and a longer generation.

    Raises
    ------
    DoesNotFit
        If no policy fits the cap.
    """
    here = planning_machine(machine, cap, link)
    maker = _Maker(model, here, link if machine.shared_memory else None, limits)
    cases: list[Case] = []
    seconds: list[float] = []
    left_out: dict[str, str] = {}
    known: set[Any] = set()
    for name, make in maker.makers():
        try:
            case = make()
            maker.check_host(case)
            took = expected(case, model, here, keep_timeline=False)[0].simulated_s + limits.overhead_s
        except HrmError as error:
            if name == "planned":
                raise
            left_out[name] = str(error)
            continue
        share = round(case.weights_on_gpu / _SHARE_STEP)
        same = (case.system, replace(case.policy, weights_on_gpu=share * _SHARE_STEP), case.prompt_lens, case.gen_len)
        if same in known:
            left_out[name] = "is one of the cases above"
        elif took > limits.longest_s or sum(seconds) + took > limits.all_s:
            left_out[name] = f"would take {took:.0f} s"
        else:
            known.add(same)
            cases.append(case)
            seconds.append(took)
    return Chosen(cases=tuple(cases), seconds=tuple(seconds), left_out=left_out)


class _Maker:
    """Makes the cases of one cap."""

    def __init__(self, model: MoEModel, here: Hardware, link: float | None, limits: Limits) -> None:
        self._model, self._here, self._link, self._limits = model, here, link, limits
        base = Workload.parse("mtbench")
        self._plain = base.with_options(gen_len=limits.gen_len)
        longest = model.max_positions - limits.long_gen_len
        if base.prompt_max > longest:  # of a tiny model
            lens = tuple(min(n, longest) for n in base.prompt_lens)
            self._plain = replace(self._plain, prompt_lens=lens, prompt_max=max(lens), prompt_avg=sum(lens) / len(lens))
        self._padded = replace(
            self._plain.with_options(prompt_len=self._plain.prompt_max), prompt_lens=(self._plain.prompt_max,)
        )
        self._planned: Policy | None = None

    def makers(self) -> Iterator[tuple[str, Callable[[], Case]]]:
        """Names of cases, and what makes them or raises why it cannot."""
        own, gpu, fewer = "planner's own choice", "attention on the GPU", f"N/{_FEWER}"
        yield "planned", lambda: self._case("planned", "unpadded", "moe-lightning", self._base(), self._plain)
        for system in _SYSTEMS:
            yield f"padded, {system}", partial(self._own, system, "padded", self._padded)
        yield "fastdecode", lambda: self._own("fastdecode", "unpadded", self._plain)
        yield own, lambda: self._own("moe-lightning", "unpadded", self._plain, own)
        yield gpu, lambda: self._changed(gpu, self._plan(self._plain, attention_on_gpu=True, ffn_on_gpu=True))
        yield fewer, lambda: self._changed(fewer, self._fewer())
        yield "r_w 0", lambda: self._changed("r_w 0", replace(self._base(), weights_on_gpu=0.0))
        yield "r_w most", lambda: self._changed("r_w most", self._most(self._base()))
        yield f"{fewer}, r_w most", lambda: self._changed(f"{fewer}, r_w most", self._most(self._fewer()))
        yield f"gen {self._limits.long_gen_len}", self._longer

    # -- sizes -------------------------------------------------------------------------------------

    def check_host(self, case: Case) -> None:
        """Refuse what host memory does not hold beside all weights, of which a footprint counts what travels."""
        need = batch_footprint(self._model, case.shape(), case.policy, system=case.system)
        beside = need.cpu_bytes - need.cpu["streamed_experts"]
        room = _HOST_MOST * float(self._here.cpu.capacity)
        if self._limits.held + beside > room:
            raise DoesNotFit(
                f"all weights and what a run needs beside them take {format_bytes(self._limits.held + beside)} of host "
                f"memory, and {format_bytes(room)} may be used."
            )

    def _requests(self, workload: Workload, system: str = "moe-lightning") -> int:
        """Requests whose KV cache and hidden states host memory holds beside all weights and the staging buffers."""
        model, limits = self._model, self._limits
        pinned = check_system(system).pinned_layers or 0.0
        staged = pinned * max(model.kind_travelling_bytes(kind, dense=True) for kind in set(model.order))
        prompt = workload.effective_prompt
        each = float(kv_cache_bytes(model, 1, prompt, workload.gen_len)) + prompt * model.hidden_bytes
        free = usable_bytes(self._here)[1] - limits.held - staged
        most = math.floor(_HOST_SPARE * free / each)
        if most < 1:
            raise InvalidValue("host memory holds the weights and no request beside them; take fewer --layers.")
        return most if limits.most_requests is None else min(most, limits.most_requests)

    def _plan(self, workload: Workload, *, most: int | None = None, **places: bool) -> Policy:
        """The planner's policy for requests without end, whose batches need not be a whole part of them."""
        most = most or self._requests(workload)
        return plan(self._model, self._here, workload, max_batch_size=most, **places).policy

    def _base(self) -> Policy:
        """CGOPipe as planned: attention on the CPU, experts on the GPU."""
        if self._planned is None:
            self._planned = self._plan(self._plain, attention_on_gpu=False, ffn_on_gpu=True)
        return self._planned

    def _fewer(self) -> Policy:
        base = self._base()
        batch = max(1, base.batch_size // _FEWER)
        return replace(base, batch_size=batch, micro_batch_size=-(-batch // base.num_micro_batches))

    def _most(self, policy: Policy) -> Policy:
        """The same sizes with as many weights resident as the cap holds; the footprint is affine in them."""

        shape = self._changed("", policy).shape()

        def need(share: float) -> float:
            changed = replace(policy, weights_on_gpu=share)
            return float(batch_footprint(self._model, shape, changed).gpu_bytes)

        least, whole = need(0.0), need(1.0)
        room = usable_bytes(self._here)[0]
        if least > room:
            raise InvalidValue("nothing resident fits either.")
        share = 1.0 if whole <= room else max(0.0, (room - least) / (whole - least) - 1e-6)
        return replace(policy, weights_on_gpu=min(1.0, share))

    # -- cases -------------------------------------------------------------------------------------

    def _case(self, name: str, setting: str, system: str, policy: Policy, workload: Workload) -> Case:
        sizes = {key: value for key, value in policy.to_dict().items() if key != "num_micro_batches"}
        return Case(
            name=name,
            setting=setting,
            system=system,
            **sizes,
            pinned_weights=not check_system(system).streams_dense or check_system(system).single_batch,
            prompt_lens=workload.prompt_lens,
            gen_len=workload.gen_len,
            link_bandwidth=self._link,
        )

    def _own(self, system: str, setting: str, workload: Workload, name: str | None = None) -> Case:
        """A system with the policy that its own rule chooses, for as many requests as one batch of it can be."""
        requests = self._requests(workload, system)
        if system in ("moe-lightning", "fastdecode"):
            places = {} if system == "moe-lightning" else {"attention_on_gpu": False, "ffn_on_gpu": True}
            requests = self._plan(workload, most=requests, **places).batch_size
        policy = choose_policy(system, self._model, self._here, workload, requests, may_cache=False)
        return self._case(name or f"{setting}, {system}", setting, system, policy, workload)

    def _changed(self, name: str, policy: Policy) -> Case:
        return self._case(name, name, "moe-lightning", policy, self._plain)

    def _longer(self) -> Case:
        workload = self._plain.with_options(gen_len=self._limits.long_gen_len)
        name = f"gen {workload.gen_len}"
        policy = self._plan(workload, attention_on_gpu=False, ffn_on_gpu=True)
        return self._case(name, name, "moe-lightning", policy, workload)
