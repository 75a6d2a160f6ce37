"""Streaming all experts against caching the active ones, and popular experts on the GPU against any, measured here.

    python benchmarks/expert_buffering.py [--rounds 3] [--quick] [--out FILE.json] [--figure FILE.png]

One checkpoint of random weights with 64 experts per layer, top-8 (OLMoE's shape, narrower and with fewer layers), whose
routers are skewed: the rows of each are scaled, so that some experts are chosen far more often than others. Everything
has the same device memory. Entries take turns in rounds; what is reported are medians.

1. For 1 to 16 requests at a time: CGOPipe with as much of the experts resident as fits, against an expert cache with as
   many slots as fit, under several cache policies. Beside the measured speed stands the predicted one, from a probe of
   this machine: for the cache with uniform routing, and with the miss rate of the trace that the run recorded.
2. Experts computed where they lie, the same share of them on the device: the first ones, or the popular ones of a trace
   recorded with other prompts.

Prints a table and writes one JSON object with machine, versions and command.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    # Python puts this file's folder first, where a file's name hides the package that is measured.
    sys.path[0] = str(_ROOT)

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from executor.checkpoint import Checkpoint, make_checkpoint  # noqa: E402
from executor.generate import generate  # noqa: E402
from executor.machine import OtherLoad, machine_facts  # noqa: E402
from executor.probe import Prober  # noqa: E402
from executor.recording import RouteRecorder  # noqa: E402
from experiments.records import commit  # noqa: E402
from hrm import BatchShape, Hardware, Policy  # noqa: E402
from hrm.catalog import model_config  # noqa: E402
from hrm.memory import batch_footprint  # noqa: E402
from hrm.units import format_bytes  # noqa: E402
from simulator import simulate  # noqa: E402
from simulator.experts.cache import DEFAULT_POLICY  # noqa: E402
from simulator.experts.shares import typical_popularity  # noqa: E402
from simulator.experts.study import decode_miss_rate  # noqa: E402

_SIZE = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 6, "vocab_size": 2048}
_SIZE |= {"num_attention_heads": 8, "num_key_value_heads": 8, "dtype": "bfloat16", "max_position_embeddings": 512}
_SIZE |= {"eos_token_id": None}
_SKEW = 1.0
"""Standard deviation of the logarithm by which a router's rows are scaled."""
_SHARE = 0.5
"""Of the experts' bytes, what the device has room for besides everything else."""
_POPULAR_SHARE = 0.25
"""Of the experts, those that stay on the device where each is computed where it lies."""
_LINK = 1e9
_PROMPT, _GEN = 24, 24
_SIZES = (1, 4, 16)
_CACHES = ("inactive-first-lifo", "lru", "next-use")


@dataclass(frozen=True)
class Entry:
    """Something that takes its turn."""

    part: str
    name: str
    policy: Policy
    cache: str | None = None
    popular: bool = False

    @property
    def size(self) -> int:
        """Requests at a time."""
        return self.policy.batch_size


def skewed_checkpoint(folder: Path) -> Checkpoint:
    """A random checkpoint in which some experts are popular."""
    config = model_config("olmoe-1b-7b") | _SIZE
    path = make_checkpoint(config, folder / "skewed")
    generator = torch.Generator().manual_seed(1)
    for file in sorted(path.glob("*.safetensors")):
        tensors = load_file(str(file))
        for name, tensor in tensors.items():
            if name.endswith("mlp.gate.weight"):
                scale = (_SKEW * torch.randn(len(tensor), generator=generator)).exp()
                tensors[name] = (tensor.float() * scale[:, None]).to(tensor.dtype)
        save_file(tensors, str(file), metadata={"format": "pt"})
    return Checkpoint.open(path)


def need(checkpoint: Checkpoint, policy: Policy) -> float:
    """Device memory of a batch of this policy."""
    shape = BatchShape.uniform(policy.batch_size, policy.micro_batch_size, _PROMPT, _GEN)
    return float(batch_footprint(checkpoint.model, shape, policy).gpu_bytes)


def filled(checkpoint: Checkpoint, size: int, budget: float, *, cached: bool) -> Policy:
    """As many slots, or as large a share of the experts, as the budget holds."""
    micro = -(-size // 2)
    if cached:
        one, two = (need(checkpoint, Policy(batch_size=size, micro_batch_size=size, expert_slots=k)) for k in (1, 2))
        slots = min(checkpoint.model.num_experts, 1 + math.floor((budget - one) / (two - one)))
        return Policy(batch_size=size, micro_batch_size=size, expert_slots=slots)
    none, half = (need(checkpoint, Policy(batch_size=size, micro_batch_size=micro, weights_on_gpu=w)) for w in (0, 0.5))
    share = min(0.999, max(0.0, (budget - none) / (half - none) / 2))
    return Policy(batch_size=size, micro_batch_size=micro, weights_on_gpu=share)


def entries(checkpoint: Checkpoint, budget: float, sizes: tuple[int, ...]) -> Iterator[Entry]:
    """Everything that is run."""
    for size in sizes:
        yield Entry("residency", "streaming", filled(checkpoint, size, budget, cached=False))
        policy = filled(checkpoint, size, budget, cached=True)
        for name in _CACHES:
            yield Entry("residency", f"cache, {name}", policy, cache=name)
    size = sizes[-1]
    both = Policy(batch_size=size, micro_batch_size=-(-size // 2), ffn_on_gpu=False, weights_on_gpu=_POPULAR_SHARE)
    yield Entry("popularity", "first experts resident", both)
    yield Entry("popularity", "popular experts resident", both, popular=True)


def prompts_of(checkpoint: Checkpoint, count: int, seed: int) -> list[list[int]]:
    """Random prompts."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(checkpoint.model.vocab_size, (count, _PROMPT), generator=generator).tolist()


def run(checkpoint: Checkpoint, entry: Entry, budget: float, popularity: Any) -> dict[str, Any]:
    """One turn: what was measured, and the routing that it met."""
    recorder = RouteRecorder(checkpoint.local)
    with OtherLoad() as load:
        result = generate(
            checkpoint,
            prompts_of(checkpoint, entry.size, 0),
            gen_len=_GEN,
            policy=entry.policy,
            device="cpu",
            device_memory=None if entry.part == "popularity" else math.ceil(budget),
            link_bandwidth=_LINK,
            recorder=recorder,
            popularity=popularity if entry.popular else None,
            **({"cache_policy": entry.cache} if entry.cache else {}),
        )
    return {
        "tok_s": result.throughput_tok_s,
        "decode_tok_s": entry.size * (_GEN - 1) / result.decode_s,
        "expert_cache": result.expert_cache,
        "device_bytes": result.peak_memory["device_bytes"],
        "other_load": load.share,
        "outputs": hash(json.dumps(result.outputs)),
        "trace": recorder.trace(),
    }


def predictions(checkpoint: Checkpoint, machine: Hardware, entry: Entry, turn: dict[str, Any]) -> dict[str, float]:
    """Tokens/s by uniform routing, and by the routing that the run met."""
    rates = machine.rates().with_link(_LINK)
    rates = replace(rates, stages_weights=True)
    shape = BatchShape.uniform(entry.size, entry.policy.micro_batch_size, _PROMPT, _GEN)
    model = checkpoint.model
    cache = entry.cache or DEFAULT_POLICY
    found = {"uniform": simulate(model, rates, entry.policy, shape, exact=True, cache_policy=cache).throughput_tok_s}
    trace = turn["trace"]
    met = model.with_routing(typical_popularity(trace).tolist())
    if entry.cache:
        slots = entry.policy.expert_slots or 1
        decode = decode_miss_rate(trace, slots, most_tokens=entry.size, policy=entry.cache)
        found["traced"] = simulate(met, rates, entry.policy, shape, exact=True, miss_rate=decode).throughput_tok_s
    else:
        found["traced"] = simulate(met, rates, entry.policy, shape, exact=True, popular=entry.popular).throughput_tok_s
    return found


def summary(entry: Entry, turns: list[dict[str, Any]], predicted: list[dict[str, float]]) -> dict[str, Any]:
    """Medians of an entry over the rounds."""
    middle = {key: statistics.median(turn[key] for turn in turns) for key in ("tok_s", "decode_tok_s", "other_load")}
    row = {"part": entry.part, "entry": entry.name, "requests": entry.size, "policy": entry.policy.to_dict(), **middle}
    row |= {f"predicted_{key}_tok_s": statistics.median(p[key] for p in predicted) for key in predicted[0]}
    row["error"] = row["predicted_traced_tok_s"] / row["tok_s"] - 1
    row["expert_cache"] = turns[-1]["expert_cache"]
    row["device_bytes"] = turns[-1]["device_bytes"]
    return row


def save_figure(rows: list[dict[str, Any]], file: Path) -> None:
    """Speed against requests, measured and predicted."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5.0), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row["entry"] for row in rows if row["part"] == "residency"):
        mine = [row for row in rows if row["entry"] == name]
        (line,) = axes.plot([r["requests"] for r in mine], [r["tok_s"] for r in mine], "o-", label=name)
        axes.plot(
            [r["requests"] for r in mine], [r["predicted_traced_tok_s"] for r in mine], "--", color=line.get_color()
        )
    axes.set(xscale="log", yscale="log", xlabel="requests at a time", ylabel="tokens/s (dashed: predicted)")
    axes.set_xticks(sorted({row["requests"] for row in rows}), labels=sorted({row["requests"] for row in rows}))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=130)


def main() -> None:
    """Run everything, print what was found, and write it with --out."""
    parser = argparse.ArgumentParser(description="Streaming against caching of experts.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="One round of two sizes.")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    sizes = (1, 8) if options.quick else _SIZES
    rounds = 1 if options.quick else options.rounds
    with tempfile.TemporaryDirectory() as name:
        checkpoint = skewed_checkpoint(Path(name))
        model = checkpoint.model
        bare = Policy(batch_size=sizes[-1], micro_batch_size=sizes[-1], expert_slots=1)
        budget = need(checkpoint, bare) + _SHARE * model.streamed_bytes
        print(f"{model}; device memory {format_bytes(budget)}", flush=True)
        prober = Prober(model, device=torch.device("cpu"))
        prober.hardware()
        recorder = RouteRecorder(checkpoint.local)
        # A share of popularity that is learned from other prompts than those that are timed.
        learn = Policy(batch_size=16, micro_batch_size=8)
        prompts = prompts_of(checkpoint, 16, 9)
        generate(checkpoint, prompts, gen_len=_GEN, policy=learn, device="cpu", link_bandwidth=None, recorder=recorder)
        popularity = recorder.trace().popularity()
        chosen = list(entries(checkpoint, budget, sizes))
        turns: list[list[dict[str, Any]]] = [[] for _ in chosen]
        predicted: list[list[dict[str, float]]] = [[] for _ in chosen]
        for number in range(rounds):
            for i, entry in enumerate(chosen):
                if not i or entry.size != chosen[i - 1].size:
                    machine = prober.refresh(passes=1)
                turn = run(checkpoint, entry, budget, popularity)
                predicted[i].append(predictions(checkpoint, machine, entry, turn))
                turns[i].append(turn)
            print(f"round {number + 1} of {rounds}", flush=True)
    rows = [summary(*each) for each in zip(chosen, turns, predicted, strict=True)]
    for size in sizes:
        answers = {t["outputs"] for e, ts in zip(chosen, turns, strict=True) if e.size == size for t in ts}
        print(f"{size} requests: {'same answers everywhere' if len(answers) == 1 else 'answers differ (ties in bf16)'}")
    print(f"{'requests':>8}  {'entry':28} {'tok/s':>8} {'predicted':>10} {'error':>7} {'uniform':>8} {'missed':>7}")
    for row in rows:
        found = row["expert_cache"]
        missed = f"{found['miss_rate']:7.1%}" if found else "      -"
        print(
            f"{row['requests']:>8}  {row['entry']:28} {row['tok_s']:8.1f} {row['predicted_traced_tok_s']:10.1f} "
            f"{row['error']:+7.1%} {row['predicted_uniform_tok_s']:8.1f} {missed}"
        )
    shares = popularity.mean(axis=0)
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine_facts(),
        "commit": commit(),
        "model": str(model),
        "router_skew": _SKEW,
        "most_popular_quarter": float(sum(sorted(shares)[-len(shares) // 4 :])),
        "device_memory_bytes": budget,
        "link_bandwidth": _LINK,
        "rounds": rounds,
        "rows": rows,
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    if options.figure:
        save_figure(rows, options.figure)


if __name__ == "__main__":
    main()
