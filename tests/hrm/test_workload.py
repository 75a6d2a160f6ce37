"""Workloads: lengths, padding, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm import Workload, catalog
from hrm.errors import InvalidConfig, InvalidValue, UnknownName


def test_mtbench_lengths() -> None:
    """MT-Bench has 80 prompts, the longest of 418 tokens, with a mean within one token of 77."""
    lengths = Workload.parse("mtbench").prompt_lens
    assert len(lengths) == 80
    assert max(lengths) == 418
    assert abs(sum(lengths) / 80 - 77) < 1


@pytest.mark.parametrize(
    ("name", "average", "longest", "gen_len"),
    [("mtbench", 77, 418, 128), ("helm-synthetic-reasoning", 242, 256, 50), ("helm-summarization", 1693, 1984, 64)],
)
def test_catalog_values(name: str, average: float, longest: int, gen_len: int) -> None:
    """The catalog carries the paper's workload figures, each with its source."""
    workload = Workload.parse(name)
    assert (workload.prompt_avg, workload.prompt_max, workload.gen_len) == (average, longest, gen_len)
    assert workload.source


@pytest.mark.parametrize("name", catalog.names("workloads"))
def test_known_lengths_agree_with_mean_and_longest(name: str) -> None:
    """Where a file lists lengths, they give its mean and its longest prompt."""
    workload = catalog.load_workload(name)
    if workload.prompt_lens:
        assert max(workload.prompt_lens) == workload.prompt_max
        assert sum(workload.prompt_lens) / len(workload.prompt_lens) == pytest.approx(workload.prompt_avg, abs=1)


def test_parse_of_two_numbers() -> None:
    """ "S,G" is a uniform workload; spaces do not matter."""
    workload = Workload.parse(" 512 , 32 ")
    assert (workload.prompt_avg, workload.prompt_max, workload.gen_len) == (512.0, 512, 32)
    assert workload.lengths(3) == [512, 512, 512]
    assert str(workload) == "512,32: prompt 512 (max 512), gen 32"


def test_padding_takes_the_longest() -> None:
    """A padded workload computes on the longest prompt for every request."""
    padded = Workload.parse("mtbench").with_options(padded=True)
    assert padded.effective_prompt == 418.0
    assert padded.lengths(5) == [418] * 5
    assert padded.with_options(padded=False).effective_prompt == 77


@given(count=st.integers(1, 500))
def test_lengths_repeat_the_list(count: int) -> None:
    """A batch larger than the list of known lengths repeats it in order."""
    workload = Workload.parse("mtbench")
    lengths = workload.lengths(count)
    assert lengths == [workload.prompt_lens[i % 80] for i in range(count)]


@given(average=st.floats(0.1, 500), count=st.integers(1, 40))
def test_lengths_without_a_distribution(average: float, count: int) -> None:
    """Without known lengths every prompt has the mean, rounded, and at least one token."""
    workload = Workload(name="x", prompt_avg=average, prompt_max=500, gen_len=2)
    assert workload.lengths(count) == [max(1, round(average))] * count


def test_options() -> None:
    """Options change only what they name."""
    base = Workload.parse("mtbench")
    assert base.with_options() == base
    assert base.with_options(gen_len=32).prompt_lens == base.prompt_lens
    fixed = base.with_options(prompt_len=100)
    assert (fixed.prompt_avg, fixed.prompt_max, fixed.gen_len, fixed.name) == (100.0, 100, 128, "mtbench")
    assert fixed.lengths(2) == [100, 100]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gen_len": 0}, "'gen_len' must be >= 1: 0"),
        ({"prompt_avg": 0}, "'prompt_avg' must be > 0 and <= prompt_max=10: 0"),
        ({"prompt_avg": 11}, "'prompt_avg' must be > 0 and <= prompt_max=10: 11"),
        ({"prompt_avg": float("nan")}, "'prompt_avg' must be > 0 and <= prompt_max=10: nan"),
        ({"prompt_lens": (3, 0)}, "'prompt_lens' must be >= 1: 0"),
    ],
)
def test_values_are_checked(values: dict[str, Any], message: str) -> None:
    """A value out of range is refused with its name and value."""
    with pytest.raises(InvalidValue) as caught:
        Workload(**{"name": "x", "prompt_avg": 5.0, "prompt_max": 10, "gen_len": 4, **values})
    assert str(caught.value) == message


def test_counts_are_checked() -> None:
    """No requests and empty prompts are refused with the value."""
    with pytest.raises(InvalidValue, match="number of requests must be >= 1: 0"):
        Workload.parse("5,5").lengths(0)
    with pytest.raises(InvalidValue, match="'prompt_len' must be >= 1: 0"):
        Workload.parse("0,5")


@pytest.mark.parametrize(
    "digits", ["1000000001", pytest.param("9" * 400, id="400 digits"), pytest.param("9" * 5000, id="5000 digits")]
)
def test_absurd_lengths_are_refused(digits: str) -> None:
    """A length of more than a billion tokens is refused in one short line, on either side of the comma."""
    for text in (f"{digits},5", f"5,{digits}"):
        with pytest.raises(InvalidValue, match="must be <= 1000000000: ") as caught:
            Workload.parse(text)
        assert len(str(caught.value)) < 120
    assert Workload.parse("0000000000000077,1000000000").gen_len == 10**9


@pytest.mark.parametrize(
    "value", [10**9 + 1, pytest.param(10**400, id="1e400"), pytest.param(10**5000, id="1e5000"), float("inf")]
)
@pytest.mark.parametrize("key", ["prompt_avg", "prompt_max", "gen_len"])
def test_numbers_of_a_file_have_a_limit(key: str, value: Any) -> None:
    """A number of more than a billion tokens is refused by its key."""
    with pytest.raises(InvalidValue, match=f"'{key}' must be <= 1000000000: ") as caught:
        Workload.from_dict({"prompt_avg": 5, "prompt_max": 9, "gen_len": 4, key: value}, name="x")
    assert len(str(caught.value)) < 120


@pytest.mark.parametrize("key", ["prompt_len", "gen_len"])
def test_options_have_a_limit(key: str) -> None:
    """A length given as an option has the same limit."""
    with pytest.raises(InvalidValue, match=f"'{key}' must be <= 1000000000: "):
        Workload.parse("5,5").with_options(**{key: 10**400})


def test_padded_is_true_or_false() -> None:
    """A text where true or false belongs is refused."""
    with pytest.raises(InvalidConfig, match="'padded' must be true or false: 'false'"):
        Workload.from_dict({"prompt_avg": 5, "prompt_max": 9, "gen_len": 4, "padded": "false"}, name="x")


def test_unknown_and_missing_keys_are_named() -> None:
    """A workload file with a stray or a missing key is refused by that key."""
    good = {"prompt_avg": 5, "prompt_max": 9, "gen_len": 4}
    with pytest.raises(InvalidConfig, match="unknown keys: 'prompt_mean'"):
        Workload.from_dict({**good, "prompt_mean": 5}, name="x")
    with pytest.raises(InvalidConfig, match="lacks 'gen_len', 'prompt_max'"):
        Workload.from_dict({"prompt_avg": 5}, name="x")


def test_files(tmp_path: Path) -> None:
    """A file is read under its own name; a missing and a damaged one are refused by path."""
    path = tmp_path / "mine.toml"
    path.write_text("prompt_avg = 5\nprompt_max = 9\ngen_len = 4\nprompt_lens = [9, 1]\n")
    workload = Workload.parse(str(path))
    assert (workload.name, workload.lengths(3)) == ("mine", [9, 1, 9])
    with pytest.raises(InvalidConfig, match=r"cannot read workload '.*none.toml'"):
        Workload.parse(str(tmp_path / "none.toml"))
    path.write_text("prompt_avg = ")
    with pytest.raises(InvalidConfig, match=r"mine.toml' does not parse"):
        Workload.parse(str(path))
    path.write_text("gen_len = " + "9" * 5000)
    with pytest.raises(InvalidConfig, match=r"mine.toml' does not parse"):
        Workload.parse(str(path))


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    """A misspelt workload is answered with the nearest."""
    with pytest.raises(UnknownName, match="Did you mean 'mtbench'"):
        Workload.parse("mt-bench")


@pytest.mark.parametrize(
    "values",
    [
        {"gen_len": "32"},
        {"prompt_avg": "77"},
        {"prompt_lens": ["a"]},
        pytest.param({"prompt_lens": 7}),
    ],
)
def test_values_of_the_wrong_type_are_refused(values: dict[str, Any]) -> None:
    """Text where a number belongs is refused in one line."""
    with pytest.raises((InvalidConfig, InvalidValue)):
        Workload.from_dict({"prompt_avg": 5, "prompt_max": 9, "gen_len": 4, **values}, name="x")


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    """A binary file is refused in one line."""
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidConfig, match=r"does not parse|is not text"):
        Workload.from_file(tmp_path / "binary.toml")


def test_no_prompt_is_longer_than_the_longest() -> None:
    """A listed length above prompt_max is refused."""
    with pytest.raises(InvalidValue, match="prompt_max"):
        Workload(name="x", prompt_avg=5, prompt_max=9, gen_len=4, prompt_lens=(5, 10))
