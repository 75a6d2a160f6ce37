"""Builds the package's C++ kernels with the system's compiler on first use, and loads them.

The shared object lies in a cache folder (``$XDG_CACHE_HOME`` or ``~/.cache``, then ``moe-hrm``) under a name made from
sources, compiler and flags. It is written under another name and renamed, so that processes that build at the same
time do not disturb each other. It holds code for several instruction sets and chooses when it runs, so that machines
may share a home folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

__all__ = ["NativeUnavailable", "load_native"]

_FOLDER = Path(__file__).parent / "native"
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-w")
_TIMEOUT_S = 300


class NativeUnavailable(Exception):
    """No native kernel here; the message says why, in one line."""


def load_native(source: str) -> ctypes.CDLL:
    """The shared object of one source file of ``executor/native``, built if the cache does not hold it.

    ``$CXX`` names the compiler; without it ``g++`` or ``c++`` is taken.

    Parameters
    ----------
    source : str
        File name, e.g. ``"decode_attention.cpp"``. All headers of the folder count as its sources.

    Raises
    ------
    NativeUnavailable
        There is no compiler, it fails, or the cache folder cannot be written.
    """
    compiler = _compiler()
    try:
        version = subprocess.run(
            [*compiler, "--version"], capture_output=True, text=True, check=True, timeout=_TIMEOUT_S
        ).stdout
        target = _cache_folder() / f"{Path(source).stem}-{_key(source, compiler, version)}.so"
        if not target.exists():
            _build(compiler, _FOLDER / source, target)
        return ctypes.CDLL(str(target))
    except subprocess.CalledProcessError as error:
        lines = [line for line in str(error.stderr).splitlines() if "error" in line] or [str(error)]
        raise NativeUnavailable(f"{compiler[0]} failed: {lines[0]}") from error
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        raise NativeUnavailable(str(error)) from error


def _compiler() -> list[str]:
    """The compiler's command with arguments that ``$CXX`` may carry."""
    chosen = os.environ.get("CXX")
    if chosen:
        command = shlex.split(chosen)
        if command and shutil.which(command[0]):
            return command
        raise NativeUnavailable(f"no C++ compiler: $CXX is {chosen!r}")
    for name in ("g++", "c++"):
        if shutil.which(name):
            return [name]
    raise NativeUnavailable("no C++ compiler: neither g++ nor c++ is installed")


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "moe-hrm"


def _key(source: str, compiler: list[str], version: str) -> str:
    """Changes whenever the shared object would."""
    digest = hashlib.sha256("\0".join([*compiler, version, platform.machine(), *_FLAGS]).encode())
    for path in [_FOLDER / source, *sorted(_FOLDER.glob("*.h"))]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:24]


def _build(compiler: list[str], source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=target.stem, suffix=".tmp", dir=target.parent)
    os.close(handle)
    try:
        command = [*compiler, *_FLAGS, str(source), "-o", name]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=_TIMEOUT_S)
        os.replace(name, target)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(name)
