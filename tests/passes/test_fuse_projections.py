"""FuseProjections: which linears share a product, and that nothing changes but their number."""

from __future__ import annotations

import copy

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

from tests.graphs import apply, assert_runs_in_torchs_pass_manager, assert_untouched, export, text
from tests.models import ids, ternary
from tsld_fx.capture import capture
from tsld_fx.lowbit_linear import LowBitLinear
from tsld_fx.lowered import _plain
from tsld_fx.packing import pack
from tsld_fx.passes import FuseProjections
from tsld_fx.passes.graph_tools import calls
from tsld_fx.quantizers import scale_shape


def layer(inputs: int, outputs: int, bits: int = 2, group_size: int = 0, zero: bool = False, bias: bool = False):
    made = LowBitLinear(inputs, outputs, bits, group_size, zero=zero, bias=bias)
    made.weight_packed = pack(torch.randint(0, 3 if bits == 2 else 2**bits, (outputs, inputs), dtype=torch.uint8), bits)
    made.weight_scale.copy_(torch.rand(scale_shape(outputs, inputs, group_size)) + 0.5)
    if zero:
        made.weight_zero.random_(0, 2**bits)
    if bias:
        made.bias.data.normal_()
    return made


class Two(nn.Module):
    def __init__(self, first: LowBitLinear, second: LowBitLinear) -> None:
        super().__init__()
        self.a, self.b = first, second

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x)], -1)


def count(graph_module: torch.fx.GraphModule) -> int:
    return len(calls(graph_module.graph, torch.ops.tsld.lowbit_linear.default))


def test_linears_of_one_input_become_one() -> None:
    module, x = Two(layer(8, 3), layer(8, 5)), torch.randn(2, 8)
    graph_module, modified = apply(FuseProjections(), export(module, x))
    assert modified
    assert_expected_inline(
        text(graph_module),
        """\
fused_projections_layer_0_weight_packed = self.fused_projections.layer_0.weight_packed
fused_projections_layer_0_weight_scale = self.fused_projections.layer_0.weight_scale
lowbit_linear_default = tsld.lowbit_linear.default(x, fused_projections_layer_0_weight_packed, fused_projections_layer_0_weight_scale, None, None, 2, 0, 8)
split_with_sizes_default = aten.split_with_sizes.default(lowbit_linear_default, [3, 5], -1)
getitem = split_with_sizes_default[0]
getitem_1 = split_with_sizes_default[1]
cat = aten.cat.default([getitem, getitem_1], -1)
return pytree.tree_unflatten((cat,), self._out_spec)""",  # noqa: E501
    )
    torch.testing.assert_close(graph_module(x), module(x), rtol=1e-6, atol=1e-6)
    assert_untouched(FuseProjections(), graph_module)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {"group_size": -1}),
        ({"bits": 4, "zero": True, "bias": True}, {"bits": 4}),
        ({"bits": 4, "group_size": 8}, {"bits": 4, "group_size": 8, "zero": True}),
        ({"bits": 8, "group_size": -1, "zero": True}, {"bits": 8, "bias": True, "zero": True}),
        ({"bias": True}, {"bias": True}),
    ],
)
def test_weights_are_the_same_bits(first: dict, second: dict, seed: int) -> None:
    torch.manual_seed(seed)
    module, x = Two(layer(24, 7, **first), layer(24, 10, **second)), torch.randn(3, 5, 24, dtype=torch.float64)
    graph_module, modified = apply(FuseProjections(), export(module, x))
    assert modified and count(graph_module) == 1
    fused = graph_module.fused_projections.layer_0
    assert torch.equal(fused.dequantize(), torch.cat([module.a.dequantize(), module.b.dequantize()]))
    torch.testing.assert_close(graph_module(x), module(x), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    ("first", "second"),
    [({}, {"bits": 4}), ({"bits": 4, "group_size": 8}, {"bits": 4}), ({"group_size": 8}, {"group_size": 4})],
)
def test_other_formats_are_untouched(first: dict, second: dict) -> None:
    assert_untouched(FuseProjections(), export(Two(layer(24, 7, **first), layer(24, 9, **second)), torch.randn(1, 24)))


def test_other_inputs_are_untouched() -> None:
    chain = nn.Sequential(layer(8, 8), layer(8, 8), layer(8, 3))
    assert_untouched(FuseProjections(), export(chain, torch.randn(1, 8)))


def test_in_torchs_pass_manager() -> None:
    module, x = Two(layer(8, 3), layer(8, 5)), torch.randn(2, 8)
    fused = assert_runs_in_torchs_pass_manager(FuseProjections(), export(module, x))
    torch.testing.assert_close(fused(x), module(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("family", "linears"), [("llama", 4), ("gpt2", 4), ("opt", 4)])
def test_model_has_one_product_for_each_input(family: str, linears: int) -> None:
    lowered = copy.deepcopy(ternary(family)[1])  # `half` below reaches its modules
    names = set(lowered.state_dict())
    graph_module, modified = apply(FuseProjections(), capture(_plain(lowered), training=False))
    assert modified is (family != "gpt2")  # GPT-2 has its q, k and v in one layer already
    assert count(graph_module) == 2 * linears
    with torch.no_grad():
        ours = graph_module(ids(), torch.ones_like(ids()))["logits"]
        torch.testing.assert_close(ours, lowered(ids()).logits, rtol=2e-5, atol=2e-5)
    assert set(lowered.state_dict()) == names
    assert graph_module.half().fused_projections.layer_0.weight_scale.dtype == torch.float32 if modified else True
