"""Proof that a schedule is safe, from its tasks and dependencies alone.

One task happens before another if a chain of dependencies and lane order leads from it to the other. Whatever the
durations, a safe schedule reads nothing before it is written and overwrites nothing that is still to be read; both
are statements about what happens before what, so that no schedule has to be played to check them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hrm.errors import InvalidSchedule
from hrm.pipeline import ACTIVATION_SLOTS, PIECES_IN_FLIGHT, PINNED_PAGES
from simulator.task import Op, Schedule

__all__ = ["check_schedule", "happens_before"]

_DENSE_TRAVELS = ("flexgen", "flexgen-c", "zero-inference")
"""Schedules in which weights of attention travel with the experts, by name."""
_PINNED_SLOTS = {"overlapped": 2, "flexgen": None, "flexgen-c": None}
"""Slots of the pinned ring where they are not `PINNED_PAGES`; None: pinned memory is made anew for every copy."""
_WEIGHT_SLOTS, _KV_SLOTS = 2, 2
_COMPUTE_FIRST, _COMPUTE_LAST = (Op.PREFILL, Op.PRE_ATTN), (Op.PREFILL, Op.POST_ATTN)
_EXPERTS = (
    Op.OFFLOAD_FFN, Op.CPU_FFN, Op.GPU_FFN, Op.LOAD_FFN, Op.OFFLOAD_ROUTES, Op.LOAD_E, Op.EXPERTS, Op.ADD_FFN
)  # fmt: skip
"""What follows the last computation of a layer whose experts are tasks of their own."""


def check_schedule(schedule: Schedule) -> None:
    """Prove that `schedule` is safe, or say what is not.

    Checked are: that all tasks can run; that weights are staged, complete before they are read, and not overwritten
    while they are; that attention has its queries and its KV cache, and decoding the token before; that hidden states
    are written before they are read, and complete, where experts are tasks of their own; that slots of activations, KV
    and pinned memory are free before they are filled; and that a barrier leaves nothing running beside it.

    Parameters
    ----------
    schedule : Schedule
        A whole run, or steps of a run in progress, whose past is taken to be over.

    Raises
    ------
    InvalidSchedule
        Naming two tasks of which one would have to wait for the other, or a task that is missing.

    Examples
    --------
    >>> text = '''schedule story layers=1 micro_batches=1 steps=1
    ... PreAttn(1,0,0) @gpu
    ... OffloadQKV(1,0,0) @d2h
    ... CPUAttn(1,0,0) @cpu < OffloadQKV(1,0,0)'''
    >>> check_schedule(Schedule.from_text(text))
    Traceback (most recent call last):
        ...
    hrm.errors.InvalidSchedule: OffloadQKV(1,0,0) does not wait for PreAttn(1,0,0), which makes what it moves.
    """
    if len(schedule):
        proof = _Proof(schedule)
        _check_data_flow(proof)
        _check_experts(proof)
        _check_pieces(proof)
        _check_cache(proof)
        _check_hidden_states(proof)
        _check_weights(proof)
        _check_slots(proof)
        _check_barriers(proof)


def happens_before(schedule: Schedule) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What happens before what, as a vector clock per task.

    Returns
    -------
    queue, index : ndarray, length ``len(schedule)``
        The queue (lane of a stage) of each task, numbered without gaps, and its position there.
    clock : ndarray, (tasks, queues)
        Highest position in each queue that happens before a task, or is the task; -1 for none. So `a` happens
        before `b` if ``index[a] <= clock[b, queue[a]]``, unless they are the same.

    Raises
    ------
    InvalidSchedule
        If tasks wait for each other.
    """
    n = len(schedule)
    order = schedule.order()
    used, queue = np.unique(schedule.queue, return_inverse=True)
    by_queue = np.argsort(queue, kind="stable")
    counts = np.bincount(queue, minlength=len(used))
    index = np.empty(n, dtype=np.int32)
    index[by_queue] = np.arange(n) - np.repeat(np.cumsum(counts) - counts, counts)
    clock = np.full((n, len(used)), -1, dtype=np.int32)
    starts, deps = schedule.dep_start.tolist(), schedule.deps.tolist()
    queues, positions = queue.tolist(), index.tolist()
    last = [-1] * len(used)
    for task in order.tolist():
        row, mine = clock[task], queues[task]
        if last[mine] >= 0:
            row[:] = clock[last[mine]]
        for dep in deps[starts[task] : starts[task + 1]]:
            np.maximum(row, clock[dep], out=row)
        row[mine] = positions[task]
        last[mine] = task
    return queue, index, clock


class _Proof:
    """What happens before what in a schedule, and which task is where."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.queue, self.index, self.clock = happens_before(schedule)
        self.step, self.layer, self.part = (
            column.astype(np.int64) for column in (schedule.step, schedule.layer, schedule.part)
        )
        self._values = [np.unique(column) for column in (self.step, self.layer, self.part)]
        keys, _ = self._keys(schedule.op.astype(np.int64), self.step, self.layer, self.part)
        self._by_key = np.argsort(keys, kind="stable")
        self._keys_sorted = keys[self._by_key]
        twice = np.flatnonzero(np.diff(self._keys_sorted) == 0)
        if len(twice):
            raise InvalidSchedule(f"{self.name(self._by_key[twice[0]])} stands twice.")

    def _keys(self, op: np.ndarray, *place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One number per task name, and whether any task has such a step, layer and part."""
        key, known = op, np.ones(len(op), dtype=bool)
        for values, column in zip(self._values, place, strict=True):
            code = np.minimum(np.searchsorted(values, column), len(values) - 1)
            known &= values[code] == column
            key = key * len(values) + code
        return key, known

    def name(self, task: int | np.integer) -> str:
        """The short name of a task."""
        return str(self.schedule[int(task)])

    def of(self, *ops: Op) -> np.ndarray:
        """Ids of all tasks of some classes."""
        return np.flatnonzero(np.isin(self.schedule.op, [op.code for op in ops]))

    def at(self, ids: np.ndarray, *ops: Op, steps: int = 0, layers: int = 0) -> np.ndarray:
        """Tasks of the first of `ops` that there is, for the micro-batch of `ids` and so much later; -1 for none."""
        return self.find(ops, self.step[ids] + steps, self.layer[ids] + layers, self.part[ids])

    def find(self, ops: Sequence[Op], step: np.ndarray, layer: np.ndarray, part: np.ndarray) -> np.ndarray:
        """Ids of tasks by name, of the first of `ops` that there is; -1 for none."""
        found = np.full(len(step), -1, dtype=np.int64)
        for op in reversed(ops):
            keys, known = self._keys(np.full(len(step), op.code, dtype=np.int64), step, layer, part)
            place = np.minimum(np.searchsorted(self._keys_sorted, keys), len(self._keys_sorted) - 1)
            known &= self._keys_sorted[place] == keys
            found = np.where(known, self._by_key[place], found)
        return found

    def before(self, earlier: np.ndarray, later: np.ndarray) -> np.ndarray:
        """Whether each of `earlier` has ended when its partner in `later` starts."""
        return (self.index[earlier] <= self.clock[later, self.queue[earlier]]) & (earlier != later)

    def waits(self, later: np.ndarray, earlier: np.ndarray, why: str) -> None:
        """Raise unless each of `later` waits for its partner in `earlier`; -1 on either side: nothing to wait for."""
        both = (later >= 0) & (earlier >= 0)
        later, earlier = later[both], earlier[both]
        bad = np.flatnonzero(~self.before(earlier, later))
        if len(bad):
            self.fail(later[bad[0]], earlier[bad[0]], why)

    def needs(self, later: np.ndarray, earlier: np.ndarray, missing: Op, why: str) -> None:
        """As `waits`, but what there is to wait for must be there."""
        alone = later[earlier < 0]
        if len(alone):
            raise InvalidSchedule(f"{self.name(alone[0])} has no {missing.value} to wait for, {why}.")
        self.waits(later, earlier, why)

    def all_wait(
        self, later: np.ndarray, later_group: np.ndarray, earlier: np.ndarray, earlier_group: np.ndarray, why: str
    ) -> None:
        """Raise unless every task of `later` waits for every task of `earlier` that has the same group."""
        if not len(later) or not len(earlier):
            return
        order = np.argsort(later_group, kind="stable")
        groups, first = np.unique(later_group[order], return_index=True)
        least = np.minimum.reduceat(self.clock[later[order]], first, axis=0)
        place = np.minimum(np.searchsorted(groups, earlier_group), len(groups) - 1)
        bad = (groups[place] == earlier_group) & (self.index[earlier] > least[place, self.queue[earlier]])
        if bad.any():
            task = earlier[bad][0]
            rest = later[later_group == earlier_group[bad][0]]
            self.fail(rest[~self.before(np.full(len(rest), task), rest)][0], task, why)

    def fail(self, later: np.integer, earlier: np.integer, why: str) -> None:
        """Raise for one pair of tasks."""
        raise InvalidSchedule(f"{self.name(later)} does not wait for {self.name(earlier)}, {why}.")

    def successive(self, ids: np.ndarray, distance: int) -> tuple[np.ndarray, np.ndarray]:
        """Pairs (task, the one `distance` before it) of those of `ids` that one stage runs, in its order."""
        stage = self.schedule.stage[ids]
        ids = ids[np.lexsort((self.index[ids], stage))]
        late, early = ids[distance:], ids[: max(0, len(ids) - distance)]
        same = self.schedule.stage[late] == self.schedule.stage[early]
        return late[same], early[same]


def _check_data_flow(proof: _Proof) -> None:
    """Within a step of a layer, every task follows the one whose result it takes."""
    for op, sources in (
        (Op.OFFLOAD_QKV, (Op.PRE_ATTN,)),
        (Op.STORE_KV, (Op.PRE_ATTN, Op.PREFILL)),
        (Op.OFFLOAD_KV, (Op.PREFILL,)),
        (Op.STORE_X, (Op.POST_ATTN, Op.PREFILL)),
        (Op.OFFLOAD_FFN, (Op.POST_ATTN, Op.PREFILL)),
        (Op.OFFLOAD_ROUTES, (Op.POST_ATTN, Op.PREFILL)),
    ):
        ids = proof.of(op)
        proof.needs(ids, proof.at(ids, *sources), sources[0], "which makes what it moves")
    for op, sources in (
        (Op.CPU_ATTN, (Op.OFFLOAD_QKV,)),
        (Op.GPU_ATTN, (Op.PRE_ATTN,)),
        (Op.LOAD_H, (Op.CPU_ATTN,)),
        # With attention on the CPU what it attended comes up first.
        (Op.POST_ATTN, (Op.LOAD_H, Op.GPU_ATTN)),
        (Op.SAMPLE, (Op.POST_ATTN, Op.PREFILL)),
        (Op.CPU_FFN, (Op.OFFLOAD_FFN,)),
        (Op.GPU_FFN, (Op.POST_ATTN, Op.PREFILL)),
        (Op.LOAD_FFN, (Op.CPU_FFN,)),
        (Op.ADD_FFN, (Op.LOAD_FFN,)),
    ):
        if op is Op.ADD_FFN and len(proof.of(Op.EXPERTS)):
            continue  # adds up pieces
        ids = proof.of(op)
        proof.needs(ids, proof.at(ids, *sources), sources[-1], "whose result it reads")


def _check_experts(proof: _Proof) -> None:
    """Where experts are tasks of their own, none is missing, and what a layer makes is the sum of them all."""
    tasks = proof.of(*_EXPERTS)
    if not len(tasks):
        return
    split = np.isin(proof.step > 0, proof.step[tasks] > 0)  # of prefill and decode, one may be

    def of(*ops: Op) -> np.ndarray:
        ids = proof.of(*ops)
        return ids[split[ids]]

    why = "whose result it reads"
    if len(of(Op.GPU_FFN)):
        ids = of(Op.ADD_FFN)
        proof.needs(ids, proof.at(ids, Op.GPU_FFN), Op.GPU_FFN, why)
    ids = of(Op.OFFLOAD_KV, Op.STORE_X)
    proof.needs(ids, proof.at(ids, Op.ADD_FFN), Op.ADD_FFN, "which makes what it moves")
    ids = of(Op.SAMPLE)
    proof.needs(ids, proof.at(ids, Op.ADD_FFN), Op.ADD_FFN, why)
    ids = of(*_COMPUTE_FIRST)
    ids = ids[proof.layer[ids] > 0]
    proof.needs(ids, proof.at(ids, Op.ADD_FFN, layers=-1), Op.ADD_FFN, why)


def _check_pieces(proof: _Proof) -> None:
    """With an expert cache, all pieces come, each before it is computed, into slots that nobody reads any more."""
    computed, pieces = proof.of(Op.EXPERTS), proof.schedule.num_pages
    if not len(computed):
        return
    loads = proof.of(Op.LOAD_E)
    routes = proof.find((Op.OFFLOAD_ROUTES,), proof.step[loads], proof.layer[loads], proof.part[loads] // pieces)
    proof.needs(loads, routes, Op.OFFLOAD_ROUTES, "which says what it brings")
    proof.needs(computed, proof.at(computed, Op.LOAD_E), Op.LOAD_E, "which brings experts that it reads")
    late, early = proof.successive(loads, PIECES_IN_FLIGHT)
    proof.waits(late, proof.at(early, Op.EXPERTS), "which still reads experts whose slots it fills")
    sums, choices = proof.of(Op.ADD_FFN), proof.of(Op.OFFLOAD_ROUTES)
    late, early = proof.successive(choices, ACTIVATION_SLOTS)
    for piece in range(pieces):

        def piece_of(ids: np.ndarray, op: Op, piece: int = piece) -> np.ndarray:
            return proof.find((op,), proof.step[ids], proof.layer[ids], proof.part[ids] * pieces + piece)

        proof.needs(sums, piece_of(sums, Op.EXPERTS), Op.EXPERTS, "whose result it reads")
        proof.waits(late, piece_of(early, Op.LOAD_E), "which still reads the choices that it overwrites")


def _check_cache(proof: _Proof) -> None:
    """Decode attention finds the keys and values of all tokens before."""
    for op, sources in (
        (Op.STAGE_KV, (Op.STORE_KV, Op.OFFLOAD_KV)),
        (Op.LOAD_KV, (Op.STORE_KV, Op.OFFLOAD_KV)),
        (Op.CPU_ATTN, (Op.CPU_ATTN, Op.STORE_KV, Op.OFFLOAD_KV)),
    ):
        ids = proof.of(op)
        ids = ids[proof.at(ids, *_COMPUTE_FIRST, steps=-1) >= 0]
        proof.needs(ids, proof.at(ids, *sources, steps=-1), sources[-1], "which writes keys and values that it reads")
    ids = proof.of(Op.LOAD_KV)
    proof.waits(ids, proof.at(ids, Op.STAGE_KV), "which stages what it moves")
    ids = proof.of(Op.GPU_ATTN)
    proof.waits(ids, proof.at(ids, Op.LOAD_KV), "which brings keys and values that it reads")


def _check_hidden_states(proof: _Proof) -> None:
    """A layer starts from what the one before left, and a step from the token before."""
    ids = proof.of(Op.LOAD_X)
    ids = ids[proof.layer[ids] > 0]
    stored = proof.at(ids, Op.STORE_X, Op.OFFLOAD_KV, layers=-1)
    proof.needs(ids, stored, Op.STORE_X, "which writes hidden states that it reads")
    firsts = proof.of(*_COMPUTE_FIRST)
    inner = firsts[proof.layer[firsts] > 0]
    before, loaded = proof.at(inner, *_COMPUTE_LAST, layers=-1), proof.at(inner, Op.LOAD_X)
    proof.needs(inner, before, Op.POST_ATTN, "whose result it reads")
    stage = proof.schedule.stage
    enters = inner[stage[inner] != stage[before]]
    proof.needs(enters, proof.at(enters, Op.LOAD_X), Op.LOAD_X, "which brings hidden states from another stage")
    proof.waits(inner, loaded, "which brings hidden states that it reads")
    outer = firsts[proof.layer[firsts] == 0]
    last = np.full(len(outer), proof.schedule.num_layers - 1)
    place = proof.step[outer] - 1, last, proof.part[outer]
    known = proof.find(_COMPUTE_LAST, *place) >= 0
    proof.needs(outer[known], proof.find((Op.SAMPLE,), *place)[known], Op.SAMPLE, "which chooses the token it reads")


def _check_weights(proof: _Proof) -> None:
    """Pages are staged before they travel, all there before a layer starts, and none comes too early."""
    schedule = proof.schedule
    loads, pages = proof.of(Op.LOAD_W), schedule.num_pages
    if not len(loads):
        return
    if len(proof.of(Op.STAGE_W)):
        proof.needs(loads, proof.at(loads, Op.STAGE_W), Op.STAGE_W, "which stages what it moves")
    readers = proof.of(*_COMPUTE_LAST, *((Op.PRE_ATTN,) if schedule.name in _DENSE_TRAVELS else ()))
    # Experts that are tasks of their own are computed where their weights lie.
    readers = readers[proof.at(readers, Op.ADD_FFN) < 0]
    # In a pipeline of stages a layer's weights come again for every block of micro-batches.
    blocks = int(proof.part[loads].max()) // pages + 1
    if blocks > schedule.num_stages:
        beyond = loads[np.argmax(proof.part[loads])]
        raise InvalidSchedule(f"{proof.name(beyond)} is not one of a layer's {pages} pages.")
    ends = schedule.num_micro_batches * np.arange(1, blocks) // blocks
    block = np.concatenate((proof.part[loads] // pages, np.searchsorted(ends, proof.part[readers], side="right")))
    both = np.concatenate((loads, readers))
    table = np.column_stack((schedule.stage[both], proof.step[both], block, proof.layer[both]))
    visits, which = np.unique(table, axis=0, return_inverse=True)
    visit, read = np.split(which.ravel(), [len(loads)])
    short = np.bincount(visit, minlength=len(visits))[read] < pages
    if short.any():
        v = int(read[short][0])
        here = set(proof.part[loads[visit == v]].tolist())
        _, step, b, layer = visits[v].tolist()
        page = next(page for page in range(b * pages, (b + 1) * pages) if page not in here)
        lacking = f"{Op.LOAD_W.value}({step},{layer},{page})"
        raise InvalidSchedule(f"{proof.name(readers[short][0])} reads weights of which {lacking} is missing.")
    proof.all_wait(readers, read, loads, visit, "which brings weights that it reads")
    # Visits are numbered stage by stage; there is no slot that two stages share.
    free = visits[np.minimum(read + _WEIGHT_SLOTS, len(visits) - 1), 0] == visits[read, 0]
    why = "which reads the weights that it overwrites"
    proof.all_wait(loads, visit, readers[free], read[free] + _WEIGHT_SLOTS, why)


def _check_slots(proof: _Proof) -> None:
    """Rings of buffers: nothing comes into a slot before what lay there has been read."""
    why = "which still uses the slot that it fills"

    def follows(ids: np.ndarray, slots: int, uses: Sequence[tuple[tuple[Op, ...], tuple[Op, ...]]]) -> None:
        late, early = proof.successive(ids, slots)
        for writers, users in uses:
            filled = proof.at(late, *writers)
            for user in users:
                proof.waits(filled, proof.at(early, user), why)

    leaving = (Op.OFFLOAD_KV, Op.STORE_KV, Op.STORE_X, Op.PREFILL, Op.POST_ATTN, Op.SAMPLE, Op.ADD_FFN)
    experts: list[tuple[tuple[Op, ...], tuple[Op, ...]]] = [
        ((Op.PREFILL, Op.POST_ATTN), (Op.OFFLOAD_FFN, Op.GPU_FFN)),
        ((Op.OFFLOAD_FFN,), (Op.CPU_FFN,)),
        ((Op.CPU_FFN,), (Op.LOAD_FFN,)),
        ((Op.LOAD_FFN,), (Op.ADD_FFN,)),
        ((Op.GPU_FFN,), (Op.ADD_FFN,)),
        ((Op.PREFILL, Op.POST_ATTN), (Op.OFFLOAD_ROUTES, Op.ADD_FFN)),
    ]
    # Hidden states of a prompt come from the host or, in the first layer, from Prefill itself.
    follows(proof.of(Op.PREFILL), ACTIVATION_SLOTS, [((Op.LOAD_X, Op.PREFILL), leaving), *experts])
    follows(
        proof.of(Op.PRE_ATTN),
        ACTIVATION_SLOTS,
        [
            ((Op.LOAD_X,), leaving),
            ((Op.PRE_ATTN,), (Op.OFFLOAD_QKV, Op.GPU_ATTN, Op.STORE_KV)),
            ((Op.OFFLOAD_QKV,), (Op.CPU_ATTN,)),
            ((Op.CPU_ATTN,), (Op.LOAD_H,)),
            ((Op.LOAD_H,), (Op.POST_ATTN,)),
            *experts,
        ],
    )
    follows(proof.of(Op.GPU_ATTN), _KV_SLOTS, [((Op.LOAD_KV,), (Op.GPU_ATTN,))])
    ring = _PINNED_SLOTS.get(proof.schedule.name, PINNED_PAGES)
    if ring is not None:
        follows(proof.of(Op.STAGE_W), ring, [((Op.STAGE_W,), (Op.LOAD_W,))])


def _check_barriers(proof: _Proof) -> None:
    """Every task of a barrier's stage is over when it begins, or begins after it."""
    schedule = proof.schedule
    barriers = proof.of(Op.BARRIER)
    for number in range(proof.clock.shape[1]):
        tasks = np.flatnonzero(proof.queue == number)
        own = barriers[schedule.stage[barriers] == schedule.stage[tasks[0]]]
        following = proof.clock[own, number] + 1
        own, following = own[following < len(tasks)], following[following < len(tasks)]
        after = tasks[following]
        bad = np.flatnonzero(~proof.before(own, after))
        if len(bad):
            one, other = proof.name(own[bad[0]]), proof.name(after[bad[0]])
            raise InvalidSchedule(f"{one} does not wait for {other}, nor {other} for it.")
