"""What most families share: names on disk, and what follows attention in a layer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from copy import copy
from typing import Any, ClassVar

import torch
from torch import nn

from executor.families.base import DecoderLayer, ExpertTensor, ExpertViews, Family, Routed, load_module
from hrm.errors import InvalidValue
from hrm.layers import Attention, Layer

__all__ = ["CommonFamily", "CommonLayer"]


class CommonLayer(DecoderLayer):
    """A decoder layer whose module has ``self_attn``, ``mlp`` and two norms.

    Parameters
    ----------
    module : transformers decoder layer
    kind : Layer
        Shapes of this process' part.
    family : CommonFamily
        Knows what is called how.
    """

    def __init__(self, module: Any, kind: Layer, family: CommonFamily) -> None:
        self.module, self.attention = module, kind.attention
        self.scale = float(module.self_attn.scaling)
        self._rotate = family.rotate
        self._router = getattr(module.mlp, family.router_name) if kind.ffn.routed else None
        self._shared = getattr(module.mlp, str(family.shared_name)) if kind.ffn.shared_size else None

    def route(self, hidden: torch.Tensor) -> Routed:
        """See `DecoderLayer.route`; a dense FFN is one expert that gets all tokens."""
        x = self.module.post_attention_layernorm(hidden)
        if self._router is None:
            tokens = (x.shape[0], 1)
            return Routed(x, torch.zeros(tokens, dtype=torch.long, device=x.device), x.new_ones(tokens))
        _, weight, index = self._router(x)
        return Routed(x, index, weight)

    def shared(self, x: torch.Tensor) -> torch.Tensor | None:
        """See `DecoderLayer.shared`."""
        return None if self._shared is None else self._shared(x)


class CommonFamily(Family):
    """A family whose transformers module is laid out like Mixtral's."""

    class_prefix: ClassVar[str]
    """Of the classes in the transformers module."""
    block_on_disk: ClassVar[str] = "mlp"
    """Name of the block that holds router and experts, where they are not stacked."""
    expert_names: ClassVar[tuple[str, str, str]] = ("gate_proj", "up_proj", "down_proj")
    """Names on disk of an expert's gate, up and down matrix, where they are not stacked."""
    router_on_disk: ClassVar[str] = "gate"
    """Name of the router, where experts are not stacked."""
    router_name: ClassVar[str] = "gate"
    """Name of the router in the module, and where experts are stacked."""
    router_bias: ClassVar[bool] = False
    norm_bias: ClassVar[bool] = False
    shared_name: ClassVar[str | None] = None
    """Name of the shared experts in the block."""
    rows_split: ClassVar[tuple[str, ...]] = ()
    """Tensors of ``self_attn`` whose rows belong to heads."""
    layer_class: ClassVar[type[CommonLayer]]

    @abstractmethod
    def _module(self) -> Any:
        """The transformers module that holds the family's classes."""

    @abstractmethod
    def _attention_shapes(self, attention: Attention) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors of ``self_attn``, on disk."""

    def _local_config(self, config: Any) -> Any:
        config = copy(config)
        attention = self.local.main_layer.attention
        config.num_attention_heads, config.num_key_value_heads = attention.num_heads, attention.num_kv_heads
        return config

    # -- on disk -------------------------------------------------------------------------------------

    @property
    def block(self) -> str:
        """Name on disk of the block that holds router and experts."""
        return "mlp" if self.stacked else self.block_on_disk

    def _norm_shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        shape: tuple[int, ...] = (self.model.hidden_size,)
        return {f"{name}.weight": shape} | ({f"{name}.bias": shape} if self.norm_bias else {})

    def dense_shapes(self, layer: int | None) -> dict[str, tuple[int, ...]]:
        """See `Family.dense_shapes`."""
        model, h = self.model, self.model.hidden_size
        if layer is None:
            shapes: dict[str, tuple[int, ...]] = {self.embedding_name: (model.vocab_size, h)}
            shapes |= self._norm_shapes("model.norm")
            if not model.tie_embeddings:
                shapes[self.head_name] = (model.vocab_size, h)
            return shapes
        attention, ffn = (getattr(model.kinds[model.order[layer]], part) for part in ("attention", "ffn"))
        shapes = self._norm_shapes("input_layernorm") | self._norm_shapes("post_attention_layernorm")
        shapes |= {f"self_attn.{name}": shape for name, shape in self._attention_shapes(attention).items()}
        if ffn.routed:
            router = f"{self.block}.{self.router_name if self.stacked else self.router_on_disk}"
            shapes[f"{router}.weight"] = (ffn.num_experts, h)
            if self.router_bias:
                shapes[f"{router}.bias"] = (ffn.num_experts,)
        if ffn.shared_size and self.shared_name:
            shared = f"{self.block}.{self.shared_name}"
            shapes |= {f"{shared}.{name}.weight": (ffn.shared_size, h) for name in ("gate_proj", "up_proj")}
            shapes[f"{shared}.down_proj.weight"] = (h, ffn.shared_size)
        return {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}

    def stacked_marker(self) -> str:
        """See `Family.stacked_marker`."""
        first = next((i for i, kind in enumerate(self.model.order) if self.model.kinds[kind].ffn.routed), 0)
        return f"model.layers.{first}.mlp.experts.gate_up_proj"

    def expert_tensors(self, layer: int) -> list[ExpertTensor]:
        """See `Family.expert_tensors`."""
        ffn, mine = (model.kinds[model.order[layer]].ffn for model in (self.model, self.local))
        h, i, take = ffn.hidden_size, ffn.intermediate_size, self.shard.take

        def matrix(expert: int, which: int) -> Callable[[torch.Tensor, torch.Tensor], None]:
            def put(tensor: torch.Tensor, flat: torch.Tensor) -> None:
                ExpertViews.of(flat, mine)[which][expert].copy_(take(tensor, 1 if which == 2 else 0))

            return put

        def put_gate_up(tensor: torch.Tensor, flat: torch.Tensor) -> None:
            views = ExpertViews.of(flat, mine)
            for view, part in zip(views, tensor.chunk(2, dim=1), strict=False):
                view.copy_(take(part, 1))

        def put_down(tensor: torch.Tensor, flat: torch.Tensor) -> None:
            ExpertViews.of(flat, mine).down.copy_(take(tensor, 2))

        prefix = f"model.layers.{layer}."
        shapes = ((i, h), (i, h), (h, i))
        if not ffn.routed:
            names = ("gate_proj", "up_proj", "down_proj")
            return [
                ExpertTensor(f"{prefix}mlp.{name}.weight", shape, matrix(0, which))
                for which, (name, shape) in enumerate(zip(names, shapes, strict=True))
            ]
        experts = f"{prefix}{self.block}.experts."
        if self.stacked:
            return [
                ExpertTensor(f"{experts}gate_up_proj", (ffn.num_experts, 2 * i, h), put_gate_up),
                ExpertTensor(f"{experts}down_proj", (ffn.num_experts, h, i), put_down),
            ]
        return [
            ExpertTensor(f"{experts}{expert}.{name}.weight", shape, matrix(expert, which))
            for expert in range(ffn.num_experts)
            for which, (name, shape) in enumerate(zip(self.expert_names, shapes, strict=True))
        ]

    def take(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """See `Family.take`: rows of what makes heads and columns of what takes them, likewise of shared experts."""
        if ".self_attn." in name:
            part, _, kind = name.split(".self_attn.")[1].partition(".")
            if part in self.rows_split:
                return self.shard.take(tensor, 0)
            if part == "o_proj":
                return self.shard.take(tensor, 1) if kind == "weight" else self.first_of_sum(tensor)
        elif f".{self.shared_name}." in name:
            return self.shard.take(tensor, 1 if ".down_proj." in name else 0)
        return tensor

    # -- in memory -----------------------------------------------------------------------------------

    def rotate(self, q: torch.Tensor, k: torch.Tensor, *turn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn ``[1, heads, tokens, d]`` by tables ``[1, tokens, ...]``."""
        return self._module().apply_rotary_pos_emb(q, k, *turn)

    def build_layer(self, layer: int, tensors: Mapping[str, torch.Tensor]) -> DecoderLayer:
        """See `Family.build_layer`."""
        with torch.device("meta"):
            module = getattr(self._module(), f"{self.class_prefix}DecoderLayer")(self.config, layer)
        prefix = f"model.layers.{layer}."
        names = {f"{self.block}.": "mlp.", f"mlp.{self.router_on_disk}.": f"mlp.{self.router_name}."}
        state = {}
        for name, tensor in tensors.items():
            name = name.removeprefix(prefix)
            for old, new in names.items():
                name = new + name.removeprefix(old) if name.startswith(old) else name
            state[name] = tensor
        return self.layer_class(load_module(module, state), self.local.kinds[self.local.order[layer]], self)

    def final_norm(self, tensors: Mapping[str, torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        """See `Family.final_norm`."""
        h, eps = self.model.hidden_size, self.config.rms_norm_eps
        with torch.device("meta"):
            kind = nn.LayerNorm if self.norm_bias else getattr(self._module(), f"{self.class_prefix}RMSNorm")
            norm: nn.Module = kind(h, eps=eps)
        return load_module(
            norm, {name.removeprefix("norm."): tensors[f"model.{name}"] for name in self._norm_shapes("norm")}
        )

    def rotary_tables(self, positions: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """See `Family.rotary_tables`: cosines and sines, ``[positions, d]``.

        Raises
        ------
        InvalidValue
            If the angles of a token would depend on how long its sequence becomes.
        """
        rope = self.config.rope_parameters
        trained = rope.get("original_max_position_embeddings")
        if rope.get("rope_type") == "longrope" and trained and positions > trained:
            raise InvalidValue(
                f"{self.model.name} turns sequences of more than {trained} tokens by other angles (longrope), which is "
                f"not run; keep prompt and generated tokens within {trained}: {positions}"
            )
        rotary = getattr(self._module(), f"{self.class_prefix}RotaryEmbedding")(self.config).to(device)
        tables = rotary(torch.empty(0, dtype=dtype, device=device), torch.arange(positions, device=device)[None])
        return self._tables(tables)

    def _tables(self, rotary: Any) -> tuple[torch.Tensor, ...]:
        """The rotary module's answer for one sequence, without its batch dimension."""
        return tuple(table[0] for table in rotary)

    def activation(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See `Family.activation`: SiLU of the gate, times up."""
        gate, up = gate_up.chunk(2, dim=-1)
        return nn.functional.silu(gate).mul_(up)
