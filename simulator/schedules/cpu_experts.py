"""MoE-Lightning with experts on the CPU (F_g = 0): every expert is computed where its weights lie, none travels.

The share r_w of the experts stays on the device and is computed there, the rest in host memory. The result of a
layer is in the hidden states only after both have been added up, so that a micro-batch crosses to the CPU twice per
layer where attention runs there, too. The order within lanes lets micro-batches overtake each other between the
crossings: while the CPU computes one micro-batch, the GPU does the work of the others.

What each task reads (<-) and writes (->) for its micro-batch; n is its sequences, in prefill (step 0) its prompt
tokens. X are hidden states: in decode n rows on the device that stay there for the whole batch, in prefill those of
a prefill slot. R is a ring of `ACTIVATION_SLOTS` slots on either side of the link, one per micro-batch in flight.

=============  ======================================================================================================
Prefill        <- X (layer 0: the prompt's token ids). Attention, O projection, residual, norm, router, shared experts.
               -> keys and values and X (with residual and shared experts) in the prefill slot; normed states, and
               k expert indices and weights per token (a dense FFN has none), in R on the device.
PreAttn        <- X (layer 0: the newest token). -> Q, K, V in a decode slot.
OffloadQKV     <- Q, K, V. -> the same in the host's decode slot.
CPUAttn        <- Q, K, V and the KV cache on the host. -> the cache (new token) and what was attended, on the host.
LoadH          <- attended, on the host. -> attended, on the device.
LoadKV         <- the KV cache of the host (without the new token). -> one of two KV buffers on the device.
GPUAttn        <- Q, K, V, the KV buffer or the resident cache. -> attended, on the device; resident cache (new token).
StoreKV        <- new K, V in the decode slot. -> the KV cache of the host.
PostAttn       <- attended, X. O projection, residual, norm, router, shared experts. -> X (with residual and shared
               experts); normed states and expert choices in R on the device.
OffloadFFN     <- normed states and expert choices in R on the device. -> the same in R on the host.
CPUFFN         <- these, and the experts in host memory. -> their weighted sum per token in R on the host.
GPUFFN         <- normed states and expert choices in R on the device, the resident experts. -> their weighted sum per
               token in R on the device. There is none where r_w = 0.
LoadFFN        <- the CPU's sum. -> the same in R on the device.
AddFFN         <- X and both sums. -> X: what the layer makes.
Sample         <- X of the last layer. -> the next token.
OffloadKV      <- X and keys and values of the prefill slot, after AddFFN. -> prompt states and KV cache on the host.
LoadX          <- prompt states on the host. -> X of a prefill slot.
=============  ======================================================================================================

A dense FFN is one expert that takes every token: PostAttn then has no router and makes no choices. Costs divide every
layer's experts r_w : 1 - r_w; which of them are the resident ones is for the executor to say.

Slots of R and of Q, K, V need no dependency of their own: the first task of the micro-batch that takes them follows, on
the GPU's lane, AddFFN of the one that had them. Prefill slots are waited for until OffloadKV has emptied them, and
slots of Q, K, V until StoreKV has, where attention is on the GPU.
"""

from __future__ import annotations

from hrm.errors import InvalidValue
from hrm.pipeline import ACTIVATION_SLOTS, LOOKAHEAD
from simulator.schedules.cgopipe import prefill_tasks
from simulator.schedules.weights import WeightStream
from simulator.task import Op, Schedule, ScheduleBuilder

__all__ = ["ExpertRun", "cpu_experts"]

_KV_BUFFERS = 2


def cpu_experts(
    *,
    num_layers: int,
    num_micro_batches: int,
    decode_steps: int,
    attention_on_gpu: bool = False,
    stream_kv: bool = True,
    resident: bool = True,
    stream_prefill: bool = False,
    staged: bool = True,
    prefill: bool = True,
    first_step: int = 1,
) -> Schedule:
    """Build the schedule of a whole run.

    With attention on the CPU its lane alternates: the experts of one micro-batch, then attention of the one
    `LOOKAHEAD` later; the GPU adds up the one before in between. With attention on the GPU, the GPU adds up the
    micro-batch `LOOKAHEAD` before the one that it has handed over. Up to `ACTIVATION_SLOTS` are in flight, and never
    more than there are.

    Parameters
    ----------
    num_layers, num_micro_batches : int
        l and G.
    decode_steps : int
        Tokens per sequence after the first, which prefill yields.
    attention_on_gpu : bool
        A_g: where decode attention runs.
    stream_kv : bool
        With attention on the GPU: False if the whole KV cache stays there.
    resident : bool
        Whether some experts stay on the GPU (r_w > 0), and are computed there.
    stream_prefill : bool
        Prefill as with experts on the GPU: their weights travel as pages, once per layer, for all tokens of the batch.
    staged : bool
        As in `cgopipe`, for pages that travel in prefill.
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

    References
    ----------
    MoE-Lightning, section 4.2: F_g.

    Examples
    --------
    >>> schedule = cpu_experts(num_layers=1, num_micro_batches=1, decode_steps=1, prefill=False, resident=False)
    >>> schedule.labels()[3:8]
    ['LoadH(1,0,0)', 'PostAttn(1,0,0)', 'OffloadFFN(1,0,0)', 'CPUFFN(1,0,0)', 'LoadFFN(1,0,0)']
    """
    if num_layers < 1 or num_micro_batches < 1:
        raise InvalidValue("number of layers and micro-batches must be >= 1.")
    if decode_steps < 0 or (decode_steps == 0 and not prefill):
        raise InvalidValue(f"'decode_steps' must be >= {0 if prefill else 1}: {decode_steps}")
    run = ExpertRun(num_layers, num_micro_batches, resident=resident)
    sampled: list[int] = []
    cached: dict[tuple[int, int], int] = {}
    if prefill and stream_prefill:
        pages = WeightStream(
            run.builder,
            num_layers=num_layers,
            pages=num_micro_batches,
            first_step=0,
            num_visits=num_layers,
            staged=staged,
        )
        pages.prologue()
        sampled, cached = prefill_tasks(run.builder, pages, num_layers, num_micro_batches)
    elif prefill:
        sampled, cached = run.prefill()
    begin = 1 if prefill else first_step
    steps = range(begin, begin + decode_steps)
    if attention_on_gpu:
        run.attend_on_gpu(steps, sampled, cached, stream_kv)
    else:
        run.attend_on_cpu(steps, sampled, cached)
    return run.builder.build(
        name="cpu-experts",
        num_layers=num_layers,
        num_micro_batches=num_micro_batches,
        num_steps=decode_steps + (1 if prefill else 0),
    )


class ExpertRun:
    """Issues the tasks of a run whose experts are tasks of their own.

    q counts (step, layer, micro-batch) without a break, in prefill and again in decode.
    """

    def __init__(self, layers: int, parts: int, *, resident: bool) -> None:
        self.builder = ScheduleBuilder()
        self._layers, self._parts, self._resident = layers, parts, resident
        self._tokens: dict[int, int] = {}
        self._hidden: dict[int, int] = {}
        self._sums: dict[int, list[int]] = {}

    def _hand_over(self, place: tuple[int, int, int], source: int, q: int) -> None:
        """Experts of number q, on both sides, once `source` has normed and routed it."""
        add = self.builder.add
        offloaded = add(Op.OFFLOAD_FFN, *place, [source])
        computed = add(Op.CPU_FFN, *place, [offloaded])
        here = [add(Op.GPU_FFN, *place, [source])] if self._resident else []
        self._sums[q] = [computed, *here]

    def _bring_sums(self, place: tuple[int, int, int], q: int) -> list[int]:
        """What the sum of number q waits for."""
        computed, *here = self._sums.pop(q)
        return [self.builder.add(Op.LOAD_FFN, *place, [computed]), *here]

    def _add_up(self, place: tuple[int, int, int], q: int) -> int:
        """The result of number q: the experts' sums, and in the last layer the next token."""
        step, layer, part = place
        sums = self._bring_sums(place, q)
        added = self._hidden[part] = self.builder.add(Op.ADD_FFN, step, layer, part, sums)
        if layer == self._layers - 1:
            self._tokens[part] = self.builder.add(Op.SAMPLE, step, layer, part, [added])
        return added

    def prefill(self) -> tuple[list[int], dict[tuple[int, int], int]]:
        """Layer by layer, all micro-batches; two compute while a third leaves its slot and another comes."""
        layers, parts, add = self._layers, self._parts, self.builder.add
        behind = min(1, parts - 1)
        loaded: dict[int, int] = {}
        offloaded: dict[int, int] = {}
        heads: dict[int, int] = {}

        def load_hidden(q: int) -> None:
            layer, part = divmod(q, parts)
            if layer < 1 or layer >= layers or q in loaded or q - parts not in offloaded:
                return
            deps = [offloaded[q - parts]]
            if q >= ACTIVATION_SLOTS and parts != ACTIVATION_SLOTS:
                deps.append(offloaded[q - ACTIVATION_SLOTS])
            if q - ACTIVATION_SLOTS in heads:
                deps.append(heads[q - ACTIVATION_SLOTS])
            loaded[q] = add(Op.LOAD_X, 0, layer, part, deps)

        total = layers * parts
        for q in range(total + behind):
            load_hidden(q + 1)
            if q < total:
                deps = [loaded[q]] if q in loaded else [offloaded[x] for x in [q - ACTIVATION_SLOTS] if x >= 0]
                place = (0, *divmod(q, parts))
                self._hand_over(place, add(Op.PREFILL, *place, deps), q)
            done = q - behind
            if done >= 0:
                place = (0, *divmod(done, parts))
                added = self._add_up(place, done)
                if place[1] == layers - 1:
                    heads[done] = self._tokens[place[2]]
                offloaded[done] = add(Op.OFFLOAD_KV, *place, [added])
            load_hidden(q + 1)
        return list(heads.values()), {divmod(q, parts): task for q, task in offloaded.items()}

    def _place(self, steps: range, q: int) -> tuple[int, int, int]:
        visit, part = divmod(q, self._parts)
        step, layer = divmod(visit, self._layers)
        return steps[step], layer, part

    def _before(self, layer: int, part: int) -> list[int]:
        """What makes the hidden states that a layer starts from."""
        found = self._hidden.get(part) if layer > 0 else self._tokens.get(part)
        return [] if found is None else [found]

    def attend_on_cpu(self, steps: range, sampled: list[int], cached: dict[tuple[int, int], int]) -> None:
        """Decode with attention beside the KV cache on the host."""
        add, layers, parts = self.builder.add, self._layers, self._parts
        total = len(steps) * layers * parts
        in_flight = min(ACTIVATION_SLOTS, parts)
        self._tokens = dict(enumerate(sampled))
        attended: dict[int, int] = {}

        def start(q: int) -> None:
            if q >= total:
                return
            step, layer, part = self._place(steps, q)
            pre = add(Op.PRE_ATTN, step, layer, part, self._before(layer, part))
            waits = [add(Op.OFFLOAD_QKV, step, layer, part, [pre])]
            if q < layers * parts and (layer, part) in cached:
                waits.append(cached[layer, part])
            attended[q] = add(Op.CPU_ATTN, step, layer, part, waits)

        def finish(q: int) -> None:
            """Add up number q, and start the one that takes its slots."""
            if 0 <= q < total:
                self._add_up(self._place(steps, q), q)
            start(q + in_flight)

        for q in range(min(LOOKAHEAD, parts, total)):
            start(q)
        for q in range(total):
            place = self._place(steps, q)
            load = add(Op.LOAD_H, *place, [attended.pop(q)])
            self._hand_over(place, add(Op.POST_ATTN, *place, [load]), q)
            if parts > LOOKAHEAD:
                finish(q - 1)
            elif place[2] == parts - 1:
                # So few stay in step: both are handed over before either is added up, so that the CPU has one to
                # compute while the GPU does the other.
                for one in range(q - parts + 1, q + 1):
                    finish(one)
        if parts > LOOKAHEAD:
            finish(total - 1)

    def attend_on_gpu(
        self, steps: range, sampled: list[int], cached: dict[tuple[int, int], int], stream_kv: bool
    ) -> None:
        """Decode with attention on the GPU, whose KV cache lies there or comes up micro-batch by micro-batch."""
        add, layers, parts = self.builder.add, self._layers, self._parts
        total = len(steps) * layers * parts
        behind = min(LOOKAHEAD, parts - 1)
        self._tokens = dict(enumerate(sampled))
        loaded: dict[int, int] = {}
        attended: dict[int, int] = {}
        stored: dict[int, int] = {}

        def load_kv(q: int) -> None:
            """KV of number q, once its last token is stored, into the buffer of number q - 2."""
            if not stream_kv or q >= total or q in loaded:
                return
            step, layer, part = self._place(steps, q)
            deps = [cached[layer, part]] if (layer, part) in cached else []
            if q - _KV_BUFFERS in attended:
                deps.append(attended[q - _KV_BUFFERS])
            loaded[q] = add(Op.LOAD_KV, step, layer, part, deps)

        for q in range(total):
            place = step, layer, part = self._place(steps, q)
            load_kv(q)
            # A prefetch further than a whole step would miss the step's new token.
            if layers * parts > 1:
                load_kv(q + 1)
            # New keys and values lie in a slot with the queries until they are stored.
            waits = self._before(layer, part)
            if q - ACTIVATION_SLOTS in stored:
                waits.append(stored.pop(q - ACTIVATION_SLOTS))
            pre = add(Op.PRE_ATTN, *place, waits)
            attended[q] = add(Op.GPU_ATTN, *place, [pre, *([loaded.pop(q)] if q in loaded else [])])
            self._hand_over(place, add(Op.POST_ATTN, *place, [attended[q]]), q)
            if stream_kv:
                stored[q] = cached[layer, part] = add(Op.STORE_KV, step, layer, part, [attended[q]])
            if q >= behind:
                self._add_up(self._place(steps, q - behind), q - behind)
            attended.pop(q - _KV_BUFFERS, None)
        for q in range(max(0, total - behind), total):
            self._add_up(self._place(steps, q), q)
