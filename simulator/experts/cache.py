"""Caches of experts: which of a layer's experts lie in a few slots, and which one makes room for the next.

All experts of a MoE layer lie in the host's memory and K of them in slots on the device ("Towards MoE Deployment",
arXiv 2303.06182, expert buffering). The experts that a batch uses are taken in increasing id; one that is not there is
copied in, and when all slots are full the policy names the expert that it replaces. `simulator.experts.replay` plays
whole traces through the same policies in compiled code.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from hrm.errors import InvalidValue, UnknownName

__all__ = ["CACHE_POLICIES", "DEFAULT_POLICY", "Access", "CachePolicy", "ExpertCache", "cache_policy"]


class Access(NamedTuple):
    """What happened when a batch asked for one expert."""

    expert: int
    hit: bool
    """It lay in a slot. If not, it is copied into one."""
    evicted: int | None
    """The expert whose slot it took; None on a hit, and while slots are free."""


class CachePolicy(ABC):
    """Which expert to evict. A policy is told what happens and ranks the residents; the highest rank leaves.

    Parameters
    ----------
    slots, num_experts : int
        Slots of the cache, and experts that may come into it.
    future : sequence of sequences of int, optional
        Active sets of all batches to come, for policies that look ahead.
    """

    name: ClassVar[str]
    looks_ahead: ClassVar[bool] = False

    def __init__(self, slots: int, num_experts: int, *, future: Sequence[Sequence[int]] | None = None) -> None:
        self.slots = slots
        self.num_experts = num_experts

    def start(self, active: Sequence[int]) -> None:  # noqa: B027
        """A batch begins that uses the experts `active`, in this order."""

    def hit(self, expert: int) -> None:  # noqa: B027
        """The batch uses an expert that lies in a slot."""

    def admit(self, expert: int) -> None:  # noqa: B027
        """The batch uses an expert that was not there; it lies in a slot now."""

    @abstractmethod
    def rank(self, expert: int, wanted: int) -> Any:
        """How much a resident may leave when `wanted` needs a slot; no two residents rank the same."""

    def victim(self, wanted: int, resident: Collection[int]) -> int:
        """The resident that leaves so that `wanted` can come."""
        return max(resident, key=lambda expert: self.rank(expert, wanted))


class _ByAdmission(CachePolicy):
    """Remembers in which order experts came."""

    def __init__(self, slots: int, num_experts: int, *, future: Sequence[Sequence[int]] | None = None) -> None:
        super().__init__(slots, num_experts)
        self._clock = 0
        self._admitted = [0] * num_experts

    def admit(self, expert: int) -> None:
        self._clock += 1
        self._admitted[expert] = self._clock


class Lifo(_ByAdmission):
    """The expert that came last leaves."""

    name = "lifo"

    def rank(self, expert: int, wanted: int) -> int:
        return self._admitted[expert]


class Fifo(_ByAdmission):
    """The expert that came first leaves."""

    name = "fifo"

    def rank(self, expert: int, wanted: int) -> int:
        return -self._admitted[expert]


class InactiveFirstLifo(_ByAdmission):
    """Experts that this batch does not use leave first, then the one that came last (arXiv 2303.06182, Section VI).

    Experts run in increasing id, so that the residents that came first are those that the next batch needs first.
    Among inactive experts, too, the one that came last leaves.

    Examples
    --------
    >>> cache = ExpertCache("inactive-first-lifo", slots=2, num_experts=4)
    >>> [(access.expert, access.evicted) for access in cache.batch([1, 2, 3])]
    [(1, None), (2, None), (3, 2)]
    """

    name = "inactive-first-lifo"

    def __init__(self, slots: int, num_experts: int, *, future: Sequence[Sequence[int]] | None = None) -> None:
        super().__init__(slots, num_experts)
        self._active: frozenset[int] = frozenset()

    def start(self, active: Sequence[int]) -> None:
        self._active = frozenset(active)

    def rank(self, expert: int, wanted: int) -> tuple[bool, int]:
        return expert not in self._active, self._admitted[expert]

    def victim(self, wanted: int, resident: Collection[int]) -> int:
        # As by rank; jobs wait for it, in every layer of every step.
        inactive = [expert for expert in resident if expert not in self._active]
        return max(inactive or resident, key=self._admitted.__getitem__)


class Lru(CachePolicy):
    """The expert that was used least recently leaves."""

    name = "lru"

    def __init__(self, slots: int, num_experts: int, *, future: Sequence[Sequence[int]] | None = None) -> None:
        super().__init__(slots, num_experts)
        self._clock = 0
        self._used = [0] * num_experts

    def hit(self, expert: int) -> None:
        self._clock += 1
        self._used[expert] = self._clock

    admit = hit

    def rank(self, expert: int, wanted: int) -> Any:
        return -self._used[expert]


class Lfu(Lru):
    """The expert that the fewest batches have used so far leaves; of several, the one used least recently.

    Uses are counted whether the expert lay in a slot or not, so that ranks do not depend on the number of slots.
    """

    name = "lfu"

    def __init__(self, slots: int, num_experts: int, *, future: Sequence[Sequence[int]] | None = None) -> None:
        super().__init__(slots, num_experts)
        self._uses = [0] * num_experts

    def hit(self, expert: int) -> None:
        super().hit(expert)
        self._uses[expert] += 1

    admit = hit

    def rank(self, expert: int, wanted: int) -> tuple[int, int]:
        return -self._uses[expert], -self._used[expert]


class Min(CachePolicy):
    """The expert whose next use lies furthest ahead leaves: the fewest misses that are possible.

    Belady's MIN (IBM Systems Journal 5:2, 1966). It must know the future: every batch that the cache will be given.
    """

    name = "min"
    looks_ahead = True

    def __init__(self, slots: int, num_experts: int, *, future: Sequence[Sequence[int]] | None = None) -> None:
        super().__init__(slots, num_experts)
        if future is None:
            raise InvalidValue("cache policy 'min' looks ahead: give the active sets of all batches as 'future'.")
        self._future = [tuple(int(e) for e in active) for active in future]
        self._uses: list[list[int]] = [[] for _ in range(num_experts)]
        at = 0
        for active in self._future:
            for expert in active:
                if not 0 <= expert < num_experts:
                    raise InvalidValue(f"'future' has expert {expert}, which is not in 0..{num_experts - 1}.")
                self._uses[expert].append(at)
                at += 1
        self._never = at
        for uses in self._uses:
            uses.reverse()
        self._batch = 0

    def start(self, active: Sequence[int]) -> None:
        if self._batch >= len(self._future) or tuple(active) != self._future[self._batch]:
            raise InvalidValue(f"batch {self._batch} is not the one that 'future' announced: {list(active)}.")
        self._batch += 1

    def hit(self, expert: int) -> None:
        self._uses[expert].pop()

    admit = hit

    def rank(self, expert: int, wanted: int) -> int:
        uses = self._uses[expert]
        return uses[-1] if uses else self._never + expert


class NextUse(CachePolicy):
    """MIN as far as it can be known: what this batch still needs is certain, later batches are guessed.

    Residents that the batch still needs stay; if all are needed, the one with the highest id leaves. Of the others that
    one leaves which is least likely to be used soon. The guess: every past batch votes for its experts, with the eighth
    power of how much the batch before it is like this one, and half of that passes on to the batch after it, and so on.
    As many votes as there are in all are shared out by how often recent batches used each expert, where recent is short
    or long, whichever explains more of the last batches, and this batch's experts get a little more. Likeness is the
    number of experts in common, counted twice, and that of the batches before the two.

    It knows this batch's active set and those of at most `WINDOW` batches before, nothing that comes later. All
    arithmetic is in integers, so that compiled code ranks exactly alike. Its constants were chosen on synthetic
    traces and on the first half of a public OLMoE trace (https://github.com/sqliteai/warp); while the form was being
    found, results on the whole of that trace were seen, so that its second half is no clean test.
    """

    name = "next-use"
    WINDOW: ClassVar[int] = 128
    """Batches that this one is compared with; at most two for every expert."""
    ONE: ClassVar[int] = 1 << 16
    """The share of an expert that all recent batches used."""
    FORGET: ClassVar[tuple[int, int]] = (2, 6)
    """Shares forget 1/2**FORGET per batch: the short memory and the long one."""
    LATEST: ClassVar[int] = (1 << 16) // 8
    """What an expert of this batch has on top of its share."""
    JUDGE: ClassVar[int] = 4
    """What they explained is forgotten by 1/2**JUDGE per batch."""
    WEIGHTS: ClassVar[tuple[int, ...]] = tuple(q**8 >> 28 for q in range(65))
    """Votes by likeness, in 64ths of that of the batch most like this one."""

    def __init__(self, slots: int, num_experts: int, *, future: Sequence[Sequence[int]] | None = None) -> None:
        super().__init__(slots, num_experts)
        self._window = self.window(num_experts)
        self._shares = np.zeros((len(self.FORGET), num_experts), np.int64)
        self._explained = [0 for _ in self.FORGET]
        self._active: frozenset[int] = frozenset()
        # The batches looked back on and the one before them: experts one after the other, and how many each has.
        self._experts = np.zeros(0, np.int64)
        self._sizes: deque[int] = deque()
        self._common = np.zeros(0, np.int64)
        self._worth: list[int] = [0] * num_experts
        self._places: list[int] | None = None

    @classmethod
    def window(cls, num_experts: int) -> int:
        """Batches that are looked back on."""
        return min(cls.WINDOW, 2 * num_experts)

    def start(self, active: Sequence[int]) -> None:
        self._active = frozenset(active)
        now = np.array(active, np.int64)
        share = self._follow(now)
        share[now] += self.LATEST
        common = self._in_common(now)
        # `_common` was counted one batch ago, when what is looked back on began at most one batch earlier.
        before = np.concatenate([[0], self._common])[len(self._common) + 1 - len(common) :]
        alike = (2 * common + before)[-self._window :].tolist()
        self._remember(now)
        votes, total = self._votes(alike)
        self._worth = (votes * self.ONE + (total + 1) * share).tolist()
        self._places = None
        self._common = common

    def _follow(self, now: np.ndarray) -> np.ndarray:
        """Count this batch, and what shares foretold of it; a copy of those that have foretold more."""
        for memory, (share, forget) in enumerate(zip(self._shares, self.FORGET, strict=True)):
            # The squares that are left over when shares, at their best scale, foretell this batch are fewer by this.
            met, whole = int((share[now] >> 8).sum()), int(((share >> 8) ** 2).sum())
            self._explained[memory] += (met * met << 8) // (whole + 1) - (self._explained[memory] >> self.JUDGE)
            used = np.zeros_like(share)
            used[now] = self.ONE
            share += (used - share) >> forget
        return self._shares[1 if self._explained[1] > self._explained[0] else 0].copy()

    def _in_common(self, now: np.ndarray) -> np.ndarray:
        """Experts that each past batch has in common with this one."""
        used = np.zeros(self.num_experts, np.int64)
        used[now] = 1
        so_far = np.concatenate([[0], used[self._experts].cumsum()])
        ends = so_far[np.cumsum([0, *self._sizes])]
        return ends[1:] - ends[:-1]

    def _remember(self, now: np.ndarray) -> None:
        self._sizes.append(len(now))
        forgotten = self._sizes.popleft() if len(self._sizes) > self._window + 1 else 0
        self._experts = np.concatenate([self._experts[forgotten:], now])

    def _votes(self, alike: list[int]) -> tuple[np.ndarray, int]:
        """Of the batches after those that are `alike`, the votes for every expert, and all that each batch gave."""
        scale = (64 << 16) // max([1, *alike])
        given, passed = [], 0
        for likeness in alike:
            passed = self.WEIGHTS[likeness * scale >> 16] + (passed >> 1)
            given.append(passed)
        if not given:
            return np.zeros(self.num_experts, np.int64), 0
        sizes = list(self._sizes)[-len(given) :]
        following = self._experts[len(self._experts) - sum(sizes) :]
        votes = np.bincount(following, np.repeat(given, sizes), self.num_experts)  # whole numbers, far below 2**53
        return votes.astype(np.int64), sum(given)

    def rank(self, expert: int, wanted: int) -> tuple[bool, int, int]:
        if expert > wanted and expert in self._active:
            return False, 0, expert
        return True, -self._worth[expert], expert

    def victim(self, wanted: int, resident: Collection[int]) -> int:
        # As by rank; jobs wait for it, in every layer of every step.
        if self._places is None:
            order = sorted(range(self.num_experts - 1, -1, -1), key=self._worth.__getitem__)
            self._places = [0] * self.num_experts
            for place, expert in enumerate(order):
                self._places[expert] = place
        idle = [expert for expert in resident if expert <= wanted or expert not in self._active]
        return min(idle, key=self._places.__getitem__) if idle else max(resident)


CACHE_POLICIES: dict[str, type[CachePolicy]] = {
    policy.name: policy for policy in (InactiveFirstLifo, NextUse, Lifo, Fifo, Lru, Lfu, Min)
}
"""Policies by name; the paper's first."""

DEFAULT_POLICY = InactiveFirstLifo.name


def cache_policy(name: str) -> type[CachePolicy]:
    """The policy of that name.

    Raises
    ------
    UnknownName
        There is none.
    """
    if name not in CACHE_POLICIES:
        raise UnknownName.of("cache policy", name, CACHE_POLICIES)
    return CACHE_POLICIES[name]


class ExpertCache:
    """The experts of one MoE layer that lie in K slots.

    Parameters
    ----------
    policy : str
        A key of `CACHE_POLICIES`.
    slots : int
        K; with as many as there are experts nothing is ever evicted.
    num_experts : int
        Experts that may come: those of the layer, or those that the device holds, numbered from 0.
    future : sequence of sequences of int, optional
        Active sets of all batches to come; only "min" needs it, others do not look at it.

    Raises
    ------
    UnknownName, InvalidValue
        No such policy; no slots or no experts; "min" without the future.

    Examples
    --------
    >>> cache = ExpertCache("lru", slots=2, num_experts=4)
    >>> cache.batch([0, 3])
    [Access(expert=0, hit=False, evicted=None), Access(expert=3, hit=False, evicted=None)]
    >>> cache.batch([0, 2])
    [Access(expert=0, hit=True, evicted=None), Access(expert=2, hit=False, evicted=3)]
    >>> sorted(cache.resident)
    [0, 2]
    """

    def __init__(
        self, policy: str, slots: int, num_experts: int, *, future: Sequence[Sequence[int]] | None = None
    ) -> None:
        kind = cache_policy(policy)
        if slots < 1:
            raise InvalidValue(f"'slots' must be >= 1: {slots}")
        if num_experts < 1:
            raise InvalidValue(f"'num_experts' must be >= 1: {num_experts}")
        self.policy = policy
        self.slots = slots
        self.num_experts = num_experts
        self._policy = kind(slots, num_experts, future=future)
        self._resident: set[int] = set()

    @property
    def resident(self) -> Collection[int]:
        """Experts that lie in slots now."""
        return frozenset(self._resident)

    def batch(self, active: Sequence[int]) -> list[Access]:
        """Use the experts of one batch, one after the other.

        Parameters
        ----------
        active : sequence of int
            Distinct ids in increasing order; none if the batch needs nothing from this cache.

        Returns
        -------
        list of Access
            In the same order. What an access evicts is used no more, or comes back as a miss; what was accessed before
            may be overwritten, since each expert computes before the next one is copied.
        """
        experts = self._checked(active)
        self._policy.start(experts)
        accesses = []
        for expert in experts:
            if expert in self._resident:
                self._policy.hit(expert)
                accesses.append(Access(expert, True, None))
                continue
            evicted = None
            if len(self._resident) >= self.slots:
                evicted = self._policy.victim(expert, self._resident)
                self._resident.remove(evicted)
            self._resident.add(expert)
            self._policy.admit(expert)
            accesses.append(Access(expert, False, evicted))
        return accesses

    def _checked(self, active: Sequence[int]) -> tuple[int, ...]:
        experts = tuple(int(expert) for expert in active)
        before = -1
        for expert in experts:
            if not 0 <= expert < self.num_experts:
                raise InvalidValue(f"'active' has expert {expert}, which is not in 0..{self.num_experts - 1}.")
            if expert <= before:
                raise InvalidValue(f"'active' must be distinct ids in increasing order: {expert} after {before}.")
            before = expert
        return experts

    def __repr__(self) -> str:
        return f"<ExpertCache {self.policy!r}: {len(self._resident)} of {self.slots} slots, {self.num_experts} experts>"
