"""The planner's optimisation problem as data: sizes on a grid, shares in [0, 1], linear memory constraints.

Two solvers read it (`hrm.solvers`), and two objectives are written as it: the throughput of a whole run
(here) and the authors' own (`hrm.paper`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from hrm.affine import Affine
from hrm.gating import Gate
from hrm.hardware import Hardware, Rates
from hrm.latency import contexts, decode_steps
from hrm.memory import footprint, usable_bytes
from hrm.model import MoEModel
from hrm.task_times import TaskTimes
from hrm.terms import Phase, Placement, Sizes, decode_phase, prefill_phase
from hrm.workload import Workload

__all__ = ["Problem", "Room", "grid_sizes", "placements", "prompt_tokens", "throughput_problem", "workload_footprint"]


@dataclass(frozen=True, slots=True)
class Room:
    """A memory constraint: `need` bytes, affine in the shares, at most `room`."""

    need: Affine
    room: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Choose (μ, G) from a grid and the shares r_w, r_c to minimise seconds per generated token.

    Arrays broadcast to `shape`: one axis of micro-batch sizes, one of their number.
    """

    place: Placement
    micro_batch: np.ndarray
    """μ, of shape (m, 1)."""
    micro_batches: np.ndarray
    """G, of shape (1, n)."""
    allowed: np.ndarray
    """False for sizes that are out of the question."""
    tokens: Any
    """Tokens that the run generates."""
    phases: tuple[tuple[Any, Phase], ...]
    """(weight, phase): the run takes the weighted sum of its phases."""
    rooms: tuple[Room, ...]
    """Memory of the GPU, memory of the host."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(sizes of a micro-batch, numbers of them)."""
        return np.broadcast_shapes(self.micro_batch.shape, self.micro_batches.shape)

    @property
    def fixed_weights(self) -> float | None:
        """r_w where the placement leaves no choice."""
        return None if self.place.streams_weights else 1.0

    @property
    def fixed_kv(self) -> float | None:
        """r_c where the placement leaves no choice."""
        if not self.place.attention_on_gpu:
            return 0.0
        return None if self.place.streams_kv else 1.0

    def seconds_per_token(self, weights_on_gpu: Any, kv_on_gpu: Any) -> Any:
        """The objective."""
        total: Any = 0.0
        for weight, phase in self.phases:
            total = total + weight * phase.seconds(weights_on_gpu, kv_on_gpu)
        return total / self.tokens


def grid_sizes(largest: int, *, every_to: int = 128) -> np.ndarray:
    """Every size to `every_to`, then in steps of less than 4 times 1/`every_to` of the value.

    Examples
    --------
    >>> grid_sizes(40, every_to=16).astype(int).tolist()[14:]
    [15, 16, 20, 24, 28, 32, 40]
    """
    sizes = list(range(1, min(largest, every_to) + 1))
    step = 4
    while sizes[-1] < largest:
        sizes.append(sizes[-1] + step)
        if sizes[-1] >= 2 * every_to * step // 4:
            step *= 2
    return np.array([size for size in sizes if size <= largest], dtype=float)


def placements(attention_on_gpu: bool | None = None, ffn_on_gpu: bool | None = None) -> Iterator[Placement]:
    """Every placement of attention and experts, with and without anything to stream; without comes first.

    Parameters
    ----------
    attention_on_gpu, ffn_on_gpu : bool, optional
        Only placements with these; both by default.
    """
    for attention in (False, True) if attention_on_gpu is None else (attention_on_gpu,):
        for ffn in (True, False) if ffn_on_gpu is None else (ffn_on_gpu,):
            for streams_weights in (False, True) if ffn else (True,):
                for streams_kv in (False, True) if attention else (True,):
                    yield Placement(
                        attention_on_gpu=attention,
                        ffn_on_gpu=ffn,
                        streams_weights=streams_weights,
                        streams_kv=streams_kv,
                    )


def prompt_tokens(workload: Workload, batch_size: Any) -> Any:
    """Prompt tokens of the first `batch_size` requests."""
    if workload.padded or not workload.prompt_lens:
        return batch_size * workload.effective_prompt
    lens = np.array(workload.prompt_lens)
    sums = np.concatenate(([0], np.cumsum(lens)))
    rounds, rest = np.divmod(np.asarray(batch_size, dtype=int), len(lens))
    return (rounds * sums[-1] + sums[rest]).astype(float)


def workload_footprint(
    model: MoEModel,
    workload: Workload,
    place: Placement,
    *,
    micro_batch_size: Any,
    num_micro_batches: Any,
    batch_size: Any = None,
    num_gpus: int = 1,
    expert_slots: int | None = None,
    gate: Gate | None = None,
) -> Any:
    """Memory of a policy on a workload; with known lengths, for the heaviest micro-batch of Algorithm 2."""
    mu, g = micro_batch_size, num_micro_batches
    n = mu * g if batch_size is None else batch_size
    tokens = prompt_tokens(workload, n)
    heaviest = np.maximum(np.ceil(tokens / n * mu), workload.prompt_max)
    if workload.prompt_lens and not workload.padded:
        heaviest = np.minimum(tokens / n * mu + workload.prompt_max, mu * workload.prompt_max)
    return footprint(
        model,
        batch_size=n,
        micro_batch_size=mu,
        num_micro_batches=g,
        micro_batch_tokens=heaviest,
        batch_tokens=tokens,
        longest_prompt=workload.prompt_max,
        gen_len=workload.gen_len,
        attention_on_gpu=place.attention_on_gpu,
        ffn_on_gpu=place.ffn_on_gpu,
        num_gpus=num_gpus,
        expert_slots=expert_slots,
        gate=gate,
    )


def throughput_problem(
    model: MoEModel,
    hardware: Hardware,
    rates: Rates,
    workload: Workload,
    place: Placement,
    *,
    micro_batch: np.ndarray,
    micro_batches: np.ndarray,
    max_batch_size: int | None = None,
    num_requests: int | None = None,
    gate: Gate | None = None,
) -> Problem:
    """Whole-run throughput: prefill and decode, contexts of all steps by Simpson's rule.

    Parameters
    ----------
    micro_batch, micro_batches : ndarray
        Sizes μ and numbers G to choose from, one-dimensional.
    max_batch_size : int, optional
        Largest N.
    num_requests : int, optional
        Requests that there are: every micro-batch gets one of them, and the last may get less than μ.
    gate : Gate, optional
        Whose masks and buffers need room, see `hrm.memory.footprint`.
    """
    mu, g = np.asarray(micro_batch, dtype=float)[:, None], np.asarray(micro_batches, dtype=float)[None, :]
    n = mu * g
    allowed = np.ones(n.shape, dtype=bool)
    if max_batch_size is not None:
        allowed &= n <= max_batch_size
    if num_requests is not None:
        allowed &= (mu <= num_requests) & (n - mu < num_requests)
    times = TaskTimes(model, rates, hardware.num_gpus)
    prompt = workload.effective_prompt
    if workload.prompt_lens and not workload.padded:
        prompt = prompt_tokens(workload, n) / n
    sizes = Sizes(micro_batch=mu, micro_batches=g, prompt_len=prompt)
    need = workload_footprint(
        model, workload, place, micro_batch_size=mu, num_micro_batches=g, num_gpus=hardware.num_gpus, gate=gate
    )
    gpu_room, cpu_room = usable_bytes(hardware)
    return Problem(
        place=place,
        micro_batch=mu,
        micro_batches=g,
        allowed=allowed,
        tokens=n * workload.gen_len,
        phases=run_phases(times, sizes, place, workload.gen_len),
        rooms=(Room(_affine(need.gpu_bytes), gpu_room), Room(_affine(need.cpu_bytes), cpu_room)),
    )


def run_phases(times: TaskTimes, sizes: Sizes, place: Placement, gen_len: int) -> tuple[tuple[float, Phase], ...]:
    """Prefill, and decode at its first, middle and last context with Simpson's weights."""
    steps = decode_steps(times.model, gen_len)
    first, last = contexts(times.model, sizes.prompt_len, gen_len)
    phases = [(1.0, prefill_phase(times, sizes, place))]
    if steps >= 3:
        middle = 0.5 * (first + last)
        weighted = ((1.0, first), (4.0, middle), (1.0, last))
        phases += [
            (steps * weight / 6, decode_phase(times, sizes, place, context=context)) for weight, context in weighted
        ]
    else:
        phases += [(1.0, decode_phase(times, sizes, place, context=first + step)) for step in range(steps)]
    return tuple(phases)


def _affine(value: Any) -> Affine:
    return value if isinstance(value, Affine) else Affine(value)
