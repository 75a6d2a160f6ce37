"""A layer's operators on the hierarchical roofline of a machine (MoE-Lightning, section 3.3)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

from hrm.hardware import Hardware
from hrm.model import DTYPE_BYTES, MoEModel
from hrm.operators import Operator, attention_core, expert_ffn, post_attention, pre_attention
from hrm.roofline import RooflinePoint, roofline_point

__all__ = ["roofline_points"]


def roofline_points(
    model: MoEModel,
    hardware: Hardware,
    batches: Iterable[int],
    *,
    micro_batch: int | None = None,
    context: int = 512,
    kv_dtype: str | None = None,
    attention_flops: Literal["paper", "exact"] = "exact",
) -> list[RooflinePoint]:
    """Place attention, expert FFN and the projections of one decode layer for each batch size.

    Parameters
    ----------
    batches : iterable of int
        N: sequences per pass; what crosses the link is shared by all of them.
    micro_batch : int, optional
        μ: sequences that one GPU kernel handles; by default, and at most, N.
    context : int
        Tokens in the KV cache per sequence.
    kv_dtype : str, optional
        Type of the KV cache, a key of `hrm.model.DTYPE_BYTES`; by default the model's.
    attention_flops : {"exact", "paper"}
        How attention is counted, see `hrm.operators.attention_core`.

    References
    ----------
    MoE-Lightning, Fig. 4 and 5.
    """
    kv_bytes = None if kv_dtype is None else DTYPE_BYTES[kv_dtype]

    def operators(sequences: int) -> list[Operator]:
        attention = attention_core(model, sequences, context, kv_dtype_bytes=kv_bytes, count=attention_flops)
        projections = [*pre_attention(model, sequences), *post_attention(model, sequences)]
        by_name = {op.name: op for op in projections}
        ffn = replace(expert_ffn(model, sequences), name="expert_ffn")
        return [attention, ffn, by_name["qkv_proj"], by_name["o_proj"]]

    points = []
    for batch in batches:
        kernel = operators(min(micro_batch or batch, batch))
        for op, kernel_op in zip(operators(batch), kernel, strict=True):
            points.append(roofline_point(hardware, op, batch=batch, kernel_op=kernel_op))
    return points
