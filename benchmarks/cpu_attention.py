"""Decode attention on the CPU: the native kernel, torch's ways to compute it, and what memory gives, in one run.

    python benchmarks/cpu_attention.py [--quick] [--out FILE.json]

Everything takes its turn in every round, after a pause and as many calls that are not timed, but for calls that take
long, which come after. Medians over the rounds are reported. A round during which other programs used the machine is
repeated; those during which they used it least count, with how much that was. The ceiling is what the same number of
threads read (a sum) or copy (bytes read plus bytes written), whichever is less, in the same round. KV lies in arenas
several times as large as the last-level cache, and every call takes the next layer. torch's ways get the keys and
values of each head in a piece, ``[n, heads, context, d]``, as they like them best.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
# Python puts this file's folder first, where its own name could hide what is measured.
sys.path[0] = str(_ROOT)

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from executor.cpu_attention import decode_attention, native_kernel  # noqa: E402
from executor.machine import OtherLoad, machine_facts  # noqa: E402
from experiments.records import commit  # noqa: E402

_ARENA_BYTES = 256 * 2**20
_LEAST_S = 0.015
_SLOW_S = 0.15
_QUIET = 0.08
_PATIENCE = 3
_PAUSE_S = 0.03
"""Between two calls: torch's threads spin for some milliseconds after their work, on cores that others want."""
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """Sequences, heads and dimensions of one call."""

    sequences: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    context: int
    latent: bool = False

    @property
    def name(self) -> str:
        """In words."""
        kind = "latent" if self.latent else f"d {self.key_dim}"
        return f"{self.sequences} sequences, {self.heads}/{self.kv_heads} heads, {kind}, context {self.context}"

    @property
    def row(self) -> int:
        """Elements of one token's cache."""
        return self.key_dim if self.latent else self.kv_heads * (self.key_dim + self.value_dim)

    @property
    def flops(self) -> int:
        """Multiplications and additions of one call."""
        return 2 * self.sequences * self.context * self.heads * (self.key_dim + self.value_dim)

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of KV that one call reads."""
        return self.sequences * self.context * self.row * dtype.itemsize


GROUPED = [Case(32, 32, 8, 128, 128, context) for context in (128, 512, 1024, 2048)]
OTHERS = [Case(32, 8, 8, 128, 128, 512), Case(32, 64, 8, 128, 128, 512)]
LATENT = [Case(8, 16, 1, 576, 512, 512, True), Case(8, 128, 1, 576, 512, 512, True)]


def _noise(count: int, dtype: torch.dtype) -> Tensor:
    """Repeated blocks of random numbers: fresh ones would take longer than what is measured."""
    block = torch.randn(2**20).to(dtype)
    return block.repeat(-(-count // block.numel()))[:count]


class Calls:
    """The calls of one case in one type, each on the next layer every time."""

    def __init__(self, case: Case, dtype: torch.dtype, threads: int) -> None:
        self.case, self.threads = case, threads
        rows = case.sequences * case.context
        self.layers = max(1, -(-_ARENA_BYTES // case.nbytes(dtype)))
        self.kv = _noise(self.layers * rows * case.row, dtype).view(self.layers, rows, case.row)
        self.q = torch.randn(case.sequences, case.heads * case.key_dim).to(dtype)
        self.out = torch.empty(case.sequences, case.heads * case.value_dim, dtype=dtype)
        self.starts = torch.arange(case.sequences) * case.context
        self.lengths = torch.full((case.sequences,), case.context)
        self.layer = 0

    def _next(self) -> Tensor:
        self.layer = (self.layer + 1) % self.layers
        return self.kv[self.layer]

    def _split(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries folded by key head, keys and values, ``[n, kv heads, group or context, d]``."""
        c = self.case
        q = self.q.view(c.sequences, c.kv_heads, c.heads // c.kv_heads, c.key_dim)
        layer = self._next()
        if c.latent:
            keys = layer.view(c.sequences, 1, c.context, c.row)
            return q, keys, keys[..., : c.value_dim]
        keys, values = layer.view(2, c.sequences, c.kv_heads, c.context, c.key_dim)
        return q, keys, values

    def native(self) -> None:
        """The native kernel."""
        c = self.case
        decode_attention(
            self.q,
            self._next(),
            self.starts,
            self.lengths,
            self.out,
            num_kv_heads=c.kv_heads,
            key_dim=c.key_dim,
            value_dim=c.value_dim,
            value_offset=0 if c.latent else c.kv_heads * c.key_dim,
            scale=c.key_dim**-0.5,
            threads=self.threads,
        )

    def folded(self) -> None:
        """torch's attention, the heads of a group as rows of one query."""
        F.scaled_dot_product_attention(*self._split())

    def grouped(self) -> None:
        """torch's attention with `enable_gqa`."""
        q, keys, values = self._split()
        whole = q.reshape(self.case.sequences, self.case.heads, 1, self.case.key_dim)
        F.scaled_dot_product_attention(whole, keys, values, enable_gqa=True)

    def manual(self) -> None:
        """Two products of matrices and a softmax in float32."""
        q, keys, values = self._split()
        scores = torch.matmul(q, keys.transpose(-1, -2)) * self.case.key_dim**-0.5
        torch.matmul(scores.softmax(-1, dtype=torch.float32).to(q.dtype), values)


class Ceilings:
    """What memory and cores give at most: reading, copying, and a product of matrices."""

    def __init__(self) -> None:
        self.source, self.target = torch.ones(2, _ARENA_BYTES // 8)
        self.square = torch.randn(1024, 1024)

    def read(self) -> None:
        """Sum of half an arena."""
        self.source.sum()

    def copy(self) -> None:
        """Half an arena to the other half."""
        self.target.copy_(self.source)

    def product(self) -> None:
        """float32, 1024 x 1024 x 1024."""
        torch.mm(self.square, self.square)


def _seconds(call: Callable[[], None], repeats: int) -> float:
    time.sleep(_PAUSE_S)
    for _ in range(repeats):
        call()  # wakes the threads that it needs, and processors that fell asleep
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - started) / repeats


def measure(case: Case, threads: int, rounds: int, ceilings: Ceilings) -> dict[str, Any]:
    """One case with everything in turn."""
    half = float(ceilings.source.nbytes)
    calls: dict[str, Callable[[], None]] = {"read": ceilings.read, "copy": ceilings.copy, "product": ceilings.product}
    for name, dtype in _DTYPES.items():
        case_calls = Calls(case, dtype, threads)
        calls |= {f"native {name}": case_calls.native, f"SDPA folded {name}": case_calls.folded}
        calls[f"manual {name}"] = case_calls.manual
        if not case.latent:
            calls[f"SDPA enable_gqa {name}"] = case_calls.grouped
    once, repeats = {}, {}
    for name, call in calls.items():
        call()
        once[name] = _seconds(call, 1)
        repeats[name] = max(1, round(_LEAST_S / once[name]))
    taken: list[tuple[float, dict[str, float]]] = []
    slow = [name for name in calls if once[name] > _SLOW_S]
    for _ in range(rounds * _PATIENCE):
        with OtherLoad() as load:
            times = {}
            for name in calls:
                if name not in slow:
                    times[name] = _seconds(calls[name], repeats[name])
                if name == "copy":
                    ceilings.read()  # what the copy wrote leaves the caches now, not at the expense of what comes next
        taken.append((load.share, times))
        if sum(share < _QUIET for share, _ in taken) == rounds:
            break
    quiet = sorted(taken, key=lambda item: item[0])[:rounds]
    seconds = {name: [times[name] for _, times in quiet] for name in calls if name not in slow}
    seconds |= {name: [_seconds(calls[name], 1) for _ in range(3)] for name in slow}
    ceiling = [min(half / r, 2 * half / c) for r, c in zip(seconds["read"], seconds["copy"], strict=True)]
    found: dict[str, Any] = {
        "threads": threads,
        "rounds": len(quiet),
        "rounds_taken": len(taken),
        "other_load": statistics.median(share for share, _ in quiet),
        "read_gb_s": half / statistics.median(seconds["read"]) / 1e9,
        "copy_gb_s": 2 * half / statistics.median(seconds["copy"]) / 1e9,
        "product_gflop_s": 2 * 1024**3 / statistics.median(seconds["product"]) / 1e9,
    }
    for name in list(calls)[3:]:
        size = case.nbytes(_DTYPES[name.split()[-1]])
        median = statistics.median(seconds[name])
        tops = [statistics.median(ceiling)] * 3 if name in slow else ceiling
        shares = sorted(size / s / top for s, top in zip(seconds[name], tops, strict=True))
        found[name] = {
            "median_s": median,
            "min_s": min(seconds[name]),
            "max_s": max(seconds[name]),
            "kv_gb_s": size / median / 1e9,
            "gflop_s": case.flops / median / 1e9,
            "share_of_ceiling": statistics.median(shares),
            "share_quartiles": [shares[len(shares) // 4], shares[-1 - len(shares) // 4]],
        }
    return found


def main() -> None:
    """Run everything and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three rounds, fewer cases")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rounds = 3 if options.quick else 11
    cases = [GROUPED[1], LATENT[0]] if options.quick else [*GROUPED, *OTHERS, *LATENT]
    result: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine_facts(),
        "commit": commit(),
        "kernel": native_kernel(),
        "rounds": rounds,
        "arena_bytes": _ARENA_BYTES,
        "cases": {},
    }
    ceilings = Ceilings()
    before = torch.get_num_threads()
    for case in cases:
        result["cases"][case.name] = {}
        for threads in dict.fromkeys((1, before)):
            torch.set_num_threads(threads)
            found = measure(case, threads, rounds, ceilings)
            result["cases"][case.name][f"{threads} threads"] = found
            _table(case.name, found)
        torch.set_num_threads(before)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def _table(name: str, found: dict[str, Any]) -> None:
    print(
        f"\n{name}; {found['threads']} thread(s), others {found['other_load']:.0%}: "
        f"read {found['read_gb_s']:.1f}, copy {found['copy_gb_s']:.1f} GB/s, "
        f"product {found['product_gflop_s']:.0f} GFLOP/s"
    )
    for row, numbers in found.items():
        if isinstance(numbers, dict):
            low, high = numbers["share_quartiles"]
            print(
                f"  {row:22} {numbers['median_s'] * 1e3:9.3f} ms {numbers['kv_gb_s']:6.1f} GB/s "
                f"{numbers['gflop_s']:6.1f} GFLOP/s  {numbers['share_of_ceiling']:5.2f} of the ceiling "
                f"({low:.2f}-{high:.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
