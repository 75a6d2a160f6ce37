"""What README shows is what the commands print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").splitlines()


def block(first: str) -> list[str]:
    """Lines of the indented block that begins with `first`, without their indent."""
    start = next(number for number, line in enumerate(README) if line.startswith(f"    {first}"))
    stop = next(number for number, line in enumerate(README[start:], start) if not line.startswith("    "))
    return [line[4:] for line in README[start:stop]]


def without_search(lines: list[str]) -> list[str]:
    """All but the line that says how long the search took."""
    return [line for line in lines if not line.startswith("  search ")]


def test_the_sample_plan_is_what_is_printed(hrm: Any) -> None:
    """Of the first `hrm plan` under "Use it", but for the time that the search takes."""
    command = next(line for line in README if line.startswith("    .venv/bin/hrm plan ")).split()[1:]
    shown, done = block("mixtral-8x7b on gcp-l4-1x"), hrm(*command)
    assert done.code == 0
    assert without_search(shown) == without_search(done.out.splitlines())
    assert len(shown) == len(without_search(shown)) + 1
