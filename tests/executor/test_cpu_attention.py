"""Decode attention on the CPU agrees with attention written out in float64, in every variant of the kernel.

Inputs are of order one. A float32 result may be off by 1e-5; a 16-bit one by as much more as rounding the result takes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from executor import native_build
from executor.cpu_attention import decode_attention, decode_attention_torch, native_kernel
from executor.native_build import NativeUnavailable, load_native
from hrm.errors import InvalidValue

VARIANTS = ("baseline", "avx2", "avx512", "avx512_bf16")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Half a unit in the last place is at most 2^-8 of the result in bfloat16 and 2^-11 in float16.
RELATIVE = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}
ROUNDED_WEIGHT = 2**-8
"""By what share of itself a weight may be off that is rounded to bfloat16."""


def available() -> list[str]:
    """Variants that run on this machine."""
    best = native_kernel()
    return [] if best is None else list(VARIANTS[: VARIANTS.index(best) + 1])


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each variant that this machine has, in turn."""
    if request.param not in available():
        pytest.skip(f"no {request.param} here")
    monkeypatch.setenv("MOE_HRM_NATIVE_ISA", request.param)
    assert native_kernel() == request.param
    return str(request.param)


@dataclass
class Case:
    """One call's arguments."""

    q: Tensor
    kv: Tensor
    starts: Tensor
    lengths: Tensor
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    value_offset: int
    sinks: Tensor | None = None

    @classmethod
    def random(
        cls,
        lengths: list[int],
        heads: int,
        kv_heads: int,
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype = torch.float32,
        *,
        latent: bool = False,
        sinks: bool = False,
        starts: list[int] | None = None,
        seed: int = 0,
    ) -> Case:
        """Random numbers; sequences stand in the arena in reverse order, with gaps, unless told otherwise."""
        generator = torch.Generator().manual_seed(seed)
        row = key_dim if latent else kv_heads * (key_dim + value_dim)
        if starts is None:
            starts, at = [], 2
            for length in reversed(lengths):
                starts.insert(0, at)
                at += length + 3
        capacity = max(s + n for s, n in zip(starts, lengths, strict=True))
        return cls(
            torch.randn(len(lengths), heads * key_dim, generator=generator).to(dtype),
            torch.randn(capacity, row, generator=generator).to(dtype),
            torch.tensor(starts, dtype=torch.int64),
            torch.tensor(lengths, dtype=torch.int64),
            heads,
            kv_heads,
            key_dim,
            value_dim,
            0 if latent else kv_heads * key_dim,
            2 * torch.randn(heads, generator=generator) if sinks else None,
        )

    def options(self, **more: Any) -> dict[str, Any]:
        """Keyword arguments of the call."""
        return {
            "num_kv_heads": self.kv_heads,
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
            "value_offset": self.value_offset,
            "scale": self.key_dim**-0.5,
            "sinks": self.sinks,
        } | more

    def run(self, function: Any = decode_attention, **more: Any) -> Tensor:
        """The output, from a buffer full of NaN."""
        out = torch.full((self.q.shape[0], self.heads * self.value_dim), torch.nan, dtype=self.q.dtype)
        function(self.q, self.kv, self.starts, self.lengths, out, **self.options(**more))
        return out

    def reference(self, *, sizes: bool = False) -> Tensor:
        """Attention written out, in float64; with `sizes`, of the values' absolute numbers."""
        out = torch.zeros(self.q.shape[0], self.heads, self.value_dim, dtype=torch.float64)
        group = self.heads // self.kv_heads
        for i, (start, length) in enumerate(zip(self.starts.tolist(), self.lengths.tolist(), strict=True)):
            rows = self.kv[start : start + length].double()
            keys = rows[:, : self.kv_heads * self.key_dim].unflatten(1, (self.kv_heads, self.key_dim))
            last = self.value_offset + self.kv_heads * self.value_dim
            values = rows[:, self.value_offset : last].unflatten(1, (self.kv_heads, self.value_dim))
            keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
            values = values.abs() if sizes else values
            query = self.q[i].double().view(self.heads, self.key_dim)
            scores = torch.einsum("hd,lhd->hl", query, keys) * self.key_dim**-0.5
            if self.sinks is not None:
                scores = torch.cat([scores, self.sinks.double()[:, None]], 1)
            if length:
                out[i] = torch.einsum("hl,lhd->hd", scores.softmax(-1)[:, :length], values)
        return out.flatten(1)

    def check(self, out: Tensor) -> None:
        """Within the tolerance of the type, and of the weights where they are rounded too."""
        expected = self.reference()
        allowed = 1e-5 + RELATIVE[out.dtype] * expected.abs()
        if out.dtype == torch.bfloat16 and native_kernel() == "avx512_bf16":
            allowed += ROUNDED_WEIGHT * self.reference(sizes=True)
        wrong = (out.double() - expected).abs() > allowed
        assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} elements are off"
        assert out.isfinite().all()


# (query heads, key heads, key dimension, value dimension, latent)
LAYOUTS = [
    (8, 8, 64, 64, False),
    (8, 2, 128, 128, False),
    (16, 2, 128, 128, False),
    (5, 1, 80, 80, False),
    (10, 2, 64, 64, False),
    (21, 3, 40, 24, False),
    (3, 3, 8, 8, False),
    (4, 1, 256, 256, False),
    (12, 4, 192, 128, False),
    (6, 2, 13, 7, False),
    (32, 2, 96, 96, False),
    (16, 1, 576, 512, True),
    (7, 1, 40, 33, True),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_agrees_with_attention_written_out(
    variant: str, layout: tuple[int, int, int, int, bool], dtype: torch.dtype
) -> None:
    """Every layout and type, with empty, short and uneven sequences that stand in no order."""
    heads, kv_heads, key_dim, value_dim, latent = layout
    case = Case.random([3, 0, 70, 1, 33, 32], heads, kv_heads, key_dim, value_dim, dtype, latent=latent)
    case.check(case.run())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_long_sequences_are_cut(variant: str, threads: int, dtype: torch.dtype) -> None:
    """Few long sequences are cut into pieces whose parts add up, for any number of threads."""
    for sinks in (False, True):
        case = Case.random([1100, 5, 333], 8, 2, 32, 32, dtype, sinks=sinks)
        case.check(case.run(threads=threads))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "layout", [(8, 1, 64, 64), (16, 2, 192, 128), (32, 2, 96, 96), (48, 2, 64, 32), (16, 2, 80, 72)], ids=str
)
def test_heads_in_groups_of_eight(variant: str, layout: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """Groups of 8, 16 and 24 heads, any number of tokens in the last block, rows with and without gaps between them."""
    case = Case.random([1, 5, 7, 8, 9, 30, 31, 45, 70], *layout, dtype, sinks=True)
    wide = torch.full((case.kv.shape[0], case.kv.shape[1] + 16), torch.nan, dtype=dtype)
    wide[:, 16:] = case.kv
    for kv in (case.kv, wide[:, 16:]):
        case.kv = kv
        case.check(case.run(threads=2))


def test_many_heads_of_one_latent(variant: str) -> None:
    """The heads of a large model share one row, which is converted once per block."""
    case = Case.random([100, 31], 128, 1, 576, 512, torch.bfloat16, latent=True)
    case.check(case.run())


def test_sinks_enter_the_denominator(variant: str) -> None:
    """A sink takes its share of the softmax; a very small one takes none and a very large one all."""
    case = Case.random([40, 1], 8, 2, 64, 64, sinks=True)
    case.check(case.run())
    case.sinks = torch.full((8,), -torch.inf)
    torch.testing.assert_close(case.run(), case.run(sinks=None), rtol=1e-6, atol=1e-6)
    case.sinks = torch.full((8,), 3e4)
    assert not case.run().any()


def test_large_scores_do_not_overflow(variant: str) -> None:
    """Scores in the thousands, growing along the sequence, give a finite softmax."""
    case = Case.random([200], 4, 2, 32, 32)
    case.q *= 300.0
    case.kv *= torch.linspace(0.1, 3, case.kv.shape[0])[:, None]
    out = case.run()
    assert out.isfinite().all()
    torch.testing.assert_close(out.double(), case.reference(), rtol=1e-3, atol=1e-3)


def test_what_is_not_a_number_stays_in_its_sequence(variant: str) -> None:
    """A NaN in one sequence's rows reaches that sequence's output and no other."""
    case = Case.random([50, 50], 4, 1, 64, 64)
    case.kv[int(case.starts[0]) + 20, 3] = torch.nan
    out = case.run()
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_behind_the_end_are_not_seen(variant: str, dtype: torch.dtype) -> None:
    """Whatever stands in other rows of the arena, NaN included, does not reach the output."""
    case = Case.random([37, 5], 4, 2, 24, 24, dtype)
    expected = case.run()
    for first, last in ((0, 2), (7, 10)):
        case.kv[first:last] = torch.nan
    assert torch.equal(case.run(), expected)


def test_strided_queries_cache_and_output(variant: str) -> None:
    """Queries, arena and output may be columns of wider tensors; the other columns stay as they were."""
    for dtype in DTYPES:
        case = Case.random([17, 40], 8, 2, 64, 32, dtype)
        wide_q = torch.zeros(2, 8 * 64 + 24, dtype=dtype)
        wide_kv = torch.full((case.kv.shape[0], case.kv.shape[1] + 16), torch.nan, dtype=dtype)
        wide_q[:, 8:-16], wide_kv[:, 16:] = case.q, case.kv
        expected = case.run()
        case.q, case.kv = wide_q[:, 8:-16], wide_kv[:, 16:]
        wide_out = torch.full((2, 8 * 32 + 10), 7.0, dtype=dtype)
        decode_attention(case.q, case.kv, case.starts, case.lengths, wide_out[:, 5:-5], **case.options())
        assert torch.equal(wide_out[:, 5:-5], expected)
        assert bool((wide_out[:, :5] == 7).all() and (wide_out[:, -5:] == 7).all())


def test_variants_and_threads_agree(variant: str) -> None:
    """Repeating a call gives the same bits where nothing is cut, whatever the number of threads."""
    case = Case.random([64] * 40, 8, 2, 64, 64, torch.bfloat16)
    alone = case.run(threads=1)
    for threads in (1, 2, 3, 7):
        assert torch.equal(case.run(threads=threads), alone)


def test_no_sequences(variant: str) -> None:
    """A call without sequences writes nothing."""
    case = Case.random([4], 2, 1, 8, 8)
    none, before = torch.empty(0, dtype=torch.int64), case.kv.clone()
    decode_attention(case.q[:0], case.kv, none, none, torch.empty(0, 16), **case.options())
    assert torch.equal(case.kv, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("latent", [False, True])
def test_torch_fallback_agrees(monkeypatch: pytest.MonkeyPatch, latent: bool, dtype: torch.dtype) -> None:
    """With the kernel switched off, torch computes the same, by the same call."""
    monkeypatch.setenv("MOE_HRM_NATIVE", "0")
    assert native_kernel() is None
    case = Case.random([3, 0, 70, 1], 12, 1 if latent else 3, 48, 40, dtype, latent=latent, sinks=True)
    case.check(case.run())
    assert torch.equal(case.run(), case.run(decode_attention_torch))


def test_calls_from_several_threads_at_once(variant: str) -> None:
    """Calls that overlap keep apart: each gets its own answer, again and again."""
    cases = [Case.random([150, 20 + i, 400], 8, 2, 64, 64, DTYPES[i], seed=i) for i in range(3)]
    expected = [case.run(threads=2) for case in cases]
    wrong: list[int] = []

    def repeat(index: int) -> None:
        for _ in range(20):
            if not torch.equal(cases[index].run(threads=2), expected[index]):
                wrong.append(index)

    workers = [threading.Thread(target=repeat, args=(i,)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_makes_its_own_threads(variant: str) -> None:
    """After a fork the child has none of the parent's threads, and computes all the same."""
    case = Case.random([700, 300], 4, 2, 32, 32)
    expected, out = case.run(threads=3), torch.zeros(2, 128)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn of every fork beside threads
        child = os.fork()
    if child == 0:
        code = 1
        try:
            decode_attention(case.q, case.kv, case.starts, case.lengths, out, **case.options(threads=3))
            code = 0 if out.numpy().tobytes() == expected.numpy().tobytes() else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_shapes(data: st.DataObject) -> None:
    """Any head counts, dimensions, lengths and overlapping or scattered rows agree with the reference."""
    draw = data.draw
    latent = draw(st.booleans())
    kv_heads = 1 if latent else draw(st.integers(1, 4))
    key_dim = draw(st.integers(1, 96))
    value_dim = draw(st.integers(1, key_dim if latent else 96))
    lengths = draw(st.lists(st.integers(0, 150), min_size=1, max_size=5))
    case = Case.random(
        lengths,
        kv_heads * draw(st.integers(1, 12)),
        kv_heads,
        key_dim,
        value_dim,
        draw(st.sampled_from(DTYPES)),
        latent=latent,
        sinks=draw(st.booleans()),
        starts=[draw(st.integers(0, 200)) for _ in lengths],
        seed=draw(st.integers(0, 1000)),
    )
    variants = available() or [""]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_HRM_NATIVE_ISA", draw(st.sampled_from(variants)))
        case.check(case.run(threads=draw(st.integers(1, 3))))
    case.check(case.run(decode_attention_torch))


INVALID: list[tuple[str, dict[str, Any]]] = [
    ("num_kv_heads", {"num_kv_heads": 0}),
    ("multiple of num_kv_heads", {"num_kv_heads": 3}),
    ("at least", {"value_offset": 40}),
    ("threads", {"threads": 0}),
    ("float32, bfloat16 or float16", {"q": torch.zeros(2, 32, dtype=torch.float64)}),
    ("float32, bfloat16 or float16", {"kv": torch.zeros(20, 32, dtype=torch.bfloat16)}),
    ("two dimensions", {"kv": torch.zeros(5, 4, 32)}),
    ("out must be", {"out": torch.zeros(2, 31)}),
    ("out must be", {"out": torch.zeros(3, 32)}),
    ("last dimension", {"kv": torch.zeros(32, 20).T}),
    ("starts must be", {"starts": torch.zeros(2)}),
    ("lengths must be", {"lengths": torch.zeros(3, dtype=torch.int64)}),
    ("sinks must be", {"sinks": torch.zeros(5)}),
    ("within the 20 rows", {"lengths": torch.tensor([1, 30])}),
    ("within the 20 rows", {"lengths": torch.tensor([1, -1])}),
    ("within the 20 rows", {"starts": torch.tensor([-1, 0])}),
    ("within the 20 rows", {"starts": torch.tensor([2**62, 0])}),
    ("host memory", {"kv": torch.zeros(20, 32, device="meta")}),
]


@pytest.mark.parametrize("native", ["1", "0"])
@pytest.mark.parametrize(("message", "change"), INVALID)
def test_wrong_arguments(message: str, change: dict[str, Any], native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments that do not fit are refused in one line, with the kernel and without, and nothing is written."""
    monkeypatch.setenv("MOE_HRM_NATIVE", native)
    tensors: dict[str, Any] = {
        "q": torch.zeros(2, 32),
        "kv": torch.zeros(20, 32),
        "starts": torch.tensor([0, 5]),
        "lengths": torch.tensor([5, 5]),
        "out": torch.full((2, 32), 7.0),
    }
    options: dict[str, Any] = {"num_kv_heads": 2, "key_dim": 8, "value_dim": 8, "value_offset": 16, "scale": 1.0}
    for name, value in change.items():
        (tensors if name in tensors else options)[name] = value
    with pytest.raises(InvalidValue, match=message) as caught:
        decode_attention(*tensors.values(), **options)
    assert "\n" not in str(caught.value)
    assert bool((tensors["out"] == 7).all()) or message == "out must be"


def test_unknown_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt instruction set is named with what there is."""
    if native_kernel() is None:
        pytest.skip("no kernel here")
    monkeypatch.setenv("MOE_HRM_NATIVE_ISA", "avx")
    with pytest.raises(InvalidValue, match="baseline, avx2, avx512, avx512_bf16"):
        native_kernel()


def test_without_a_compiler_torch_computes(tmp_path: Path) -> None:
    """With $CXX naming nothing and an empty cache, calls work, with one warning in one line."""
    script = """
        import warnings
        import torch
        from executor.cpu_attention import decode_attention, native_kernel
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(3):
                out = torch.full((1, 8), torch.nan)
                one = torch.tensor([1])
                decode_attention(torch.zeros(1, 8), torch.ones(4, 16), one, one, out, num_kv_heads=1, key_dim=8,
                                 value_dim=8, value_offset=8, scale=1.0)
        assert native_kernel() is None
        assert bool((out == 1).all())
        said = [str(w.message) for w in seen if "decode attention" in str(w.message)]
        assert len(said) == 1 and "no-such-compiler" in said[0] and "\\n" not in said[0], said
    """
    environment = os.environ | {"CXX": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("MOE_HRM_NATIVE", None)
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


@pytest.fixture
def tiny_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source file that builds at once, and an empty cache."""
    folder = tmp_path / "native"
    folder.mkdir()
    (folder / "answer.cpp").write_text('extern "C" int answer() { return 42; }\n')
    monkeypatch.setattr(native_build, "_FOLDER", folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if not available():
        pytest.skip("no compiler here")
    return folder


def test_builds_at_the_same_time(tiny_source: Path, tmp_path: Path) -> None:
    """Builds that overlap all end with a library that works, and leave nothing else behind."""
    answers: list[int] = []
    builders = [threading.Thread(target=lambda: answers.append(load_native("answer.cpp").answer())) for _ in range(4)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert answers == [42] * 4
    assert [p.suffix for p in (tmp_path / "cache" / "moe-hrm").iterdir()] == [".so"]


def test_a_changed_source_is_built_anew(tiny_source: Path) -> None:
    """The cache does not answer for another source, header included."""
    (tiny_source / "number.h").write_text("constexpr int number = 1;\n")
    (tiny_source / "answer.cpp").write_text('#include "number.h"\nextern "C" int answer() { return number; }\n')
    assert load_native("answer.cpp").answer() == 1
    (tiny_source / "number.h").write_text("constexpr int number = 2;\n")
    assert load_native("answer.cpp").answer() == 2


@pytest.mark.parametrize("trouble", ["does not compile", "no cache", "compiler fails", "no compiler"])
def test_trouble_in_one_line(tiny_source: Path, trouble: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong with a build is one kind of error with one line."""
    if trouble == "does not compile":
        (tiny_source / "answer.cpp").write_text("int x = ;\n")
    elif trouble == "no cache":
        monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    else:
        monkeypatch.setenv("CXX", "false" if trouble == "compiler fails" else "no-such-compiler -O1")
    with pytest.raises(NativeUnavailable) as caught:
        load_native("answer.cpp")
    assert "\n" not in str(caught.value)
