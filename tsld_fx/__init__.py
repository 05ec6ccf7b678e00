"""Ternary decoder language models: TSLD training on exported graphs, and packed low-bit inference.

import tsld_fx
prepared = tsld_fx.prepare(model)          # fake-quantised graph over the model's own parameters
lowered = tsld_fx.convert(prepared)        # packed weights, transformers' generate
"""

import importlib

from tsld_fx import losses
from tsld_fx.checkpoint import load
from tsld_fx.config import AffineWeight, QuantConfig, TernaryWeight
from tsld_fx.distill import DistillConfig, LossTerm
from tsld_fx.errors import TsldError
from tsld_fx.lowered import LoweredModel, convert
from tsld_fx.prepared import PreparedModel, load_prepared, prepare

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


_LAZY = {  # name -> module that is imported on its first use, because it is slow to import or needs an extra
    "TSLDTrainer": "tsld_fx.trainer",
    "export_onnx": "tsld_fx.onnx.export",
    "build_runtime_module": "tsld_fx.runtime_module",
    "to_relax": "tsld_fx.relax.translate",
}


def __getattr__(name: str) -> object:
    """The names in _LAZY."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'tsld_fx' has no attribute {name!r}")
