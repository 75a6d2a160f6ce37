"""Answers as JSON lines on disk, kept through kills and full disks, that a later run can go on with."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Self

from experiments.prompts import is_token_list, json_lines
from hrm.errors import HrmError, InvalidValue

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # not every system has it
    fcntl = None

__all__ = ["Results"]

_LINE_START = b'{"id": '
_SYNC_S = 1.0
"""Shortest time between two calls that wait for the disk."""
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EROFS)
"""What devices and pipes say to fsync."""


class Results:
    """Output lines, appended as requests finish; a kill at any moment loses no line that was written.

    Every line goes to the operating system at once, and to the disk at most once a second. A file has one writer.

    Parameters
    ----------
    path : Path
    resume : bool
        Go on with a file that has lines already; a last line that was cut short is dropped.
    job : mapping, optional
        What answers depend on besides the prompts. It is kept beside the file, in ``<name>.job.json``, and must be the
        same when the file is gone on with.

    Raises
    ------
    InvalidValue
        If the file has content and `resume` is off, its content is not output lines or of another job, or another run
        writes it.
    """

    def __init__(self, path: Path, *, resume: bool, job: Mapping[str, Any] | None = None) -> None:
        self.done: set[str | int] = set()
        self._path, self._job_path = path, path.with_name(path.name + ".job.json")
        self._new, self._has_job = not path.exists(), job is not None
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            self._lock()
            # Of a device or a pipe there is nothing to take up, to cut or to delete.
            self._regular = stat.S_ISREG(os.fstat(self._fd).st_mode)
            self._size = os.fstat(self._fd).st_size if self._regular else 0
            if self._size:
                if not resume:
                    raise InvalidValue(
                        f"{str(path)!r} exists and is not empty; add --resume to go on with it, or name another --out."
                    )
                self._take_up(path)
                self._check_job(job or {})
            if self._regular and job is not None:
                self._job_path.write_text(json.dumps(job) + "\n")
        except BaseException:
            os.close(self._fd)
            raise
        self._kept = len(self.done)
        self._synced_at = time.monotonic()

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidValue(f"{str(self._path)!r} is being written by another run; name another --out.") from None
        except OSError:
            pass  # a file system without locks

    def _take_up(self, path: Path) -> None:
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        torn = data[whole:]
        if not torn.startswith(_LINE_START[: len(torn)]):
            raise InvalidValue(f"{str(path)!r} does not end in a line that this command wrote; name another --out.")
        for number, entry in json_lines(data[:whole]):
            where = f"{str(path)!r}, line {number}"
            if isinstance(entry, InvalidValue):
                raise InvalidValue(f"{where}: {entry}")
            if not is_token_list(entry.get("output_ids")):
                raise InvalidValue(f"{where} is not an output line: it lacks 'output_ids'.")
            self.done.add(entry["id"])
        if torn:
            os.ftruncate(self._fd, whole)
        self._size = whole

    def _check_job(self, job: Mapping[str, Any]) -> None:
        """Refuse to mix answers of two jobs; a file without a job beside it is believed."""
        try:
            before = json.loads(self._job_path.read_text())
        except (OSError, ValueError):
            return
        for name, value in job.items():
            if isinstance(before, dict) and name in before and before[name] != value:
                raise InvalidValue(
                    f"{str(self._path)!r} has answers with {name} {before[name]!r}, and now it is {value!r}: "
                    "use the same options to go on with it, or name another --out."
                )

    def write(self, ids: Sequence[str | int], outputs: Sequence[Sequence[int]], tokenizer: Any = None) -> None:
        """Append one line per request.

        Raises
        ------
        HrmError
            If the file cannot be written, with the number of answers that it holds.
        """
        try:
            for name, tokens in zip(ids, outputs, strict=True):
                text = tokenizer.decode(list(tokens), skip_special_tokens=True) if tokenizer else None
                line = json.dumps({"id": name, "output_ids": list(tokens), "text": text}) + "\n"
                self._append(line.encode())
                self._kept += 1
            if time.monotonic() - self._synced_at >= _SYNC_S:
                self._sync()
        except OSError as error:
            raise self._failure(error) from None

    def _append(self, line: bytes) -> None:
        """Write a whole line, or leave the file as it was."""
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except BaseException:
            if self._regular:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._fd, self._size)
            raise
        self._size += len(line)

    def _sync(self) -> None:
        self._synced_at = time.monotonic()
        try:
            os.fsync(self._fd)
        except OSError as error:
            if error.errno not in _NO_SYNC:
                raise

    def _failure(self, error: OSError) -> HrmError:
        kept = f"{self._kept} answers are kept in it" if self._regular else f"{self._kept} answers were written"
        return HrmError(
            f"cannot write {str(self._path)!r}: {error.strerror or error}; {kept}. "
            "Make room and add --resume, or name another --out."
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if self._regular:
                self._sync()
                if self._new and not self._size:
                    # A run that was refused leaves nothing behind.
                    self._path.unlink(missing_ok=True)
                    if self._has_job:
                        self._job_path.unlink(missing_ok=True)
        except OSError as error:
            if kind is None:
                raise self._failure(error) from None
        finally:
            os.close(self._fd)
