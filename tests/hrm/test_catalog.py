"""The catalog: everything in it loads, by name or by path."""

from __future__ import annotations

import pytest

from hrm import catalog
from hrm.errors import UnknownName

LOADERS = {"hardware": catalog.load_hardware, "models": catalog.load_model, "workloads": catalog.load_workload}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in LOADERS for name in catalog.names(kind)])
def test_every_entry_loads_under_its_name(kind: str, name: str) -> None:
    """Every entry loads and calls itself by its file's name."""
    assert LOADERS[kind](name).name == name


def test_the_contracts_names_are_there() -> None:
    """The names that the papers' main settings go by are in the catalog."""
    assert {"gcp-t4-1x", "gcp-l4-1x"} <= set(catalog.names("hardware"))
    assert "mixtral-8x7b" in catalog.names("models")
    assert {"mtbench", "helm-synthetic-reasoning", "helm-summarization"} <= set(catalog.names("workloads"))


@pytest.mark.parametrize(("kind", "word"), [("hardware", "hardware"), ("models", "model"), ("workloads", "workload")])
def test_an_unknown_name_says_what_kind(kind: str, word: str) -> None:
    """An unknown name is refused as what it was meant to be, with all that are known."""
    with pytest.raises(UnknownName, match=f"unknown {word} 'zzzz'") as caught:
        LOADERS[kind]("zzzz")
    assert all(name in str(caught.value) for name in catalog.names(kind))
