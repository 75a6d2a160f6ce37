"""DBRX: fused and clipped queries, keys and values; experts as long matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from typing import Any

import torch
from torch import nn

from executor.families.base import DecoderLayer, ExpertTensor, ExpertViews, Routed, load_module
from executor.families.grouped_query import GroupedQueryFamily, GroupedQueryLayer
from hrm.layers import Layer

__all__ = ["DbrxFamily"]


class _DbrxLayer(GroupedQueryLayer):
    """A block: attention between two norms, then the FFN."""

    def __init__(self, module: Any, kind: Layer, family: DbrxFamily) -> None:
        self.module, self.attention = module, kind.attention
        self._attention = module.norm_attn_norm.attn
        self.scale = float(self._attention.scaling)
        self._rotate, self._shared = family.rotate, None

    def _normed(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.module.norm_attn_norm.norm_1(hidden)

    def _heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        a, clip = self.attention, self._attention.clip_qkv
        qkv = self._attention.Wqkv(x)
        if clip is not None:
            qkv.clamp_(-clip, clip)
        heads = qkv.view(x.shape[0], a.num_heads + 2 * a.num_kv_heads, a.head_dim)
        q, k, v = heads.split([a.num_heads, a.num_kv_heads, a.num_kv_heads], dim=1)
        return q, k, v

    def decode_output(self, attended: torch.Tensor) -> torch.Tensor:
        return self._attention.out_proj(attended)

    def route(self, hidden: torch.Tensor) -> Routed:
        x, ffn = self.module.norm_attn_norm.norm_2(hidden), self.module.ffn
        weight, index = ffn.route_tokens_to_experts(ffn.router(x))
        return Routed(x, index, weight)


class DbrxFamily(GroupedQueryFamily):
    """DBRX (databricks, 2024).

    Its one layout on disk has all experts' rows below each other, ``[E * I, H]``, for the down matrix too. The base of
    the rotary angles is the one that transformers reads, ``rope_theta`` or ``rope_parameters`` of the whole config;
    transformers 5 passes over the one in ``attn_config``.
    """

    model_types = ("dbrx",)
    class_prefix = "Dbrx"
    embedding_name = "transformer.wte.weight"

    def _module(self) -> Any:
        from transformers.models.dbrx import modeling_dbrx

        return modeling_dbrx

    def _local_config(self, config: Any) -> Any:
        config, attention = copy(config), self.local.main_layer.attention
        # Widths of Wqkv and out_proj follow from the hidden size in the module; here its tensors say them.
        config.n_heads = self.model.main_layer.attention.num_heads
        config.head_dim = attention.head_dim
        return config

    # -- on disk -------------------------------------------------------------------------------------

    def dense_shapes(self, layer: int | None) -> dict[str, tuple[int, ...]]:
        """See `Family.dense_shapes`."""
        model, h = self.model, self.model.hidden_size
        if layer is None:
            return {
                self.embedding_name: (model.vocab_size, h),
                "transformer.norm_f.weight": (h,),
                self.head_name: (model.vocab_size, h),
            }
        a, ffn = model.main_layer.attention, model.main_layer.ffn
        prefix = f"transformer.blocks.{layer}."
        return {
            f"{prefix}norm_attn_norm.norm_1.weight": (h,),
            f"{prefix}norm_attn_norm.attn.Wqkv.weight": ((a.num_heads + 2 * a.num_kv_heads) * a.head_dim, h),
            f"{prefix}norm_attn_norm.attn.out_proj.weight": (h, a.num_heads * a.head_dim),
            f"{prefix}norm_attn_norm.norm_2.weight": (h,),
            f"{prefix}ffn.router.layer.weight": (ffn.num_experts, h),
        }

    def stacked_marker(self) -> str:
        """See `Family.stacked_marker`."""
        return "transformer.blocks.0.ffn.experts.mlp.w1"

    def expert_tensors(self, layer: int) -> list[ExpertTensor]:
        """See `Family.expert_tensors`."""
        ffn, mine = self.model.main_layer.ffn, self.local.main_layer.ffn
        e, h, i = ffn.num_experts, ffn.hidden_size, ffn.intermediate_size

        def put(which: str) -> Callable[[torch.Tensor, torch.Tensor], None]:
            def fill(tensor: torch.Tensor, flat: torch.Tensor) -> None:
                part = self.shard.take(tensor.view(e, i, h), 1)
                getattr(ExpertViews.of(flat, mine), which).copy_(part.transpose(1, 2) if which == "down" else part)

            return fill

        prefix = f"transformer.blocks.{layer}.ffn.experts.mlp."
        names = {"w1": "gate", "v1": "up", "w2": "down"}
        return [ExpertTensor(prefix + name, (e * i, h), put(which)) for name, which in names.items()]

    def take(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """See `Family.take`: rows of queries, keys and values one by one, and columns of the output."""
        if name.endswith(".Wqkv.weight"):
            a = self.model.main_layer.attention
            sizes = [heads * a.head_dim for heads in (a.num_heads, a.num_kv_heads, a.num_kv_heads)]
            parts = [self.shard.take(part, 0) for part in tensor.split(sizes)]
            return tensor if self.shard.world == 1 else torch.cat(parts)
        return self.shard.take(tensor, 1) if name.endswith(".out_proj.weight") else tensor

    # -- in memory -----------------------------------------------------------------------------------

    def build_layer(self, layer: int, tensors: Mapping[str, torch.Tensor]) -> DecoderLayer:
        """See `Family.build_layer`."""
        with torch.device("meta"):
            module = self._module().DbrxBlock(self.config, layer)
        attention, prefix = module.norm_attn_norm.attn, f"transformer.blocks.{layer}."
        state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        # A part of the heads is narrower than the module expects.
        for name in ("Wqkv", "out_proj"):
            rows, columns = state[f"norm_attn_norm.attn.{name}.weight"].shape
            setattr(attention, name, nn.Linear(columns, rows, bias=False, device="meta"))
        return _DbrxLayer(load_module(module, state), self.local.main_layer, self)

    def final_norm(self, tensors: Mapping[str, torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        """See `Family.final_norm`."""
        norm = nn.LayerNorm(self.model.hidden_size, bias=False, device="meta")
        return load_module(norm, {"weight": tensors["transformer.norm_f.weight"]})
