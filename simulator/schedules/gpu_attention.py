"""MoE-Lightning with attention on the GPU: the paper's S4 (Fig. 6), without FlexGen's barriers.

The KV cache of a micro-batch comes up while the one before it computes, new keys and values go back, and
weights of the next layer travel as pages between, as in CGOPipe.
"""

from __future__ import annotations

from hrm.errors import InvalidValue
from hrm.pipeline import ACTIVATION_SLOTS
from simulator.schedules.cgopipe import prefill_tasks
from simulator.schedules.weights import WeightStream
from simulator.task import Op, Schedule, ScheduleBuilder

__all__ = ["gpu_attention"]

_KV_BUFFERS = 2


def gpu_attention(
    *,
    num_layers: int,
    num_micro_batches: int,
    decode_steps: int,
    stream_weights: bool = True,
    staged: bool = True,
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
    stream_kv : bool
        False if the whole KV cache stays on the GPU.
    stream_weights, staged, prefill, first_step
        As in `cgopipe`.

    Returns
    -------
    Schedule
        Tasks in issue order.
    """
    if num_layers < 1 or num_micro_batches < 1:
        raise InvalidValue("number of layers and micro-batches must be >= 1.")
    if decode_steps < 0 or (decode_steps == 0 and not prefill):
        raise InvalidValue(f"'decode_steps' must be >= {0 if prefill else 1}: {decode_steps}")
    builder = ScheduleBuilder()
    layers, parts = num_layers, num_micro_batches
    passes = decode_steps + (1 if prefill else 0)
    weights = WeightStream(
        builder,
        num_layers=layers,
        pages=parts if stream_weights else 0,
        first_step=0 if prefill else first_step,
        num_visits=passes * layers,
        staged=staged,
    )
    weights.prologue()
    tokens: dict[int, int] = {}
    cached: dict[tuple[int, int], int] = {}
    if prefill:
        sampled, cached = prefill_tasks(builder, weights, layers, parts)
        tokens = dict(enumerate(sampled))
    begin = 1 if prefill else first_step
    first_visit = layers if prefill else 0
    total = decode_steps * layers * parts
    loaded: dict[int, int] = {}
    attended: dict[int, int] = {}
    hidden: dict[int, int] = {}
    stored: dict[int, int] = {}

    def place(q: int) -> tuple[int, int, int]:
        visit, part = divmod(q, parts)
        step, layer = divmod(visit, layers)
        return begin + step, layer, part

    def load_kv(q: int) -> None:
        """KV of number q, once its last token is stored, into the buffer of number q - 2."""
        if not stream_kv or q >= total or q in loaded:
            return
        step, layer, part = place(q)
        deps = [cached[layer, part]] if (layer, part) in cached else []
        if q - _KV_BUFFERS in attended:
            deps.append(attended[q - _KV_BUFFERS])
        loaded[q] = builder.add(Op.LOAD_KV, step, layer, part, deps)

    # A prefetch further than a whole step would miss the step's new token.
    ahead = 1 if layers * parts > 1 else 0
    for q in range(total):
        step, layer, part = place(q)
        visit = first_visit + q // parts
        load_kv(q)
        load_kv(q + ahead)
        weights.load_next(visit, part)
        before = hidden.get(part) if layer > 0 else tokens.get(part)
        # New keys and values lie in a slot with the queries until they are stored.
        waits = [task for task in (before, stored.pop(q - ACTIVATION_SLOTS, None)) if task is not None]
        pre = builder.add(Op.PRE_ATTN, step, layer, part, waits)
        attended[q] = builder.add(Op.GPU_ATTN, step, layer, part, [pre, *([loaded.pop(q)] if q in loaded else [])])
        deps = [attended[q], *(weights.needed_by(visit) if part == 0 else [])]
        hidden[part] = builder.add(Op.POST_ATTN, step, layer, part, deps)
        weights.read_by(visit, hidden[part])
        if stream_kv:
            stored[q] = cached[layer, part] = builder.add(Op.STORE_KV, step, layer, part, [attended[q]])
        if layer == layers - 1:
            tokens[part] = builder.add(Op.SAMPLE, step, layer, part, [hidden[part]])
        weights.stage_next(visit, part)
        attended.pop(q - _KV_BUFFERS, None)
    return builder.build(name="gpu-attention", num_layers=layers, num_micro_batches=parts, num_steps=passes)
