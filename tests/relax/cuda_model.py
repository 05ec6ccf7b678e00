"""A tiny LLaMA whose layers the CUDA kernels serve, and what its CUDA program must compute."""

from __future__ import annotations

import torch
from torch import Tensor

import tsld_fx
from tests.models import build


def lowered(family: str = "llama") -> tsld_fx.LoweredModel:
    """Float32, ternary, layers of 64 and 128 inputs."""
    changes = {"llama": {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}}[family]
    return tsld_fx.convert(tsld_fx.prepare(build(family, **changes)), backend="reference")


def with_half_layers(model: tsld_fx.LoweredModel, input_ids: Tensor) -> Tensor:
    """Logits with the packed layers in float16, as the kernels take them, and everything else in float32."""
    layers = model.lowbit_layers().values()
    hooks = [layer.register_forward_pre_hook(lambda _, x: (x[0].half(),)) for layer in layers]
    hooks += [layer.register_forward_hook(lambda _, __, y: y.float()) for layer in layers]
    try:
        with torch.no_grad():
            return model(input_ids=input_ids).logits
    finally:
        for hook in hooks:
            hook.remove()
