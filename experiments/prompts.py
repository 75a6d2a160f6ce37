"""Requests from JSON lines or at random, and what a checkpoint says of text and of ends."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hrm.errors import CheckpointError, InvalidValue
from hrm.model import MoEModel
from hrm.units import brief

__all__ = [
    "Prompt",
    "Rejected",
    "Requests",
    "eos_token_ids",
    "is_token_list",
    "json_lines",
    "load_tokenizer",
    "random_prompts",
    "read_prompts",
]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
_NAMED_LINES = 10
"""Bad lines that one message spells out."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request: its id in the file, its tokens, and how many it may generate."""

    id: str | int
    ids: list[int]
    gen_len: int


@dataclass(frozen=True, slots=True)
class Rejected:
    """A line that holds no request that can be run."""

    line: int
    error: str


@dataclass(frozen=True, slots=True)
class Requests:
    """The good lines of a file, and the bad ones."""

    prompts: Sequence[Prompt]
    rejected: Sequence[Rejected] = ()

    def complaint(self, what: str = "were not run") -> str:
        """One line on the bad lines: how many of how many, and why.

        Examples
        --------
        >>> Requests([], [Rejected(7, "not JSON.")]).complaint()
        '1 of 1 lines were not run: line 7: not JSON'
        """
        bad = self.rejected
        named = ", ".join(f"line {each.line}: {each.error.rstrip('.')}" for each in bad[:_NAMED_LINES])
        more = f", and {len(bad) - _NAMED_LINES} more" if len(bad) > _NAMED_LINES else ""
        return f"{len(bad)} of {len(bad) + len(self.prompts)} lines {what}: {named}{more}"


def json_lines(data: bytes) -> Iterator[tuple[int, dict[str, Any] | InvalidValue]]:
    """(number, object with an id, or what is wrong) of every line that is not blank."""
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, InvalidValue(f"not JSON: {error}.")
            continue
        if not isinstance(entry, dict):
            yield number, InvalidValue(f"not a JSON object: {line.decode(errors='replace')[:40]!r}.")
        elif isinstance(entry.get("id"), bool) or not isinstance(entry.get("id"), str | int):
            yield number, InvalidValue("needs an 'id' that is a string or a whole number.")
        else:
            yield number, entry


def is_token_list(value: Any) -> bool:
    """Whether a JSON value is a list of whole numbers."""
    return isinstance(value, list) and all(isinstance(x, int) and not isinstance(x, bool) for x in value)


def read_prompts(path: Path, model: MoEModel, *, gen_len: int, tokenizer: Any = None) -> Requests:
    """Read and check every request of a file before anything is run.

    Parameters
    ----------
    path : Path
        Lines ``{"id": ..., "prompt_ids": [...]}`` or ``{"id": ..., "prompt": "text"}``, each with a ``"gen_len"``
        of its own if it wants one; or blank.
    model : MoEModel
        Bounds token ids and lengths.
    gen_len : int
        Tokens that a request generates at most, and where it does not say.
    tokenizer : optional
        Turns text into ids; without one, text is an error.

    Raises
    ------
    InvalidValue
        If no line is good.
    """
    prompts: list[Prompt] = []
    rejected: list[Rejected] = []
    seen: dict[str | int, int] = {}
    for number, entry in json_lines(path.read_bytes()):
        try:
            if isinstance(entry, InvalidValue):
                raise entry
            if entry["id"] in seen:
                raise InvalidValue(f"the id {brief(entry['id'])} stands in line {seen[entry['id']]} already.")
            prompts.append(_prompt(entry, model, gen_len, tokenizer))
            seen[entry["id"]] = number
        except InvalidValue as error:
            rejected.append(Rejected(number, " ".join(str(error).split())))
    found = Requests(prompts, rejected)
    if not prompts:
        why = f": {found.complaint('cannot be run')}" if rejected else " holds no prompts"
        raise InvalidValue(f"{str(path)!r}{why}.")
    return found


def _prompt(entry: dict[str, Any], model: MoEModel, gen_len: int, tokenizer: Any) -> Prompt:
    """The request of a line; raises `InvalidValue` saying what is wrong with it."""
    own = entry.get("gen_len", gen_len)
    if not isinstance(own, int) or isinstance(own, bool) or not 1 <= own <= gen_len:
        raise InvalidValue(f"'gen_len' must be a whole number from 1 to --gen-len {gen_len}: {brief(own)}.")
    if ("prompt_ids" in entry) == ("prompt" in entry):
        raise InvalidValue("needs either 'prompt_ids' or 'prompt'.")
    if "prompt_ids" in entry:
        ids = entry["prompt_ids"]
        if not is_token_list(ids):
            raise InvalidValue("'prompt_ids' must be a list of whole numbers.")
    else:
        ids = _encode(entry["prompt"], tokenizer)
    if not ids:
        raise InvalidValue("the prompt is empty.")
    if min(ids) < 0 or max(ids) >= model.vocab_size:
        outside = brief(min(ids) if min(ids) < 0 else max(ids))
        raise InvalidValue(f"token ids must be 0..{model.vocab_size - 1}: {outside}.")
    if len(ids) + own > model.max_positions:
        raise InvalidValue(
            f"{len(ids)} tokens and gen_len {own} pass the {model.max_positions} positions of {model.name}."
        )
    return Prompt(entry["id"], ids, own)


def _encode(text: Any, tokenizer: Any) -> list[int]:
    if not isinstance(text, str):
        raise InvalidValue("'prompt' must be a string.")
    if tokenizer is None:
        raise InvalidValue(
            "text, and the checkpoint has no tokenizer; give 'prompt_ids', or put the tokenizer's files into the "
            "checkpoint's folder."
        )
    try:
        return [int(token) for token in tokenizer(text)["input_ids"]]
    except Exception as error:  # half of a surrogate pair, for one; the library raises whatever its parts raise
        raise InvalidValue(f"the tokenizer does not take this text: {str(error)[:100]}.") from None


def random_prompts(count: int, length: int, *, model: MoEModel, gen_len: int, seed: int) -> Requests:
    """`count` prompts of `length` uniformly random tokens, with ids 0, 1, ..

    Raises
    ------
    InvalidValue
        If they are too long for the model.

    Examples
    --------
    >>> model = MoEModel.from_catalog("mixtral-tiny")
    >>> [len(p.ids) for p in random_prompts(2, 3, model=model, gen_len=1, seed=0).prompts]
    [3, 3]
    """
    if length + gen_len > model.max_positions:
        raise InvalidValue(
            f"prompts of {length} tokens and gen_len {gen_len} pass the {model.max_positions} positions "
            f"of {model.name}."
        )
    tokens = np.random.default_rng(seed).integers(model.vocab_size, size=(count, length))
    return Requests([Prompt(number, ids, gen_len) for number, ids in enumerate(tokens.tolist())])


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's tokenizer, or None if it has none.

    Raises
    ------
    CheckpointError
        If it has one that does not load.
    """
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the library raises whatever its parsers raise
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"the tokenizer of {str(folder)!r} does not load: {reason}") from None


def eos_token_ids(folder: Path, config: Any) -> tuple[int, ...]:
    """Ids that end an output: of ``generation_config.json`` if it names them, else of the config."""
    ids = getattr(config, "eos_token_id", None)
    file = folder / "generation_config.json"
    if file.exists():
        try:
            ids = json.loads(file.read_bytes()).get("eos_token_id", ids)
        except (ValueError, AttributeError) as error:
            raise CheckpointError(f"{str(file)!r} is not a JSON object: {error}.") from None
    if ids is None:
        return ()
    ids = ids if isinstance(ids, list) else [ids]
    if not is_token_list(ids):
        raise CheckpointError(f"'eos_token_id' of {str(folder)!r} must be whole numbers: {ids!r}.")
    return tuple(ids)
