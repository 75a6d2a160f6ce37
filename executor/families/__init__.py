"""Model families that can be run, by ``model_type``."""

from __future__ import annotations

from typing import Any

from executor.families.base import WHOLE, DecoderLayer, ExpertTensor, ExpertViews, Family, Routed, Shard
from executor.families.dbrx import DbrxFamily
from executor.families.deepseek import DeepseekV2Family, DeepseekV3Family
from executor.families.gpt_oss import GptOssFamily
from executor.families.grouped_query import MixtralFamily, OlmoeFamily, PhimoeFamily, Qwen2MoeFamily, Qwen3MoeFamily
from hrm.errors import InvalidConfig
from hrm.model import MoEModel

__all__ = ["FAMILIES", "WHOLE", "DecoderLayer", "ExpertTensor", "ExpertViews", "Family", "Routed", "Shard", "family_of"]

_ALL: tuple[type[Family], ...] = (
    DbrxFamily,
    DeepseekV2Family,
    DeepseekV3Family,
    GptOssFamily,
    MixtralFamily,
    OlmoeFamily,
    PhimoeFamily,
    Qwen2MoeFamily,
    Qwen3MoeFamily,
)
FAMILIES: dict[str, type[Family]] = {name: family for family in _ALL for name in family.model_types}
"""Family of each ``model_type`` that runs."""


def family_of(model: MoEModel, config: Any, shard: Shard = WHOLE) -> Family:
    """The family of a model; refuses by name what can be planned but not run."""
    if model.architecture not in FAMILIES:
        raise InvalidConfig(
            f"architecture {model.architecture!r} of {model.name!r} can be planned but not run; "
            f"this version runs: {', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[model.architecture](model, config, shard)
