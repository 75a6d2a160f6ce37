"""Model families: how a layer's dense parts are built from transformers' own modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from executor.checkpoint import Checkpoint
from executor.memory import DeviceMemory

__all__ = ["DenseLayer", "DenseModel", "dispatch_probe", "load_dense"]


@dataclass(frozen=True)
class DenseLayer:
    """A decoder layer without its experts, made of transformers' modules, weights on the device."""

    module: nn.Module
    """The transformers decoder layer; its experts are not used and hold no memory."""
    head_dim: int
    rotate: Callable[..., tuple[torch.Tensor, torch.Tensor]]

    def project(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Norm, Q/K/V projections and rotary embedding of packed tokens.

        Parameters
        ----------
        hidden : Tensor, [tokens, H]
        cos, sin : Tensor, [tokens, d]

        Returns
        -------
        q, k, v : Tensor, [tokens, heads, d]
        """
        layer: Any = self.module
        x = layer.input_layernorm(hidden)
        attention = layer.self_attn
        tokens = hidden.shape[0]
        # The module's rotary function wants [batch, heads, length, d]; every token is a batch of its own.
        q = attention.q_proj(x).view(tokens, -1, 1, self.head_dim)
        k = attention.k_proj(x).view(tokens, -1, 1, self.head_dim)
        v = attention.v_proj(x).view(tokens, -1, self.head_dim)
        q, k = self.rotate(q, k, cos[:, None], sin[:, None])
        return q.squeeze(2), k.squeeze(2), v

    def attention_output(self, attended: torch.Tensor) -> torch.Tensor:
        """O projection of ``[tokens, n_q * d]``."""
        layer: Any = self.module
        return layer.self_attn.o_proj(attended)

    def route(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Post-attention norm and router: (normed tokens, expert index, expert weight)."""
        layer: Any = self.module
        x = layer.post_attention_layernorm(hidden)
        _, weight, index = layer.mlp.gate(x)
        return x, index, weight


@dataclass(frozen=True)
class DenseModel:
    """Everything but the experts, on the device."""

    layers: list[DenseLayer]
    embedding: torch.Tensor
    """[vocab, H]"""
    norm: nn.Module
    head: torch.Tensor
    """[vocab, H]"""
    cos: torch.Tensor
    """[positions, d]"""
    sin: torch.Tensor
    activation: Callable[[torch.Tensor], torch.Tensor]

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings, [tokens, H]."""
        return F.embedding(ids, self.embedding)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[tokens, vocab]"""
        return F.linear(self.norm(hidden), self.head)


def load_dense(checkpoint: Checkpoint, memory: DeviceMemory, *, positions: int) -> DenseModel:
    """Load every weight but the experts' onto the device, into transformers' modules.

    Parameters
    ----------
    positions : int
        Rotary positions to prepare: longest prompt and generation.
    """
    # One family so far; a second one makes this a registry by `model_type`.
    from transformers.activations import ACT2FN
    from transformers.models.mixtral import modeling_mixtral as family

    config, model = checkpoint.config, checkpoint.model
    config._attn_implementation = "sdpa"
    tensors: dict[str, torch.Tensor] = {}

    def put(name: str, tensor: torch.Tensor) -> None:
        tensors[name] = memory.place("dense_weights", tensor)

    dense = [name for name in checkpoint.expected() if ".experts." not in name]
    checkpoint.read(dense, put)
    layers = []
    for index in range(model.num_layers):
        with torch.device("meta"):
            module = family.MixtralDecoderLayer(config, index)
        prefix = f"model.layers.{index}."
        state = {
            name.removeprefix(prefix).replace("block_sparse_moe.", "mlp."): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        module.load_state_dict(state, strict=False, assign=True)
        layers.append(DenseLayer(module.eval().requires_grad_(False), model.head_dim, family.apply_rotary_pos_emb))
    with torch.device("meta"):
        norm = family.MixtralRMSNorm(model.hidden_size, eps=config.rms_norm_eps)
    norm.load_state_dict({"weight": tensors["model.norm.weight"]}, assign=True)
    rotary = family.MixtralRotaryEmbedding(config).to(memory.device)
    with torch.inference_mode():
        ids = torch.arange(positions, device=memory.device)[None]
        cos, sin = rotary(torch.empty(0, dtype=checkpoint.dtype, device=memory.device), ids)
    memory.reserve("rotary_table", cos.nbytes + sin.nbytes)
    embedding = tensors["model.embed_tokens.weight"]
    return DenseModel(
        layers=layers,
        embedding=embedding,
        norm=norm.eval().requires_grad_(False),
        head=tensors.get("lm_head.weight", embedding),
        cos=cos[0],
        sin=sin[0],
        activation=ACT2FN[config.hidden_act],
    )


def dispatch_probe(device: torch.device, dtype: torch.dtype) -> Callable[[], Any]:
    """A PreAttn too small to compute anything: what its operators cost to be called at all."""
    from transformers import MixtralConfig
    from transformers.models.mixtral import modeling_mixtral as family

    config = MixtralConfig(
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_local_experts=2,
        vocab_size=16,
    )
    config._attn_implementation = "sdpa"
    module = family.MixtralDecoderLayer(config, 0).to(device=device, dtype=dtype).eval().requires_grad_(False)
    layer = DenseLayer(module, 8, family.apply_rotary_pos_emb)
    hidden = torch.zeros(1, 16, device=device, dtype=dtype)
    turn = torch.ones(1, 8, device=device, dtype=dtype)
    return lambda: layer.project(hidden, turn, turn)
