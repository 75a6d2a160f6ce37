"""Expert buffering: a cache of whole experts on the device, filled on a miss ("Towards MoE Deployment", section V).

Every routed layer has K slots on the device; all experts lie in host memory. Once a micro-batch is routed, its choices
go to the host, which knows then which experts the cache lacks. The active experts are cut into a fixed number of
pieces: first those that are there, then the missing ones in increasing id. While one piece is computed, the experts of
the next one come. So what a task carries depends on the tokens, but not which tasks there are nor what waits for what;
only, a piece that turns out to be empty does not wait.

=============  ======================================================================================================
OffloadRoutes  <- k expert indices per token in R on the device. -> the same in R on the host.
LoadExperts    <- the choices on the host; of piece p, the experts that the layer's cache lacks, in host memory.
               -> free slots on the device.
Experts        <- normed states and choices in R on the device, slots with the experts of piece p.
               -> their weighted sum per token, added to that of the pieces before, in R on the device.
AddFFN         <- X and the sum of all pieces. -> X: what the layer makes.
=============  ======================================================================================================

All other tasks are those of `simulator.schedules.cpu_experts`. An expert that leaves the cache may still be read: by
the piece that is computed, or by one that is loaded and waits. Its slot is filled again two pieces later, so that with
K slots per layer and room for `PIECES_IN_FLIGHT` pieces more there is always a free one.
"""

from __future__ import annotations

from hrm.errors import InvalidValue
from hrm.pipeline import EXPERT_PIECES, PIECES_IN_FLIGHT
from simulator.schedules.cpu_experts import ExpertRun
from simulator.task import Op, Schedule

__all__ = ["expert_cache"]


def expert_cache(
    *,
    num_layers: int,
    num_micro_batches: int,
    decode_steps: int,
    pieces: int = EXPERT_PIECES + 1,
    attention_on_gpu: bool = False,
    stream_kv: bool = True,
    prefill: bool = True,
    first_step: int = 1,
) -> Schedule:
    """Build the schedule of a whole run.

    Parameters
    ----------
    num_layers, num_micro_batches : int
        l and G.
    decode_steps : int
        Tokens per sequence after the first, which prefill yields.
    pieces : int
        Pieces in which a micro-batch's active experts come.
    attention_on_gpu, stream_kv
        As in `cpu_experts`.
    prefill, first_step
        As in `cgopipe`.

    Returns
    -------
    Schedule
        Tasks in issue order.

    Raises
    ------
    InvalidValue
        For sizes below one, or no steps at all.

    Examples
    --------
    >>> schedule = expert_cache(num_layers=1, num_micro_batches=1, decode_steps=1, pieces=2, prefill=False)
    >>> schedule.labels()[5:9]
    ['OffloadRoutes(1,0,0)', 'LoadExperts(1,0,0)', 'Experts(1,0,0)', 'LoadExperts(1,0,1)']
    """
    if min(num_layers, num_micro_batches, pieces) < 1:
        raise InvalidValue("number of layers, micro-batches and pieces must be >= 1.")
    if decode_steps < 0 or (decode_steps == 0 and not prefill):
        raise InvalidValue(f"'decode_steps' must be >= {0 if prefill else 1}: {decode_steps}")
    run = _Run(num_layers, num_micro_batches, pieces)
    sampled: list[int] = []
    cached: dict[tuple[int, int], int] = {}
    if prefill:
        sampled, cached = run.prefill()
    begin = 1 if prefill else first_step
    steps = range(begin, begin + decode_steps)
    if attention_on_gpu:
        run.attend_on_gpu(steps, sampled, cached, stream_kv)
    else:
        run.attend_on_cpu(steps, sampled, cached)
    return run.builder.build(
        name="expert-cache",
        num_layers=num_layers,
        num_micro_batches=num_micro_batches,
        num_steps=decode_steps + (1 if prefill else 0),
        num_pages=pieces,
    )


class _Run(ExpertRun):
    """The cache instead of the CPU's experts."""

    def __init__(self, layers: int, parts: int, pieces: int) -> None:
        super().__init__(layers, parts, resident=False)
        self._pieces = pieces
        self._computed: list[int] = []

    def _hand_over(self, place: tuple[int, int, int], source: int, q: int) -> None:
        self._sums[q] = [self.builder.add(Op.OFFLOAD_ROUTES, *place, [source])]

    def _bring_sums(self, place: tuple[int, int, int], q: int) -> list[int]:
        add, (step, layer, part) = self.builder.add, place
        (waits,) = self._sums.pop(q)
        for number in range(part * self._pieces, (part + 1) * self._pieces):
            # Slots that the pieces before the last one gave up are free once those are computed.
            free = self._computed[-PIECES_IN_FLIGHT:][:1] if len(self._computed) >= PIECES_IN_FLIGHT else []
            loaded = add(Op.LOAD_E, step, layer, number, [waits, *free])
            self._computed.append(add(Op.EXPERTS, step, layer, number, [loaded]))
            del self._computed[:-PIECES_IN_FLIGHT]
        return [self._computed[-1]]
