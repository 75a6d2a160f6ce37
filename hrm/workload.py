"""Prompts to answer: how long they are, how many tokens each asks for."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hrm.errors import InvalidConfig, InvalidValue
from hrm.units import MAX_SIZE, brief

__all__ = ["Workload"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A stream of requests with prompt lengths and a generation length.

    Examples
    --------
    >>> Workload.parse("512,32").prompt_avg
    512.0
    """

    name: str
    prompt_avg: float
    """Mean prompt length, tokens."""
    prompt_max: int
    """Longest prompt, tokens."""
    gen_len: int
    """Tokens generated per request."""
    padded: bool = False
    """Pad every prompt to `prompt_max`."""
    prompt_lens: tuple[int, ...] = ()
    """Length of each prompt where known; a batch larger than the list repeats it."""
    source: str = ""

    def __post_init__(self) -> None:
        numbers = {"prompt_avg": self.prompt_avg, "prompt_max": self.prompt_max, "gen_len": self.gen_len}
        for name, value in numbers.items():
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise InvalidValue(f"{name!r} must be a number: {brief(value)}")
            if value > MAX_SIZE:
                raise InvalidValue(f"{name!r} must be <= {MAX_SIZE}: {brief(value)}")
        if not all(isinstance(n, int) and not isinstance(n, bool) for n in self.prompt_lens):
            raise InvalidValue("'prompt_lens' must be whole numbers.")
        if not self.gen_len >= 1:
            raise InvalidValue(f"'gen_len' must be >= 1: {self.gen_len}")
        if not 0 < self.prompt_avg <= self.prompt_max:
            raise InvalidValue(
                f"'prompt_avg' must be > 0 and <= prompt_max={self.prompt_max}: {brief(self.prompt_avg)}"
            )
        if any(n < 1 for n in self.prompt_lens):
            raise InvalidValue(f"'prompt_lens' must be >= 1: {min(self.prompt_lens)}")
        if self.prompt_lens and max(self.prompt_lens) > self.prompt_max:
            raise InvalidValue(f"'prompt_lens' must be <= prompt_max={self.prompt_max}: {brief(max(self.prompt_lens))}")

    @classmethod
    def uniform(cls, prompt_len: int, gen_len: int) -> Workload:
        """Every prompt has `prompt_len` tokens."""
        for key, value in (("prompt_len", prompt_len), ("gen_len", gen_len)):
            if value < 1:
                raise InvalidValue(f"{key!r} must be >= 1: {brief(value)}")
            if value > MAX_SIZE:
                raise InvalidValue(f"{key!r} must be <= {MAX_SIZE}: {brief(value)}")
        return cls(
            name=f"{prompt_len},{gen_len}",
            prompt_avg=float(prompt_len),
            prompt_max=prompt_len,
            gen_len=gen_len,
        )

    @classmethod
    def parse(cls, text: str) -> Workload:
        """A catalog name, a workload file, or ``"prompt_len,gen_len"``."""
        match = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", text)
        if match:
            long = next((digits for digits in match.groups() if len(digits.lstrip("0")) > len(str(MAX_SIZE))), None)
            if long is not None:
                raise InvalidValue(f"lengths of a workload must be <= {MAX_SIZE}: {brief(long)}")
            return cls.uniform(int(match.group(1)), int(match.group(2)))
        from hrm import catalog

        return catalog.load_workload(text)

    @classmethod
    def from_file(cls, path: str | Path) -> Workload:
        """Read a workload TOML file."""
        path = Path(path)
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InvalidConfig(f"cannot read workload {str(path)!r}: {error.strerror}.") from None
        except UnicodeDecodeError as error:
            raise InvalidConfig(f"workload {str(path)!r} is not text: {error}.") from None
        except (ValueError, RecursionError) as error:
            raise InvalidConfig(f"workload {str(path)!r} does not parse: {error}.") from None
        return cls.from_dict(data, name=path.stem)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, name: str) -> Workload:
        """Build a workload from a file's content; unknown keys are errors."""
        known = {"prompt_avg", "prompt_max", "gen_len", "padded", "prompt_lens", "source"}
        unknown = sorted(set(data) - known)
        if unknown:
            raise InvalidConfig(f"workload {name!r} has unknown keys: {', '.join(map(repr, unknown))}.")
        missing = sorted({"prompt_avg", "prompt_max", "gen_len"} - set(data))
        if missing:
            raise InvalidConfig(f"workload {name!r} lacks {', '.join(map(repr, missing))}.")
        values = dict(data)
        lens = values.get("prompt_lens", [])
        if not isinstance(lens, list | tuple):
            raise InvalidConfig(f"workload {name!r}: 'prompt_lens' must be a list: {lens!r}")
        values["prompt_lens"] = tuple(lens)
        if not isinstance(values.get("padded", False), bool):
            raise InvalidConfig(f"workload {name!r}: 'padded' must be true or false: {brief(values['padded'])}")
        return cls(name=name, **values)

    def with_options(
        self, *, gen_len: int | None = None, prompt_len: int | None = None, padded: bool | None = None
    ) -> Workload:
        """The same workload with another generation length, a fixed prompt length, or padding."""
        changed = self
        if prompt_len is not None:
            changed = replace(Workload.uniform(prompt_len, self.gen_len), name=self.name)
        if gen_len is not None:
            changed = replace(changed, gen_len=gen_len)
        if padded is not None:
            changed = replace(changed, padded=padded)
        return changed

    @property
    def effective_prompt(self) -> float:
        """Tokens per prompt that the machine computes on: the longest when padded, else the mean."""
        return float(self.prompt_max) if self.padded else self.prompt_avg

    def lengths(self, count: int) -> list[int]:
        """Prompt lengths of `count` requests, in order of arrival.

        Without a known distribution every prompt gets the mean length, rounded.
        """
        if count < 1:
            raise InvalidValue(f"number of requests must be >= 1: {count}")
        if self.padded:
            return [self.prompt_max] * count
        if not self.prompt_lens:
            return [max(1, round(self.prompt_avg))] * count
        repeats = -(-count // len(self.prompt_lens))
        return (list(self.prompt_lens) * repeats)[:count]

    def __str__(self) -> str:
        padded = ", padded" if self.padded else ""
        return f"{self.name}: prompt {self.prompt_avg:g} (max {self.prompt_max}), gen {self.gen_len}{padded}"
