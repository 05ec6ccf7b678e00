"""Rows of a comparison that are not trained: round to nearest, GPTQ and AWQ, from settings."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tsld_fx.baselines.post_training import gptq, simulate
from tsld_fx.config import QuantConfig
from tsld_fx.errors import ConfigError, DataError
from tsld_fx.model_folders import check_window, load_float, load_tokenizer
from tsld_fx.preparation import prepare
from tsld_fx.recipes import device_of, evaluate, open_data
from tsld_fx.runs import RunFolder
from tsld_fx.settings import RunSettings, check_keys
from tsld_fx.whole_files import whole_folder

METHODS = ("rtn", "gptq", "awq")
_OWN = ("method", "quant", "float_bits", "group_size", "samples", "seed")


@dataclass(frozen=True)
class BaselineSettings:
    """One row without training.

    Attributes:
        run: model, data and quant, as of a run.
        method: `rtn` (what `prepare` does before any training), `gptq`, or `awq`.
        float_bits: 2, 4 or 8: round to 2^bits levels with a zero point and keep the weights as floats, as the papers
            of GPTQ and AWQ do; None for the packed format's own grids (`quant`). AWQ has the former only.
        group_size: input features per scale with float_bits; 0 for one scale per output channel.
        samples: calibration blocks, drawn from the training text with `seed`.
    """

    run: RunSettings
    method: str = "rtn"
    float_bits: int | None = None
    group_size: int = 0
    samples: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"baselines: method={self.method!r} is not one of {', '.join(METHODS)}.")
        if self.float_bits not in (None, 2, 4, 8):
            raise ConfigError(f"baselines: float_bits={self.float_bits!r} is not 2, 4 or 8.")
        if self.method == "awq" and self.float_bits is None:
            raise ConfigError(
                "baselines: awq scales input features, which the packed format has no form for. Set float_bits."
            )
        for name in ("group_size", "samples", "seed"):
            value = getattr(self, name)
            if type(value) is not int or value < (1 if name == "samples" else 0):
                raise ConfigError(f"baselines: {name} must be a whole number, got {value!r}.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], shared: Mapping[str, Any], where: str) -> BaselineSettings:
        """Read one entry of `baselines` over what the runs share.

        Raises:
            ConfigError: an unknown key or value.
        """
        check_keys(where, values, list(_OWN))
        run = {k: v for k, v in shared.items() if k in ("model", "data", "quant", "training")}
        if "quant" in values:
            run["quant"] = values["quant"]
        own = {k: v for k, v in values.items() if k != "quant" and v is not None}
        return cls(RunSettings.from_dict(run, where), **own)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for run.yaml."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "run"}
        run = self.run.to_dict()
        return own | {k: run[k] for k in ("model", "data", "quant")}


def calibration_blocks(blocks: Any, samples: int, seed: int) -> Tensor:
    """Token numbers [samples, T] drawn without repetition from blocks of one length.

    Raises:
        DataError: samples of several lengths (task files).
    """
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))[:samples]
    rows = [blocks[int(i)]["input_ids"] for i in order]
    if len({r.numel() for r in rows}) > 1:
        raise DataError("baselines: calibration needs text; task files have samples of several lengths.")
    return torch.stack(rows)


def quantise(model: PreTrainedModel, settings: BaselineSettings, calibration: Tensor | None) -> PreTrainedModel:
    """The model of one row; a prepared one where the packed format can hold it."""
    if settings.float_bits is not None:
        assert calibration is not None
        return simulate(
            model, settings.method, bits=settings.float_bits, group_size=settings.group_size, calibration=calibration,  # type: ignore[arg-type]
        )  # fmt: skip
    quant: QuantConfig = settings.run.quant
    if settings.method == "rtn":
        return prepare(model, quant).eval()
    assert calibration is not None
    return gptq(model, quant, calibration=calibration).eval()


def evaluate_baseline(settings: BaselineSettings, out: str | Path, *, quiet: bool = False) -> dict[str, Any]:
    """Quantise, evaluate, save.

    Args:
        out: the row's folder; a finished one is read.

    Returns:
        The content of result.json: `scores` and `seconds` of the quantisation. The model is in `out`/model.
    """
    folder = RunFolder(out, {"command": "baseline", **settings.to_dict()})
    if (done := folder.result()) is not None:
        return done
    model, tokenizer = load_float(settings.run.model), load_tokenizer(settings.run.model)
    check_window(settings.run.data.block_size, model)
    data = open_data(settings.run, tokenizer)
    data.check(model)
    needed = settings.method != "rtn" or settings.float_bits is not None
    calibration = calibration_blocks(data.blocks("train"), settings.samples, settings.seed) if needed else None
    folder.begin()
    start = time.perf_counter()
    made = quantise(model.to(device_of(settings.run)), settings, calibration)
    result = {"seconds": round(time.perf_counter() - start, 1), "scores": evaluate(made, data, quiet)}
    with whole_folder(folder.path / "model") as target:
        made.save_pretrained(target)
        tokenizer.save_pretrained(target)
    folder.finish(result)
    return result
