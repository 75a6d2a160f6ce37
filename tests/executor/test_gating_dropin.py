"""Gates in models of transformers give transformers' logits, and leave no trace when they are taken out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from executor.gating import DynamicGating, StaticGating, make_gating
from executor.gating.layers import use_gating
from hrm.errors import InvalidValue
from tests.executor.family_configs import CONFIGS

_GATES: dict[str, dict[str, Any]] = {
    "dynamic": {"gating": "dynamic"},
    "tutel": {"gating": "tutel"},
    "static": {"gating": "static", "capacity_factor": 1.0},
}
_NLLB = {
    "vocab_size": 60,
    "d_model": 16,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 40,
    "encoder_sparse_step": 2,
    "decoder_sparse_step": 2,
    "num_experts": 6,
    "max_position_embeddings": 64,
}
_SWITCH = {
    "vocab_size": 60,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_heads": 2,
    "num_layers": 4,
    "num_decoder_layers": 4,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 2,
    "num_experts": 5,
    "decoder_start_token_id": 0,
}


def _large(model: Any, seed: int = 3) -> Any:
    """The model in eval mode with weights large enough that experts matter."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.3)
    return model.eval()


def _nllb(**changes: Any) -> Any:
    from transformers import NllbMoeConfig, NllbMoeForConditionalGeneration

    return _large(NllbMoeForConditionalGeneration(NllbMoeConfig(**(_NLLB | changes))))


def _switch(**changes: Any) -> Any:
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    return _large(SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**(_SWITCH | changes))))


def _causal(name: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = dict(CONFIGS[name])
    return _large(AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config)))


def _ids(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randint(4, 60, (rows, columns), generator=torch.Generator().manual_seed(seed))


def _logits(model: Any, *, padded: bool = False) -> torch.Tensor:
    inputs = {"input_ids": _ids(3, 11, 0)}
    if padded:
        inputs["attention_mask"] = torch.ones(3, 11, dtype=torch.int64)
        inputs["attention_mask"][1, 6:] = 0
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = _ids(3, 7, 1)
    with torch.no_grad():
        logits: torch.Tensor = model(**inputs).logits
    return logits


def _as_published(model: Any) -> None:
    """NLLB-MoE's experts as fairseq and transformers 4 run them: those that the router chose."""
    from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeExperts

    for module in model.modules():
        if isinstance(module, NllbMoeExperts):

            def forward(x: torch.Tensor, _: torch.Tensor, probs: torch.Tensor, module: Any = module) -> torch.Tensor:
                out = torch.zeros_like(x)
                for e in range(module.num_experts):
                    mine = probs[:, e] > 0
                    out[mine] += module[f"expert_{e}"](x[mine]) * probs[mine, e, None] * (1 - module.moe_token_dropout)
                return out

            module.forward = forward


# -- logits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", _GATES)
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss"])
def test_decoder_only_models_keep_their_logits(name: str, gate: str) -> None:
    """Experts in stacked tensors, transposed, interleaved and with biases, too, under every uncapped gate."""
    model = _causal(name)
    untouched = _logits(model)
    with use_gating(model, **_GATES[gate]) as gated:
        torch.testing.assert_close(_logits(model), untouched, rtol=1e-4, atol=1e-4)
        assert gated.layers == gated.calls == len(gated.by_layer) > 0
        assert gated.stats.dropped == gated.stats.elsewhere == 0
        assert gated.stats.padded > 0 or gate == "dynamic"


@pytest.mark.parametrize("gate", _GATES)
def test_switch_keeps_its_logits(gate: str) -> None:
    """Switch Transformers, encoder and decoder blocks."""
    model = _switch()
    untouched = _logits(model)
    with use_gating(model, **_GATES[gate]) as gated:
        torch.testing.assert_close(_logits(model), untouched, rtol=1e-4, atol=1e-4)
        assert gated.layers == 4
        assert gated.stats.choices == gated.stats.tokens == 2 * (33 + 21)


@pytest.mark.parametrize("gate", _GATES)
def test_switch_drops_what_its_router_drops(gate: str) -> None:
    """Tokens beyond the router's capacity of a sequence stay dropped and are counted, unless the caps are lifted."""
    model = _switch(expert_capacity=2)
    untouched = _logits(model)
    with use_gating(model, **_GATES[gate]) as gated:
        torch.testing.assert_close(_logits(model), untouched, rtol=1e-4, atol=1e-4)
        assert gated.stats.elsewhere > 10 and gated.stats.choices + gated.stats.elsewhere == 2 * (33 + 21)
    with use_gating(model, **_GATES[gate], uncap=True) as gated:
        torch.testing.assert_close(_logits(model), _logits(_switch(expert_capacity=64)), rtol=1e-4, atol=1e-4)
        assert gated.stats.elsewhere == 0
    torch.testing.assert_close(_logits(model), untouched, rtol=0, atol=0)


@pytest.mark.parametrize("gate", _GATES)
def test_nllb_runs_the_experts_that_its_router_chose(gate: str) -> None:
    """NLLB-MoE, encoder and decoder blocks: both experts of every token, with the routers' weights."""
    model, reference = _nllb(), _nllb()
    _as_published(reference)
    with use_gating(model, **_GATES[gate]) as gated:
        torch.testing.assert_close(_logits(model), _logits(reference), rtol=1e-4, atol=1e-4)
        assert gated.layers == 4
        assert gated.stats.choices == 2 * gated.stats.tokens == 2 * 2 * (33 + 21)
        assert gated.stats.elsewhere == 0


@pytest.mark.parametrize("gate", _GATES)
def test_nllb_of_the_installed_transformers(gate: str) -> None:
    """transformers 5 takes the router's mask for expert ids; a gate can do the same, to its untouched logits."""
    model = _nllb()
    untouched = _logits(model)
    with use_gating(model, **_GATES[gate], nllb_ids="mask"):
        torch.testing.assert_close(_logits(model), untouched, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gate", _GATES)
def test_nllb_is_untouched_where_both_readings_agree(gate: str) -> None:
    """Routers that choose expert 1 first and expert 0 second mean the same to both: untouched logits."""
    model = _nllb(router_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("router.classifier.bias"):
            parameter.data.copy_(torch.tensor([50.0, 53.0, 0, 0, 0, 0]))
        elif name.endswith("router.classifier.weight"):
            parameter.data.mul_(0.1)
    untouched = _logits(model)
    with use_gating(model, **_GATES[gate]) as gated:
        torch.testing.assert_close(_logits(model), untouched, rtol=1e-4, atol=1e-4)
        assert gated.stats.elsewhere == 0


def test_nllb_drops_what_its_router_drops() -> None:
    """The router's capacity in eval mode stays, and is lifted on request."""
    changes = {"moe_eval_capacity_token_fraction": 0.2, "batch_prioritized_routing": True}
    model, reference, uncapped = _nllb(**changes), _nllb(**changes), _nllb()
    for other in (reference, uncapped):
        _as_published(other)
    with use_gating(model, "dynamic") as gated:
        torch.testing.assert_close(_logits(model), _logits(reference), rtol=1e-4, atol=1e-4)
        assert gated.stats.elsewhere > 10
    with use_gating(model, "dynamic", uncap=True) as gated:
        torch.testing.assert_close(_logits(model), _logits(uncapped), rtol=1e-4, atol=1e-4)
        assert gated.stats.elsewhere == 0


def test_nllb_draws_second_experts_as_before() -> None:
    """Where the router draws second experts, the draws are the same and those not drawn are not run."""
    model, reference = _nllb(second_expert_policy="random"), _nllb(second_expert_policy="random")
    _as_published(reference)
    torch.manual_seed(5)
    expected = _logits(reference)
    torch.manual_seed(5)
    with use_gating(model, "dynamic") as gated:
        torch.testing.assert_close(_logits(model), expected, rtol=1e-4, atol=1e-4)
        assert gated.stats.elsewhere > 0


def test_generation_goes_through_the_gate() -> None:
    """Greedy generation gives the untouched model's tokens, and the gate sees each step."""
    model = _causal("mixtral")
    ids = _ids(2, 9, 4)

    def tokens() -> list[list[int]]:
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0
        )
        answer: list[list[int]] = out.tolist()
        return answer

    untouched = tokens()
    with use_gating(model, "dynamic") as gated:
        assert tokens() == untouched
        assert gated.calls == gated.layers * (len(untouched[0]) - 9)
        assert gated.stats.waste_factor == 1


def test_capped_gates_change_the_logits_and_say_so() -> None:
    """A static gate with little room drops choices: logits differ, and the count says how many were dropped."""
    model = _causal("mixtral")
    untouched = _logits(model)
    with use_gating(model, "static", capacity_factor=0.1) as gated:
        assert not torch.allclose(_logits(model), untouched, atol=1e-3)
        assert gated.stats.dropped > 0
        assert all(".experts" in name for name in gated.by_layer)


@pytest.mark.parametrize("make", [_nllb, _switch, lambda: _causal("mixtral")])
def test_padded_batches(make: Any) -> None:
    """What routers make of padding is theirs; the gate follows."""
    model, reference = make(), make()
    _as_published(reference)
    with use_gating(model, "dynamic"):
        ours, theirs = _logits(model, padded=True), _logits(reference, padded=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# -- in and out ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [_nllb, _switch, lambda: _causal("mixtral")])
def test_restored_models_are_untouched(make: Any) -> None:
    """After `restore`, and after an error inside the context, modules and logits are as they were."""
    model = make()
    untouched = _logits(model)
    before = {name: set(vars(m)) for name, m in model.named_modules()}
    gated = use_gating(model, StaticGating(0.1))
    assert gated.gating.capacity_factor == 0.1  # type: ignore[attr-defined]
    gated.restore()
    with pytest.raises(ZeroDivisionError), use_gating(model, DynamicGating(), uncap=True):
        raise ZeroDivisionError
    assert {name: set(vars(m)) for name, m in model.named_modules()} == before
    torch.testing.assert_close(_logits(model), untouched, rtol=0, atol=0)


def test_what_no_gate_can_serve_is_refused() -> None:
    """Models without experts, in training mode, or with a gate in place already: one line each."""
    with pytest.raises(InvalidValue, match="Linear has no experts that a gate can run"):
        use_gating(torch.nn.Linear(2, 2), "dynamic")
    model = _causal("mixtral")
    with pytest.raises(InvalidValue, match=r"is in training mode .* call model\.eval\(\) first"):
        use_gating(model.train(), "dynamic")
    with use_gating(model.eval(), "dynamic") as gated:
        with pytest.raises(InvalidValue, match="has a gate already; restore it first"):
            use_gating(model, "static", capacity_factor=1)
        model.train()
        with pytest.raises(InvalidValue, match="is in training mode"):
            _logits(model)
    assert gated.layers == 0
    with pytest.raises(InvalidValue, match="'nllb_ids' must be 'router' or 'mask': 'other'"):
        use_gating(model.eval(), "dynamic", nllb_ids="other")  # type: ignore[arg-type]
    with pytest.raises(InvalidValue, match="belongs to a gate by name"):
        use_gating(model, make_gating("dynamic"), capacity_factor=0.5)
