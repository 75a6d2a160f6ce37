"""Tensor parallelism of ``hrm run``: ``--tp N`` starts the ranks, ``torchrun`` may have started them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import click

from experiments.running import measure
from hrm import Hardware, Policy
from hrm.errors import InvalidValue

if TYPE_CHECKING:
    from executor.checkpoint import Checkpoint
    from executor.families import Shard
    from executor.ranks import Team
    from executor.results import GenerationResult

__all__ = ["Ranks", "tp_option"]

tp_option = click.option(
    "--tp",
    type=click.IntRange(1, 64),
    metavar="N",
    help="Tensor parallelism: processes (with GPUs: one on each) that share heads and experts. [default: 1]",
)


class Ranks:
    """The processes that a command computes on: this one alone, or this one as rank 0.

    Processes are started when they are first needed, and end with the context.

    Parameters
    ----------
    tp : int or None
        Number of ranks; by default as many as a launcher has started, else 1.
    device : str or None
        "cuda" or "cpu"; by default CUDA where there is one.

    Raises
    ------
    InvalidValue
        If a launcher has started another number.
    """

    def __init__(self, tp: int | None, device: str | None) -> None:
        from executor.ranks import environment_ranks

        self._device, self._team = device, None
        self._stack = contextlib.ExitStack()
        started = environment_ranks()
        self._joins = started is not None and started[1] > 1
        self._rank, self.world = started if started is not None and self._joins else (0, tp or 1)
        if tp is not None and tp != self.world:
            raise InvalidValue(f"--tp {tp} and a launcher that has started {self.world} processes; leave --tp out.")

    _team: Team | None

    @property
    def shard(self) -> Shard:
        """What this process holds of a checkpoint."""
        from executor.families import Shard

        return Shard(self._rank, self.world)

    def follow(self) -> bool:
        """On ranks that a launcher has started beside rank 0: do what that asks for; True when it has left."""
        if self._rank == 0:
            return False
        from executor.ranks import follow

        follow(device=self._device)
        return True

    def __enter__(self) -> Self:
        if self._joins:
            self._meet()  # the others wait, whether there is work or not
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def _meet(self) -> Team:
        from executor.ranks import join, launch

        if self._team is None:
            context = join(device=self._device) if self._joins else launch(self.world, device=self._device)
            self._team = self._stack.enter_context(context)
        return self._team

    def auto_policy(
        self,
        checkpoint: Checkpoint,
        prompt_lens: Sequence[int],
        gen_len: int,
        *,
        hardware: Hardware | None,
        device: Any,
        **options: Any,
    ) -> Policy:
        """As `executor.placements.auto_policy`; without `hardware`, what is measured is this process' part."""
        if self.world == 1:
            from executor.placements import auto_policy

            machine = hardware or measure(checkpoint.model, self._device)
            return auto_policy(checkpoint, prompt_lens, gen_len, hardware=machine, device=device, **options)
        from executor.tensor_parallel import policy_for

        team = self._meet()
        part = None if hardware else measure(checkpoint.local, self._device)
        return policy_for(team, checkpoint, prompt_lens, gen_len, hardware=hardware, part=part, **options)

    def generate(
        self, checkpoint: Checkpoint, prompts: Sequence[Sequence[int]], *, device: str, **options: Any
    ) -> GenerationResult:
        """As `executor.generate.generate`, on all ranks."""
        if self.world == 1:
            from executor.generate import generate

            return generate(checkpoint, prompts, device=device, **options)
        from executor.tensor_parallel import generate_on

        return generate_on(self._meet(), checkpoint, prompts, **options)
