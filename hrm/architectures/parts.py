"""Pieces that the readers share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hrm.architectures.reader import ConfigReader
from hrm.layers import FeedForward, Layer
from hrm.model import MoEModel

__all__ = ["arrange", "attention_biases", "causal_lm", "plain_ffn"]


def arrange(layers: Iterable[Layer], known: tuple[Layer, ...] = ()) -> tuple[tuple[Layer, ...], tuple[int, ...]]:
    """The different layers, `known` ones first, and the index of each layer among them."""
    kinds, order = list(known), []
    for layer in layers:
        if layer not in kinds:
            kinds.append(layer)
        order.append(kinds.index(layer))
    return tuple(kinds), tuple(order)


def attention_biases(hidden: int, q_size: int, kv_size: int) -> int:
    """Biases of the query, key, value and output projections."""
    return q_size + 2 * kv_size + hidden


def plain_ffn(
    hidden: int,
    intermediate: int,
    *,
    bias: bool = True,
    num_experts: int = 1,
    top_k: int = 1,
    router_bias: bool = False,
) -> FeedForward:
    """Two matrices with a ReLU between them, once or as experts behind a linear router."""
    router = num_experts * (hidden + router_bias) if num_experts > 1 else 0
    return FeedForward(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_experts=num_experts,
        top_k=top_k,
        matrices=2,
        expert_other_parameters=intermediate + hidden if bias else 0,
        router_parameters=router,
    )


def causal_lm(
    config: ConfigReader,
    layers: Iterable[Layer],
    *,
    hidden: int,
    max_positions: int,
    final_norm: int,
    head_bias: bool = False,
    **fields: Any,
) -> MoEModel:
    """A decoder-only model with a token embedding, a final norm and an LM head.

    Parameters
    ----------
    config : ConfigReader
        ``vocab_size``, ``tie_word_embeddings`` and the type of the weights are read from it.
    layers : iterable of Layer
        Every layer, in order.
    hidden, max_positions : int
        Width of the hidden state; longest sequence.
    final_norm : int
        Parameters of the norm before the LM head.
    head_bias : bool
        True where the LM head has a bias.
    **fields
        Further fields of `MoEModel`.
    """
    kinds, order = arrange(layers)
    vocab, tied = config.size("vocab_size"), config.flag("tie_word_embeddings")
    return MoEModel(
        name=config.name,
        architecture=config.model_type,
        hidden_size=hidden,
        vocab_size=vocab,
        max_positions=max_positions,
        kinds=kinds,
        order=order,
        embedding_parameters=(1 if tied else 2) * vocab * hidden + final_norm + (vocab if head_bias else 0),
        tie_embeddings=tied,
        dtype=config.dtype,
        **fields,
    )
