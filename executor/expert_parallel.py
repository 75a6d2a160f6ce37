"""Expert parallelism: every process has some of the experts, and tokens travel to them and back.

Each process brings its own tokens. A gate sorts them as it would for local experts; what it takes for the experts is
`ExpertParallel`, which exchanges rows over torch.distributed (gloo on CPUs, NCCL on GPUs). With dynamic gating the
processes first tell each other how many rows they will send, while they still gather them, and then exchange exactly
these rows. Static and Tutel-like gates send the same number of rows for every expert, empty slots included.

References
----------
arXiv 2303.06182, section IV.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from executor.gating import Experts, Gating, GatingStats
from executor.gating.base import RunExperts
from executor.ranks import RankLost
from hrm.errors import InvalidValue

__all__ = ["Exchange", "ExpertParallel", "check_placement", "experts_of"]


@dataclass(frozen=True, slots=True)
class Exchange:
    """What a process sent to others in one call; what stays with it does not count."""

    rows: int = 0
    """Tokens or empty slots sent to experts elsewhere."""
    bytes_out: int = 0
    """Of these rows."""
    bytes_back: int = 0
    """Of the answers to rows that came from others."""
    bytes_sizes: int = 0
    """Of the numbers that precede them."""

    @property
    def total(self) -> int:
        """All bytes sent."""
        return self.bytes_out + self.bytes_back + self.bytes_sizes


def check_placement(num_experts: int, world: int, placement: Sequence[int] | None = None) -> tuple[int, ...]:
    """The process of every expert, [E]; by default the first E/D experts on the first of D processes, and so on.

    Raises
    ------
    InvalidValue
        If not every process has E/D experts.

    Examples
    --------
    >>> check_placement(4, 2)
    (0, 0, 1, 1)
    """
    if world < 1:
        raise InvalidValue(f"'world' must be >= 1: {world}")
    if num_experts < 1 or num_experts % world:
        raise InvalidValue(
            f"{num_experts} experts cannot be split evenly over {world} processes; use a number of processes that "
            f"divides {num_experts}."
        )
    each = num_experts // world
    if placement is None:
        return tuple(e // each for e in range(num_experts))
    found = tuple(int(p) for p in placement)
    if len(found) != num_experts:
        raise InvalidValue(f"'placement' must name a process for each of {num_experts} experts: {len(found)} given.")
    for rank in sorted(set(found) | set(range(world))):
        if not 0 <= rank < world:
            raise InvalidValue(f"'placement' names process {rank}; there are 0..{world - 1}.")
        if found.count(rank) != each:
            raise InvalidValue(
                f"'placement' puts {found.count(rank)} experts on process {rank}; each of {world} takes {each}."
            )
    return found


def experts_of(rank: int, placement: Sequence[int]) -> list[int]:
    """Numbers of the experts that a placement gives to a process, rising."""
    return [e for e, place in enumerate(placement) if place == rank]


class ExpertParallel:
    """This process's part of a layer whose experts are spread over all processes of a group.

    Parameters
    ----------
    experts : RunExperts
        Runs the experts of this process, in the order of `experts_of`.
    num_experts : int
        E, on all processes together.
    placement : sequence of int, [E], optional
        Process of every expert, the same everywhere; as many on each. See `check_placement`.
    group : ProcessGroup, optional
        By default all processes; where torch.distributed is not in use, this one alone.

    Raises
    ------
    InvalidValue
    """

    def __init__(
        self,
        experts: RunExperts,
        num_experts: int,
        *,
        placement: Sequence[int] | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        alone = not dist.is_initialized()
        self.world = 1 if alone else dist.get_world_size(group)
        self.rank = 0 if alone else dist.get_rank(group)
        self.placement = check_placement(num_experts, self.world, placement)
        self.num_experts, self.group = num_experts, group
        self._experts = experts
        # Gates see experts in the order of processes, so that what goes to one of them lies in one piece.
        order = sorted(range(num_experts), key=lambda e: self.placement[e])
        self._position = torch.tensor([order.index(e) for e in range(num_experts)] + [num_experts])

    def __call__(
        self, x: torch.Tensor, expert_index: torch.Tensor, expert_weight: torch.Tensor, gating: Gating
    ) -> tuple[torch.Tensor, GatingStats, Exchange]:
        """Run a layer on this process's tokens; all processes of the group call it together, with the same gate.

        Parameters
        ----------
        x : Tensor, [S, H]
            S may differ from process to process, and be 0.
        expert_index, expert_weight : Tensor, [S, k]
        gating : Gating

        Returns
        -------
        Tensor, [S, H]
        GatingStats
            Of this process's tokens, wherever they were computed.
        Exchange

        Raises
        ------
        RankLost
            If another process has ended.
        """
        self._position = self._position.to(x.device)
        remote = _Remote(self, x.device)
        out, stats = gating(x, self._position[expert_index], expert_weight, remote, self.num_experts)
        return out, stats, remote.exchange


class _Remote(Experts):
    """The experts of all processes, for one call of a gate."""

    def __init__(self, layer: ExpertParallel, device: torch.device) -> None:
        self._layer, self._device = layer, device
        self._each = layer.num_experts // layer.world
        self._pending: tuple[Any, torch.Tensor] | None = None
        self.exchange = Exchange()

    def agree(self, capacity: int) -> int:
        """The largest capacity of all processes: equal exchanges need equal sizes."""
        if self._layer.world == 1:
            return capacity
        largest = torch.tensor([capacity], device=self._device)
        with self._contact():
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._layer.group)
        return int(largest)

    def announce(self, counts: Sequence[int]) -> None:
        """Start to tell every process how many rows its experts will get from here."""
        if self._layer.world == 1:
            return
        mine = torch.tensor(counts, device=self._device).view(self._layer.world, self._each)
        theirs = torch.empty_like(mine)
        with self._contact():
            work = dist.all_to_all_single(theirs, mine, group=self._layer.group, async_op=True)
        self._pending = work, theirs
        self.exchange = replace(self.exchange, bytes_sizes=(self._layer.world - 1) * self._each * mine.itemsize)

    def __call__(self, rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """Send the rows to their experts, run those that are here on what came, send the answers back."""
        layer, each = self._layer, self._each
        if layer.world == 1:
            return layer._experts(rows, counts)
        sent = [sum(counts[r * each : (r + 1) * each]) for r in range(layer.world)]
        if self._pending is None:
            theirs = torch.full((layer.world, each), counts[0], device=self._device)
        else:
            work, theirs = self._pending
            with self._contact():
                work.wait()
        sizes = theirs.tolist()  # [source][expert here]
        received = [sum(of_one) for of_one in sizes]
        rows = rows.contiguous()
        arrived = rows.new_empty(sum(received), rows.shape[1])
        self._swap(arrived, rows, received, sent)
        # By source now, and there by expert; experts want all of theirs in one run.
        expert = torch.arange(each, device=self._device).repeat(layer.world).repeat_interleave(theirs.flatten())
        order = expert.argsort(stable=True)
        arrived[order] = layer._experts(arrived[order], [sum(column) for column in zip(*sizes, strict=True)])
        self._swap(rows, arrived, sent, received)
        width = rows.shape[1] * rows.itemsize
        out, back = (sum(part) - part[layer.rank] for part in (sent, received))
        self.exchange = replace(self.exchange, rows=out, bytes_out=out * width, bytes_back=back * width)
        return rows

    def _swap(self, into: torch.Tensor, out: torch.Tensor, into_sizes: list[int], out_sizes: list[int]) -> None:
        with self._contact():
            dist.all_to_all_single(into, out, into_sizes, out_sizes, group=self._layer.group)

    @contextlib.contextmanager
    def _contact(self) -> Iterator[None]:
        """Turn what a backend raises when a process is gone into `RankLost`."""
        try:
            yield
        except RuntimeError as error:
            reason = str(error).splitlines()[0].partition("] ")[2] or str(error)
            raise RankLost(
                f"process {self._layer.rank} of {self._layer.world} lost contact with the others: {reason[:120]}"
            ) from None
