"""Quantised weights of one optimiser step, kept by tsld::fake_quant over its micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

_open: WeightCache | None = None


class WeightCache:
    """Inside `with cache:` tsld::fake_quant computes each weight once, until the weight or its scale changes.

    A weight is known by its memory and its version, which every in-place operation raises. Whoever writes weights
    behind autograd's back (`parameter.data`, FSDP) must not use it. `clear()` forgets everything: call it after the
    optimiser's step.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], tuple[list[int], list[Tensor], Tensor]] = {}

    def __enter__(self) -> WeightCache:
        global _open
        _open = self
        return self

    def __exit__(self, *_: object) -> None:
        global _open
        _open = None

    def clear(self) -> None:
        """Forget every weight."""
        self._kept.clear()

    def get(self, inputs: tuple[Tensor | None, ...], how: tuple[Any, ...], compute: Callable[[], Tensor]) -> Tensor:
        """The result for these inputs, from the cache while none of them has changed."""
        given = [t for t in inputs if t is not None]
        key = (*((t.data_ptr(), t.shape, t.stride()) for t in given), *how)
        versions = [t._version for t in given]
        found = self._kept.get(key)
        if found is None or found[0] != versions:
            found = self._kept[key] = (versions, [t.detach() for t in given], compute())  # the memory stays taken
        return found[2].detach()  # a tensor of its own, so that each call has its own place in autograd's graph


def quantised(inputs: tuple[Tensor | None, ...], how: tuple[Any, ...], compute: Callable[[], Tensor]) -> Tensor:
    """`compute()`, or what the open cache kept of it."""
    if _open is None or any(t is not None and t.is_inference() for t in inputs):
        return compute()
    return _open.get(inputs, how, compute)
