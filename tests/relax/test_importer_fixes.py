"""Each fix of TVM's importer: right with it, and wrong or refused without it (then it can go)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from tsld_fx.relax.importer_fixes import FIXES
from tsld_fx.relax.tvm_import import load_tvm


class CumsumOfBool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x > 0).cumsum(-1)


class SliceInBounds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(40.0).reshape(40, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.table[: x.shape[1]].transpose(0, 1) + x


class CatWithEmpty(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.zeros(0), x], dim=-1) * 2


CASES: dict[str, Callable[[], nn.Module]] = {
    "cumsum.default": CumsumOfBool,
    "slice.Tensor": SliceInBounds,
    "cat.default": CatWithEmpty,
}


def compiled(module: nn.Module, x: Tensor, fixes: dict) -> np.ndarray:
    """What TVM computes for an exported module with a dynamic second size."""
    load_tvm()
    import tvm
    from tvm import relax
    from tvm.relax.frontend.torch import from_exported_program

    program = torch.export.export(module, (torch.zeros(3, 5),), dynamic_shapes=({1: Dim("n", max=40)},), strict=False)
    imported = from_exported_program(program, custom_convert_map=fixes)
    machine = relax.VirtualMachine(tvm.compile(imported, target="llvm"), tvm.cpu())
    return machine["main"](tvm.runtime.tensor(x.numpy()))[0].numpy()


@pytest.mark.parametrize("operator", CASES)
def test_right_with_the_fix(operator: str) -> None:
    module, x = CASES[operator](), torch.randn(3, 7)
    result = compiled(module, x, FIXES)
    assert result.dtype == module(x).numpy().dtype
    np.testing.assert_allclose(result, module(x).numpy(), rtol=1e-6)


@pytest.mark.parametrize("operator", CASES)
def test_wrong_without_the_fix(operator: str) -> None:
    """When this fails, TVM has mended the fault: drop the converter and its case here."""
    module, x = CASES[operator](), torch.randn(3, 7)
    others = {name: fix for name, fix in FIXES.items() if name != operator}
    try:
        result = compiled(module, x, others)
    except Exception:  # refused by the importer, a pass or LLVM
        return
    expected = module(x).numpy()
    assert result.dtype != expected.dtype or not np.allclose(result, expected)


def test_every_fix_has_a_case() -> None:
    assert set(CASES) == set(FIXES)
