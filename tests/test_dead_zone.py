"""Tequila's bias of dead weights: value and gradients by its formulas, the graph, and the way through conversion."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tsld_fx
from tests.models import build, ids
from tsld_fx import QuantConfig, TernaryWeight, convert, prepare
from tsld_fx.dead_zone import is_dead
from tsld_fx.errors import ConfigError

SCHEMES = ["twn", "absmean", "lsq", "seq"]


def layer(x: Tensor, weight: Tensor, scale: Any, bias: Any, scheme: str, group: int, factor: float) -> Tensor:
    quantised = torch.ops.tsld.fake_quant(weight, scale, None, scheme, 2, group)
    extra = torch.ops.tsld.dead_zone_bias(weight, scale, bias, scheme, group, factor)
    return torch.nn.functional.linear(x, quantised, extra)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("group", [-1, 0, 4])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_value_and_gradients_equal_the_formulas(scheme: str, group: int, with_bias: bool) -> None:
    """y = x W_q^T + b + e * sum of dead w; dL/dw of a dead weight gets e * dL/dy (arXiv 2509.23809)."""
    generator = torch.Generator().manual_seed(3)
    x, weight, upstream = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((5, 8), (3, 8), (5, 3)))
    rows = {-1: (1, 1), 0: (3, 1), 4: (3, 2)}[group]
    scale = torch.full(rows, 0.9, dtype=torch.float64) if scheme in ("lsq", "seq") else None
    bias = torch.randn(3, generator=generator, dtype=torch.float64).requires_grad_() if with_bias else None
    leaf, plain = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    out = layer(x, leaf, scale, bias, scheme, group, 0.05)
    out.backward(upstream)
    quantised = torch.ops.tsld.fake_quant(plain, scale, None, scheme, 2, group)
    torch.nn.functional.linear(x, quantised).backward(upstream)
    dead = quantised.detach() == 0
    assert 0 < int(dead.sum()) < dead.numel()
    expected = x @ quantised.detach().t() + 0.05 * (weight * dead).sum(1) + (0 if bias is None else bias.detach())
    torch.testing.assert_close(out.detach(), expected, rtol=1e-12, atol=1e-12)
    through = plain.grad + 0.05 * upstream.sum(0).unsqueeze(1) * dead
    torch.testing.assert_close(leaf.grad, through, rtol=1e-12, atol=1e-12)
    if bias is not None:
        torch.testing.assert_close(bias.grad, upstream.sum(0), rtol=1e-12, atol=1e-12)


def test_operator_passes_torchs_own_checks() -> None:
    weight, bias = torch.randn(6, 8, requires_grad=True), torch.randn(6, requires_grad=True)
    for given in (None, bias):
        torch.library.opcheck(torch.ops.tsld.dead_zone_bias.default, (weight, None, given, "twn", 0, 0.01))


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # without biases; with them, and weights as [in, out]
def test_conversion_folds_it_into_the_bias_bit_for_bit(family: str, tmp_path: Path) -> None:
    config = QuantConfig(TernaryWeight(dead_zone_bias=0.02))
    prepared, without = prepare(build(family), config).eval(), prepare(build(family)).eval()
    tokens = ids()
    expected = prepared(tokens).logits
    assert not torch.allclose(expected, without(tokens).logits)
    before = copy.deepcopy(prepared.state_dict())
    lowered = convert(prepared)
    assert all(torch.equal(value, before[name]) for name, value in prepared.state_dict().items())
    for name, packed in lowered.lowbit_layers().items():
        live = prepared.get_submodule(name)
        weight = live.weight.detach().t() if family == "gpt2" else live.weight.detach()
        found = torch.ops.tsld.dead_zone_bias(weight, None, getattr(live, "bias", None), "twn", 0, 0.02)
        assert torch.equal(packed.bias, found)
        assert bool(is_dead(weight, None, "twn", 0).any())
    torch.testing.assert_close(lowered(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    lowered.save_pretrained(tmp_path / "packed")
    assert torch.equal(tsld_fx.load(tmp_path / "packed")(tokens).logits, lowered(tokens).logits)


def test_prepared_model_trains_saves_and_runs_by_layers(tmp_path: Path) -> None:
    prepared = prepare(build("llama"), QuantConfig(TernaryWeight("lsq", dead_zone_bias=0.02)))
    tokens = ids()
    loss = prepared(tokens, labels=tokens).loss
    loss.backward()
    flat = {n: p.grad.clone() for n, p in prepared.named_parameters() if p.grad is not None}
    prepared.zero_grad()
    prepared.gradient_checkpointing_enable()
    again = prepared(tokens, labels=tokens).loss
    again.backward()
    assert torch.equal(again, loss)
    assert all(torch.equal(p.grad, flat[n]) for n, p in prepared.named_parameters() if n in flat)
    prepared.save_pretrained(tmp_path / "trained")
    loaded = tsld_fx.load_prepared(tmp_path / "trained")
    assert loaded.quant_config == prepared.quant_config
    assert torch.equal(loaded.eval()(tokens).logits, prepared.eval()(tokens).logits)


def test_a_factor_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ConfigError, match="dead_zone_bias"):
        TernaryWeight(dead_zone_bias=-1e-3)
    assert "dead_zone_bias" not in QuantConfig().to_dict()["weight"]
