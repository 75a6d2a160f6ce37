"""Mixtral: every layer grouped-query attention and routed, gated experts."""

from __future__ import annotations

from hrm.architectures.reader import ConfigReader
from hrm.layers import Attention, FeedForward, Layer
from hrm.model import MoEModel

__all__ = ["read_mixtral"]


def read_mixtral(config: ConfigReader) -> MoEModel:
    """Read a ``mixtral`` config."""
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    experts = config.size("num_local_experts")
    head_dim = config.head_dim(hidden, heads)
    config.expect("hidden_act", "silu")
    layer = Layer(
        attention=Attention(
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=config.size("num_key_value_heads"),
            head_dim=head_dim,
            value_dim=head_dim,
            window=config.optional_size("sliding_window"),
        ),
        ffn=FeedForward(
            hidden_size=hidden,
            intermediate_size=config.size("intermediate_size"),
            num_experts=experts,
            top_k=config.size("num_experts_per_tok"),
            router_parameters=experts * hidden,
        ),
        norm_parameters=2 * hidden,
    )
    vocab = config.size("vocab_size")
    tied = config.flag("tie_word_embeddings")
    return MoEModel(
        name=config.name,
        architecture="mixtral",
        hidden_size=hidden,
        vocab_size=vocab,
        max_positions=config.size("max_position_embeddings"),
        kinds=(layer,),
        order=(0,) * config.size("num_hidden_layers"),
        embedding_parameters=(1 if tied else 2) * vocab * hidden + hidden,
        tie_embeddings=tied,
        dtype=config.dtype,
    )
