"""GPTQ and AWQ against independent oracles, and what comes out of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import tsld_fx
from tests.models import VOCABULARY, build, ids
from tsld_fx import AffineWeight, QuantConfig, TernaryWeight, baselines
from tsld_fx.baselines.grids import find_grid
from tsld_fx.errors import ConfigError, DataError
from tsld_fx.inspection import weights_equal

GRIDS = [(2, 0, True), (2, 0, False), (2, 8, False), (2, -1, True), (4, 0, False), (4, 8, False), (8, 8, False)]


def layer(seed: int, rows: int = 13, columns: int = 24, samples: int = 200) -> tuple[Tensor, Tensor]:
    """A weight and inputs with strong correlations between features."""
    torch.manual_seed(seed)
    mix = torch.randn(columns, columns, dtype=torch.float64) * torch.logspace(0, -1, columns, dtype=torch.float64)
    return torch.randn(rows, columns, dtype=torch.float64), torch.randn(samples, columns, dtype=torch.float64) @ mix


def brute_force(weight: Tensor, gram: Tensor, grid: object, order: list[int], damping: float) -> Tensor:
    """Optimal brain quantisation column by column, with the inverse Hessian of what is left solved anew each time."""
    hessian = gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    work, levels, left = weight.clone(), torch.zeros_like(weight), list(order)
    while left:
        column = left[0]
        level = grid.levels(work)[:, column]  # type: ignore[attr-defined]
        levels[:, column] = level
        made = grid.values(levels)[:, column]  # type: ignore[attr-defined]
        inverse = torch.linalg.inv(hessian[left][:, left])
        work[:, left] -= torch.outer((work[:, column] - made) / inverse[0, 0], inverse[0])
        left = left[1:]
    return levels


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("bits", "group_size", "ternary"), GRIDS)
@pytest.mark.parametrize("ordered", [True, False])
def test_gptq_equals_brute_force(seed: int, bits: int, group_size: int, ternary: bool, ordered: bool) -> None:
    weight, inputs = layer(seed)
    gram = inputs.T @ inputs
    levels, grid = baselines.gptq_weight(weight, gram, bits, group_size, ternary=ternary, ordered=ordered, block=7)
    order = gram.diagonal().argsort(descending=True).tolist() if ordered else list(range(24))
    torch.testing.assert_close(levels, brute_force(weight, gram, grid, order, 0.01))
    error = lambda made: float(((made - weight) @ inputs.T).square().sum())  # noqa: E731
    assert error(grid.values(levels)) < error(grid.values(grid.levels(weight)))


def test_gptq_without_correlation_is_rounding_to_nearest() -> None:
    weight, _ = layer(3)
    levels, grid = baselines.gptq_weight(weight, torch.diag(torch.rand(24, dtype=torch.float64) + 0.1), 4)
    torch.testing.assert_close(levels, grid.levels(weight))


def test_features_that_are_always_zero() -> None:
    weight, inputs = layer(4)
    inputs[:, [3, 17]] = 0
    levels, grid = baselines.gptq_weight(weight, inputs.T @ inputs, 4)
    assert not grid.values(levels)[:, [3, 17]].any() and torch.isfinite(levels).all()
    with pytest.raises(DataError, match="NaN or Inf"):
        baselines.gptq_weight(weight, torch.full((24, 24), float("nan")), 4)


@pytest.mark.parametrize(("bits", "group_size", "ternary"), GRIDS)
def test_the_searched_grid_is_no_worse_than_the_first(bits: int, group_size: int, ternary: bool) -> None:
    weight, inputs = layer(5)
    importance = inputs.square().sum(0)
    grid = find_grid(weight, importance, bits, group_size, ternary=ternary)
    levels = grid.levels(weight)
    made = grid.values(levels)
    per_scale = levels if group_size <= 0 else levels.reshape(-1, group_size)
    most = 3 if ternary and bits == 2 else 2**bits
    assert all(line.unique().numel() <= most for line in per_scale)
    low, high = weight.amin().clamp_max(0), weight.amax().clamp_min(0)
    step = (high - low) / (2**bits - 1)
    nearest = ((weight - low) / step).round() * step + low
    if not (ternary and bits == 2):
        assert float((importance * (made - weight).square()).sum()) <= float(
            (importance * (nearest - weight).square()).sum()
        )
    assert torch.equal(grid.scale.float().double(), grid.scale)


@pytest.mark.parametrize(("bits", "group_size"), [(2, 0), (2, 8), (4, 0), (4, 8)])
def test_awq_beats_rounding_where_few_features_are_large(bits: int, group_size: int) -> None:
    weight, inputs = layer(6)
    inputs[:, ::6] *= 20
    gram, size = inputs.T @ inputs, inputs.abs().mean(0)
    made, alpha = baselines.awq_weight(weight, gram, size, bits, group_size, ternary=False)
    grid = find_grid(weight, gram.diagonal(), bits, group_size, ternary=False)
    error = lambda w: float(((w - weight) @ inputs.T).square().sum())  # noqa: E731
    plain = error(grid.values(grid.levels(weight)))
    assert error(made) < plain and 0 < alpha < 1 if group_size == 0 else error(made) <= plain


@pytest.mark.parametrize(
    ("family", "spec"),
    [
        ("gpt2", TernaryWeight()),
        ("llama", AffineWeight(bits=4, granularity="group", group_size=4)),
    ],
)
def test_a_gptq_model_packs_bit_for_bit(family: str, spec: object, tmp_path: Path) -> None:
    config = QuantConfig(weight=spec)  # type: ignore[arg-type]
    teacher, batch = build(family), ids(6, 20)
    prepared = baselines.gptq(build(family), config, calibration=batch, batch_size=4)
    lowered = tsld_fx.convert(prepared.eval(), "reference")
    assert weights_equal(prepared, lowered)
    for name, module in lowered.lowbit_layers().items():
        weight = prepared.get_submodule(name).weight
        weight = weight.T if type(prepared.get_submodule(name)).__name__ == "Conv1D" else weight
        assert torch.equal(module.weight, weight), name  # the codes are GPTQ's own
    with torch.no_grad():
        full, ours = teacher(batch).logits, lowered(batch).logits
        plain = tsld_fx.prepare(build(family), config).eval()(batch).logits
        assert torch.allclose(prepared.eval()(batch).logits, ours, atol=1e-4)
    assert float((ours - full).square().mean()) < float((plain - full).square().mean())
    lowered.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(tsld_fx.load(tmp_path, "reference")(batch).logits, ours)


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_simulations_stay_float_models(method: str) -> None:
    teacher, batch = build("llama"), ids(6, 20)
    made = {bits: baselines.simulate(build("llama"), method, bits=bits, calibration=batch) for bits in (2, 8)}
    with torch.no_grad():
        full = teacher(batch).logits
        error = {bits: float((m(batch).logits - full).square().mean()) for bits, m in made.items()}
    assert 0 < error[8] < error[2] / 100
    row = made[2].model.layers[0].mlp.down_proj.weight[0]
    assert method == "awq" or row.unique().numel() <= 4
    assert torch.equal(made[2].lm_head.weight, teacher.lm_head.weight)


def test_mistakes() -> None:
    model = build("llama")
    for calibration, message in ((ids(2, 9)[0], "samples, tokens"), (ids(2, 9) + VOCABULARY, "outside the model's")):
        with pytest.raises(DataError, match=message):
            baselines.gptq(model, calibration=calibration)
    with pytest.raises(ConfigError, match="is not one of rtn, gptq, awq"):
        baselines.simulate(model, "magic", bits=4, calibration=ids(2, 9))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="leaves every layer in full precision"):
        baselines.gptq(model, QuantConfig(weight=None), calibration=ids(2, 9))
    with pytest.raises(ConfigError, match="'lm_head' lies outside the decoder layers"):
        baselines.gptq(model, QuantConfig(overrides={"lm_head": AffineWeight(bits=8)}), calibration=ids(2, 9))
    torch.testing.assert_close(model.state_dict(), build("llama").state_dict())
