"""Gates by name."""

from __future__ import annotations

from executor.gating.base import Gating
from executor.gating.dynamic import DynamicGating
from executor.gating.static import StaticGating
from executor.gating.tutel import TutelGating
from hrm.errors import InvalidValue
from hrm.gating import check_gating

__all__ = ["make_gating"]


def make_gating(name: str, *, capacity_factor: float | None = None) -> Gating:
    """A gate by name.

    Parameters
    ----------
    name : {"static", "tutel", "dynamic"}
    capacity_factor : float, optional
        Share of a batch's tokens that one expert takes. Static gating needs one; without one a Tutel-like gate adapts
        to the fullest expert; dynamic gating has none.

    Raises
    ------
    UnknownName, InvalidValue

    Examples
    --------
    >>> make_gating("static", capacity_factor=0.05)
    <static gating, capacity 0.05 of the tokens>
    """
    check_gating(name)
    if name == "static":
        if capacity_factor is None:
            raise InvalidValue("static gating needs a 'capacity_factor', such as 0.05; 1 drops nothing.")
        return StaticGating(capacity_factor)
    if name == "tutel":
        return TutelGating(capacity_factor)
    if capacity_factor is not None:
        raise InvalidValue(f"dynamic gating has no capacity; leave 'capacity_factor' out: {capacity_factor!r}")
    return DynamicGating()
