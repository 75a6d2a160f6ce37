"""Readers of Hugging Face configs: one function per ``model_type``, strict about keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hrm.architectures.decoder import read_dbrx, read_olmoe, read_phimoe, read_qwen2_moe, read_qwen3_moe
from hrm.architectures.deepseek import read_deepseek
from hrm.architectures.encoder_decoder import read_nllb_moe, read_switch
from hrm.architectures.gpt_oss import read_gpt_oss
from hrm.architectures.llama4 import read_llama4, read_llama4_text
from hrm.architectures.mixtral import read_mixtral
from hrm.architectures.plain import read_fairseq_moe_lm, read_opt
from hrm.architectures.reader import ConfigReader
from hrm.errors import InvalidConfig
from hrm.model import MoEModel

__all__ = ["SUPPORTED_ARCHITECTURES", "read_model"]

_READERS: dict[str, Callable[[ConfigReader], MoEModel]] = {
    "dbrx": read_dbrx,
    "deepseek_v2": read_deepseek,
    "deepseek_v3": read_deepseek,
    "fairseq_moe_lm": read_fairseq_moe_lm,
    "gpt_oss": read_gpt_oss,
    "llama4": read_llama4,
    "llama4_text": read_llama4_text,
    "mixtral": read_mixtral,
    "nllb-moe": read_nllb_moe,
    "olmoe": read_olmoe,
    "opt": read_opt,
    "phimoe": read_phimoe,
    "qwen2_moe": read_qwen2_moe,
    "qwen3_moe": read_qwen3_moe,
    "switch_transformers": read_switch,
}
SUPPORTED_ARCHITECTURES = tuple(sorted(_READERS))


def read_model(config: Mapping[str, Any], *, name: str) -> MoEModel:
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
        If the architecture is not supported, or a key is missing, unknown or has an impossible value.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _READERS:
        raise InvalidConfig(
            f"architecture {model_type!r} of {name!r} is not supported; "
            f"supported: {', '.join(SUPPORTED_ARCHITECTURES)}."
        )
    reader = ConfigReader(config, name=name)
    model = _READERS[model_type](reader)
    reader.refuse_unread()
    return model
