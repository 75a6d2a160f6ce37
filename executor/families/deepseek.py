"""DeepSeek-V2 and V3: latent attention (MLA), shared experts, dense layers first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from executor.families.base import WHOLE, Shard
from executor.families.common import CommonFamily, CommonLayer
from executor.kernels import causal_attention
from hrm.errors import InvalidConfig
from hrm.layers import Attention, Layer
from hrm.model import MoEModel

__all__ = ["DeepseekV2Family", "DeepseekV3Family", "LatentLayer"]


class LatentLayer(CommonLayer):
    """A decoder layer with latent attention.

    The cache keeps one latent vector and one rotary key per token. Decode stays in the latent space: W_UK is absorbed
    into the query and W_UV is applied to what was attended. Prefill expands keys and values of all heads, which takes
    fewer operations per pair of tokens (arXiv 2405.04434, section 2.1).
    """

    def __init__(self, module: Any, kind: Layer, family: CommonFamily) -> None:
        super().__init__(module, kind, family)
        a = self.attention
        assert a.kv_rank is not None
        self.rank, self.nope = a.kv_rank, a.head_dim - a.rope_dim
        expand = module.self_attn.kv_b_proj.weight.view(a.num_heads, self.nope + a.value_dim, self.rank)
        self._key, self._value = expand.split([self.nope, a.value_dim], dim=1)

    def _project(
        self, hidden: torch.Tensor, turn: Sequence[torch.Tensor], cached: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries of all heads without and with rotary part, ``[tokens, n_q, d]``; fills the cache's rows."""
        a, attention = self.attention, self.module.self_attn
        x = self.module.input_layernorm(hidden)
        if a.q_rank is None:
            q = attention.q_proj(x)
        else:
            q = attention.q_b_proj(attention.q_a_layernorm(attention.q_a_proj(x)))
        plain, rotary = q.view(-1, a.num_heads, a.head_dim).split([self.nope, a.rope_dim], dim=2)
        latent, key = attention.kv_a_proj_with_mqa(x).split([self.rank, a.rope_dim], dim=1)
        rotary, key = self._rotate(rotary.transpose(0, 1)[None], key[None, None], *(table[None] for table in turn))
        cached[:, : self.rank] = attention.kv_a_layernorm(latent)
        cached[:, self.rank :] = key[0, 0]
        return plain, rotary[0].transpose(0, 1)

    def decode_inputs(
        self, hidden: torch.Tensor, turn: Sequence[torch.Tensor], queries: torch.Tensor, cached: torch.Tensor
    ) -> None:
        """See `DecoderLayer.decode_inputs`."""
        plain, rotary = self._project(hidden, turn, cached)
        heads = queries.view(-1, self.attention.num_heads, self.rank + self.attention.rope_dim)
        heads[..., : self.rank] = torch.bmm(plain.transpose(0, 1), self._key).transpose(0, 1)
        heads[..., self.rank :] = rotary

    def prefill(
        self, hidden: torch.Tensor, turn: Sequence[torch.Tensor], lengths: Sequence[int], cached: torch.Tensor
    ) -> torch.Tensor:
        """See `DecoderLayer.prefill`."""
        a, tokens = self.attention, hidden.shape[0]
        plain, rotary = self._project(hidden, turn, cached)
        latent, key = cached.split([self.rank, a.rope_dim], dim=1)
        both = self.module.self_attn.kv_b_proj(latent).view(tokens, a.num_heads, self.nope + a.value_dim)
        keys, values = both.split([self.nope, a.value_dim], dim=2)
        k = torch.cat([keys, key[:, None].expand(tokens, a.num_heads, a.rope_dim)], dim=2)
        attended = causal_attention(torch.cat([plain, rotary], dim=2), k, values, lengths, scale=self.scale)
        return self.module.self_attn.o_proj(attended)

    def decode_output(self, attended: torch.Tensor) -> torch.Tensor:
        """See `DecoderLayer.decode_output`: W_UV, then the O projection."""
        a = self.attention
        latents = attended.view(-1, a.num_heads, self.rank).transpose(0, 1)
        values = torch.bmm(latents, self._value.transpose(1, 2)).transpose(0, 1)
        return self.module.self_attn.o_proj(values.reshape(-1, a.num_heads * a.value_dim))


class _DeepseekFamily(CommonFamily):
    """What both versions share: names on disk, and how heads are split."""

    shared_name = "shared_experts"
    rows_split = ("q_proj", "q_b_proj", "kv_b_proj")
    layer_class = LatentLayer

    def _local_config(self, config: Any) -> Any:
        config = super()._local_config(config)
        local = self.local.main_layer.ffn
        # The module derives the width of the shared experts from that of a routed one.
        config.moe_intermediate_size = local.intermediate_size if local.routed else config.moe_intermediate_size
        return config

    def _attention_shapes(self, attention: Attention) -> dict[str, tuple[int, ...]]:
        a, h = attention, attention.hidden_size
        assert a.kv_rank is not None
        heads, cached = a.num_heads * a.head_dim, a.kv_rank + a.rope_dim
        shapes: dict[str, tuple[int, ...]] = {}
        if a.q_rank is None:
            shapes["q_proj.weight"] = (heads, h)
        else:
            shapes["q_a_proj.weight"] = (a.q_rank, h)
            shapes["q_a_layernorm.weight"] = (a.q_rank,)
            shapes["q_b_proj.weight"] = (heads, a.q_rank)
        shapes |= {
            "kv_a_proj_with_mqa.weight": (cached, h),
            "kv_a_layernorm.weight": (a.kv_rank,),
            "kv_b_proj.weight": (a.num_heads * (a.head_dim - a.rope_dim + a.value_dim), a.kv_rank),
            "o_proj.weight": (h, a.num_heads * a.value_dim),
        }
        if self.config.attention_bias:
            biases = {"q_a_proj": a.q_rank, "kv_a_proj_with_mqa": cached, "o_proj": h}
            shapes |= {f"{name}.bias": (size,) for name, size in biases.items() if size is not None}
        return shapes


class DeepseekV2Family(_DeepseekFamily):
    """DeepSeek-V2 (arXiv 2405.04434)."""

    model_types = ("deepseek_v2",)
    class_prefix = "DeepseekV2"

    def __init__(self, model: MoEModel, config: Any, shard: Shard = WHOLE) -> None:
        super().__init__(model, config, shard)
        _expect(model, config, "topk_method", "greedy", "group_limited_greedy")
        _expect(model, config, "scoring_func", "softmax")

    def _module(self) -> Any:
        from transformers.models.deepseek_v2 import modeling_deepseek_v2

        return modeling_deepseek_v2

    def _tables(self, rotary: Any) -> tuple[torch.Tensor, ...]:
        # The module's table is complex; as pairs of numbers, ``[positions, rope / 2, 2]``, any copy can move it.
        return (torch.view_as_real(rotary[0]),)

    def rotate(self, q: torch.Tensor, k: torch.Tensor, *turn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `CommonFamily.rotate`: pairs of neighbours as complex numbers."""
        return self._module().apply_rotary_emb(q, k, torch.view_as_complex(turn[0]))


class DeepseekV3Family(_DeepseekFamily):
    """DeepSeek-V3 (arXiv 2412.19437): experts are chosen with a correction that balances their load."""

    model_types = ("deepseek_v3",)
    class_prefix = "DeepseekV3"
    float32_names = (".e_score_correction_bias",)

    def __init__(self, model: MoEModel, config: Any, shard: Shard = WHOLE) -> None:
        super().__init__(model, config, shard)
        _expect(model, config, "topk_method", "noaux_tc")
        _expect(model, config, "scoring_func", "sigmoid")

    def _module(self) -> Any:
        from transformers.models.deepseek_v3 import modeling_deepseek_v3

        return modeling_deepseek_v3

    def dense_shapes(self, layer: int | None) -> dict[str, tuple[int, ...]]:
        """See `Family.dense_shapes`; routers have a correction per expert."""
        shapes = super().dense_shapes(layer)
        if layer is not None and (ffn := self.model.kinds[self.model.order[layer]].ffn).routed:
            shapes[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"] = (ffn.num_experts,)
        return shapes

    def rotate(self, q: torch.Tensor, k: torch.Tensor, *turn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `CommonFamily.rotate`: pairs of neighbours, unless the config says halves."""
        module = self._module()
        if self.config.rope_interleave:
            return module.apply_rotary_pos_emb_interleave(q, k, *turn)
        return module.apply_rotary_pos_emb(q, k, *turn)


def _expect(model: MoEModel, config: Any, key: str, *allowed: str) -> None:
    """Refuse a router that transformers does not have for this version and would pass over in silence."""
    value = getattr(config, key, None)
    if value is not None and value not in allowed:
        raise InvalidConfig(f"{key!r} of {model.name!r} must be {' or '.join(map(repr, allowed))} to be run: {value!r}")
