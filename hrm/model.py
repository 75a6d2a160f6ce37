"""A transformer with Mixture-of-Experts (or dense) layers, as its Hugging Face ``config.json`` describes it.

`hrm.architectures` reads the configs, strictly: a key that it does not know, or one that it needs and does
not find, is an error that names the key. A Mixtral file read as a dense model without a word is the
field's common mistake.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hrm.errors import InvalidConfig, InvalidValue
from hrm.layers import Layer, check_size

__all__ = ["DTYPE_BYTES", "MoEModel"]

DTYPE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "float8": 1.0, "int8": 1.0, "int4": 0.5}


def _count(number: int) -> str:
    return f"{number / 1e9:.2f}B" if number >= 1e8 else f"{number / 1e6:.2f}M"


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEModel:
    """Shapes of a transformer, layer by layer.

    Symbols of MoE-Lightning (arXiv 2411.11217): ``hidden_size`` is h1, ``intermediate_size`` h2,
    ``num_experts`` n_e, ``top_k`` k, ``num_layers`` l, ``num_heads`` n_q, ``num_kv_heads`` n_kv.
    Where layers differ, the properties that name one number mean the layer with the most experts.

    Examples
    --------
    >>> MoEModel.from_catalog("mixtral-8x7b").num_parameters
    46702792704
    """

    name: str
    architecture: str
    """``model_type`` of the config."""
    hidden_size: int
    vocab_size: int
    max_positions: int
    """Longest sequence (prompt and generated tokens) the position embedding covers."""
    kinds: tuple[Layer, ...]
    """The different layers that the model has."""
    order: tuple[int, ...]
    """Index into `kinds` of each layer that generates (of the decoder, where there is an encoder)."""
    encoder_order: tuple[int, ...] = ()
    """Index into `kinds` of each encoder layer; empty for decoder-only models."""
    embedding_parameters: int
    """Parameters outside all layers: embeddings of tokens and positions, final norms, LM head."""
    tie_embeddings: bool = False
    """True where the LM head is the token embedding."""
    dtype: str = "bfloat16"
    """Type of weights, activations and KV cache; a key of `DTYPE_BYTES`."""
    kv_dtype: str | None = None
    """Type of the KV cache where it differs from `dtype`."""
    dense_weight_bytes: float | None = None
    """Bytes of one stored weight of attention and shared experts, where it differs from `dtype`."""
    expert_weight_bytes: float | None = None
    """Bytes of one stored weight of a routed expert, scales included, where it differs from `dtype`."""

    def __post_init__(self) -> None:
        owner = f"model {self.name!r}"
        for name in ("hidden_size", "vocab_size", "max_positions"):
            check_size(getattr(self, name), name, owner)
        if not self.order or not set(self.order) | set(self.encoder_order) <= set(range(len(self.kinds))):
            raise InvalidConfig(f"{owner} needs layers, each one of its {len(self.kinds)} kinds.")
        for name in ("dtype", "kv_dtype"):
            value = getattr(self, name)
            if value not in DTYPE_BYTES and not (name == "kv_dtype" and value is None):
                raise InvalidConfig(f"{name!r} must be one of {', '.join(DTYPE_BYTES)}: {value!r}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, name: str) -> MoEModel:
        """Read the content of a Hugging Face ``config.json``; see `hrm.architectures.read_model`."""
        from hrm.architectures import read_model

        return read_model(config, name=name)

    @classmethod
    def from_file(cls, path: str | Path) -> MoEModel:
        """Read a ``config.json`` or a checkpoint folder that holds one."""
        path = Path(path)
        file = path / "config.json" if path.is_dir() else path
        try:
            config = json.loads(file.read_text())
        except OSError as error:
            raise InvalidConfig(f"cannot read model config {str(file)!r}: {error.strerror}.") from None
        except (ValueError, RecursionError) as error:  # no JSON, no text, numbers of thousands of digits
            raise InvalidConfig(f"model config {str(file)!r} is not JSON: {error}.") from None
        if not isinstance(config, dict):
            raise InvalidConfig(f"model config {str(file)!r} must hold a JSON object.")
        name = file.parent.name if file.name == "config.json" else file.stem
        return cls.from_config(config, name=name)

    @classmethod
    def from_catalog(cls, name: str) -> MoEModel:
        """Load a catalog model by name, or a config by path."""
        from hrm import catalog

        return catalog.load_model(name)

    def with_layers(self, num_layers: int) -> MoEModel:
        """The same model with its first `num_layers` layers, repeated from the start if it has fewer."""
        check_size(num_layers, "num_layers", f"model {self.name!r}")
        order = (self.order * -(-num_layers // len(self.order)))[:num_layers]
        return replace(self, order=order)

    def with_dtype(self, dtype: str) -> MoEModel:
        """The same model with every weight and activation in `dtype`, however its checkpoint stores them."""
        return replace(self, dtype=dtype, dense_weight_bytes=None, expert_weight_bytes=None)

    def with_kv_dtype(self, dtype: str | None) -> MoEModel:
        """The same model with its KV cache kept in another type."""
        return replace(self, kv_dtype=dtype)

    def with_routing(self, tokens_per_expert: Sequence[float]) -> MoEModel:
        """The same model with experts as popular as a histogram of tokens says, in every routed layer.

        Parameters
        ----------
        tokens_per_expert : sequence of float
            Tokens (or shares) that each expert got; of length ``num_experts``.
        """
        counts = [float(x) for x in tokens_per_expert]
        if len(counts) != self.num_experts or min(counts) < 0 or not sum(counts) > 0:
            raise InvalidValue(
                f"a routing histogram of {self.name} needs {self.num_experts} counts >= 0, not all 0: got {len(counts)}"
            )
        kinds = []
        for layer in self.kinds:
            if layer.ffn.num_experts == self.num_experts and layer.ffn.routed:
                shares = tuple(min(1.0, layer.ffn.top_k * x / sum(counts)) for x in counts)
                layer = replace(layer, ffn=replace(layer.ffn, routing=shares))
            kinds.append(layer)
        return replace(self, kinds=tuple(kinds))

    # -- layers ---------------------------------------------------------------------------------------

    @property
    def num_layers(self) -> int:
        """l: layers that generate."""
        return len(self.order)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Every layer that generates, in order."""
        return tuple(self.kinds[kind] for kind in self.order)

    @property
    def layer_counts(self) -> dict[int, int]:
        """How often each kind occurs among the layers that generate."""
        return dict(Counter(self.order))

    @property
    def layer_pairs(self) -> dict[tuple[int, int], int]:
        """How often a layer of one kind is followed by one of another, from step to step."""
        return _pairs(self.order)

    @property
    def encoder_pairs(self) -> dict[tuple[int, int], int]:
        """As `layer_pairs`, for the encoder."""
        return _pairs(self.encoder_order)

    @property
    def main_layer(self) -> Layer:
        """The layer with the most experts."""
        return max(self.layers, key=lambda layer: layer.ffn.num_experts)

    @property
    def uniform(self) -> bool:
        """True for a decoder-only model whose layers are all alike."""
        return len(set(self.order)) == 1 and not self.encoder_order

    @property
    def intermediate_size(self) -> int:
        """h2 of one routed expert."""
        return self.main_layer.ffn.intermediate_size

    @property
    def num_experts(self) -> int:
        """n_e; 1 for a dense model."""
        return self.main_layer.ffn.num_experts

    @property
    def top_k(self) -> int:
        """k: experts that a token is sent to."""
        return self.main_layer.ffn.top_k

    @property
    def num_heads(self) -> int:
        """n_q."""
        return self.main_layer.attention.num_heads

    @property
    def num_kv_heads(self) -> int:
        """n_kv."""
        return self.main_layer.attention.num_kv_heads

    @property
    def head_dim(self) -> int:
        """d of queries and keys."""
        return self.main_layer.attention.head_dim

    @property
    def sliding_window(self) -> int | None:
        """Window of the layer with the most experts."""
        return self.main_layer.attention.window

    @property
    def q_size(self) -> int:
        """Width of the query projection, n_q · d."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of the key (or value) projection, n_kv · d."""
        return self.num_kv_heads * self.head_dim

    # -- parameters -----------------------------------------------------------------------------------

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert."""
        return self.main_layer.ffn.expert_parameters

    @property
    def num_expert_parameters(self) -> int:
        """Parameters of all routed experts of all layers (of dense FFNs, where a layer has one)."""
        return sum(self.kinds[kind].ffn.experts_parameters for kind in (*self.order, *self.encoder_order))

    @property
    def num_parameters(self) -> int:
        """All parameters."""
        layers = sum(self.kinds[kind].parameters for kind in (*self.order, *self.encoder_order))
        return layers + self.embedding_parameters

    @property
    def active_parameters(self) -> int:
        """Parameters that one token meets: all but the experts that it is not sent to."""
        idle = 0
        for kind in (*self.order, *self.encoder_order):
            ffn = self.kinds[kind].ffn
            idle += (ffn.num_experts - ffn.top_k) * ffn.expert_parameters
        return self.num_parameters - idle

    # -- bytes ----------------------------------------------------------------------------------------

    @property
    def dtype_bytes(self) -> float:
        """Bytes of one activation, and of one weight unless stored in another type."""
        return DTYPE_BYTES[self.dtype]

    @property
    def kv_dtype_bytes(self) -> float:
        """Bytes of one element of the KV cache."""
        return DTYPE_BYTES[self.kv_dtype or self.dtype]

    @property
    def dense_element_bytes(self) -> float:
        """Bytes of one stored weight outside the routed experts."""
        return self.dtype_bytes if self.dense_weight_bytes is None else self.dense_weight_bytes

    @property
    def expert_element_bytes(self) -> float:
        """Bytes of one stored weight of a routed expert."""
        return self.dtype_bytes if self.expert_weight_bytes is None else self.expert_weight_bytes

    @property
    def expert_bytes(self) -> float:
        """Bytes of one expert."""
        return self.expert_parameters * self.expert_element_bytes

    def kind_expert_bytes(self, kind: int) -> float:
        """Bytes of the routed experts of a layer of `kind`."""
        return self.kinds[kind].ffn.experts_parameters * self.expert_element_bytes

    def kind_travelling_bytes(self, kind: int, *, dense: bool = False) -> float:
        """Bytes of a layer's weights that may travel: its routed experts, with `dense` all but its layer norms."""
        layer = self.kinds[kind]
        size = self.kind_expert_bytes(kind)
        if dense:
            others = layer.attention.parameters + layer.ffn.shared_parameters + layer.ffn.router_parameters
            size += others * self.dense_element_bytes
        return size

    def kind_vector_bytes(self, kind: int) -> float:
        """Bytes of a layer's parameters of attention and router that are in no matrix: biases, norms, sinks."""
        layer = self.kinds[kind]
        router = layer.ffn.router_parameters - layer.ffn.num_experts * layer.ffn.hidden_size
        return (layer.attention.other_parameters + max(0, router)) * self.dense_element_bytes

    def kind_kv_token_bytes(self, kind: int) -> float:
        """Bytes of one token's keys and values in a layer of `kind`."""
        return self.kinds[kind].attention.kv_elements * self.kv_dtype_bytes

    @property
    def layer_expert_bytes(self) -> float:
        """Bytes of all experts of one layer: what CGOPipe streams (W_L)."""
        return self.main_layer.ffn.experts_parameters * self.expert_element_bytes

    @property
    def streamed_bytes(self) -> float:
        """Bytes of the routed experts of all layers, encoder included."""
        return self.num_expert_parameters * self.expert_element_bytes

    @property
    def dense_bytes(self) -> float:
        """Bytes of everything but the experts; stays on the GPU."""
        layers = sum(self.kinds[kind].dense_parameters for kind in (*self.order, *self.encoder_order))
        return layers * self.dense_element_bytes + self.embedding_parameters * self.dtype_bytes

    @property
    def weight_bytes(self) -> float:
        """Bytes of all weights."""
        return self.dense_bytes + self.streamed_bytes

    @property
    def kv_token_bytes(self) -> float:
        """Bytes of one token's keys and values in one layer."""
        return self.main_layer.attention.kv_elements * self.kv_dtype_bytes

    @property
    def hidden_bytes(self) -> float:
        """Bytes of one token's hidden state."""
        return self.hidden_size * self.dtype_bytes

    def __str__(self) -> str:
        experts = f"{self.num_experts} experts top-{self.top_k}" if self.num_experts > 1 else "dense"
        encoder = f"{len(self.encoder_order)} + " if self.encoder_order else ""
        layers = f"{encoder}{self.num_layers} layers"
        return f"{self.name}: {_count(self.num_parameters)} parameters, {layers}, {experts}, {self.dtype}"

    def _repr_html_(self) -> str:
        return f"<b>{self.name}</b><br>{str(self).split(': ', 1)[1]}"


def _pairs(order: tuple[int, ...]) -> dict[tuple[int, int], int]:
    return dict(Counter(zip(order, order[1:] + order[:1], strict=True)))
