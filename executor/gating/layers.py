"""Gates in models of transformers: the model keeps its weights, its routers and its outputs.

Only the module that holds the experts gets another `forward`. What a model drops before that, it still drops:

- Switch Transformers' router masks tokens beyond ``expert_capacity`` of every sequence.
- NLLB-MoE's router caps experts at ``moe_eval_capacity_token_fraction`` of a batch's tokens (1 by default, which drops
  nothing), and with ``second_expert_policy="random"`` or ``"sampling"`` it draws second experts, in eval mode, too.
  Its answers are scaled by ``1 - moe_token_dropout``, as transformers does it.
- Mixtral and the other models whose experts are stacked tensors cap nothing.

Such choices come without an expert and are counted as ``elsewhere``. ``uncap=True`` lifts both caps for as long as the
gate is in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from executor.gating.base import Gating, GatingStats
from executor.gating.ffn import Activation, ExpertLoop
from executor.gating.make import make_gating
from executor.kernels import ExpertWeights
from hrm.errors import InvalidValue

__all__ = ["GatedModel", "use_gating"]

NllbIds = Literal["router", "mask"]


def use_gating(
    model: nn.Module,
    gating: str | Gating,
    *,
    capacity_factor: float | None = None,
    uncap: bool = False,
    nllb_ids: NllbIds = "router",
) -> GatedModel:
    """Bring tokens to a model's experts by another gate, for inference.

    Parameters
    ----------
    model : Module
        Of transformers, in eval mode: NLLB-MoE, Switch Transformers, Mixtral, or another model whose experts are
        stacked tensors.
    gating : str or Gating
        As for `make_gating`.
    capacity_factor : float, optional
    uncap : bool
        Lift the capacities of the model's own routers.
    nllb_ids : {"router", "mask"}
        Which experts NLLB-MoE's tokens get. "router": those that its router chose, as in fairseq and transformers 4.
        "mask": what `NllbMoeExperts.forward` of transformers 5 (seen in 5.23) makes of it. There the router's mask of
        zeros and ones is taken for expert ids, so that every token's first choice runs on expert 1, its second
        choice on expert 0, and the other experts never run.

    Returns
    -------
    GatedModel
        Undo with its `restore`, or use it as a context.

    Raises
    ------
    InvalidValue
        For a model in training mode, or one without experts that a gate can run.

    Examples
    --------
    >>> with use_gating(model, "dynamic") as gated:  # doctest: +SKIP
    ...     logits = model(**inputs).logits
    >>> gated.stats.waste_factor  # doctest: +SKIP
    1.0
    """
    gate = gating if isinstance(gating, Gating) else make_gating(gating, capacity_factor=capacity_factor)
    if isinstance(gating, Gating) and capacity_factor is not None:
        raise InvalidValue(f"'capacity_factor' belongs to a gate by name, not to {gating!r}: {capacity_factor}")
    if nllb_ids not in ("router", "mask"):
        raise InvalidValue(f"'nllb_ids' must be 'router' or 'mask': {nllb_ids!r}")
    return GatedModel(model, gate, uncap, nllb_ids)


class GatedModel:
    """A model with a gate in place; see `use_gating`."""

    def __init__(self, model: nn.Module, gating: Gating, uncap: bool, nllb_ids: NllbIds) -> None:
        self.model, self.gating = model, gating
        self.calls = 0
        """Times that the gate has run."""
        self.by_layer: dict[str, GatingStats] = {}
        """What it did so far, by name of the module that holds the experts."""
        self._undo: list[Callable[[], None]] = []
        blocks = [(name, module) for name, module in model.named_modules() if _kind(module)]
        if not blocks:
            raise InvalidValue(
                f"{type(model).__name__} has no experts that a gate can run; models that do: NLLB-MoE, Switch "
                "Transformers, Mixtral and others with stacked experts."
            )
        for name, module in blocks:
            if "forward" in vars(module):
                raise InvalidValue(f"{name!r} has a gate already; restore it first.")
            if module.training:
                raise InvalidValue(
                    f"{name!r} is in training mode and gates are for inference; call model.eval() first."
                )
        for name, module in blocks:
            self._replace(name, module, nllb_ids)
        for module in model.modules() if uncap else ():
            self._lift(module)

    @property
    def layers(self) -> int:
        """Blocks that the gate serves."""
        return sum(1 for _, module in self.model.named_modules() if "forward" in vars(module) and _kind(module))

    @property
    def stats(self) -> GatingStats:
        """All layers added up."""
        nothing = GatingStats(gating=self.gating.name, tokens=0, choices=0, rows=0, buffer_bytes=0)
        return sum(self.by_layer.values(), start=nothing)

    def restore(self) -> None:
        """Give the model its own dispatch back."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> GatedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def _replace(self, name: str, module: Any, nllb_ids: NllbIds) -> None:
        kind = _kind(module)
        assert kind is not None
        num_experts = int(module.num_experts)

        @torch.no_grad()
        def forward(hidden_states: torch.Tensor, *chosen: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
            if module.training:
                raise InvalidValue(
                    f"{name!r} is in training mode and gates are for inference; call model.eval() first."
                )
            index, weight = _CHOICES[kind](module, *chosen, *named.values(), nllb_ids)
            # Looked up at every call: weights may have been moved or loaded in between.
            experts, activation = _WEIGHTS[kind](module)
            run = ExpertLoop(experts, activation)
            out, stats = self.gating(hidden_states, index, weight, run, num_experts)
            self.calls += 1
            self.by_layer[name] = self.by_layer[name] + stats if name in self.by_layer else stats
            return out

        module.forward = forward
        self._undo.append(lambda: module.__dict__.pop("forward"))

    def _lift(self, module: Any) -> None:
        names: dict[str, tuple[str, float]] = {"SwitchTransformersTop1Router": ("expert_capacity", 2**62)}
        names["NllbMoeTop2Router"] = ("moe_eval_capacity_token_fraction", 1.0)
        if type(module).__name__ in names:
            field, value = names[type(module).__name__]
            before = getattr(module, field)
            setattr(module, field, value)
            self._undo.append(lambda: setattr(module, field, before))


# -- the kinds of modules that hold experts --------------------------------------------------------------

_BY_CLASS = {"NllbMoeExperts": "nllb", "SwitchTransformersExperts": "switch"}


def _kind(module: Any) -> str | None:
    name = type(module).__name__
    if name in _BY_CLASS:
        return _BY_CLASS[name]
    # What `use_experts_implementation` of transformers 5 leaves on the classes it decorates.
    stacked = hasattr(module, "is_transposed") and hasattr(module, "_apply_gate") and hasattr(module, "down_proj")
    return "stacked" if stacked and not module.has_post_expert_norm else None


def _nllb_choices(
    module: Any, top_1_mask: torch.Tensor, router_probs: torch.Tensor, nllb_ids: NllbIds
) -> tuple[torch.Tensor, torch.Tensor]:
    """From the router's ``[S, E]``: where it is not zero, the token goes to that expert."""
    weight, index = router_probs.topk(min(2, module.num_experts), dim=-1)
    ids = index if nllb_ids == "router" else top_1_mask.gather(1, index).long()
    return ids.masked_fill(weight == 0, module.num_experts), weight * (1 - module.moe_token_dropout)


def _switch_choices(
    module: Any, selected: torch.Tensor, weight: torch.Tensor, _: NllbIds
) -> tuple[torch.Tensor, torch.Tensor]:
    """From ones among zeros, ``[S, 1, E]``; a token beyond the router's capacity has zeros only."""
    index = selected.argmax(dim=-1).masked_fill(selected.sum(dim=-1) == 0, module.num_experts)
    return index, weight


def _stacked_choices(
    module: Any, index: torch.Tensor, weight: torch.Tensor, _: NllbIds
) -> tuple[torch.Tensor, torch.Tensor]:
    return index, weight


def _nllb_weights(module: Any) -> tuple[list[ExpertWeights], Activation]:
    experts = [module[f"expert_{e}"] for e in range(module.num_experts)]
    weights = [ExpertWeights([e.fc1.weight], [e.fc2.weight], e.fc1.bias, e.fc2.bias) for e in experts]
    return weights, experts[0].act


def _switch_weights(module: Any) -> tuple[list[ExpertWeights], Activation]:
    experts = [module[f"expert_{e}"] for e in range(module.num_experts)]
    return [ExpertWeights([e.wi.weight], [e.wo.weight]) for e in experts], experts[0].act


def _stacked_weights(module: Any) -> tuple[list[ExpertWeights], Activation]:
    """Stacks of matrices ``[E, rows, columns]``, or ``[E, columns, rows]`` if they are transposed."""
    up = "gate_up_proj" if module.has_gate else "up_proj"
    first, last = getattr(module, up), module.down_proj
    if module.is_transposed:
        first, last = first.transpose(1, 2), last.transpose(1, 2)
    biases = [None] * len(first), [None] * len(first)
    if module.has_bias:
        biases = getattr(module, f"{up}_bias"), module.down_proj_bias
    experts = [ExpertWeights([first[e]], [last[e]], biases[0][e], biases[1][e]) for e in range(module.num_experts)]
    return experts, module._apply_gate if module.has_gate else module.act_fn


_CHOICES: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    "nllb": _nllb_choices,
    "switch": _switch_choices,
    "stacked": _stacked_choices,
}
_WEIGHTS = {"nllb": _nllb_weights, "switch": _switch_weights, "stacked": _stacked_weights}
