"""The cases that a validation predicts and measures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from hrm import BatchShape, Policy, micro_batches

__all__ = ["QUICK", "Case", "validation_cases"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run to predict and measure."""

    name: str
    setting: str
    """Cases of one setting differ in nothing but the system, and can be ranked."""
    system: str = "moe-lightning"
    batch_size: int
    micro_batch_size: int
    weights_on_gpu: float = 0.0
    kv_on_gpu: float = 0.0
    attention_on_gpu: bool = False
    ffn_on_gpu: bool = True
    expert_slots: int | None = None
    pinned_weights: bool = False
    """Weights travel from where they lie, without a staging copy."""
    prompt_lens: tuple[int, ...]
    """One length for all, or lengths that repeat."""
    gen_len: int
    link_bandwidth: float | None
    """Bytes/s of the paced link; None for none."""

    @property
    def policy(self) -> Policy:
        """The policy to run."""
        return Policy(
            batch_size=self.batch_size,
            micro_batch_size=self.micro_batch_size,
            attention_on_gpu=self.attention_on_gpu,
            ffn_on_gpu=self.ffn_on_gpu,
            weights_on_gpu=self.weights_on_gpu,
            kv_on_gpu=self.kv_on_gpu,
            expert_slots=self.expert_slots,
        )

    @property
    def key(self) -> str:
        """What it is found by on disk."""
        return json.dumps(asdict(self))

    def lengths(self) -> list[int]:
        """Prompt length of each request."""
        return [self.prompt_lens[i % len(self.prompt_lens)] for i in range(self.batch_size)]

    def shape(self) -> BatchShape:
        """The batch as Algorithm 2 forms it."""
        lengths = self.lengths()
        groups, _ = micro_batches(
            lengths,
            num_micro_batches=self.policy.num_micro_batches,
            micro_batch_size=self.micro_batch_size,
        )
        return BatchShape(tuple(tuple(lengths[i] for i in group) for group in groups), self.gen_len)


_SYSTEMS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("moe-lightning", {}),
    ("fastdecode", {}),
    ("flexgen-c", {}),
    ("flexgen", {"attention_on_gpu": True}),
    ("deepspeed-zero", {"attention_on_gpu": True, "kv_on_gpu": 1.0, "single": True}),
)
_MIXED = (8, 96, 24, 40, 16, 64, 32, 120)
_SETTINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    # All five systems on the same requests, in batches of the same size.
    ("slow link", {"n": 32, "mu": 8, "lens": (32,), "gen": 8, "link": 0.5e9}),
    ("streaming", {"n": 64, "mu": 16, "lens": (32,), "gen": 10, "link": 2e9}),
    ("fast link", {"n": 48, "mu": 12, "lens": (64,), "gen": 10, "link": 5e9}),
    ("no pacing", {"n": 64, "mu": 16, "lens": (32,), "gen": 10, "link": None}),
)
_SINGLE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("half resident", {"n": 64, "mu": 16, "lens": (32,), "gen": 12, "link": 2e9, "weights_on_gpu": 0.5}),
    ("all resident", {"n": 64, "mu": 32, "lens": (32,), "gen": 12, "link": 2e9, "weights_on_gpu": 1.0}),
    ("one micro-batch", {"n": 16, "mu": 16, "lens": (64,), "gen": 12, "link": 2e9, "weights_on_gpu": 0.5}),
    ("few sequences", {"n": 24, "mu": 4, "lens": (16,), "gen": 8, "link": 1e9}),
    ("uneven prompts", {"n": 48, "mu": 16, "lens": _MIXED, "gen": 12, "link": 2e9, "weights_on_gpu": 0.25}),
    ("pinned weights", {"n": 64, "mu": 16, "lens": (32,), "gen": 12, "link": 1e9, "pinned_weights": True}),
    ("GPU attention", {"n": 32, "mu": 8, "lens": (64,), "gen": 12, "link": 2e9, "attention_on_gpu": True}),
    (
        "half the KV resident",
        {"n": 32, "mu": 8, "lens": (64,), "gen": 12, "link": 1e9, "attention_on_gpu": True, "kv_on_gpu": 0.5},
    ),
    (
        "experts on both",
        {"n": 32, "mu": 8, "lens": (32,), "gen": 12, "link": 1e9, "ffn_on_gpu": False, "weights_on_gpu": 0.5},
    ),
    # Few at a time, as caches are for, and so many in all that those which repeat themselves do not decide.
    ("expert cache", {"n": 8, "mu": 2, "lens": (32,), "gen": 16, "link": 1e9, "expert_slots": 3}),
    (
        "expert cache, GPU attention",
        {
            "n": 6,
            "mu": 3,
            "lens": (32,),
            "gen": 16,
            "link": 2e9,
            "expert_slots": 5,
            "attention_on_gpu": True,
            "kv_on_gpu": 1.0,
        },
    ),
)


def validation_cases(
    planned: Policy, gen_len: int, lens: tuple[int, ...], pace: float | None, cuda: bool
) -> Iterator[Case]:
    """The planned case, the systems side by side, then a spread over residency, lengths, places and link pace."""
    yield Case(
        name="planned",
        setting="planned",
        batch_size=planned.batch_size,
        micro_batch_size=planned.micro_batch_size,
        weights_on_gpu=planned.weights_on_gpu,
        kv_on_gpu=planned.kv_on_gpu,
        attention_on_gpu=planned.attention_on_gpu,
        ffn_on_gpu=planned.ffn_on_gpu,
        prompt_lens=lens,
        gen_len=gen_len,
        link_bandwidth=pace,
    )
    for setting, options in _SETTINGS:
        for system, places in _SYSTEMS:
            name = setting if system == "moe-lightning" else f"{setting}, {system}"
            yield _case(name, setting, {**options, **places, "system": system}, cuda)
    for name, options in _SINGLE:
        yield _case(name, name, dict(options), cuda)


def _case(name: str, setting: str, options: dict[str, Any], cuda: bool) -> Case:
    n, mu = options.pop("n"), options.pop("mu")
    if options.pop("single", False):
        mu = n
    link = options.pop("link")
    return Case(
        name=name,
        setting=setting,
        batch_size=n,
        micro_batch_size=mu,
        prompt_lens=options.pop("lens"),
        gen_len=options.pop("gen"),
        link_bandwidth=None if cuda else link,
        **options,
    )


QUICK = ("planned", "slow link", "streaming")
