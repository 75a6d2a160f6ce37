"""Work of a layer whose experts are computed where their weights lie, task by task.

What the closed form (`hrm.terms`) adds up per micro-batch is divided over the tasks: the resident share r_w of the
experts' time, weights and FLOPs is the GPU's, the rest the CPU's. Hidden states cross the link once in each
direction; the tokens' choice of experts, a thousandth of that, is not counted, as it is not there. Of the layer's two
residual additions one is `AddFFN`'s. Beyond the closed form, `GPUFFN` and `AddFFN` are tasks, and cost what a task
costs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from hrm.layers import FeedForward, Layer
from hrm.model import MoEModel
from hrm.operators import Operator, after_attention, expert_ffn, sharded
from hrm.task_times import TaskTimes, operator_seconds
from simulator.task import Op

__all__ = [
    "addition_seconds",
    "addition_work",
    "expert_seconds",
    "expert_work",
    "seconds_elsewhere",
    "work_elsewhere",
]


def _addition(model: MoEModel, tokens: Any, layer: Layer) -> Operator:
    """One of the layer's two residual additions: that of the FFN."""
    both = next(op for op in after_attention(model, tokens, layer) if op.name == "residual")
    return replace(
        both,
        name="add_ffn",
        flops=both.flops / 2,
        activation_bytes=both.activation_bytes / 2,
        launches=both.launches / 2,
    )


def addition_work(model: MoEModel, tokens: Any, layer: Layer) -> Any:
    """FLOPs of `AddFFN`."""
    return _addition(model, tokens, layer).flops


def _on_both(model: MoEModel, tokens: Any, layer: Layer, resident: float, popular: bool) -> tuple[Operator, Operator]:
    """The experts on the GPU and those on the CPU."""
    op = expert_ffn(model, tokens, layer)
    work, weights = _shares(layer.ffn, tokens, resident) if popular else (resident, resident)
    return _part(op, work, weights), _part(op, 1 - work, 1 - weights)


def _shares(ffn: FeedForward, tokens: Any, resident: float) -> tuple[Any, Any]:
    """Of the tokens' choices and of the active experts, the shares that fall on the most popular ones."""
    if ffn.routing is None:
        return resident, resident
    chosen = np.sort(np.array(ffn.routing))[::-1]
    count = np.arange(ffn.num_experts + 1)

    def share(values: np.ndarray) -> float:
        sums = np.concatenate([[0.0], np.cumsum(values)])
        return float(np.interp(resident * ffn.num_experts, count, sums) / sums[-1])

    active = [share(1 - (1 - chosen) ** n) for n in np.atleast_1d(np.asarray(tokens, dtype=float))]
    return share(chosen), np.array(active).reshape(np.shape(tokens))


def _part(op: Operator, work: Any, weights: Any) -> Operator:
    """A part of the experts: of the rows, and of the experts that they meet."""
    met = np.where(np.asarray(weights) > 0, weights, 1.0)
    return replace(
        op,
        flops=op.flops * work,
        activation_bytes=op.activation_bytes * work,
        weight_bytes=op.weight_bytes * weights,
        launches=op.launches * weights,
        rows=op.rows * np.where(np.asarray(weights) > 0, work / met, 1.0),
    )


def expert_work(
    model: MoEModel, tokens: Any, layer: Layer, resident: float, popular: bool = False
) -> dict[Op, tuple[Any, Any]]:
    """Bytes and FLOPs of a micro-batch of `tokens` tokens, by task class.

    Parameters
    ----------
    resident : float
        r_w: share of the experts that stays on the GPU.
    popular : bool
        Those are the most popular ones by the model's routing histogram; otherwise an even selection.

    Returns
    -------
    dict
        (bytes, FLOPs), arrays like `tokens`. Bytes cross the link, or are weights of the experts that are expected
        to be active.
    """
    hidden = tokens * model.hidden_bytes
    gpu, cpu = _on_both(model, tokens, layer, resident, popular)
    nothing = 0.0 * hidden
    return {
        Op.OFFLOAD_FFN: (hidden, nothing),
        Op.CPU_FFN: (cpu.weight_bytes, cpu.flops),
        Op.GPU_FFN: (gpu.weight_bytes, gpu.flops),
        Op.LOAD_FFN: (hidden, nothing),
        Op.ADD_FFN: (nothing, nothing + addition_work(model, tokens, layer)),
    }


def work_elsewhere(model: MoEModel, tokens: Any, layer: Layer) -> Any:
    """FLOPs that a layer in one piece has beyond its task before the experts: the experts' and the last addition."""
    return expert_ffn(model, tokens, layer).flops + addition_work(model, tokens, layer)


def expert_seconds(
    times: TaskTimes, tokens: Any, layer: Layer, resident: float, popular: bool = False
) -> dict[Op, Any]:
    """Seconds of the tasks that compute, each alone; parameters as those of `expert_work`."""
    rates = times.rates
    # No processor reads weights faster than the memory gives them, the closed form's term "CPU memory".
    gpu, cpu = _on_both(times.model, tokens, layer, resident, popular)
    computed = np.maximum(times.experts_on_cpu(cpu), cpu.weight_bytes / rates.dram_bandwidth)
    return {
        Op.CPU_FFN: rates.task_s + rates.cpu_task_s + computed,
        Op.GPU_FFN: rates.task_s + times.on_gpu(gpu),
        Op.ADD_FFN: rates.task_s + addition_seconds(times, tokens, layer),
    }


def seconds_elsewhere(times: TaskTimes, tokens: Any, layer: Layer) -> Any:
    """As `work_elsewhere`, in seconds of a GPU that computes everything."""
    return times.gpu_experts(tokens, layer) + addition_seconds(times, tokens, layer)


def addition_seconds(times: TaskTimes, tokens: Any, layer: Layer) -> Any:
    """`AddFFN`, alone."""
    alone = operator_seconds(sharded(_addition(times.model, tokens, layer), times.num_gpus), times.rates)
    return alone if times.num_gpus == 1 else alone / times.rates.parallel_efficiency
