"""``hrm experts``: gating, caching and placement of experts ("Towards MoE Deployment", arXiv 2303.06182)."""

from __future__ import annotations

import click

from experiments.experts.cache import cache_command
from experiments.experts.gating import gating_command
from experiments.experts.placement import placement_command

__all__ = ["experts_group"]


@click.group("experts")
def experts_group() -> None:
    """Expert gating, caching and placement."""


for _command in (gating_command, cache_command, placement_command):
    experts_group.add_command(_command)
