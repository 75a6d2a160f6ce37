"""Draws belong to the request: not to its batch, its place in it, or the moment at which a run was resumed."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from executor.checkpoint import Checkpoint
from executor.generate import generate
from executor.kv_cache import Request
from executor.sampling import Sampling, choose
from hrm import Policy
from hrm.errors import InvalidValue


def drawn(logits: torch.Tensor, sampling: Sampling, count: int) -> torch.Tensor:
    """`count` tokens from one row of logits, with the numbers of one long request."""
    numbers = sampling.numbers("a long request", count)
    assert numbers is not None
    return choose(logits.expand(count, -1), sampling, torch.tensor(numbers, dtype=torch.float32))


def chi_square(tokens: torch.Tensor, expected: np.ndarray) -> float:
    """Pearson's statistic of the tokens that are expected at all."""
    seen = np.bincount(tokens.numpy(), minlength=len(expected))
    wanted = expected * len(tokens)
    kept = wanted > 0
    assert seen[~kept].sum() == 0
    return float(((seen - wanted)[kept] ** 2 / wanted[kept]).sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_the_distribution(temperature: float) -> None:
    """40,000 draws among 12 tokens have a chi-square that 11 degrees of freedom pass once in a thousand times."""
    logits = torch.linspace(-2, 1.5, 12)[torch.randperm(12, generator=torch.Generator().manual_seed(1))]
    tokens = drawn(logits, Sampling(temperature=temperature, seed=4), 40_000)
    expected = (logits.double() / temperature).softmax(dim=-1).numpy()
    assert chi_square(tokens, expected) < 31.3


def test_draws_of_a_nucleus_follow_its_distribution() -> None:
    """With top-p, what is kept is drawn with its own probabilities, scaled to one, and nothing else is drawn."""
    p = np.array([0.05, 0.4, 0.1, 0.25, 0.2])
    tokens = drawn(torch.tensor(p).log().float(), Sampling(temperature=1.0, top_p=0.8, seed=9), 40_000)
    expected = np.array([0, 0.4, 0, 0.25, 0.2]) / 0.85
    assert chi_square(tokens, expected) < 18.5


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(1e-9, {3}), (0.4, {3}), (0.5, {3, 0}), (0.79, {3, 0, 4}), (0.9, {3, 0, 4, 1}), (1.0, {0, 1, 2, 3, 4})],
)
def test_top_p_keeps_the_smallest_set(top_p: float, kept: set[int]) -> None:
    """The likeliest tokens that together reach top-p, and not one more."""
    logits = torch.tensor([0.22, 0.12, 0.06, 0.42, 0.18]).log()
    assert set(drawn(logits, Sampling(temperature=1.0, top_p=top_p, seed=2), 3000).tolist()) == kept


def test_ends_of_the_unit_interval_are_safe() -> None:
    """The smallest and the largest number draw the likeliest and the least likely token that is kept."""
    logits = torch.tensor([[1.0, -float("inf"), 3.0, 2.0]]).expand(2, -1)
    ends = torch.tensor([0.0, 1.0])
    assert choose(logits, Sampling(temperature=1.0), ends).tolist() == [2, 0]
    assert choose(logits, Sampling(temperature=1.0, top_p=0.7), ends).tolist() == [2, 3]


def test_temperature_zero_is_the_likeliest_token() -> None:
    """Greedy, with no number drawn; and the limit of temperatures close to zero, however close."""
    logits = torch.randn(40, 300, generator=torch.Generator().manual_seed(0)) * 50
    best = logits.argmax(dim=-1).tolist()
    greedy = Sampling()
    assert greedy.numbers("x", 5) is None and greedy.draws([], 0) is None
    assert choose(logits, greedy, None).tolist() == best
    numbers = torch.rand(40, generator=torch.Generator().manual_seed(1))
    for temperature in (1e-4, 1e-20, 1e-45, 1e-300):
        assert choose(logits, Sampling(temperature=temperature), numbers).tolist() == best


def test_a_draw_does_not_depend_on_the_rows_beside_it() -> None:
    """Any composition of a batch gives each row the token that it has alone."""
    generator = torch.Generator().manual_seed(3)
    logits, numbers = torch.randn(50, 97, generator=generator), torch.rand(50, generator=generator)
    sampling = Sampling(temperature=1.3, top_p=0.9)
    alone = [int(choose(logits[i : i + 1], sampling, numbers[i : i + 1])) for i in range(50)]
    rng = random.Random(0)
    for _ in range(10):
        rows = rng.sample(range(50), rng.randint(1, 50))
        assert choose(logits[rows], sampling, numbers[rows]).tolist() == [alone[i] for i in rows]


def test_numbers_belong_to_seed_and_name() -> None:
    """A name gives the same numbers whatever else there is, a prefix of them if it is shorter; others give others."""
    one = Sampling(temperature=1.0, seed=7)
    numbers = one.numbers("a", 20)
    assert numbers is not None
    assert (one.numbers("a", 5) == numbers[:5]).all()
    assert (Sampling(temperature=0.3, top_p=0.5, seed=7).numbers("a", 20) == numbers).all()
    others = [one.numbers(name, 20) for name in ("b", "aa", "", 0, 10, "\ud800")]
    others.append(Sampling(temperature=1.0, seed=8).numbers("a", 20))
    assert all(other is not None and not (other == numbers).any() for other in others)
    assert (numbers >= 0).all() and (numbers < 1).all()


def test_a_request_goes_on_with_its_own_numbers() -> None:
    """The number of a token is that of its place in the answer, whatever segment it is drawn in; past the end, any."""
    sampling = Sampling(temperature=1.0)
    requests = [Request(i, [1], 4, sampling.numbers(i, 4)) for i in range(2)]
    requests[1].output = [5, 6]
    draws = [sampling.draws(requests, count) for count in range(4)]
    for count, found in enumerate(draws):
        assert found is not None
        for request, value in zip(requests, found.tolist(), strict=True):
            assert request.draws is not None
            place = min(len(request.output) + count, 3)
            assert value == pytest.approx(request.draws[place])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": -0.1}, "'temperature'"),
        ({"temperature": float("inf")}, "'temperature'"),
        ({"temperature": float("nan")}, "'temperature'"),
        ({"top_p": 0.0}, "'top_p'"),
        ({"top_p": 1.1}, "'top_p'"),
        ({"top_p": float("nan")}, "'top_p'"),
        ({"seed": -1}, "'seed'"),
    ],
)
def test_bad_values_are_refused(values: dict[str, float], words: str) -> None:
    """Each is named in one line."""
    with pytest.raises(InvalidValue, match=words):
        Sampling(**values)  # type: ignore[arg-type]


def test_answers_do_not_depend_on_batches_or_resuming(tiny: Checkpoint) -> None:
    """Sampled answers of a queue are those of any other policy, and of any part of it that is run later."""
    rng = random.Random(11)
    prompts = [[rng.randrange(256) for _ in range(rng.randint(1, 12))] for _ in range(11)]
    names = [f"request {i}" for i in range(11)]
    sampling = Sampling(temperature=1.5, top_p=0.95, seed=3)

    def answers(which: list[int], **policy: int) -> list[list[int]]:
        return generate(
            tiny,
            [prompts[i] for i in which],
            gen_len=[5 + i % 3 for i in which],
            policy=Policy(**policy),
            device="cpu",
            link_bandwidth=None,
            eos_token_ids=range(0, 256, 16),
            sampling=sampling,
            names=[names[i] for i in which],
        ).outputs

    everything = answers(list(range(11)), batch_size=11, micro_batch_size=4)
    assert answers(list(range(11)), batch_size=3, micro_batch_size=1) == everything
    rest = [9, 2, 5, 10]
    assert answers(rest, batch_size=2, micro_batch_size=2) == [everything[i] for i in rest]
    assert len({tuple(tokens) for tokens in everything}) > 5
