"""The error tree and its exit codes."""

from __future__ import annotations

import pytest

from hrm import errors
from hrm.errors import DoesNotFit, HrmError, InvalidConfig, PolicyInfeasible, UnknownName


def test_unknown_name_suggests_the_nearest() -> None:
    """A misspelt name is answered with the closest known one and the whole list."""
    error = UnknownName.of("model", "mixtral-8x7", ["mixtral-8x7b", "dbrx", "mixtral-8x22b"])
    assert str(error) == (
        "unknown model 'mixtral-8x7'. Did you mean 'mixtral-8x7b'? Known: dbrx, mixtral-8x22b, mixtral-8x7b."
    )


def test_unknown_name_suggests_nothing_far_fetched() -> None:
    """A name that resembles none is answered with the list alone."""
    message = str(UnknownName.of("workload", "zzz", ["mtbench", "helm-summarization"]))
    assert "Did you mean" not in message
    assert message.endswith("Known: helm-summarization, mtbench.")


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_is_the_users_to_mend(name: str) -> None:
    """Every public error derives from the base and has exit code 2, or 3 where something does not fit."""
    kind = getattr(errors, name)
    assert issubclass(kind, HrmError)
    assert kind.exit_code == (3 if issubclass(kind, DoesNotFit) else 2)


def test_exit_codes() -> None:
    """Bad input exits with 2, what does not fit with 3."""
    assert InvalidConfig("x").exit_code == 2
    assert UnknownName("x").exit_code == 2
    assert DoesNotFit("x").exit_code == 3
    assert PolicyInfeasible("x").exit_code == 3
    assert issubclass(PolicyInfeasible, DoesNotFit)


def test_errors_derive_from_the_nearest_builtin() -> None:
    """Callers may catch ValueError and LookupError."""
    assert issubclass(errors.InvalidValue, ValueError)
    assert issubclass(errors.InvalidSchedule, ValueError)
    assert issubclass(UnknownName, LookupError)
