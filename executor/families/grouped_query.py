"""Families with grouped-query attention: Mixtral, Qwen2-MoE and Qwen3-MoE, OLMoE, Phi-3.5-MoE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from executor.families.common import CommonFamily, CommonLayer
from executor.kernels import causal_attention
from hrm.errors import InvalidValue
from hrm.layers import Attention
from hrm.model import MoEModel

__all__ = [
    "GroupedQueryFamily",
    "GroupedQueryLayer",
    "MixtralFamily",
    "OlmoeFamily",
    "PhimoeFamily",
    "Qwen2MoeFamily",
    "Qwen3MoeFamily",
]


class GroupedQueryLayer(CommonLayer):
    """A decoder layer whose ``self_attn`` has q, k, v and o projections."""

    def _heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values of normed tokens, ``[tokens, heads, d]``, before they are turned."""
        attention, a = self.module.self_attn, self.attention
        tokens = x.shape[0]
        q = attention.q_proj(x).view(tokens, a.num_heads, a.head_dim)
        k = attention.k_proj(x).view(tokens, a.num_kv_heads, a.head_dim)
        return q, k, attention.v_proj(x).view(tokens, a.num_kv_heads, a.value_dim)

    def _normed(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.module.input_layernorm(hidden)

    def _project(
        self, hidden: torch.Tensor, turn: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = self._heads(self._normed(hidden))
        # The module's rotary function wants [batch, heads, length, d]: one batch, tokens as its length.
        q, k = self._rotate(q.transpose(0, 1)[None], k.transpose(0, 1)[None], *(table[None] for table in turn))
        return q[0].transpose(0, 1), k[0].transpose(0, 1), v

    def decode_inputs(
        self, hidden: torch.Tensor, turn: Sequence[torch.Tensor], queries: torch.Tensor, cached: torch.Tensor
    ) -> None:
        """See `DecoderLayer.decode_inputs`."""
        q, k, v = self._project(hidden, turn)
        queries.view(q.shape).copy_(q)
        self._cache(k, v, cached)

    def _cache(self, k: torch.Tensor, v: torch.Tensor, cached: torch.Tensor) -> None:
        tokens = cached.shape[0]
        keys, values = cached.split([k[0].numel(), v[0].numel()], dim=1)
        keys.view(tokens, *k.shape[1:]).copy_(k)
        values.view(tokens, *v.shape[1:]).copy_(v)

    def prefill(
        self, hidden: torch.Tensor, turn: Sequence[torch.Tensor], lengths: Sequence[int], cached: torch.Tensor
    ) -> torch.Tensor:
        """See `DecoderLayer.prefill`."""
        q, k, v = self._project(hidden, turn)
        self._cache(k, v, cached)
        attended = causal_attention(q, k, v, lengths, scale=self.scale, window=self.attention.window, sinks=self.sinks)
        return self.decode_output(attended)

    def decode_output(self, attended: torch.Tensor) -> torch.Tensor:
        """See `DecoderLayer.decode_output`."""
        return self.module.self_attn.o_proj(attended)


class GroupedQueryFamily(CommonFamily):
    """Names of the projections of grouped-query attention."""

    rows_split: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj")
    layer_class = GroupedQueryLayer
    biased: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Projections that have biases where the config asks for biases."""
    bias_key: ClassVar[str | None] = "attention_bias"
    """The config's key for them; None: never."""

    def _local_config(self, config: Any) -> Any:
        config = super()._local_config(config)
        # Hidden size and local heads no longer give it.
        config.head_dim = self.local.main_layer.attention.head_dim
        return config

    def _attention_shapes(self, attention: Attention) -> dict[str, tuple[int, ...]]:
        h, q, kv = (
            attention.hidden_size,
            attention.num_heads * attention.head_dim,
            attention.num_kv_heads * attention.head_dim,
        )
        weights = {"q_proj": (q, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, q)}
        shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in weights.items()}
        if self.bias_key and getattr(self.config, self.bias_key):
            shapes |= {f"{name}.bias": weights[name][:1] for name in self.biased}
        return shapes


class MixtralFamily(GroupedQueryFamily):
    """Mixtral (arXiv 2401.04088)."""

    model_types = ("mixtral",)
    class_prefix = "Mixtral"
    block_on_disk = "block_sparse_moe"
    expert_names = ("w1", "w3", "w2")
    bias_key = None

    def _module(self) -> Any:
        from transformers.models.mixtral import modeling_mixtral

        return modeling_mixtral


class PhimoeFamily(GroupedQueryFamily):
    """Phi-3.5-MoE (arXiv 2404.14219): LayerNorms, biases, experts chosen by SparseMixer (arXiv 2409.12136)."""

    model_types = ("phimoe",)
    class_prefix = "Phimoe"
    block_on_disk = "block_sparse_moe"
    expert_names = ("w1", "w3", "w2")
    router_name = "router"
    norm_bias = True

    def _module(self) -> Any:
        from transformers.models.phimoe import modeling_phimoe

        return modeling_phimoe

    def dense_shapes(self, layer: int | None) -> dict[str, tuple[int, ...]]:
        """See `Family.dense_shapes`; the LM head may have a bias."""
        shapes = super().dense_shapes(layer)
        if layer is None and self.config.lm_head_bias:
            shapes["lm_head.bias"] = (self.model.vocab_size,)
        return shapes


class _Qwen3MoeLayer(GroupedQueryLayer):
    """Queries and keys are normed per head."""

    def _heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = super()._heads(x)
        return self.module.self_attn.q_norm(q), self.module.self_attn.k_norm(k), v


class Qwen3MoeFamily(GroupedQueryFamily):
    """Qwen3-MoE (arXiv 2505.09388)."""

    model_types = ("qwen3_moe",)
    class_prefix = "Qwen3Moe"
    layer_class = _Qwen3MoeLayer

    def _module(self) -> Any:
        from transformers.models.qwen3_moe import modeling_qwen3_moe

        return modeling_qwen3_moe

    def _attention_shapes(self, attention: Attention) -> dict[str, tuple[int, ...]]:
        norm = (attention.head_dim,)
        return super()._attention_shapes(attention) | {"q_norm.weight": norm, "k_norm.weight": norm}


class _Qwen2MoeLayer(GroupedQueryLayer):
    """Every token decides how much of the shared expert it takes."""

    def shared(self, x: torch.Tensor) -> torch.Tensor | None:
        added = super().shared(x)
        return None if added is None else added.mul_(self.module.mlp.shared_expert_gate(x).sigmoid())


class Qwen2MoeFamily(GroupedQueryFamily):
    """Qwen1.5-MoE and Qwen2-MoE (arXiv 2407.10671)."""

    model_types = ("qwen2_moe",)
    class_prefix = "Qwen2Moe"
    layer_class = _Qwen2MoeLayer
    bias_key = "qkv_bias"
    biased = ("q_proj", "k_proj", "v_proj")
    shared_name = "shared_expert"

    def _module(self) -> Any:
        from transformers.models.qwen2_moe import modeling_qwen2_moe

        return modeling_qwen2_moe

    def _local_config(self, config: Any) -> Any:
        config = super()._local_config(config)
        config.shared_expert_intermediate_size = self.local.main_layer.ffn.shared_size
        return config

    def dense_shapes(self, layer: int | None) -> dict[str, tuple[int, ...]]:
        """See `Family.dense_shapes`; the shared expert has a gate."""
        shapes = super().dense_shapes(layer)
        if layer is not None and self.model.kinds[self.model.order[layer]].ffn.routed:
            shapes[f"model.layers.{layer}.mlp.shared_expert_gate.weight"] = (1, self.model.hidden_size)
        return shapes


class _OlmoeLayer(GroupedQueryLayer):
    """Queries and keys are normed over all heads, and all three may be clipped."""

    def _heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        attention, a = self.module.self_attn, self.attention
        q, k = attention.q_norm(attention.q_proj(x)), attention.k_norm(attention.k_proj(x))
        v, clip = attention.v_proj(x), attention.config.clip_qkv
        if clip is not None:
            for states in (q, k, v):
                states.clamp_(-clip, clip)
        tokens = x.shape[0]
        return (
            q.view(tokens, a.num_heads, a.head_dim),
            k.view(tokens, a.num_kv_heads, a.head_dim),
            v.view(tokens, a.num_kv_heads, a.value_dim),
        )


class OlmoeFamily(GroupedQueryFamily):
    """OLMoE (arXiv 2409.02060)."""

    model_types = ("olmoe",)
    class_prefix = "Olmoe"
    layer_class = _OlmoeLayer

    def _module(self) -> Any:
        from transformers.models.olmoe import modeling_olmoe

        return modeling_olmoe

    def _local_model(self) -> MoEModel:
        if self.shard.world > 1:
            raise InvalidValue(
                f"{self.model.name} does not split over processes: its norms of queries and keys run over all heads; "
                f"use --tp 1."
            )
        return super()._local_model()

    def _attention_shapes(self, attention: Attention) -> dict[str, tuple[int, ...]]:
        q, kv = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
        return super()._attention_shapes(attention) | {"q_norm.weight": (q,), "k_norm.weight": (kv,)}
