"""Ternary decoder language models: TSLD training on exported graphs, and packed low-bit inference.

import tsld_fx
prepared = tsld_fx.prepare(model)          # fake-quantised graph over the model's own parameters
lowered = tsld_fx.convert(prepared)        # packed weights, transformers' generate
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING

from tsld_fx.errors import TsldError
from tsld_fx.on_import import after_import

if TYPE_CHECKING:
    from tsld_fx import losses
    from tsld_fx.checkpoint import load
    from tsld_fx.config import AffineWeight, QuantConfig, TernaryWeight
    from tsld_fx.distill import DistillConfig, LossTerm
    from tsld_fx.lowered import LoweredModel, convert
    from tsld_fx.onnx.export import export_onnx
    from tsld_fx.preparation import load_prepared, prepare
    from tsld_fx.prepared import PreparedModel
    from tsld_fx.relax.translate import to_relax
    from tsld_fx.runtime_module import build_runtime_module
    from tsld_fx.trainer import TSLDTrainer

__version__ = "0.1.0"

__all__ = [
    "AffineWeight",
    "DistillConfig",
    "LossTerm",
    "LoweredModel",
    "PreparedModel",
    "QuantConfig",
    "TSLDTrainer",
    "TernaryWeight",
    "TsldError",
    "build_runtime_module",
    "convert",
    "export_onnx",
    "load",
    "load_prepared",
    "losses",
    "prepare",
    "to_relax",
]


_LAZY = {  # name -> module that is imported on its first use: torch and transformers take seconds, others need an extra
    "AffineWeight": "tsld_fx.config",
    "DistillConfig": "tsld_fx.distill",
    "LossTerm": "tsld_fx.distill",
    "LoweredModel": "tsld_fx.lowered",
    "PreparedModel": "tsld_fx.prepared",
    "QuantConfig": "tsld_fx.config",
    "TSLDTrainer": "tsld_fx.trainer",
    "TernaryWeight": "tsld_fx.config",
    "build_runtime_module": "tsld_fx.runtime_module",
    "convert": "tsld_fx.lowered",
    "export_onnx": "tsld_fx.onnx.export",
    "load": "tsld_fx.checkpoint",
    "load_prepared": "tsld_fx.preparation",
    "prepare": "tsld_fx.preparation",
    "to_relax": "tsld_fx.relax.translate",
}


def __getattr__(name: str) -> object:
    """The names in _LAZY, and submodules."""
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    if not name.startswith("_") and importlib.util.find_spec(f"tsld_fx.{name}") is not None:
        return importlib.import_module(f"tsld_fx.{name}")
    raise AttributeError(f"module 'tsld_fx' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


after_import("torch", lambda: importlib.import_module("tsld_fx.ops"))  # registers torch.ops.tsld
after_import("transformers.quantizers.auto", lambda: importlib.import_module("tsld_fx.hf_quantizer"))
