"""CGOPipe: prefill, then decode by Algorithm 1 of MoE-Lightning (arXiv 2411.11217, section 4.1, Fig. 6 S1)."""

from __future__ import annotations

from hrm.errors import InvalidValue
from hrm.pipeline import ACTIVATION_SLOTS, LOOKAHEAD
from simulator.schedules.weights import WeightStream
from simulator.task import Op, Schedule, ScheduleBuilder

__all__ = ["cgopipe", "prefill_tasks"]


def cgopipe(
    *,
    num_layers: int,
    num_micro_batches: int,
    decode_steps: int,
    stream_weights: bool = True,
    staged: bool = True,
    paged: bool = True,
    prefill: bool = True,
    first_step: int = 1,
) -> Schedule:
    """Build the schedule of a whole run.

    Decode follows Algorithm 1: PreAttn, OffloadQKV and CPUAttn run two micro-batches ahead of PostAttn;
    the next layer's weights travel as one page per micro-batch, each staged two micro-batches before it
    travels; indices past the last micro-batch wrap to the next layer, and past the last layer to the
    next decode step.

    Parameters
    ----------
    num_layers, num_micro_batches : int
        l and G.
    decode_steps : int
        Tokens per sequence after the first, which prefill yields.
    stream_weights : bool
        False if every expert stays on the GPU.
    staged : bool
        False where weights lie in pinned memory: they travel from there without a staging copy.
    paged : bool
        False: the next layer's weights travel in one piece, as in the FastDecode-like schedule S2 of Fig. 6, so
        that hidden states of the first micro-batches queue behind a whole layer of weights.
    prefill : bool
        Begin with prefill. Without it, the schedule is `decode_steps` steps of a run in progress.
    first_step : int
        Number of the first decode step when there is no prefill.

    Returns
    -------
    Schedule
        Tasks in issue order: every dependency stands before the task that has it.

    Examples
    --------
    >>> cgopipe(num_layers=2, num_micro_batches=1, decode_steps=0, stream_weights=False).labels()
    ['Prefill(0,0,0)', 'OffloadKV(0,0,0)', 'LoadX(0,1,0)', 'Prefill(0,1,0)', 'Sample(0,1,0)', 'OffloadKV(0,1,0)']
    """
    for name, value in (("num_layers", num_layers), ("num_micro_batches", num_micro_batches)):
        if value < 1:
            raise InvalidValue(f"{name!r} must be >= 1: {value}")
    if decode_steps < 0 or (decode_steps == 0 and not prefill):
        raise InvalidValue(f"'decode_steps' must be >= {0 if prefill else 1}: {decode_steps}")
    builder = ScheduleBuilder()
    passes = decode_steps + (1 if prefill else 0)
    pages = num_micro_batches if paged else 1
    weights = WeightStream(
        builder,
        num_layers=num_layers,
        pages=pages if stream_weights else 0,
        first_step=0 if prefill else first_step,
        num_visits=passes * num_layers,
        staged=staged,
        **({} if paged else {"lookahead": 1, "ring": 2}),
    )
    weights.prologue()
    sampled: list[int] = []
    cached: dict[tuple[int, int], int] = {}
    if prefill:
        sampled, cached = prefill_tasks(builder, weights, num_layers, num_micro_batches)
    if decode_steps:
        _decode(
            builder,
            weights,
            num_layers,
            num_micro_batches,
            steps=range(1 if prefill else first_step, (1 if prefill else first_step) + decode_steps),
            first_visit=num_layers if prefill else 0,
            sampled=sampled,
            cached=cached,
        )
    return builder.build(
        name="cgopipe" if paged else "overlapped",
        num_layers=num_layers,
        num_micro_batches=num_micro_batches,
        num_steps=passes,
        num_pages=pages,
    )


def prefill_tasks(
    builder: ScheduleBuilder, weights: WeightStream, layers: int, parts: int
) -> tuple[list[int], dict[tuple[int, int], int]]:
    """Layer by layer, all micro-batches; hidden states and KV go to the host, hidden states come back."""
    loaded: dict[int, int] = {}
    offloaded: dict[int, int] = {}
    heads: dict[int, int] = {}

    def load_hidden(q: int) -> None:
        layer, part = divmod(q, parts)
        if layer < 1 or layer >= layers:
            return
        deps = [offloaded[q - parts]]
        if q >= ACTIVATION_SLOTS and q - ACTIVATION_SLOTS != q - parts:
            deps.append(offloaded[q - ACTIVATION_SLOTS])
        if q - ACTIVATION_SLOTS in heads:
            deps.append(heads[q - ACTIVATION_SLOTS])
        loaded[q] = builder.add(Op.LOAD_X, 0, layer, part, deps)

    for q in range(layers * parts):
        layer, part = divmod(q, parts)
        weights.load_next(layer, part)
        deps = weights.needed_by(layer) if part == 0 else []
        if q in loaded:
            deps = [*deps, loaded[q]]
        elif q >= ACTIVATION_SLOTS:
            deps = [*deps, offloaded[q - ACTIVATION_SLOTS]]
        compute = builder.add(Op.PREFILL, 0, layer, part, deps)
        weights.read_by(layer, compute)
        if layer == layers - 1:
            heads[q] = builder.add(Op.SAMPLE, 0, layer, part, [compute])
        offloaded[q] = builder.add(Op.OFFLOAD_KV, 0, layer, part, [compute])
        load_hidden(q + 1)
        weights.stage_next(layer, part)
    return list(heads.values()), {divmod(q, parts): task for q, task in offloaded.items()}


def _decode(
    builder: ScheduleBuilder,
    weights: WeightStream,
    layers: int,
    parts: int,
    *,
    steps: range,
    first_visit: int,
    sampled: list[int],
    cached: dict[tuple[int, int], int],
) -> None:
    """Algorithm 1 over all steps; q counts (step, layer, micro-batch) without a break."""
    total = len(steps) * layers * parts
    # With one micro-batch, running two ahead would wait for what is not yet issued.
    ahead = min(LOOKAHEAD, parts)
    post: dict[int, int] = {}
    attended: dict[int, int] = {}
    last_sample = dict(enumerate(sampled))

    def place(q: int) -> tuple[int, int, int]:
        visit, part = divmod(q, parts)
        step, layer = divmod(visit, layers)
        return steps[step], layer, part

    def start(q: int) -> None:
        """PreAttn, OffloadQKV and CPUAttn of (step, layer, micro-batch) number q."""
        if q >= total:
            return
        step, layer, part = place(q)
        deps = [post[q - parts]] if layer > 0 else [last_sample[part]] if part in last_sample else []
        pre = builder.add(Op.PRE_ATTN, step, layer, part, deps)
        offload = builder.add(Op.OFFLOAD_QKV, step, layer, part, [pre])
        waits = [offload]
        if q < layers * parts and (layer, part) in cached:
            waits.append(cached[layer, part])
        attended[q] = builder.add(Op.CPU_ATTN, step, layer, part, waits)

    for q in range(min(ahead, total)):
        start(q)
    for q in range(total):
        step, layer, part = place(q)
        visit = first_visit + q // parts
        load = builder.add(Op.LOAD_H, step, layer, part, [attended.pop(q)])
        weights.load_next(visit, part)
        deps = [load, *(weights.needed_by(visit) if part == 0 else [])]
        post[q] = builder.add(Op.POST_ATTN, step, layer, part, deps)
        post.pop(q - parts, None)
        weights.read_by(visit, post[q])
        if layer == layers - 1:
            last_sample[part] = builder.add(Op.SAMPLE, step, layer, part, [post[q]])
        start(q + ahead)
        weights.stage_next(visit, part)
