"""SI inside, people's units at the edges.

Everything inside the project is bytes, seconds, FLOP and their quotients as plain numbers.
Strings such as ``"16 GiB"`` or ``"12.3 GB/s"`` are parsed on entry and printed on exit, here only.
GB is 1e9 bytes and GiB is 2**30 bytes; the two are never mixed.
"""

from __future__ import annotations

import math
import re

from hrm.errors import InvalidValue

__all__ = [
    "MAX_SIZE",
    "brief",
    "format_bandwidth",
    "format_bytes",
    "format_flops",
    "format_seconds",
    "parse_bandwidth",
    "parse_bytes",
    "parse_flops",
    "parse_seconds",
]

MAX_SIZE = 10**9
"""Largest number of tokens, sequences or elements of a dimension that is taken for meant."""

_DECIMAL = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_TIME = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_SCALES = {**_DECIMAL, **_BINARY, **_TIME}
_NUMBER = r"\s*([-+]?\d[\d_]*(?:\.\d+)?(?:[eE][-+]?\d+)?)\s*"
_BYTES = re.compile(_NUMBER + r"([kKMGTP]?|[KMGT]i)B\s*$")
_BANDWIDTH = re.compile(_NUMBER + r"([kKMGTP]?|[KMGT]i)B/s\s*$")
_FLOPS = re.compile(_NUMBER + r"([kKMGTP]?)FLOP/?s\s*$")
_SECONDS = re.compile(_NUMBER + r"(s|ms|us|µs|ns)\s*$")


def brief(value: object) -> str:
    """A value as a message quotes it: long ones are cut.

    Examples
    --------
    >>> brief(7), brief(10**5000), brief("x" * 90)
    ('7', 'an integer of more than 40 digits', "'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx...")
    """
    if isinstance(value, int) and abs(value) >= 10**40:
        return "an integer of more than 40 digits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:40]}..."


def _parse(text: str | float, pattern: re.Pattern[str], what: str, example: str) -> float:
    if isinstance(text, int | float) and not isinstance(text, bool):
        try:
            value = float(text)
        except OverflowError:
            value = math.inf
    else:
        match = pattern.match(str(text))
        if match is None:
            raise InvalidValue(f"{brief(text)} is not a {what}; write it like {example!r}.")
        value = float(match.group(1).replace("_", "")) * _SCALES[match.group(2)]
    if not math.isfinite(value) or value <= 0:
        raise InvalidValue(f"{what} must be a finite number > 0: {brief(text)}")
    return value


def parse_bytes(text: str | float) -> int:
    """Parse a capacity in bytes.

    Parameters
    ----------
    text : str or number
        ``"16 GiB"``, ``"24GB"`` or a plain number of bytes.

    Returns
    -------
    int
        Bytes.

    Raises
    ------
    InvalidValue
        If the text is not a capacity or is not positive.

    Examples
    --------
    >>> parse_bytes("16 GiB"), parse_bytes("16 GB")
    (17179869184, 16000000000)
    >>> parse_bytes("16 GBps")
    Traceback (most recent call last):
    hrm.errors.InvalidValue: '16 GBps' is not a capacity in bytes; write it like '16 GiB'.
    """
    size = round(_parse(text, _BYTES, "capacity in bytes", "16 GiB"))
    if size < 1:
        raise InvalidValue(f"capacity in bytes must be >= 1: {brief(text)}")
    return size


def parse_bandwidth(text: str | float) -> float:
    """Parse a bandwidth into bytes per second; raises `InvalidValue` on anything else.

    Examples
    --------
    >>> parse_bandwidth("2GB/s")
    2000000000.0
    """
    return _parse(text, _BANDWIDTH, "bandwidth", "12.3 GB/s")


def parse_flops(text: str | float) -> float:
    """Parse a compute rate into FLOP per second; raises `InvalidValue` on anything else.

    Examples
    --------
    >>> parse_flops("65 TFLOP/s")
    65000000000000.0
    """
    return _parse(text, _FLOPS, "compute rate", "65 TFLOP/s")


def parse_seconds(text: str | float) -> float:
    """Parse a duration into seconds; raises `InvalidValue` on anything else.

    Examples
    --------
    >>> parse_seconds("250 ms")
    0.25
    """
    return _parse(text, _SECONDS, "duration", "10 us")


def _scaled(value: float, unit: str, steps: list[tuple[float, str]]) -> str:
    for factor, prefix in steps:
        if abs(value) >= factor:
            return f"{_digits(value / factor)} {prefix}{unit}"
    return f"{_digits(value)} {unit}"


def _digits(value: float) -> str:
    """Three significant digits, but never an exponent for what four can say."""
    return f"{value:.0f}" if 999.5 <= abs(value) < 10000 else f"{value:.3g}"


_STEPS = [(1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")]


def format_bytes(value: float) -> str:
    """Print bytes in binary units.

    Examples
    --------
    >>> format_bytes(16 * 2**30)
    '16 GiB'
    """
    return _scaled(value, "B", [(2.0**40, "Ti"), (2.0**30, "Gi"), (2.0**20, "Mi"), (2.0**10, "Ki")])


def format_bandwidth(value: float) -> str:
    """Print bytes per second in decimal units."""
    return _scaled(value, "B/s", _STEPS)


def format_flops(value: float) -> str:
    """Print FLOP per second in decimal units."""
    return _scaled(value, "FLOP/s", _STEPS)


def format_seconds(value: float) -> str:
    """Print a duration with the prefix that suits it.

    Examples
    --------
    >>> format_seconds(0.00125)
    '1.25 ms'
    """
    if value and abs(value) < 1e-3:
        return f"{_digits(value * 1e6)} us"
    if value and abs(value) < 1:
        return f"{_digits(value * 1e3)} ms"
    return f"{value:.3g} s"
