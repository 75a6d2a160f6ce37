"""Requests from JSON lines, and outputs to JSON lines that a later run can go on with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from hrm.errors import CheckpointError, InvalidValue
from hrm.model import MoEModel

__all__ = ["Prompt", "Results", "eos_token_ids", "load_tokenizer", "random_prompts", "read_prompts"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
_LINE_START = b'{"id": '


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request: its id in the file, and its tokens."""

    id: str | int
    ids: list[int]


def _json_lines(path: Path, data: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) of every line that is not blank."""
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{str(path)!r}, line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidValue(f"{where} is not JSON: {error}.") from None
        if not isinstance(entry, dict):
            raise InvalidValue(f"{where} is not a JSON object: {line.decode(errors='replace')[:40]!r}.")
        if isinstance(entry.get("id"), bool) or not isinstance(entry.get("id"), str | int):
            raise InvalidValue(f"{where} needs an 'id' that is a string or a whole number.")
        yield where, entry


def _is_token_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(x, int) and not isinstance(x, bool) for x in value)


def read_prompts(path: Path, model: MoEModel, *, gen_len: int, tokenizer: Any = None) -> list[Prompt]:
    """Read and check every request of a file before anything is run.

    Parameters
    ----------
    path : Path
        Lines ``{"id": ..., "prompt_ids": [...]}`` or ``{"id": ..., "prompt": "text"}``, or blank.
    model : MoEModel
        Bounds token ids and lengths.
    gen_len : int
        Tokens that each request will generate.
    tokenizer : optional
        Turns text into ids; without one, text is an error.

    Raises
    ------
    InvalidValue
        Naming the file and the line.
    """
    prompts: list[Prompt] = []
    seen: dict[str | int, str] = {}
    for where, entry in _json_lines(path, path.read_bytes()):
        if entry["id"] in seen:
            raise InvalidValue(f"{where}: the id {entry['id']!r} stands in {seen[entry['id']]} already.")
        seen[entry["id"]] = where.rpartition(", ")[2]
        if ("prompt_ids" in entry) == ("prompt" in entry):
            raise InvalidValue(f"{where} needs either 'prompt_ids' or 'prompt'.")
        if "prompt_ids" in entry:
            ids = entry["prompt_ids"]
            if not _is_token_list(ids):
                raise InvalidValue(f"{where}: 'prompt_ids' must be a list of whole numbers.")
        else:
            if not isinstance(entry["prompt"], str):
                raise InvalidValue(f"{where}: 'prompt' must be a string.")
            if tokenizer is None:
                raise InvalidValue(
                    f"{where} holds text and the checkpoint has no tokenizer; give 'prompt_ids', or put the "
                    "tokenizer's files into the checkpoint's folder."
                )
            ids = [int(token) for token in tokenizer(entry["prompt"])["input_ids"]]
        if not ids:
            raise InvalidValue(f"{where}: the prompt is empty.")
        if min(ids) < 0 or max(ids) >= model.vocab_size:
            raise InvalidValue(f"{where}: token ids must be 0..{model.vocab_size - 1}: {min(ids)}..{max(ids)}.")
        if len(ids) + gen_len > model.max_positions:
            raise InvalidValue(
                f"{where}: {len(ids)} tokens and gen_len {gen_len} pass the {model.max_positions} positions "
                f"of {model.name}."
            )
        prompts.append(Prompt(entry["id"], ids))
    if not prompts:
        raise InvalidValue(f"{str(path)!r} holds no prompts.")
    return prompts


def random_prompts(count: int, length: int, *, vocab_size: int, seed: int) -> list[Prompt]:
    """`count` prompts of `length` uniformly random tokens, with ids 0, 1, ..

    Examples
    --------
    >>> [len(p.ids) for p in random_prompts(2, 3, vocab_size=10, seed=0)]
    [3, 3]
    """
    tokens = np.random.default_rng(seed).integers(vocab_size, size=(count, length))
    return [Prompt(number, ids) for number, ids in enumerate(tokens.tolist())]


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
    if not _is_token_list(ids):
        raise CheckpointError(f"'eos_token_id' of {str(folder)!r} must be whole numbers: {ids!r}.")
    return tuple(ids)


class Results:
    """Output lines, appended and flushed batch by batch, so that a kill loses only the running batch.

    Parameters
    ----------
    path : Path
    resume : bool
        Go on with a file that has lines already; a last line that was cut short is dropped.

    Raises
    ------
    InvalidValue
        If the file has content and `resume` is off, or its content is not output lines.
    """

    def __init__(self, path: Path, *, resume: bool) -> None:
        self.done: set[str | int] = set()
        if path.exists() and path.stat().st_size:
            if not resume:
                raise InvalidValue(
                    f"{str(path)!r} exists and is not empty; add --resume to go on with it, or name another --out."
                )
            self._take_up(path)
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def _take_up(self, path: Path) -> None:
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        torn = data[whole:]
        if not torn.startswith(_LINE_START[: len(torn)]):
            raise InvalidValue(f"{str(path)!r} does not end in a line that this command wrote; name another --out.")
        for where, entry in _json_lines(path, data[:whole]):
            if not _is_token_list(entry.get("output_ids")):
                raise InvalidValue(f"{where} is not an output line: it lacks 'output_ids'.")
            self.done.add(entry["id"])
        if torn:
            with path.open("r+b") as file:
                file.truncate(whole)

    def write(self, ids: Sequence[str | int], outputs: Sequence[Sequence[int]], tokenizer: Any = None) -> None:
        """Append one line per request."""
        lines = []
        for name, tokens in zip(ids, outputs, strict=True):
            text = tokenizer.decode(list(tokens), skip_special_tokens=True) if tokenizer else None
            lines.append(json.dumps({"id": name, "output_ids": list(tokens), "text": text}) + "\n")
        self._file.write("".join(lines))
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if not self._path.stat().st_size:
            self._path.unlink()  # a run that was refused leaves nothing behind
