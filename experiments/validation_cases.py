"""The cases that a validation predicts and measures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hrm import BatchShape, Policy, micro_batches

__all__ = ["QUICK", "Case", "validation_cases"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run to predict and measure."""

    name: str
    batch_size: int
    micro_batch_size: int
    weights_on_gpu: float
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
            weights_on_gpu=self.weights_on_gpu,
        )

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


def validation_cases(
    planned: Policy, gen_len: int, lens: tuple[int, ...], pace: float | None, cuda: bool
) -> Iterator[Case]:
    """The planned case, then a spread over batch, micro-batch, residency, lengths and link pace."""
    yield Case(
        name="planned",
        batch_size=planned.batch_size,
        micro_batch_size=planned.micro_batch_size,
        weights_on_gpu=planned.weights_on_gpu,
        prompt_lens=lens,
        gen_len=gen_len,
        link_bandwidth=pace,
    )
    mixed = (8, 96, 24, 40, 16, 64, 32, 120)
    table: list[tuple[str, int, int, float, tuple[int, ...], int, float | None]] = [
        # name, N, mu, r_w, prompt lengths, gen_len, link
        ("slow link", 32, 16, 0.0, (32,), 8, 0.5e9),
        ("streaming", 64, 16, 0.0, (32,), 12, 2e9),
        ("balanced", 64, 16, 0.0, (32,), 12, 1e9),
        ("small micro-batches", 32, 8, 0.0, (32,), 12, 2e9),
        ("half resident", 64, 16, 0.5, (32,), 12, 2e9),
        ("all resident", 64, 32, 1.0, (32,), 12, 2e9),
        ("one micro-batch", 16, 16, 0.5, (64,), 12, 2e9),
        ("two micro-batches", 64, 32, 0.25, (16,), 12, 1e9),
        ("long prompts", 32, 16, 0.5, (128,), 8, 2e9),
        ("few sequences", 24, 4, 0.0, (16,), 8, 1e9),
        ("no pacing", 64, 16, 0.0, (32,), 12, None),
        ("slow, mostly resident", 48, 16, 0.75, (32,), 12, 0.5e9),
        ("uneven prompts", 48, 16, 0.25, mixed, 12, 2e9),
    ]
    for name, n, mu, share, lengths, gen, link in table:
        yield Case(
            name=name,
            batch_size=n,
            micro_batch_size=mu,
            weights_on_gpu=share,
            prompt_lens=lengths,
            gen_len=gen,
            link_bandwidth=None if cuda else link,
        )


QUICK = ("planned", "slow link", "streaming")
