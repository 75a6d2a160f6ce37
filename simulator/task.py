"""A pipeline schedule as data: tasks with lanes and dependencies, immutable, with a text form.

A schedule says *what* happens in which order on which lane and what waits for what; it says nothing of
durations or kernels. The simulator plays it with times from a model, the executor runs it with kernels
and copies, and both give back a timeline of the same tasks.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

from hrm.errors import InvalidSchedule

__all__ = ["LANES", "OPS", "Lane", "Op", "Schedule", "ScheduleBuilder", "Task"]


class Lane(Enum):
    """What a task occupies. Tasks of one lane run in the order in which the schedule lists them."""

    GPU = "gpu"
    """Device compute."""
    CPU = "cpu"
    """Host compute: attention beside the KV cache, experts beside their weights."""
    H2D = "h2d"
    """Link, host to device (D2 and D3 of MoE-Lightning)."""
    D2H = "d2h"
    """Link, device to host (D1)."""
    PIN = "pin"
    """Host copies from pageable to pinned memory."""


class Op(Enum):
    """Task classes, named as in MoE-Lightning's Algorithm 1 where it names them."""

    STAGE_W = "WCtoPin"
    LOAD_W = "WPinToG"
    LOAD_X = "LoadX"
    """Hidden states, host to device."""
    PREFILL = "Prefill"
    OFFLOAD_KV = "OffloadKV"
    """Prompt hidden states and their KV, device to host."""
    STAGE_KV = "KVtoPin"
    LOAD_KV = "LoadKV"
    """KV cache of a micro-batch, host to device (D4)."""
    PRE_ATTN = "PreAttn"
    OFFLOAD_QKV = "OffloadQKV"
    CPU_ATTN = "CPUAttn"
    LOAD_H = "LoadH"
    GPU_ATTN = "GPUAttn"
    STORE_KV = "StoreKV"
    """New keys and values (in prefill: all of them), device to host."""
    POST_ATTN = "PostAttn"
    OFFLOAD_FFN = "OffloadFFN"
    """Normed hidden states and the tokens' choice of experts, device to host."""
    CPU_FFN = "CPUFFN"
    """Experts whose weights lie in host memory."""
    GPU_FFN = "GPUFFN"
    """Experts whose weights stay on the device, where others run on the CPU."""
    LOAD_FFN = "LoadFFN"
    """What the CPU's experts made, host to device."""
    ADD_FFN = "AddFFN"
    """Sum of what all experts made and the residual."""
    OFFLOAD_ROUTES = "OffloadRoutes"
    """The tokens' choice of experts, device to host, which looks up what the expert cache lacks."""
    LOAD_E = "LoadExperts"
    """The experts of a piece that the cache on the device lacks, host to device."""
    EXPERTS = "Experts"
    """The experts of a piece, which lie in the cache's slots."""
    SAMPLE = "Sample"
    STORE_X = "StoreX"
    """Hidden states, device to host."""
    BARRIER = "Barrier"
    """The host waits for everything that it has issued."""

    code: int
    lane_code: int

    @property
    def lane(self) -> Lane:
        """The lane that this class of task runs on."""
        return _LANE_OF[self]


_LANE_OF = {
    Op.STAGE_W: Lane.PIN,
    Op.LOAD_W: Lane.H2D,
    Op.LOAD_X: Lane.H2D,
    Op.PREFILL: Lane.GPU,
    Op.OFFLOAD_KV: Lane.D2H,
    Op.STAGE_KV: Lane.PIN,
    Op.LOAD_KV: Lane.H2D,
    Op.PRE_ATTN: Lane.GPU,
    Op.OFFLOAD_QKV: Lane.D2H,
    Op.CPU_ATTN: Lane.CPU,
    Op.LOAD_H: Lane.H2D,
    Op.GPU_ATTN: Lane.GPU,
    Op.STORE_KV: Lane.D2H,
    Op.POST_ATTN: Lane.GPU,
    Op.OFFLOAD_FFN: Lane.D2H,
    Op.CPU_FFN: Lane.CPU,
    Op.GPU_FFN: Lane.GPU,
    Op.LOAD_FFN: Lane.H2D,
    Op.ADD_FFN: Lane.GPU,
    Op.OFFLOAD_ROUTES: Lane.D2H,
    Op.LOAD_E: Lane.H2D,
    Op.EXPERTS: Lane.GPU,
    Op.SAMPLE: Lane.GPU,
    Op.STORE_X: Lane.D2H,
    Op.BARRIER: Lane.GPU,
}
OPS: tuple[Op, ...] = tuple(Op)
LANES: tuple[Lane, ...] = tuple(Lane)
_LANE_CODE = {lane: i for i, lane in enumerate(LANES)}
for _code, _op in enumerate(OPS):
    # Attributes, because a dictionary of enum members is slow where tasks are made by the million.
    _op.code, _op.lane_code = _code, _LANE_CODE[_LANE_OF[_op]]
_OP_BY_NAME = {op.value: op for op in OPS}
_LANE_BY_NAME = {lane.value: lane for lane in LANES}


@dataclass(frozen=True, slots=True)
class Task:
    """One unit of work.

    Examples
    --------
    >>> str(Task(id=7, op=Op.POST_ATTN, step=2, layer=5, part=1, lane=Lane.GPU, deps=(3,)))
    'PostAttn(2,5,1)'
    """

    id: int
    op: Op
    step: int
    """0 is prefill; decode steps count from 1. For weights: the step that reads them."""
    layer: int
    part: int
    """Micro-batch, or page of a layer's weights; of experts that come in pieces, both: micro-batch * pieces + piece."""
    lane: Lane
    deps: tuple[int, ...]
    """Ids of the tasks that must end before this one starts."""
    stage: int = 0
    """Stage of a pipeline-parallel run; every stage has lanes of its own."""

    def __str__(self) -> str:
        return f"{self.op.value}({self.step},{self.layer},{self.part})"


class Schedule(Sequence[Task]):
    """An immutable list of tasks, held in columns.

    Examples
    --------
    >>> text = '''schedule example layers=1 micro_batches=1 steps=1
    ... OffloadQKV(1,0,0) @d2h
    ... CPUAttn(1,0,0) @cpu < OffloadQKV(1,0,0)'''
    >>> schedule = Schedule.from_text(text)
    >>> schedule[1].deps, schedule.to_text() == text
    ((0,), True)
    """

    def __init__(
        self,
        *,
        name: str,
        num_layers: int,
        num_micro_batches: int,
        num_steps: int,
        op: Sequence[int] | np.ndarray,
        step: Sequence[int] | np.ndarray,
        layer: Sequence[int] | np.ndarray,
        part: Sequence[int] | np.ndarray,
        lane: Sequence[int] | np.ndarray,
        dep_start: Sequence[int] | np.ndarray,
        deps: Sequence[int] | np.ndarray,
        stage: Sequence[int] | np.ndarray | None = None,
        num_pages: int | None = None,
    ) -> None:
        self.name = name
        self.num_layers = num_layers
        self.num_micro_batches = num_micro_batches
        self.num_steps = num_steps
        """Passes of the whole model, prefill included if present."""
        self.num_pages = num_pages or num_micro_batches
        """Tasks in which the weights of a layer travel, by default one per micro-batch."""
        columns = {"op": (op, np.int8), "step": (step, np.int32), "layer": (layer, np.int32)}
        columns |= {"part": (part, np.int32), "lane": (lane, np.int8)}
        columns |= {"dep_start": (dep_start, np.int64), "deps": (deps, np.int32)}
        columns |= {"stage": (np.zeros(len(op)) if stage is None else stage, np.int8)}
        arrays = {key: np.asarray(values, dtype=dtype) for key, (values, dtype) in columns.items()}
        for array in arrays.values():
            array.flags.writeable = False
        self.op, self.step, self.layer = arrays["op"], arrays["step"], arrays["layer"]
        self.part, self.lane = arrays["part"], arrays["lane"]
        self.dep_start, self.deps = arrays["dep_start"], arrays["deps"]
        self.stage = arrays["stage"]

    @property
    def num_stages(self) -> int:
        """Stages of a pipeline-parallel run, else 1."""
        return int(self.stage.max()) + 1 if len(self) else 1

    @property
    def queue(self) -> np.ndarray:
        """What each task queues in: its lane, of its stage."""
        return self.lane.astype(np.int64) + len(LANES) * self.stage.astype(np.int64)

    def __len__(self) -> int:
        return len(self.op)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        return Task(
            id=i,
            op=OPS[self.op[i]],
            step=int(self.step[i]),
            layer=int(self.layer[i]),
            part=int(self.part[i]),
            lane=LANES[self.lane[i]],
            deps=tuple(int(d) for d in self.deps[self.dep_start[i] : self.dep_start[i + 1]]),
            stage=int(self.stage[i]),
        )

    def __iter__(self) -> Iterator[Task]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Schedule):
            return NotImplemented
        keys = ("name", "num_layers", "num_micro_batches", "num_steps", "num_pages")
        columns = ("op", "step", "layer", "part", "lane", "dep_start", "deps", "stage")
        return all(getattr(self, k) == getattr(other, k) for k in keys) and all(
            np.array_equal(getattr(self, c), getattr(other, c)) for c in columns
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return (
            f"<Schedule {self.name}: {len(self)} tasks, {self.num_layers} layers, "
            f"{self.num_micro_batches} micro-batches, {self.num_steps} steps>"
        )

    def mask(self, op: Op) -> np.ndarray:
        """Which tasks are of class `op`."""
        return self.op == op.code

    def lane_tasks(self, lane: Lane) -> np.ndarray:
        """Ids of the tasks of `lane`, in order."""
        return np.flatnonzero(self.lane == _LANE_CODE[lane])

    def labels(self) -> list[str]:
        """The short name of every task."""
        columns = zip(self.op.tolist(), self.step.tolist(), self.layer.tolist(), self.part.tolist(), strict=True)
        return [f"{OPS[o].value}({s},{i},{j})" for o, s, i, j in columns]

    def to_text(self) -> str:
        """One line per task; `from_text` reads it back."""
        names = self.labels()
        lines = [
            f"schedule {self.name} layers={self.num_layers} "
            f"micro_batches={self.num_micro_batches} steps={self.num_steps}"
            + (f" pages={self.num_pages}" if self.num_pages != self.num_micro_batches else "")
        ]
        for i, name in enumerate(names):
            deps = self.deps[self.dep_start[i] : self.dep_start[i + 1]]
            waits = " < " + " ".join(names[d] for d in deps) if len(deps) else ""
            stage = str(self.stage[i]) if self.stage[i] else ""
            lines.append(f"{name} @{LANES[self.lane[i]].value}{stage}{waits}")
        return "\n".join(lines)

    def diff(self, other: Schedule) -> str:
        """What `other` has differently, as a unified diff of the text forms; empty if nothing."""
        import difflib

        lines = difflib.unified_diff(
            self.to_text().split("\n"), other.to_text().split("\n"), self.name, other.name, lineterm="", n=1
        )
        return "\n".join(lines)

    @classmethod
    def from_text(cls, text: str) -> Schedule:
        """Read a schedule's text form.

        Raises
        ------
        InvalidSchedule
            Naming the line or task: unknown class, lane or dependency, or a name used twice.
        """
        lines = [(i, line.strip()) for i, line in enumerate(text.splitlines(), start=1) if line.strip()]
        head = _HEAD.fullmatch(lines[0][1]) if lines else None
        if head is None:
            raise InvalidSchedule("a schedule begins with 'schedule NAME layers=L micro_batches=G steps=S'.")
        parsed: list[tuple[Op, int, int, int, tuple[Lane, int], str | None]] = []
        ids: dict[str, int] = {}
        for number, line in lines[1:]:
            match = _LINE.fullmatch(line)
            if match is None:
                raise InvalidSchedule(f"line {number} is not 'Task(step,layer,part) @lane < deps': {line!r}")
            op_name, step, layer, part, lane_text, waits = match.groups()
            lane_name, stage = _LANE_TEXT.fullmatch(lane_text).groups()  # type: ignore[union-attr]
            if len(stage) > 2 or int(stage or 0) > _LAST_STAGE:
                raise InvalidSchedule(f"line {number}: stages go from 0 to {_LAST_STAGE}: @{lane_text}")
            if max(int(step), int(layer), int(part)) > _LARGEST:
                raise InvalidSchedule(f"line {number}: a number in {line!r} is larger than {_LARGEST}.")
            if op_name not in _OP_BY_NAME:
                raise InvalidSchedule(f"line {number}: unknown task class {op_name!r}; known: {', '.join(_OP_BY_NAME)}")
            if lane_name not in _LANE_BY_NAME:
                raise InvalidSchedule(f"line {number}: unknown lane {lane_name!r}; known: {', '.join(_LANE_BY_NAME)}")
            label = f"{op_name}({step},{layer},{part})"
            if label in ids:
                raise InvalidSchedule(f"line {number}: {label} stands twice.")
            ids[label] = len(parsed)
            place = (_LANE_BY_NAME[lane_name], int(stage or 0))
            parsed.append((_OP_BY_NAME[op_name], int(step), int(layer), int(part), place, waits))
        builder = ScheduleBuilder()
        for i, (op, step, layer, part, (lane, stage), waits) in enumerate(parsed):
            deps = []
            for name in waits.split() if waits else []:
                if name not in ids:
                    raise InvalidSchedule(f"{list(ids)[i]} waits for {name}, which is not in the schedule.")
                deps.append(ids[name])
            builder.add(op, step, layer, part, deps, lane=lane, stage=stage)
        name, layers, micro_batches, steps, pages = head.groups()
        return builder.build(
            name=name,
            num_layers=int(layers),
            num_micro_batches=int(micro_batches),
            num_steps=int(steps),
            num_pages=int(pages) if pages else None,
        )

    def order(self) -> np.ndarray:
        """Task ids in an order in which every task follows its dependencies and its lane's predecessor.

        Raises
        ------
        InvalidSchedule
            If the schedule is not progressing: some tasks wait for each other.
        """
        n = len(self)
        owner = np.repeat(np.arange(n), np.diff(self.dep_start))
        if (self.deps < owner).all():
            return np.arange(n)
        waits = np.diff(self.dep_start).astype(np.int64)
        users: list[list[int]] = [[] for _ in range(n)]
        for dep, user in zip(self.deps.tolist(), owner.tolist(), strict=True):
            users[dep].append(user)
        for queue in np.unique(self.queue):
            for before, after in itertools.pairwise(np.flatnonzero(self.queue == queue).tolist()):
                users[before].append(after)
                waits[after] += 1
        ready = [int(i) for i in np.flatnonzero(waits == 0)]
        done: list[int] = []
        while ready:
            task = ready.pop()
            done.append(task)
            for user in users[task]:
                waits[user] -= 1
                if waits[user] == 0:
                    ready.append(user)
        if len(done) < n:
            stuck = [str(self[int(i)]) for i in np.flatnonzero(waits > 0)[:4]]
            raise InvalidSchedule(f"schedule is not progressing: {', '.join(stuck)} wait for each other.")
        return np.array(done)


_LARGEST = 2**31 - 1
_LAST_STAGE = 24
_LANE_TEXT = re.compile(r"(\w*?)(\d*)")
_HEAD = re.compile(r"schedule (\S+) layers=(\d+) micro_batches=(\d+) steps=(\d+)(?: pages=(\d+))?")
_LINE = re.compile(r"(\w+)\((\d+),(\d+),(\d+)\) @(\w+)(?: < (.+))?")


class ScheduleBuilder:
    """Collects tasks in issue order."""

    def __init__(self) -> None:
        self._rows: list[int] = []
        self._count = 0
        self._dep_start = [0]
        self._deps: list[int] = []

    def add(
        self,
        op: Op,
        step: int,
        layer: int,
        part: int,
        deps: Iterable[int] = (),
        *,
        lane: Lane | None = None,
        stage: int = 0,
    ) -> int:
        """Append a task and return its id."""
        # One list for all columns: tasks are made by the million.
        self._rows += (op.code, step, layer, part, op.lane_code if lane is None else _LANE_CODE[lane], stage)
        self._deps += deps
        self._dep_start.append(len(self._deps))
        self._count += 1
        return self._count - 1

    def build(
        self, *, name: str, num_layers: int, num_micro_batches: int, num_steps: int, num_pages: int | None = None
    ) -> Schedule:
        """The finished schedule."""
        op, step, layer, part, lane, stage = np.array(self._rows, dtype=np.int32).reshape(-1, 6).T
        return Schedule(
            name=name,
            num_layers=num_layers,
            num_micro_batches=num_micro_batches,
            num_steps=num_steps,
            op=op,
            step=step,
            layer=layer,
            part=part,
            lane=lane,
            dep_start=self._dep_start,
            deps=self._deps,
            stage=stage,
            num_pages=num_pages,
        )
