"""Decoders with multi-head attention and two-matrix FFNs: OPT, and the MoE language models of fairseq."""

from __future__ import annotations

from hrm.architectures.parts import arrange, attention_biases, causal_lm, plain_ffn
from hrm.architectures.reader import ConfigReader
from hrm.layers import Attention, Layer
from hrm.model import MoEModel

__all__ = ["read_fairseq_moe_lm", "read_opt"]

_OPT_POSITION_OFFSET = 2
"""OPT's position table has two rows that no position uses (`OPTLearnedPositionalEmbedding` in transformers)."""


def _attention(config: ConfigReader, hidden: int, heads: int, *, bias: bool) -> Attention:
    head_dim = config.per_head(hidden, heads)
    return Attention(
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        value_dim=head_dim,
        other_parameters=attention_biases(hidden, hidden, hidden) if bias else 0,
    )


def read_opt(config: ConfigReader) -> MoEModel:
    """Read an ``opt`` config (arXiv 2205.01068): dense layers, learned positions."""
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    config.expect("activation_function", "relu")
    # Used in training, or text that is put before a prompt.
    config.ignore(["activation_dropout", "dropout", "init_std", "layerdrop", "prefix"])
    bias = config.flag("enable_bias", True)
    norm = 2 * hidden if config.flag("layer_norm_elementwise_affine", True) else 0
    norm_first, removed = config.flag("do_layer_norm_before", True), config.flag("_remove_final_layer_norm")
    layer = Layer(
        attention=_attention(config, hidden, heads, bias=bias),
        ffn=plain_ffn(hidden, config.size("ffn_dim"), bias=bias),
        norm_parameters=2 * norm,
    )
    vocab, positions = config.size("vocab_size"), config.size("max_position_embeddings")
    width, tied = config.size("word_embed_proj_dim", hidden), config.flag("tie_word_embeddings", True)
    tables = (1 if tied else 2) * vocab * width + (positions + _OPT_POSITION_OFFSET) * hidden
    projections = 2 * width * hidden if width != hidden else 0
    kinds, order = arrange([layer] * config.size("num_hidden_layers"))
    return MoEModel(
        name=config.name,
        architecture=config.model_type,
        hidden_size=hidden,
        vocab_size=vocab,
        max_positions=positions,
        kinds=kinds,
        order=order,
        embedding_parameters=tables + projections + (norm if norm_first and not removed else 0),
        tie_embeddings=tied,
        dtype=config.dtype,
    )


def read_fairseq_moe_lm(config: ConfigReader) -> MoEModel:
    """Read a ``fairseq_moe_lm`` config, a type of our own: fairseq published no Hugging Face config.

    Sinusoidal positions without parameters, biases in attention and FFN, LayerNorms with biases, and a router
    without bias behind every ``moe_freq``-th layer (arXiv 2112.10684 and 2303.06182).
    """
    hidden, heads, intermediate = (config.size(key) for key in ("d_model", "num_heads", "ffn_dim"))
    config.expect("activation_function", "relu", "gelu")
    attention = _attention(config, hidden, heads, bias=True)
    moe = plain_ffn(hidden, intermediate, num_experts=config.size("num_experts"), top_k=config.size("top_k"))
    dense, every = plain_ffn(hidden, intermediate), config.size("moe_freq")
    layers = [
        Layer(attention=attention, ffn=dense if (i + 1) % every else moe, norm_parameters=4 * hidden)
        for i in range(config.size("num_layers"))
    ]
    positions = config.size("max_position_embeddings")
    return causal_lm(config, layers, hidden=hidden, max_positions=positions, final_norm=2 * hidden)
