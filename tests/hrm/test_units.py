"""Parsing and printing of sizes, rates and durations."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm.errors import InvalidValue
from hrm.units import (
    format_bandwidth,
    format_bytes,
    format_flops,
    format_seconds,
    parse_bandwidth,
    parse_bytes,
    parse_flops,
    parse_seconds,
)

PAIRS = [
    (format_bytes, parse_bytes),
    (format_bandwidth, parse_bandwidth),
    (format_flops, parse_flops),
    (format_seconds, parse_seconds),
]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("16 GB", 16 * 10**9),
        ("16 GiB", 16 * 2**30),
        ("1kB", 1000),
        ("1 KiB", 1024),
        ("1.5 MiB", 3 * 2**19),
        ("2e3 B", 2000),
        (" 192 GB ", 192 * 10**9),
        ("1_000 MB", 10**9),
        (4096, 4096),
        (4096.0, 4096),
    ],
)
def test_bytes_are_parsed(text: str | float, expected: int) -> None:
    """Decimal and binary prefixes keep their own meaning and plain numbers pass through as integers."""
    value = parse_bytes(text)
    assert value == expected
    assert isinstance(value, int)


def test_gb_is_not_gib() -> None:
    """A GiB is 7.4 % more than a GB, in capacities and in bandwidths alike."""
    assert parse_bytes("1 GiB") / parse_bytes("1 GB") == pytest.approx(1.073741824)
    assert parse_bandwidth("1 GiB/s") / parse_bandwidth("1 GB/s") == pytest.approx(1.073741824)


@pytest.mark.parametrize(
    ("parse", "text", "expected"),
    [
        (parse_bandwidth, "285 GiB/s", 285 * 2**30),
        (parse_bandwidth, "15.75 GB/s", 15.75e9),
        (parse_flops, "1.3 TFLOP/s", 1.3e12),
        (parse_flops, "1.3 TFLOPs", 1.3e12),
        (parse_seconds, "10 us", 1e-5),
        (parse_seconds, "10 µs", 1e-5),
        (parse_seconds, "3 ns", 3e-9),
        (parse_seconds, "2 s", 2.0),
        (parse_seconds, 0.5, 0.5),
    ],
)
def test_rates_and_durations_are_parsed(parse, text, expected) -> None:
    """Every unit that the catalog writes comes out in SI."""
    assert parse(text) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("show", "parse"), PAIRS)
@given(value=st.floats(min_value=1e-8, max_value=5e14))
def test_printed_values_parse_back(show, parse, value: float) -> None:
    """What is printed parses back to the value within the three digits that are printed."""
    if parse is parse_bytes:
        value += 1000  # below a few bytes, rounding to whole bytes is coarser than three digits
    assert parse(show(value)) == pytest.approx(value, rel=0.0051)


@given(value=st.integers(min_value=1, max_value=2**60))
def test_plain_bytes_are_exact(value: int) -> None:
    """A plain number of bytes below 2**53 survives unchanged, larger ones to a double's precision."""
    assert parse_bytes(value) == (value if value < 2**53 else round(float(value)))


@pytest.mark.parametrize("parse", [parse_bytes, parse_bandwidth, parse_flops, parse_seconds])
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, -math.inf, "inf", "nan", "", "GB", "16", None, True])
def test_what_is_not_a_positive_quantity_is_refused(parse, value) -> None:
    """Zero, negative, undefined, infinite and unitless text values are all refused."""
    with pytest.raises(InvalidValue):
        parse(value)


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (parse_bytes, "16 GBps"),
        (parse_bytes, "16 GB/s"),
        (parse_bytes, "16 Gb"),
        (parse_bytes, "16 gb"),
        (parse_bytes, "-16 GB"),
        (parse_bytes, "0 GB"),
        (parse_bytes, "1e999 GB"),
        (parse_bandwidth, "16 GB"),
        (parse_bandwidth, "16 GBps"),
        (parse_bandwidth, "0 GB/s"),
        (parse_flops, "65 TiFLOP/s"),
        (parse_flops, "65 GB/s"),
        (parse_seconds, "10 min"),
        (parse_seconds, "-10 us"),
        (parse_seconds, "0 s"),
    ],
)
def test_a_wrong_unit_is_refused(parse, text: str) -> None:
    """A quantity in another quantity's unit, or out of range, is refused and the text is quoted."""
    with pytest.raises(InvalidValue) as caught:
        parse(text)
    number = text.split()[0]
    assert number in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_refusal_shows_how_to_write_it() -> None:
    """The message of a refused capacity quotes it and shows a good one."""
    with pytest.raises(InvalidValue, match="'16 GBps' is not a capacity in bytes; write it like '16 GiB'"):
        parse_bytes("16 GBps")


@pytest.mark.parametrize("parse", [parse_bytes, parse_bandwidth, parse_flops, parse_seconds])
@pytest.mark.parametrize(
    "value",
    [
        pytest.param(10**400, id="1e400"),
        pytest.param(-(10**400), id="negative"),
        pytest.param(10**5000, id="1e5000"),
        math.inf,
        1e308 * 10,
    ],
)
def test_numbers_without_end_are_refused(parse, value) -> None:
    """A number that no double holds is refused in a line that does not repeat its digits."""
    with pytest.raises(InvalidValue, match="must be a finite number > 0") as caught:
        parse(value)
    assert len(str(caught.value)) < 120


def test_long_texts_are_cut_in_messages() -> None:
    """What is quoted of a long text is short."""
    for text in ("9" * 400 + " GB", "x" * 10_000):
        with pytest.raises(InvalidValue) as caught:
            parse_bytes(text)
        assert len(str(caught.value)) < 160


def test_printing_picks_the_prefix() -> None:
    """Bytes print in binary units, rates in decimal ones, durations in the unit that suits them."""
    assert format_bytes(24e9) == "22.4 GiB"
    assert format_bytes(512) == "512 B"
    assert format_bandwidth(16e9) == "16 GB/s"
    assert format_flops(242e12) == "242 TFLOP/s"
    assert format_seconds(12e-6) == "12 us"
    assert format_seconds(90.0) == "90 s"
    assert format_seconds(0) == "0 s"


def test_a_capacity_never_rounds_to_zero() -> None:
    """Less than one byte is no capacity."""
    with pytest.raises(InvalidValue):
        parse_bytes("0.3 B")


@pytest.mark.parametrize(
    ("show", "value"),
    [(format_bytes, 1000 * 2**20), (format_bandwidth, 999.9e9), (format_seconds, 0.0009999)],
)
def test_no_exponent_is_printed(show, value: float) -> None:
    """Values just under the next prefix print without an exponent."""
    assert "e+" not in show(value)
