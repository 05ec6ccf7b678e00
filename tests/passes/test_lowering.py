"""FreezeScales, PackWeights and LowerLinear: from fake-quantised to packed weights, step by step."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn

from tests.graphs import apply, assert_runs_in_torchs_pass_manager, assert_untouched, export, text
from tsld_fx import AffineWeight, QuantConfig, TernaryWeight
from tsld_fx.errors import PassError
from tsld_fx.passes import FoldTransposedLinear, FreezeScales, InsertFakeQuant, LowerLinear, PackWeights

SPECS = [
    TernaryWeight(),
    TernaryWeight("absmean", "group", 3),
    TernaryWeight("lsq"),
    TernaryWeight("pact", "tensor"),
    TernaryWeight("absmean", dead_zone_bias=0.1),
    TernaryWeight("lsq", "tensor", dead_zone_bias=0.1),
    AffineWeight(4, True, "seq", "group", 3),
    AffineWeight(4),
    AffineWeight(8, True, granularity="tensor"),
    AffineWeight(4, scale="lsq", granularity="group", group_size=2),
    AffineWeight(4, scale="pact", clip_init=1.5),
    AffineWeight(8, True, scale="pact"),
]


class Mixed(nn.Module):
    """A linear and, behind it, a layer with its weight as [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(6, 12), nn.Module()
        self.conv.weight, self.conv.bias = nn.Parameter(torch.randn(12, 5)), nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.conv.bias, self.linear(x), self.conv.weight)


class Alone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def quantised(spec: TernaryWeight | AffineWeight, module: nn.Module | None = None) -> fx.GraphModule:
    graph_module, _ = apply(FoldTransposedLinear(), export(module or Mixed(), torch.randn(6, 6)))
    names = {n for n, _ in graph_module.named_parameters()}
    overrides = {name: spec for name in ("linear", "fc") if f"{name}.weight" in names}
    return apply(InsertFakeQuant(QuantConfig(weight=spec, overrides=overrides)), graph_module)[0]


def alone(spec: TernaryWeight | AffineWeight) -> fx.GraphModule:
    return quantised(spec, Alone())


def lowered(graph_module: fx.GraphModule) -> fx.GraphModule:
    for one in (FreezeScales(), PackWeights(), LowerLinear()):
        graph_module, modified = apply(one, graph_module)
        assert modified
    return graph_module


def test_scales_freeze() -> None:
    graph_module, modified = apply(FreezeScales(), alone(TernaryWeight()))
    assert modified
    assert_expected_inline(
        text(graph_module),
        """\
fc_weight = self.fc.weight
fc_bias = self.fc.bias
fc_weight_scale = self.fc.weight_scale
fake_quant_default = tsld.fake_quant.default(fc_weight, fc_weight_scale, None, 'twn', 2, 0)
linear = aten.linear.default(x, fake_quant_default, fc_bias)
return pytree.tree_unflatten((linear,), self._out_spec)""",
    )
    assert graph_module.fc.weight_scale.shape == (3, 1)
    assert not graph_module.fc.weight_scale.requires_grad


def test_learned_clips_freeze_into_scales_and_zero_points() -> None:
    graph_module, _ = apply(FreezeScales(), alone(AffineWeight(scale="pact")))
    assert_expected_inline(
        text(graph_module),
        """\
fc_weight = self.fc.weight
fc_bias = self.fc.bias
fc_weight_scale = self.fc.weight_scale
fc_weight_zero = self.fc.weight_zero
fake_quant_default = tsld.fake_quant.default(fc_weight, fc_weight_scale, fc_weight_zero, 'pact', 4, 0)
linear = aten.linear.default(x, fake_quant_default, fc_bias)
return pytree.tree_unflatten((linear,), self._out_spec)""",
    )
    assert "weight_clip" not in dict(graph_module.fc.named_parameters())
    assert graph_module.fc.weight_zero.dtype == torch.uint8


def test_weights_pack() -> None:
    graph_module, _ = apply(FreezeScales(), alone(AffineWeight(granularity="group", group_size=2)))
    graph_module, modified = apply(PackWeights(), graph_module)
    assert modified
    assert_expected_inline(
        text(graph_module),
        """\
fc_bias = self.fc.bias
fc_weight_scale = self.fc.weight_scale
fc_weight_zero = self.fc.weight_zero
fc_weight_packed = self.fc.weight_packed
dequantize_weight_default = tsld.dequantize_weight.default(fc_weight_packed, fc_weight_scale, fc_weight_zero, 4, 2, 6)
linear = aten.linear.default(x, dequantize_weight_default, fc_bias)
return pytree.tree_unflatten((linear,), self._out_spec)""",
    )
    assert graph_module.fc.weight_packed.shape == (3, 3)
    assert [n for n, _ in graph_module.named_parameters()] == ["fc.bias"]


def test_linears_lower() -> None:
    graph_module = lowered(alone(TernaryWeight()))
    assert_expected_inline(
        text(graph_module),
        """\
fc_bias = self.fc.bias
fc_weight_scale = self.fc.weight_scale
fc_weight_packed = self.fc.weight_packed
lowbit_linear_default = tsld.lowbit_linear.default(x, fc_weight_packed, fc_weight_scale, None, fc_bias, 2, 0, 6)
return pytree.tree_unflatten((lowbit_linear_default,), self._out_spec)""",
    )


@pytest.mark.parametrize("spec", SPECS)
def test_every_step_keeps_the_weights_bit_for_bit(spec: TernaryWeight | AffineWeight) -> None:
    trained = quantised(spec)
    eye = torch.eye(6)
    expected = trained(eye)
    frozen, _ = apply(FreezeScales(), trained)
    assert torch.equal(frozen(eye), expected)
    packed, _ = apply(PackWeights(), frozen)
    assert torch.equal(packed(eye), expected)
    final, _ = apply(LowerLinear(), packed)
    torch.testing.assert_close(final(eye), expected, rtol=1e-6, atol=1e-6)
    assert not [n for n, _ in final.named_parameters() if n.endswith("weight")]


@pytest.mark.parametrize("spec", SPECS[::3])
def test_new_nodes_carry_shapes_and_origins(spec: TernaryWeight | AffineWeight) -> None:
    graph_module = lowered(quantised(spec))
    for node in graph_module.graph.nodes:
        if node.op != "output":
            assert "val" in node.meta, node.name
        if node.target is torch.ops.tsld.lowbit_linear.default:
            assert node.meta["nn_module_stack"]


def test_untouched_graphs_and_idempotence() -> None:
    plain = export(Mixed(), torch.randn(2, 6))
    for one in (FreezeScales(), PackWeights(), LowerLinear()):
        assert_untouched(one, plain)
    frozen, _ = apply(FreezeScales(), quantised(AffineWeight(scale="lsq")))
    assert_untouched(FreezeScales(), frozen)
    assert_untouched(LowerLinear(), frozen)
    packed, _ = apply(PackWeights(), frozen)
    assert_untouched(PackWeights(), packed)
    assert_untouched(FreezeScales(), packed)
    final, _ = apply(LowerLinear(), packed)
    for one in (FreezeScales(), PackWeights(), LowerLinear()):
        assert_untouched(one, final)


def test_weight_used_elsewhere_too_is_kept() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + self.fc.weight.sum()

    module = Shared()
    graph_module = lowered(quantised(TernaryWeight(), module))
    assert graph_module.fc.weight is module.fc.weight


def test_steps_run_in_torchs_pass_manager() -> None:
    graph_module = quantised(TernaryWeight())
    expected = graph_module(torch.eye(6))
    for one in (FreezeScales(), PackWeights(), LowerLinear()):
        graph_module = assert_runs_in_torchs_pass_manager(one, graph_module)
    torch.testing.assert_close(graph_module(torch.eye(6)), expected)


def test_packing_before_freezing_is_refused() -> None:
    with pytest.raises(PassError, match=r"scale of 'fc'.*is not frozen. Run FreezeScales first"):
        PackWeights()(alone(TernaryWeight()))


def test_packing_weights_of_another_precision_is_refused() -> None:
    frozen, _ = apply(FreezeScales(), alone(TernaryWeight()))
    with pytest.raises(PassError, match=r"'fc\.weight' is torch\.bfloat16. Pack float32 weights"):
        PackWeights()(frozen.to(torch.bfloat16))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("spec", [TernaryWeight(), AffineWeight(), TernaryWeight("lsq")])
def test_weights_that_are_not_finite_are_refused(spec: TernaryWeight | AffineWeight, value: float) -> None:
    graph_module = alone(spec)
    with torch.no_grad():
        graph_module.fc.weight[1, 2] = value
    with pytest.raises(PassError, match="the weight of 'fc' holds NaN or Inf"):
        lowered(graph_module)


def test_learned_scale_that_is_not_finite_is_refused() -> None:
    graph_module = alone(TernaryWeight("lsq"))
    with torch.no_grad():
        graph_module.fc.weight_scale[0] = float("nan")
    with pytest.raises(PassError, match="the scale of 'fc' holds NaN or Inf"):
        lowered(graph_module)


def test_quantised_value_that_is_no_parameter_is_refused() -> None:
    class Computed(nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            return x @ torch.ops.tsld.fake_quant(weight, None, None, "twn", 2, 0).T

    graph_module = export(Computed(), torch.randn(2, 6), torch.randn(3, 6))
    with pytest.raises(PassError, match="is not a parameter"):
        FreezeScales()(graph_module)
