"""Ternary decoder language models: TSLD training on exported graphs, and packed low-bit inference.

import tsld_fx
prepared = tsld_fx.prepare(model)          # fake-quantised graph over the model's own parameters
lowered = tsld_fx.convert(prepared)        # packed weights, transformers' generate
"""

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
    "convert",
    "load",
    "load_prepared",
    "losses",
    "prepare",
]


def __getattr__(name: str) -> object:
    """TSLDTrainer is imported on first use: it pulls in transformers.Trainer and accelerate."""
    if name == "TSLDTrainer":
        from tsld_fx.trainer import TSLDTrainer

        return TSLDTrainer
    raise AttributeError(f"module 'tsld_fx' has no attribute {name!r}")
