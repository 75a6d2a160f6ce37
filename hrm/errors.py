"""The kinds of failure a user can meet. Each carries one clear line and a process exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "DoesNotFit",
    "HrmError",
    "InvalidConfig",
    "InvalidSchedule",
    "InvalidValue",
    "NotBuiltYet",
    "PolicyInfeasible",
    "UnknownName",
]


class HrmError(Exception):
    """Base of every error that is the user's to mend; printed as one line, never as a traceback."""

    exit_code = 2


class InvalidValue(HrmError, ValueError):
    """An argument out of its range or in the wrong unit."""


class InvalidConfig(HrmError, ValueError):
    """A config, hardware or workload file with a missing, unknown or contradictory key."""


class InvalidSchedule(HrmError, ValueError):
    """A schedule that cannot be played: a cycle, an unknown task or lane, a read before its write."""


class CheckpointError(HrmError, ValueError):
    """A checkpoint that is missing, truncated or not of the architecture its config names."""


class UnknownName(HrmError, LookupError):
    """A name that is in no catalog; the message suggests the nearest one."""

    @classmethod
    def of(cls, kind: str, name: str, known: Iterable[str]) -> UnknownName:
        """Build the error for `name`, listing `known` and suggesting the closest match."""
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return cls(f"unknown {kind} {name!r}.{hint} Known: {', '.join(names)}.")


class NotBuiltYet(HrmError):
    """A part of the command contract that this version does not have."""


class DoesNotFit(HrmError):
    """A model or policy that needs more memory than a tier has."""

    exit_code = 3


class PolicyInfeasible(DoesNotFit):
    """No policy in the search space satisfies the memory of the machine."""
