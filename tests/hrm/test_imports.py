"""The direction of imports, and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FORBIDDEN = {
    "hrm": {"simulator", "executor", "experiments", "notebooks", "torch", "transformers"},
    "simulator": {"executor", "experiments", "notebooks", "torch", "transformers"},
}
HEAVY = ("torch", "transformers", "pandas", "matplotlib")


def imported(path: Path) -> Iterator[str]:
    """Top-level names of all modules that a file imports, at any depth of the code."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("room", FORBIDDEN)
def test_rooms_import_in_one_direction(room: str) -> None:
    """No file of a room imports a room that stands on it, nor torch or transformers, not even lazily."""
    files = sorted((ROOT / room).rglob("*.py"))
    assert len(files) > 5
    wrong = {str(path.relative_to(ROOT)): sorted(set(imported(path)) & FORBIDDEN[room]) for path in files}
    assert {path: names for path, names in wrong.items() if names} == {}


@pytest.mark.parametrize("room", FORBIDDEN)
def test_importing_a_room_is_light(room: str) -> None:
    """A fresh interpreter that imports the room has loaded none of the heavy libraries."""
    code = f"import sys, {room}; print(','.join(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == ""


def test_the_public_names_are_there() -> None:
    """The names that the documentation imports exist."""
    import hrm
    import simulator

    assert {"Hardware", "MoEModel", "Workload", "Policy", "plan", "evaluate"} <= set(hrm.__all__)
    assert {"build_schedule", "simulate", "Schedule", "Timeline"} <= set(simulator.__all__)
    assert all(hasattr(hrm, name) for name in hrm.__all__)
    assert all(hasattr(simulator, name) for name in simulator.__all__)
