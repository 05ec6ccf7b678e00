"""FoldTransposedLinear: products with a weight become linears, whatever layout the weight has."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

from tests.graphs import apply, assert_runs_in_torchs_pass_manager, assert_untouched, export, text
from tsld_fx.passes import FoldTransposedLinear
from tsld_fx.passes.graph_tools import aten, calls


class Conv1D(nn.Module):
    """GPT-2's layer: the weight is [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Product(nn.Module):
    """x W and x V^T without bias, as decompositions write them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.other = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.mm(torch.mm(x, self.weight), self.other.t())


class NotALayer(nn.Module):
    """Products of activations, and an addmm that scales: none is a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, torch.mm(x, x), self.weight, alpha=0.5)


def test_addmm_over_an_in_out_weight_becomes_a_linear() -> None:
    graph_module, modified = apply(FoldTransposedLinear(), export(Conv1D(), torch.randn(2, 4)))
    assert modified
    assert_expected_inline(
        text(graph_module),
        """\
weight = self.weight
bias = self.bias
transpose_int = aten.transpose.int(weight, 0, 1)
linear_default = aten.linear.default(x, transpose_int, bias)
return pytree.tree_unflatten((linear_default,), self._out_spec)""",
    )


def test_products_of_both_layouts_become_linears() -> None:
    graph_module, modified = apply(FoldTransposedLinear(), export(Product(), torch.randn(2, 4)))
    assert modified
    assert_expected_inline(
        text(graph_module),
        """\
weight = self.weight
other = self.other
transpose_int = aten.transpose.int(weight, 0, 1)
linear_default = aten.linear.default(x, transpose_int, None)
linear_default_1 = aten.linear.default(linear_default, other, None)
return pytree.tree_unflatten((linear_default_1,), self._out_spec)""",
    )


@pytest.mark.parametrize("module", [Conv1D(), Product()])
def test_values_gradients_and_parameters_stay(module: nn.Module) -> None:
    graph_module, _ = apply(FoldTransposedLinear(), export(module, torch.randn(2, 4)))
    x = torch.randn(2, 4)
    torch.testing.assert_close(graph_module(x), module(x))
    assert {n: p.shape for n, p in graph_module.named_parameters()} == {
        n: p.shape for n, p in module.named_parameters()
    }
    (ours,) = torch.autograd.grad(graph_module(x).square().sum(), graph_module.weight)
    (theirs,) = torch.autograd.grad(module(x).square().sum(), module.weight)
    torch.testing.assert_close(ours, theirs)


def test_new_nodes_carry_shapes_and_origins() -> None:
    graph_module, _ = apply(FoldTransposedLinear(), export(nn.Sequential(Conv1D()), torch.randn(2, 4)))
    (linear,) = calls(graph_module.graph, aten.linear.default)
    assert linear.meta["val"].shape == (2, 3)
    assert linear.args[1].meta["val"].shape == (3, 4)
    assert list(linear.meta["nn_module_stack"].values())[-1][0].endswith("0")


def test_other_products_and_linears_are_untouched_and_the_pass_is_idempotent() -> None:
    assert_untouched(FoldTransposedLinear(), export(NotALayer(), torch.randn(3, 3)))
    assert_untouched(FoldTransposedLinear(), export(nn.Linear(4, 3), torch.randn(2, 4)))
    graph_module, _ = apply(FoldTransposedLinear(), export(Product(), torch.randn(2, 4)))
    assert_untouched(FoldTransposedLinear(), graph_module)


def test_runs_in_torchs_pass_manager() -> None:
    assert_runs_in_torchs_pass_manager(FoldTransposedLinear(), export(Conv1D(), torch.randn(2, 4)))
