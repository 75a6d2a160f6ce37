"""A Mixture-of-Experts decoder as its Hugging Face ``config.json`` describes it.

The reader is strict: a key that it does not know, or one that it needs and does not find, is an error
that names the key. A Mixtral file read as a dense model without a word is the field's common mistake.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hrm.errors import InvalidConfig

__all__ = ["DTYPE_BYTES", "SUPPORTED_ARCHITECTURES", "MoEModel"]

DTYPE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "int4": 0.5}

# Keys that say nothing about shapes: initialisation, token ids, bookkeeping of the library.
_BOOKKEEPING = frozenset(
    [
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "bos_token_id",
        "eos_token_id",
        "initializer_range",
        "model_type",
        "output_router_logits",
        "pad_token_id",
        "rms_norm_eps",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "transformers_version",
        "use_cache",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "chunk_size_feed_forward",
        "is_encoder_decoder",
        "problem_type",
        "id2label",
        "label2id",
    ]
)


@dataclass(frozen=True, slots=True)
class _Architecture:
    """Which config keys of one ``model_type`` carry the shape of the model."""

    fields: Mapping[str, str]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    harmless: frozenset[str] = frozenset()


_ARCHITECTURES = {
    "mixtral": _Architecture(
        fields={
            "num_layers": "num_hidden_layers",
            "hidden_size": "hidden_size",
            "intermediate_size": "intermediate_size",
            "num_heads": "num_attention_heads",
            "num_kv_heads": "num_key_value_heads",
            "vocab_size": "vocab_size",
            "num_experts": "num_local_experts",
            "top_k": "num_experts_per_tok",
            "max_positions": "max_position_embeddings",
        },
    ),
}
SUPPORTED_ARCHITECTURES = tuple(sorted(_ARCHITECTURES))


def _count(number: int) -> str:
    return f"{number / 1e9:.2f}B" if number >= 1e8 else f"{number / 1e6:.2f}M"


def _check_size(value: Any, key: str, model: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidConfig(f"{key!r} of model {model!r} must be an integer >= 1: {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEModel:
    """Shapes of a decoder-only Mixture-of-Experts transformer.

    Symbols of MoE-Lightning (arXiv 2411.11217): ``hidden_size`` is h1, ``intermediate_size`` h2,
    ``num_experts`` n_e, ``top_k`` k, ``num_layers`` l, ``num_heads`` n_q, ``num_kv_heads`` n_kv.

    Examples
    --------
    >>> MoEModel.from_catalog("mixtral-8x7b").num_parameters
    46702792704
    """

    name: str
    architecture: str
    """``model_type`` of the config."""
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    num_experts: int
    top_k: int
    max_positions: int
    """Longest sequence (prompt and generated tokens) the position embedding covers."""
    dtype: str = "bfloat16"
    """Type of weights, activations and KV cache; a key of `DTYPE_BYTES`."""
    tie_embeddings: bool = False
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        for name in (
            "num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads",
            "head_dim", "vocab_size", "num_experts", "top_k", "max_positions",
        ):  # fmt: skip
            _check_size(getattr(self, name), name, self.name)
        if self.top_k > self.num_experts:
            raise InvalidConfig(f"'top_k' must be <= num_experts={self.num_experts}: {self.top_k}")
        if self.num_heads % self.num_kv_heads:
            raise InvalidConfig(f"'num_heads' must be a multiple of num_kv_heads={self.num_kv_heads}: {self.num_heads}")
        if self.dtype not in DTYPE_BYTES:
            raise InvalidConfig(f"'dtype' must be one of {', '.join(DTYPE_BYTES)}: {self.dtype!r}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, name: str) -> MoEModel:
        """Read a Hugging Face config.

        Parameters
        ----------
        config : mapping
            Content of a ``config.json``.
        name : str
            What to call the model in tables and messages.

        Raises
        ------
        InvalidConfig
            If the architecture is not supported, or a key is missing or unknown.
        """
        model_type = config.get("model_type")
        if not isinstance(model_type, str) or model_type not in _ARCHITECTURES:
            raise InvalidConfig(
                f"architecture {model_type!r} of {name!r} is not supported; "
                f"supported: {', '.join(SUPPORTED_ARCHITECTURES)}."
            )
        arch = _ARCHITECTURES[model_type]
        missing = [key for key in arch.fields.values() if key not in config]
        if missing:
            raise InvalidConfig(f"config of {name!r} lacks {', '.join(map(repr, missing))}.")
        shape = {ours: config[theirs] for ours, theirs in arch.fields.items()}
        for ours, theirs in arch.fields.items():
            _check_size(shape[ours], theirs, name)
        tied = config.get("tie_word_embeddings", False)
        if not isinstance(tied, bool):
            raise InvalidConfig(f"'tie_word_embeddings' of {name!r} must be true or false: {tied!r}")
        if config.get("sliding_window") is not None:
            _check_size(config["sliding_window"], "sliding_window", name)
        if config.get("hidden_act", "silu") != "silu":
            raise InvalidConfig(f"'hidden_act' of {name!r} must be 'silu': {config['hidden_act']!r}")
        read = {"head_dim", "hidden_act", "dtype", "torch_dtype", "tie_word_embeddings", "sliding_window"}
        unknown = sorted(set(config) - set(arch.fields.values()) - read - _BOOKKEEPING - arch.harmless)
        if unknown:
            raise InvalidConfig(
                f"config of {name!r} has keys that {model_type!r} models do not have here: "
                f"{', '.join(map(repr, unknown))}; remove them or use a version that knows them."
            )
        head_dim = config.get("head_dim")
        if head_dim is None:
            if shape["hidden_size"] % shape["num_heads"]:
                raise InvalidConfig(
                    f"'hidden_size' of {name!r} must be a multiple of "
                    f"num_attention_heads={shape['num_heads']}: {shape['hidden_size']}"
                )
            head_dim = shape["hidden_size"] // shape["num_heads"]
        return cls(
            name=name,
            architecture=model_type,
            head_dim=head_dim,
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"),
            tie_embeddings=tied,
            sliding_window=config.get("sliding_window"),
            **shape,
        )

    @classmethod
    def from_file(cls, path: str | Path) -> MoEModel:
        """Read a ``config.json`` or a checkpoint folder that holds one."""
        path = Path(path)
        file = path / "config.json" if path.is_dir() else path
        try:
            config = json.loads(file.read_text())
        except OSError as error:
            raise InvalidConfig(f"cannot read model config {str(file)!r}: {error.strerror}.") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
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

    @property
    def dtype_bytes(self) -> float:
        """Bytes of one weight, activation or KV element."""
        return DTYPE_BYTES[self.dtype]

    @property
    def q_size(self) -> int:
        """Width of the query projection, n_q · d."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of the key (or value) projection, n_kv · d."""
        return self.num_kv_heads * self.head_dim

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert (gate, up and down projections)."""
        return 3 * self.hidden_size * self.intermediate_size

    @property
    def attention_parameters(self) -> int:
        """Parameters of one layer's Q, K, V and O projections."""
        return self.hidden_size * (2 * self.q_size + 2 * self.kv_size)

    @property
    def dense_layer_parameters(self) -> int:
        """Parameters of one layer outside its experts: attention, two norms, router."""
        return self.attention_parameters + 2 * self.hidden_size + self.num_experts * self.hidden_size

    @property
    def embedding_parameters(self) -> int:
        """Parameters of token embedding, final norm and LM head."""
        tables = 1 if self.tie_embeddings else 2
        return tables * self.vocab_size * self.hidden_size + self.hidden_size

    @property
    def num_expert_parameters(self) -> int:
        """Parameters of all experts of all layers."""
        return self.num_layers * self.num_experts * self.expert_parameters

    @property
    def num_parameters(self) -> int:
        """All parameters."""
        dense = self.num_layers * self.dense_layer_parameters + self.embedding_parameters
        return dense + self.num_expert_parameters

    @property
    def expert_bytes(self) -> float:
        """Bytes of one expert."""
        return self.expert_parameters * self.dtype_bytes

    @property
    def layer_expert_bytes(self) -> float:
        """Bytes of all experts of one layer: what CGOPipe streams (W_L)."""
        return self.num_experts * self.expert_bytes

    @property
    def dense_bytes(self) -> float:
        """Bytes of everything but the experts; stays on the GPU."""
        return (self.num_parameters - self.num_expert_parameters) * self.dtype_bytes

    @property
    def kv_token_bytes(self) -> float:
        """Bytes of one token's keys and values in one layer."""
        return 2 * self.kv_size * self.dtype_bytes

    @property
    def hidden_bytes(self) -> float:
        """Bytes of one token's hidden state."""
        return self.hidden_size * self.dtype_bytes

    def __str__(self) -> str:
        return (
            f"{self.name}: {_count(self.num_parameters)} parameters, {self.num_layers} layers, "
            f"{self.num_experts} experts top-{self.top_k}, {self.dtype}"
        )

    def _repr_html_(self) -> str:
        return f"<b>{self.name}</b><br>{str(self).split(': ', 1)[1]}"
