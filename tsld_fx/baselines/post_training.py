"""Quantise a float decoder without training: round to nearest, GPTQ or AWQ, on the same grids."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tsld_fx.baselines.awq import awq_weight
from tsld_fx.baselines.calibration import InputStatistics, is_linear, linear_weight, walk
from tsld_fx.baselines.gptq import gptq_weight
from tsld_fx.baselines.grids import Grid, find_grid, shape_of
from tsld_fx.capture import check_decoder
from tsld_fx.config import QuantConfig, WeightSpec, check_type, group_size_code
from tsld_fx.errors import ConfigError, DataError
from tsld_fx.preparation import prepare
from tsld_fx.prepared import PreparedModel
from tsld_fx.prepared_inputs import check_tokens

Method = Literal["rtn", "gptq", "awq"]


def gptq(
    model: PreTrainedModel,
    config: QuantConfig | None = None,
    *,
    calibration: Tensor,
    batch_size: int = 8,
    damping: float = 0.01,
    ordered: bool = True,
) -> PreparedModel:
    """Post-training quantisation with GPTQ, in the packed format's own grids.

    The model's weights are replaced in place. The result is a prepared model with frozen codes under learned scales
    (`lsq`): `convert` packs it, and quantisation-aware training can start from it.

    Args:
        model: a float decoder.
        config: bits, granularity and layers as for `prepare`; which rule finds the scale does not matter, it is
            searched (`find_grid`).
        calibration: int64 [samples, T] token numbers.
        damping, ordered: see `gptq_weight`.

    Raises:
        TsldError: no decoder, a configuration that does not fit it, or calibration text that does not.
    """
    config = config or QuantConfig()
    specs = _specs(model, config)
    grids: dict[str, Grid] = {}

    def quantise(name: str, module: nn.Module, statistics: InputStatistics) -> None:
        spec = specs[name]
        weight = linear_weight(module)
        levels, grid = gptq_weight(
            weight, statistics.gram, spec.bits, group_size_code(spec),
            symmetric=spec.symmetric, damping=damping, ordered=ordered,
        )  # fmt: skip
        weight.copy_(_rounded(grid, levels))
        grids[name] = grid

    walk(model.eval(), _batches(model, calibration, batch_size), specs, quantise)
    learned = {name: replace(spec, scale="lsq", clip_init=None) for name, spec in specs.items()}
    prepared = prepare(model, replace(config, weight=None, overrides=learned))
    with torch.no_grad():
        for name, grid in grids.items():
            module = prepared.get_submodule(name)
            shape = shape_of(grid, linear_weight(module))
            module.weight_scale.copy_(grid.scale.reshape(shape))  # type: ignore[operator]
            if grid.zero is not None:
                module.weight_zero.copy_(grid.zero.reshape(shape))  # type: ignore[operator]
    return prepared


def simulate(
    model: PreTrainedModel,
    method: Method,
    *,
    bits: int,
    group_size: int = 0,
    symmetric: bool = False,
    calibration: Tensor,
    batch_size: int = 8,
) -> PreTrainedModel:
    """Replace the linear weights of a float decoder by their quantised values, as float.

    For comparisons that the packed format has no form for: 2 bits with four levels and a zero point, as the papers of
    GPTQ and AWQ have it (ternary has three), and AWQ's scaled weights.

    Args:
        method: `rtn` (nearest level of the searched grid), `gptq` or `awq`.
        bits: 2 (four levels), 4 or 8.
        group_size: 0 for one scale per output channel.

    Raises:
        TsldError: as for `gptq`.
    """
    if method not in get_args(Method):
        raise ConfigError(f"simulate: method={method!r} is not one of {', '.join(get_args(Method))}.")
    if bits not in (2, 4, 8):
        raise ConfigError(f"simulate: bits={bits!r} is not 2, 4 or 8.")
    specs = _specs(model, QuantConfig())

    def quantise(name: str, module: nn.Module, statistics: InputStatistics) -> None:
        weight = linear_weight(module)
        form: dict[str, Any] = {"symmetric": symmetric, "ternary": False}
        if method == "awq":
            weight.copy_(awq_weight(weight, statistics.gram, statistics.mean_abs, bits, group_size, **form)[0])
        elif method == "gptq":
            levels, grid = gptq_weight(weight, statistics.gram, bits, group_size, **form)
            weight.copy_(_rounded(grid, levels))
        else:
            plain = torch.ones(weight.shape[1], device=weight.device)
            grid = find_grid(weight, plain, bits, group_size, **form)
            weight.copy_(_rounded(grid, grid.levels(weight)))

    walk(model.eval(), _batches(model, calibration, batch_size), specs, quantise)
    return model


def _rounded(grid: Grid, levels: Tensor) -> Tensor:
    """The float32 weight exactly as tsld::fake_quant makes it from these levels."""
    zero = None if grid.zero is None else grid.zero.float()
    return replace(grid, scale=grid.scale.float(), zero=zero).values(levels.float())


def _specs(model: PreTrainedModel, config: QuantConfig) -> dict[str, WeightSpec]:
    """Name -> specification of the linear layers that `prepare` would quantise."""
    check_type("post-training quantisation", config, QuantConfig)
    check_decoder(model)
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    head = model.get_output_embeddings()
    config.check_patterns(linears)
    found = {}
    for name, module in linears.items():
        spec = config.spec_for("lm_head" if module is head and "lm_head" in config.skip else name)
        if spec is not None:
            found[name] = spec
    if not found:
        raise ConfigError("post-training quantisation: the configuration leaves every layer in full precision.")
    return found


def _batches(model: PreTrainedModel, calibration: Tensor, batch_size: int) -> list[Tensor]:
    if batch_size < 1:
        raise DataError(f"calibration: batch_size={batch_size} must be at least 1.")
    if calibration.ndim != 2 or calibration.shape[0] < 1 or calibration.shape[1] < 2:
        raise DataError(f"calibration must be token numbers [samples, tokens], got {list(calibration.shape)}.")
    check_tokens(calibration.flatten(), model)
    device = model.get_input_embeddings().weight.device
    return list(calibration.to(device).split(batch_size))
