"""Strict access to a config: every key is read, known to be harmless, or refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hrm.errors import InvalidConfig
from hrm.layers import check_size
from hrm.units import MAX_SIZE, brief

__all__ = ["GENERATION_DEFAULTS", "ConfigReader"]

# Keys that say nothing about shapes: initialisation, token ids, bookkeeping of the library.
_BOOKKEEPING = frozenset(
    [
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "is_encoder_decoder",
        "label2id",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "rms_norm_eps",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    ]
)

# What transformers before 5 wrote into every config, nested ones too, whether a model uses it or not.
GENERATION_DEFAULTS = frozenset(
    [
        "add_cross_attention",
        "bad_words_ids",
        "begin_suppress_tokens",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "is_decoder",
        "length_penalty",
        "max_length",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "prefix",
        "pruned_heads",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict_in_generate",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tie_word_embeddings",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torchscript",
        "typical_p",
        "use_bfloat16",
    ]
)


_MAX_LAYERS = 10_000


class ConfigReader:
    """A config whose keys are ticked off as they are read."""

    def __init__(self, config: Mapping[str, Any], *, name: str, parent: ConfigReader | None = None) -> None:
        self.config = config
        self.name = name
        self._parent = parent
        self._read: set[str] = set()
        self._nested: list[ConfigReader] = []

    @property
    def model_type(self) -> str:
        """``model_type``, of the outer config where a nested one has none."""
        own = self.config.get("model_type")
        return self._parent.model_type if self._parent and not own else str(own)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `key`, or `default` where it is absent."""
        self._read.add(key)
        return self.config.get(key, default)

    def size(self, key: str, default: int | None = None) -> int:
        """An integer >= 1; needed unless `default` is given."""
        value = self.get(key, default)
        if value is None:
            raise InvalidConfig(f"config of {self.name!r} lacks {key!r}.")
        check_size(value, key, f"model {self.name!r}")
        self._check_limit(key, value)
        return int(value)

    def count(self, key: str, default: int | None = None) -> int:
        """An integer >= 0; needed unless `default` is given."""
        value = self.get(key, default)
        if value is None:
            raise InvalidConfig(f"config of {self.name!r} lacks {key!r}.")
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise InvalidConfig(f"{key!r} of model {self.name!r} must be an integer >= 0: {value!r}")
        self._check_limit(key, value)
        return value

    def _check_limit(self, key: str, value: int) -> None:
        limit = _MAX_LAYERS if key.endswith("layers") else MAX_SIZE
        if value > limit:
            raise InvalidConfig(f"{key!r} of model {self.name!r} must be <= {limit}: {brief(value)}")

    def size_of(self, *keys: str) -> int:
        """An integer >= 1 that goes by several names; all that are given must agree."""
        given = [key for key in keys if self.config.get(key) is not None]
        value = self.size(given[0] if given else keys[0])
        for key in given[1:]:
            if self.size(key) != value:
                raise InvalidConfig(f"{given[0]!r} and {key!r} of {self.name!r} differ: {value} and {self.size(key)}")
        self.ignore(keys)
        return value

    def optional_size(self, key: str) -> int | None:
        """An integer >= 1, or None where the key is absent or null."""
        return None if self.get(key) is None else self.size(key)

    def nullable_size(self, key: str) -> int | None:
        """An integer >= 1 or null; the key is needed, because the library's default for an absent one is a number."""
        if key not in self.config:
            raise InvalidConfig(f"config of {self.name!r} lacks {key!r}.")
        return self.optional_size(key)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise InvalidConfig(f"{key!r} of {self.name!r} must be true or false: {value!r}")
        return value

    def indices(self, key: str) -> list[int]:
        """A list of integers; empty where the key is absent or null."""
        value = self.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(i, int) for i in value):
            raise InvalidConfig(f"{key!r} of {self.name!r} must be a list of integers: {value!r}")
        return value

    def layer_types(self, num_layers: int, *allowed: str) -> list[str] | None:
        """``layer_types``, one word per layer; None where absent."""
        value = self.get("layer_types")
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != num_layers or any(word not in allowed for word in value):
            raise InvalidConfig(
                f"'layer_types' of {self.name!r} must be {num_layers} of {', '.join(map(repr, allowed))}: {value!r}"
            )
        return value

    def nested(self, key: str) -> ConfigReader:
        """The config under `key`; its keys are ticked off like the others."""
        value = self.get(key)
        if value is None:
            raise InvalidConfig(f"config of {self.name!r} lacks {key!r}.")
        if not isinstance(value, Mapping):
            raise InvalidConfig(f"{key!r} of {self.name!r} must be an object: {value!r}")
        reader = ConfigReader(value, name=self.name, parent=self)
        self._nested.append(reader)
        return reader

    def optional_nested(self, key: str) -> ConfigReader | None:
        """As `nested`, None where the key is absent or null."""
        return None if self.get(key) is None else self.nested(key)

    def expect(self, key: str, *allowed: Any) -> None:
        """Refuse a value that this model type is not known to have; an absent key counts as the first."""
        value = self.get(key, allowed[0])
        if value not in allowed:
            raise InvalidConfig(f"{key!r} of {self.name!r} must be {' or '.join(map(repr, allowed))}: {value!r}")

    def ignore(self, keys: Iterable[str]) -> None:
        """Tick off keys that say nothing about shapes."""
        self._read.update(keys)

    def per_head(self, hidden_size: int, num_heads: int, key: str = "num_attention_heads") -> int:
        """hidden_size / heads."""
        if hidden_size % num_heads:
            raise InvalidConfig(
                f"'hidden_size' of {self.name!r} must be a multiple of {key}={num_heads}: {hidden_size}"
            )
        return hidden_size // num_heads

    def head_dim(self, hidden_size: int, num_heads: int) -> int:
        """``head_dim``, by default hidden_size / heads."""
        return self.optional_size("head_dim") or self.per_head(hidden_size, num_heads)

    @property
    def dtype(self) -> str:
        """Type of the weights, by default that of the outer config, else bfloat16."""
        own = self.config.get("dtype") or self.config.get("torch_dtype")
        if not own and self._parent:
            return self._parent.dtype
        return str(own or "bfloat16")

    def refuse_unread(self) -> None:
        """Raise `InvalidConfig` for keys that nobody read."""
        unknown = sorted(set(self.config) - self._read - _BOOKKEEPING)
        if unknown:
            raise InvalidConfig(
                f"config of {self.name!r} has keys that {self.model_type!r} models do not have here: "
                f"{', '.join(map(repr, unknown))}; remove them or use a version that knows them."
            )
        for reader in self._nested:
            reader.refuse_unread()
