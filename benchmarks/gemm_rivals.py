"""What the low-bit kernels are compared with, each multiplying the same ternary weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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


def gemlite(weight: Tensor, scales: Tensor, count: int, tuned: Path | None) -> list[Call] | None:
    """gemlite (Triton, W2A16, the same groups as `scales` [N, groups]), or None where it is not installed.

    It tunes itself at the first call of every shape, which takes long; `tuned` is the file where it keeps the outcome.
    """
    try:
        from gemlite import DType, GemLiteLinear
    except ImportError:
        return None
    if tuned is not None and tuned.exists():
        GemLiteLinear.load_config(str(tuned))
    (n, k), groups = weight.shape, scales.shape[1]
    codes = (weight / scales.repeat_interleave(k // groups, dim=1)).round().add(1).to(torch.uint8)
    layers = []
    for _ in range(count):
        layer = GemLiteLinear(2, k // groups, k, n, input_dtype=DType.FP16, output_dtype=DType.FP16)
        layer.pack(codes.clone(), scales.half(), 1)
        layers.append(layer)
    return list(layers)


def save_gemlite(tuned: Path) -> None:
    """Keep what gemlite has tuned in this process."""
    from gemlite import GemLiteLinear

    GemLiteLinear.cache_config(str(tuned))
