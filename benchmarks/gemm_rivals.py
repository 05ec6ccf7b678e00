"""What the low-bit kernels are compared with, each multiplying the same ternary weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Call = Callable[[Tensor], Tensor]


def cublas(weight: Tensor, count: int) -> list[Call]:
    """torch.nn.functional.linear on fp16 weights; `count` copies in different places of memory."""
    copies = [weight.half().clone() for _ in range(count)]
    return [lambda x, w=w: torch.nn.functional.linear(x, w) for w in copies]


def humming(weight: Tensor, count: int) -> list[Call] | None:
    """humming-kernels (W2A16 per channel), or None where the package is not installed."""
    try:
        from humming.layer import HummingLayer
    except ImportError:
        return None
    n, k = weight.shape
    layers = []
    for _ in range(count):
        layer = HummingLayer(shape_n=n, shape_k=k, weight_config={"dtype": "int2"}, torch_dtype=torch.float16).cuda()
        layer.load_from_unquantized(weight.half())
        layer.transform()
        layers.append(layer)
    return list(layers)
