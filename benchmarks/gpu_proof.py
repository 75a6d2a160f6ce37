"""What the parts of `benchmarks/gpu.py` share: the model, its weights, the probed machine, records, and the time."""

from __future__ import annotations

import gc
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from executor.host_weights import HostWeights
from executor.machine import machine_facts, ram_bytes
from executor.probe import Passes, Prober
from executor.random_checkpoint import RandomCheckpoint
from experiments.records import OutOfTime, Records, commit, say
from experiments.resizing import resized
from hrm import Hardware, MoEModel
from hrm.catalog import model_config
from hrm.errors import DoesNotFit, HrmError, InvalidValue
from hrm.units import format_bytes

__all__ = ["Options", "Proof", "failure_of", "with_layers", "without_result"]

_SIZES: dict[str, int | None] = dict.fromkeys(
    ("layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "experts", "top_k", "vocab")
)
_HOST_SHARE = 0.72
"""Most of host memory that weights may take; KV caches and the system get the rest."""
_SAME = {
    "probe": (),
    "cases": ("cap",),
    "run": ("cap", "case"),
    "exact": ("family", "system", "policy"),
    "sanitizer": ("tool",),
    "peers": (),
    "upper": ("who", "batch_size"),
}
"""What two records of a kind share if the later one stands for both."""


@dataclass(kw_only=True)
class Options:
    """What a command was asked for."""

    device: torch.device
    model: str
    out: Path
    results: Path
    started: float
    layers: int | None = None
    link_bandwidth: float | None = None
    """Bytes/s of the paced link where there is no GPU."""
    time_budget: float = math.inf
    """Seconds after which nothing new begins."""
    seconds_per_cap: float = math.inf
    gen_len: int = 32
    long_gen_len: int = 128
    most_requests: int | None = None
    batch_sizes: tuple[int, ...] = (1, 8, 32, 128, 512)
    retry: bool = False
    """Run cases again that failed."""
    version: str | None = field(default_factory=commit)

    @property
    def cuda(self) -> bool:
        """Whether there is a GPU."""
        return self.device.type == "cuda"


class Proof:
    """One command's view of the proof: what is known already is taken from disk, what is needed is made once."""

    def __init__(self, options: Options) -> None:
        self.options = options
        options.out.mkdir(parents=True, exist_ok=True)
        self.facts = machine_facts() | ({} if options.cuda else {"gpu": None})
        self.model_config = _config_of(options)
        self.model = MoEModel.from_config(self.model_config, name=options.model)
        self.records = Records(options.out / "records.jsonl", self._conditions(), keep_s=math.inf)
        self.ran = False
        """Whether something has ended in this command that the next one need not do again."""

    def _conditions(self) -> dict[str, Any]:
        options = self.options
        shared = {key: self.facts.get(key) for key in ("cpu", "gpu", "cores", "torch", "transformers")}
        given = {"model": options.model, "layers": self.model.num_layers, "link": options.link_bandwidth}
        lengths = {"gen_len": options.gen_len, "long_gen_len": options.long_gen_len, "most": options.most_requests}
        return shared | given | lengths | {"device": options.device.type}

    # -- time --------------------------------------------------------------------------------------

    @property
    def left(self) -> float:
        """Seconds of this command that are left."""
        return self.options.time_budget - (time.monotonic() - self.options.started)

    def wanted(self, **keys: Any) -> bool:
        """Whether there is no record with these keys, or one that is to be made again.

        That is one of a program that was not there, of a case for which a smaller budget was too short and, where it
        was asked for, of a failure.
        """
        found = self.records.find(**keys)
        if found is None or "missing" in found:
            return True
        if "no_time" in found and self.options.time_budget > found["time_budget"]:
            return True
        return self.options.retry and without_result(found) is not None

    def latest(self, kind: str) -> list[dict[str, Any]]:
        """Records of a kind, each the last of its case, in the order in which cases were first recorded."""
        rows = [row for row in self.records.rows if row.get("kind") == kind]
        return list({tuple(row[key] for key in _SAME[kind]): row for row in rows}.values())

    def once(
        self, run: Callable[[], dict[str, Any]], *, expected: float = 0.0, again: bool = False, **keys: Any
    ) -> dict[str, Any]:
        """The record with these keys; made now if there is none. A failure is a record, too.

        Parameters
        ----------
        run : callable
            Makes the record.
        expected : float
            Seconds that it is predicted to take, 0 where nobody knows.
        again : bool
            Make it now even if there is one.
        **keys
            What the record is found by.

        Raises
        ------
        OutOfTime
            If it would pass the time budget, and the next command comes further than this one. A command in which
            nothing has ended leaves the case out instead: with the same budget the next one would have no more time.
        """
        found = self.records.find(**keys)
        if found is not None and not (again or self.wanted(**keys)):
            return found
        left = self.left
        if expected > left or (left < 0 and self.ran):
            if self.ran:
                raise OutOfTime
            if expected > 0:
                return self._leave_out(expected, left, keys)
        began = time.perf_counter()
        stops: BaseException | None = None
        try:
            row = run()
        except OutOfTime:
            raise
        except Exception as error:
            # What the user or the planner could have known is a result; anything else must be seen, but not again.
            row = {"failed": failure_of(error)}
            stops = None if isinstance(error, HrmError | torch.cuda.OutOfMemoryError) else error
            say(f"  failed: {row['failed']}")
        about = {"commit": self.options.version, "wall_s": time.perf_counter() - began}
        row = self.records.add(**keys, **about, **row)
        self.ran = True
        if stops is not None:
            raise stops
        return row

    def _leave_out(self, expected: float, left: float, keys: dict[str, Any]) -> dict[str, Any]:
        budget = self.options.time_budget
        why = f"would take {expected:.0f} s, and a command of {budget:.0f} s has {max(0.0, left):.0f} s for it"
        say(f"  left out: {why}")
        self.ran = True
        return self.records.add(**keys, commit=self.options.version, no_time=why, time_budget=budget)

    # -- what is needed ----------------------------------------------------------------------------

    @cached_property
    def checkpoint(self) -> RandomCheckpoint:
        """Random weights of the model."""
        return RandomCheckpoint.of(self.model_config, name=self.options.model)

    @cached_property
    def weights(self) -> HostWeights:
        """All of them in host memory, page-locked with a GPU."""
        began = time.perf_counter()
        say(f"drawing {self.model.num_layers} layers of {self.options.model} into host memory")
        weights = HostWeights(self.checkpoint, pinned=self.options.cuda)
        say(f"  {format_bytes(weights.nbytes)} in {time.perf_counter() - began:.0f} s")
        return weights

    @cached_property
    def machine(self) -> Hardware:
        """This machine by a full probe, from disk if one was taken under the same conditions."""
        path = self.options.out / "machine.json"
        if self.records.find(kind="probe") and path.exists():
            return Hardware.from_file(path)
        say("probing this machine")
        machine = self._new_prober().hardware()
        machine.save(path)
        self.records.add(kind="probe", facts=dict(machine.facts), commit=self.options.version)
        self.ran = True
        return machine

    def _new_prober(self) -> Prober:
        self.__dict__["_bare"] = Prober(self.model, device=self.options.device, progress=lambda text: say(f"  {text}"))
        return self.__dict__["_bare"]

    @cached_property
    def prober(self) -> Prober:
        """The probe, with fresh passes of this command."""
        machine = self.machine
        prober = self.__dict__.get("_bare")
        if prober is None:
            say("probing this machine again, briefly")
            prober = self._new_prober()
            prober.take_over(machine)
            prober.refresh()
        self.passes: Passes = list(prober.last_passes)
        return prober

    def drop(self) -> None:
        """Give back weights, the probe's buffers and the device's memory."""
        for name in ("weights", "checkpoint", "prober", "_bare"):
            self.__dict__.pop(name, None)
        self.make_room()

    def make_room(self) -> None:
        """Give back what nobody uses any more, and lift the last run's cap."""
        gc.collect()
        if self.options.cuda:
            torch.cuda.set_per_process_memory_fraction(1.0, self.options.device)
            torch.cuda.empty_cache()
            getattr(torch._C, "_host_emptyCache", lambda: None)()

    @property
    def slug(self) -> str:
        """The device's name as a folder's."""
        name = str(self.facts["gpu"]) if self.options.cuda else "rehearsal"
        return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def failure_of(error: BaseException) -> str:
    """One line on an exception."""
    lines = str(error).strip().splitlines() or [""]
    return lines[0] if isinstance(error, HrmError) else f"{type(error).__name__}: {lines[0]}"


def without_result(row: dict[str, Any]) -> str | None:
    """Why a record has no result: its program is missing, it was left out, or it failed. None if it has one."""
    return row.get("missing") or row.get("no_time") or row.get("failed")


def _config_of(options: Options) -> dict[str, Any]:
    """The model's config with as many layers as host memory holds beside the KV cache of a batch."""
    config = model_config(options.model)
    whole = MoEModel.from_config(config, name=options.model)
    each = whole.num_parameters * whole.dtype_bytes / whole.num_layers
    layers = options.layers
    if layers is None:
        layers = min(whole.num_layers, math.floor(_HOST_SHARE * ram_bytes() / each))
        if layers < 1:
            raise DoesNotFit(f"host memory does not hold a layer of {options.model}; take a smaller --model.")
    if not 1 <= layers <= whole.num_layers:
        raise InvalidValue(f"'layers' must be between 1 and {whole.num_layers}: {layers}")
    return with_layers(config, layers)


def with_layers(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """The config with another number of layers; what it lists by layer follows."""
    return resized(config, _SIZES | {"layers": layers})
