"""What the runtime asks of a model family: its tensors on disk, and a layer without its routed experts.

A family knows where a checkpoint keeps each tensor and builds layers from transformers' own modules. The
runtime deals in packed tokens and rows of the KV cache only, so that it is the same for all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from hrm.errors import InvalidValue
from hrm.layers import Attention, FeedForward
from hrm.model import MoEModel

__all__ = ["WHOLE", "DecoderLayer", "ExpertTensor", "ExpertViews", "Family", "Routed", "Shard", "load_module"]


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of heads and expert widths a process holds under tensor parallelism."""

    rank: int = 0
    world: int = 1

    def take(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """This process' part of `tensor` along `dim`."""
        if self.world == 1:
            return tensor
        size = tensor.shape[dim] // self.world
        return tensor.narrow(dim, self.rank * size, size)


WHOLE = Shard()


class Routed(NamedTuple):
    """What the router decides for packed tokens."""

    x: torch.Tensor
    """[tokens, H], normed: the experts' input."""
    index: torch.Tensor  # type: ignore[assignment]  # hides the method of tuples
    """[tokens, k]"""
    weight: torch.Tensor
    """[tokens, k]"""


@dataclass(frozen=True)
class ExpertTensor:
    """A tensor on disk that holds weights of routed experts."""

    name: str
    shape: tuple[int, ...]
    """On disk."""
    put: Callable[[torch.Tensor, torch.Tensor], None]
    """Called with (the tensor, ``[E, expert_parameters]``) to write its part of the layer's experts; see `ExpertViews`.
    """


class ExpertViews(NamedTuple):
    """The plan of a layer's experts in memory: views of ``[E, expert_parameters]``, in this order.

    Gate and up rows are next to each other, ``[2I, H]``; the biases are there in families that have them.
    """

    gate: torch.Tensor
    """[E, I, H]"""
    up: torch.Tensor
    """[E, I, H]"""
    down: torch.Tensor
    """[E, H, I]"""
    gate_bias: torch.Tensor
    """[E, I], or [E, 0]"""
    up_bias: torch.Tensor
    """[E, I], or [E, 0]"""
    down_bias: torch.Tensor
    """[E, H], or [E, 0]"""

    @classmethod
    def of(cls, flat: torch.Tensor, ffn: FeedForward) -> ExpertViews:
        """Views of ``[E, expert_parameters]`` for experts of these sizes."""
        h, i = ffn.hidden_size, ffn.intermediate_size
        biases = (i, i, h) if ffn.expert_other_parameters else (0, 0, 0)
        gate, up, down, *rest = flat.split([i * h, i * h, h * i, *biases], dim=1)
        return cls(gate.unflatten(1, (i, h)), up.unflatten(1, (i, h)), down.unflatten(1, (h, i)), *rest)


class DecoderLayer(ABC):
    """A decoder layer without its routed experts, weights on the device.

    Hidden states are packed: ``[tokens, H]``, whatever sequence each token belongs to.
    """

    attention: Attention
    """Shapes of this process' part."""
    scale: float
    """Of the attention scores."""
    sinks: torch.Tensor | None = None
    """[n_q], one more logit per head in the softmax."""

    @abstractmethod
    def decode_inputs(
        self, hidden: torch.Tensor, turn: Sequence[torch.Tensor], queries: torch.Tensor, cached: torch.Tensor
    ) -> None:
        """Norm, projections and rotary embedding of one token per sequence.

        Parameters
        ----------
        hidden : Tensor, [tokens, H]
        turn : sequence of Tensor, [tokens, ...]
            Rows of `Family.rotary_tables` at the tokens' positions.
        queries : Tensor, [tokens, query_size]
            Filled with queries as decode attention over the cache takes them (with MLA: in the latent space).
        cached : Tensor, [tokens, kv_elements]
            Filled with rows of the KV cache: keys of all heads, then values; with MLA the latent and the rotary key.
        """

    @abstractmethod
    def prefill(
        self, hidden: torch.Tensor, turn: Sequence[torch.Tensor], lengths: Sequence[int], cached: torch.Tensor
    ) -> torch.Tensor:
        """Norm, projections, causal attention and O projection of packed prompts.

        Parameters
        ----------
        lengths : sequence of int
            Tokens of each prompt, in the order in which they are packed.
        cached : Tensor, [tokens, kv_elements]
            Filled with the rows of the KV cache.

        Returns
        -------
        Tensor, [tokens, H]
            What attention adds to the hidden states; partial sums under tensor parallelism.
        """

    @abstractmethod
    def decode_output(self, attended: torch.Tensor) -> torch.Tensor:
        """O projection of ``[tokens, attended_size]``; partial sums under tensor parallelism."""

    @abstractmethod
    def route(self, hidden: torch.Tensor) -> Routed:
        """Norm before the experts, and the router's choice."""

    def shared(self, x: torch.Tensor) -> torch.Tensor | None:
        """What experts that see every token add, or None; partial sums under tensor parallelism."""
        return None


class Family(ABC):
    """One ``model_type``: names and shapes on disk, layers in memory.

    Parameters
    ----------
    model : MoEModel
        The whole model.
    config : transformers config
    shard : Shard
        Which part of it this process holds.
    """

    model_types: ClassVar[tuple[str, ...]]
    float32_names: ClassVar[tuple[str, ...]] = ()
    """Ends of the names of dense tensors that may lie on disk in float32, whatever the type of the weights.

    `hrm` does not count them among the parameters.
    """

    def __init__(self, model: MoEModel, config: Any, shard: Shard = WHOLE) -> None:
        self.model, self.shard = model, shard
        self.stacked = False
        """Whether the checkpoint stores experts stacked (else one tensor per expert and matrix)."""
        self.local = self._local_model()
        """Shapes of this process' part."""
        self.config = self._local_config(config)
        if shard.world > 1:
            self.local = self._counted(self.local)

    # -- shapes --------------------------------------------------------------------------------------

    def _local_model(self) -> MoEModel:
        """The model with heads and expert widths of one process."""
        world = self.shard.world
        if world == 1:
            return self.model
        kinds = []
        for kind in self.model.kinds:
            attention, ffn = kind.attention, kind.ffn
            sizes = {
                "query heads": attention.num_heads,
                "key-value heads": world if attention.kv_rank is not None else attention.num_kv_heads,
                "width of an expert": ffn.intermediate_size,
                "width of the shared experts": ffn.shared_size,
            }
            for what, size in sizes.items():
                if size % world:
                    raise InvalidValue(
                        f"{self.model.name} does not split over {world} processes: {what} {size}; choose another --tp."
                    )
            kv_heads = attention.num_heads if attention.kv_rank is not None else attention.num_kv_heads
            kinds.append(
                replace(
                    kind,
                    attention=replace(
                        attention, num_heads=attention.num_heads // world, num_kv_heads=kv_heads // world
                    ),
                    ffn=self._local_ffn(ffn, world),
                )
            )
        return replace(self.model, kinds=tuple(kinds))

    @staticmethod
    def _local_ffn(ffn: FeedForward, world: int) -> FeedForward:
        other = ffn.expert_other_parameters
        if other:  # biases of gate and up are split, that of down is not
            other = 2 * ffn.intermediate_size // world + ffn.hidden_size
        return replace(
            ffn,
            intermediate_size=ffn.intermediate_size // world,
            shared_size=ffn.shared_size // world,
            expert_other_parameters=other,
        )

    def _counted(self, local: MoEModel) -> MoEModel:
        """The local model with the dense parameters that its tensors really have: not all of them are split."""
        kinds = []
        for number, kind in enumerate(local.kinds):
            have = sum(
                self.take(name, torch.empty(shape, device="meta")).numel()
                for name, shape in self.dense_shapes(local.order.index(number)).items()
                if not name.endswith(self.float32_names)
            )
            other = kind.attention.other_parameters + have - kind.dense_parameters
            kinds.append(replace(kind, attention=replace(kind.attention, other_parameters=other)))
        return replace(local, kinds=tuple(kinds))

    def _local_config(self, config: Any) -> Any:
        """transformers' config with the sizes of one process, for its modules."""
        return config

    # -- on disk -------------------------------------------------------------------------------------

    @abstractmethod
    def dense_shapes(self, layer: int | None) -> dict[str, tuple[int, ...]]:
        """Name and shape on disk of every tensor outside the routed experts, of a layer, or outside all layers."""

    @abstractmethod
    def expert_tensors(self, layer: int) -> list[ExpertTensor]:
        """Where a layer's routed experts (or its one dense FFN) lie on disk, in either layout (`stacked`)."""

    @abstractmethod
    def stacked_marker(self) -> str:
        """A tensor name that only checkpoints with stacked experts have."""

    def take(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """This process' part of a dense tensor, by its name on disk."""
        return tensor

    def first_of_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """What is added after a split product: the tensor on the first process, zeros on the others."""
        return tensor if self.shard.rank == 0 else torch.zeros_like(tensor)

    # -- in memory -----------------------------------------------------------------------------------

    @abstractmethod
    def build_layer(self, layer: int, tensors: Mapping[str, torch.Tensor]) -> DecoderLayer:
        """A layer that computes with `tensors` (by name on disk), which it neither copies nor changes."""

    @abstractmethod
    def final_norm(self, tensors: Mapping[str, torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        """The norm before the LM head."""

    @abstractmethod
    def rotary_tables(self, positions: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Tables ``[positions, ...]`` whose rows at a token's position turn its queries and keys."""

    @abstractmethod
    def activation(self, gate_up: torch.Tensor) -> torch.Tensor:
        """What stands between an expert's matrices: ``[rows, 2I]`` to ``[rows, I]``; may overwrite its input."""

    def embed(self, ids: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Token embeddings, ``[tokens, H]``."""
        return F.embedding(ids, tensors[self.embedding_name])

    def logits(self, normed: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """``[tokens, vocab]``"""
        head = tensors[self.embedding_name if self.model.tie_embeddings else self.head_name]
        return F.linear(normed, head, tensors.get(self.head_name.replace(".weight", ".bias")))

    embedding_name: ClassVar[str] = "model.embed_tokens.weight"
    head_name: ClassVar[str] = "lm_head.weight"


def load_module(module: nn.Module, state: Mapping[str, torch.Tensor]) -> Any:
    """A module built on the meta device with `state` as its parameters, for inference; buffers stay as they are."""
    module.load_state_dict(dict(state), strict=False, assign=True)
    return module.eval().requires_grad_(False)
