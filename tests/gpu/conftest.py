"""Random layers in the canonical packed format and their float64 oracle. Without a GPU these tests are deselected."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    mine = [item for item in items if item.get_closest_marker("gpu")]
    if mine:
        config.hook.pytest_deselected(items=mine)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@dataclass(frozen=True)
class Layer:
    """packed uint8 [n, bytes], scales float32 [n, groups], zeros uint8 or None, weight float64 [n, k]."""

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group_size: int
    k: int
    weight: Tensor

    def arguments(self) -> tuple[Tensor, Tensor, Tensor | None, int, int, int]:
        return self.packed, self.scales, self.zeros, self.bits, self.group_size, self.k


def random_layer(n: int, k: int, bits: int, group_size: int, device: str = "cuda") -> Layer:
    """group_size 0: one scale per row, -1: one for the tensor."""
    codes = torch.randint(0, 3 if bits == 2 else 2**bits, (n, k), dtype=torch.uint8, device=device)
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, -k % per_byte)).view(n, -1, per_byte).int()
    packed = sum(padded[:, :, i] << (bits * i) for i in range(per_byte)).to(torch.uint8)
    groups = -(-k // group_size) if group_size > 0 else 1
    shape = (1, 1) if group_size == -1 else (n, groups)
    scales = (torch.rand(shape, device=device) + 0.1) * 0.05
    zeros = None if bits == 2 else torch.randint(0, 2**bits, shape, dtype=torch.uint8, device=device)
    repeat = group_size if group_size > 0 else k

    def spread(values: Tensor) -> Tensor:
        return values.double().expand(n, -1).repeat_interleave(repeat, dim=1)[:, :k]

    zero = torch.ones(n, groups, device=device) if zeros is None else zeros
    weight = (codes.double() - spread(zero)) * spread(scales)
    return Layer(packed, scales, zeros, bits, group_size, k, weight)


@pytest.fixture
def make_layer():
    return random_layer
