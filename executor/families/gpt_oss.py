"""gpt-oss: attention sinks, sliding windows on every other layer, experts with biases and a clamped gate."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from executor.families.base import ExpertTensor, ExpertViews
from executor.families.common import CommonFamily
from executor.families.grouped_query import GroupedQueryFamily, GroupedQueryLayer
from hrm.layers import Attention, Layer

__all__ = ["GptOssFamily"]


class _GptOssLayer(GroupedQueryLayer):
    def __init__(self, module: Any, kind: Layer, family: CommonFamily) -> None:
        super().__init__(module, kind, family)
        self.sinks = module.self_attn.sinks


class GptOssFamily(GroupedQueryFamily):
    """gpt-oss (arXiv 2508.10925), with experts in the type of the other weights.

    Its one layout on disk stacks the experts: matrices with inputs as rows, columns of gate and up in turn.
    """

    model_types = ("gpt_oss",)
    class_prefix = "GptOss"
    router_on_disk = router_name = "router"
    router_bias = True
    rows_split: ClassVar[tuple[str, ...]] = (*GroupedQueryFamily.rows_split, "sinks")
    layer_class = _GptOssLayer

    def _module(self) -> Any:
        from transformers.models.gpt_oss import modeling_gpt_oss

        return modeling_gpt_oss

    def _attention_shapes(self, attention: Attention) -> dict[str, tuple[int, ...]]:
        return super()._attention_shapes(attention) | {"sinks": (attention.num_heads,)}

    def expert_tensors(self, layer: int) -> list[ExpertTensor]:
        """See `Family.expert_tensors`."""
        ffn, mine = (model.kinds[model.order[layer]].ffn for model in (self.model, self.local))
        e, h, i, take = ffn.num_experts, ffn.hidden_size, ffn.intermediate_size, self.shard.take

        def put_gate_up(tensor: torch.Tensor, flat: torch.Tensor) -> None:
            views = ExpertViews.of(flat, mine)
            for first, view in enumerate((views.gate, views.up)):
                view.copy_(take(tensor[..., first::2], 2).transpose(1, 2))

        def put_gate_up_bias(tensor: torch.Tensor, flat: torch.Tensor) -> None:
            views = ExpertViews.of(flat, mine)
            for first, view in enumerate((views.gate_bias, views.up_bias)):
                view.copy_(take(tensor[..., first::2], 1))

        def put_down(tensor: torch.Tensor, flat: torch.Tensor) -> None:
            ExpertViews.of(flat, mine).down.copy_(take(tensor, 1).transpose(1, 2))

        def put_down_bias(tensor: torch.Tensor, flat: torch.Tensor) -> None:
            ExpertViews.of(flat, mine).down_bias.copy_(self.first_of_sum(tensor))

        prefix = f"model.layers.{layer}.mlp.experts."
        return [
            ExpertTensor(f"{prefix}gate_up_proj", (e, h, 2 * i), put_gate_up),
            ExpertTensor(f"{prefix}gate_up_proj_bias", (e, 2 * i), put_gate_up_bias),
            ExpertTensor(f"{prefix}down_proj", (e, i, h), put_down),
            ExpertTensor(f"{prefix}down_proj_bias", (e, h), put_down_bias),
        ]

    def activation(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See `Family.activation`: ``(up + 1) · gate · σ(α · gate)``, both clamped first."""
        gate, up = gate_up.chunk(2, dim=-1)
        limit = self.config.swiglu_limit
        gate, up = gate.clamp_(max=limit), up.clamp_(-limit, limit)
        return (gate * self.config.swiglu_alpha).sigmoid_().mul_(gate).mul_(up.add_(1))
