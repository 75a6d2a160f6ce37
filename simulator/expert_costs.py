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

from hrm.layers import Layer
from hrm.model import MoEModel
from hrm.operators import Operator, active_experts, after_attention, expert_ffn, sharded
from hrm.task_times import TaskTimes, operator_seconds
from simulator.task import Op

__all__ = ["expert_seconds", "expert_work", "seconds_elsewhere", "work_elsewhere"]


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


def expert_work(model: MoEModel, tokens: Any, layer: Layer, resident: float) -> dict[Op, tuple[Any, Any]]:
    """Bytes and FLOPs of a micro-batch of `tokens` tokens, by task class.

    Parameters
    ----------
    resident : float
        r_w: share of the experts that stays on the GPU.

    Returns
    -------
    dict
        (bytes, FLOPs), arrays like `tokens`. Bytes cross the link, or are weights of the experts that are expected
        to be active.
    """
    hidden = tokens * model.hidden_bytes
    weights = active_experts(layer.ffn, tokens) * layer.ffn.expert_parameters * model.expert_element_bytes
    flops = expert_ffn(model, tokens, layer).flops
    nothing = 0.0 * hidden
    return {
        Op.OFFLOAD_FFN: (hidden, nothing),
        Op.CPU_FFN: ((1 - resident) * weights, (1 - resident) * flops),
        Op.GPU_FFN: (resident * weights, resident * flops),
        Op.LOAD_FFN: (hidden, nothing),
        Op.ADD_FFN: (nothing, nothing + _addition(model, tokens, layer).flops),
    }


def work_elsewhere(model: MoEModel, tokens: Any, layer: Layer) -> Any:
    """FLOPs that a layer in one piece has beyond its task before the experts: the experts' and the last addition."""
    return expert_ffn(model, tokens, layer).flops + _addition(model, tokens, layer).flops


def expert_seconds(times: TaskTimes, tokens: Any, layer: Layer, resident: float) -> dict[Op, Any]:
    """Seconds of the tasks that compute, each alone; parameters as those of `expert_work`."""
    rates = times.rates
    # No processor reads weights faster than the memory gives them, the closed form's term "CPU memory".
    read = times.active_expert_bytes(tokens, layer) / rates.dram_bandwidth
    computed = np.maximum(times.cpu_experts(tokens, layer), read)
    return {
        Op.CPU_FFN: rates.task_s + rates.cpu_task_s + (1 - resident) * computed,
        Op.GPU_FFN: rates.task_s + resident * times.gpu_experts(tokens, layer),
        Op.ADD_FFN: rates.task_s + _addition_seconds(times, tokens, layer),
    }


def seconds_elsewhere(times: TaskTimes, tokens: Any, layer: Layer) -> Any:
    """As `work_elsewhere`, in seconds of a GPU that computes everything."""
    return times.gpu_experts(tokens, layer) + _addition_seconds(times, tokens, layer)


def _addition_seconds(times: TaskTimes, tokens: Any, layer: Layer) -> Any:
    alone = operator_seconds(sharded(_addition(times.model, tokens, layer), times.num_gpus), times.rates)
    return alone if times.num_gpus == 1 else alone / times.rates.parallel_efficiency
