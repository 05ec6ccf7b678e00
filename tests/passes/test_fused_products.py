"""FuseGatedProjection and FuseNormLinear: what is around a product becomes part of it, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.nn import functional

from tests.graphs import apply, assert_runs_in_torchs_pass_manager, assert_untouched, export, text
from tests.models import build
from tests.passes.test_fuse_projections import layer
from tsld_fx import convert, prepare
from tsld_fx.capture import capture
from tsld_fx.decode_linear_ops import silu_mul_taking_turns, taking_turns
from tsld_fx.passes import FuseGatedActivation, FuseGatedProjection, FuseNormLinear, FuseRMSNorm, run_passes
from tsld_fx.passes.graph_tools import calls
from tsld_fx.passes.pipelines import decode_pipeline

tsld = torch.ops.tsld


class Gated(nn.Module):
    """An MLP's first half."""

    def __init__(self, gate: nn.Module, up: nn.Module, also: str = "") -> None:
        super().__init__()
        self.gate, self.up, self.also = gate, up, also

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate(x), self.up(x * 2 if self.also == "other input" else x)
        out = functional.silu(gate) * up
        return out + gate if self.also == "gate" else out


def gated_graph(module: nn.Module, inputs: int) -> torch.fx.GraphModule:
    return run_passes(export(module, torch.randn(2, 3, inputs)), (FuseGatedActivation(),))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("bits", "group", "zero"), [(2, 0, False), (4, 8, True), (8, 0, False), (2, -1, False)])
def test_gated_projection_gives_the_same_features(bits: int, group: int, zero: bool, bias: bool) -> None:
    module = Gated(*(layer(24, 40, bits, group, zero, bias) for _ in range(2)))
    x = torch.randn(2, 3, 24)
    graph_module, modified = apply(FuseGatedProjection(), gated_graph(module, 24))
    assert modified and not calls(graph_module.graph, tsld.lowbit_linear.default, tsld.silu_mul.default)
    torch.testing.assert_close(graph_module(x), module(x))
    assert_untouched(FuseGatedProjection(), graph_module)


def test_gated_projection_as_text() -> None:
    graph_module, _ = apply(FuseGatedProjection(), gated_graph(Gated(layer(8, 16), layer(8, 16)), 8))
    assert_expected_inline(
        text(graph_module),
        """\
fused_projections_layer_0_weight_packed = self.fused_projections.layer_0.weight_packed
fused_projections_layer_0_weight_scale = self.fused_projections.layer_0.weight_scale
gated_linear_default = tsld.gated_linear.default(x, fused_projections_layer_0_weight_packed, fused_projections_layer_0_weight_scale, None, None, 2, 0, 8)
return pytree.tree_unflatten((gated_linear_default,), self._out_spec)""",  # noqa: E501
    )


def test_gated_projections_that_stay() -> None:
    for module, inputs in (
        (Gated(layer(8, 12), layer(8, 12)), 8),  # not whole tiles of 8 features
        (Gated(layer(8, 16), layer(8, 16, bits=4)), 8),
        (Gated(layer(8, 16), nn.Linear(8, 16)), 8),
        (Gated(layer(8, 16), layer(8, 16), also="gate"), 8),
        (Gated(layer(8, 16), layer(8, 16), also="other input"), 8),
    ):
        assert_untouched(FuseGatedProjection(), gated_graph(module, inputs))


def test_taking_turns() -> None:
    gate, up = torch.arange(16), torch.arange(16) + 100
    both = taking_turns(gate, up)
    assert both.tolist() == [*range(8), *range(100, 108), *range(8, 16), *range(108, 116)]
    x = torch.randn(3, 32)
    gate, up = torch.cat([x[:, :8], x[:, 16:24]], 1), torch.cat([x[:, 8:16], x[:, 24:]], 1)
    torch.testing.assert_close(silu_mul_taking_turns(x), functional.silu(gate) * up)


class Block(nn.Module):
    """A residual addition, RMSNorm, and what reads them."""

    def __init__(self, reader: nn.Module, add: bool = True, twice: bool = False) -> None:
        super().__init__()
        self.weight, self.reader, self.add, self.twice = nn.Parameter(torch.randn(16)), reader, add, twice

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        s = a + b if self.add else a
        h = self.weight * (s * torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + 1e-6))
        y = self.reader(h)
        return (y.sum(-1, keepdim=True) + s) * 2 + (h if self.twice else 0)


def block_graph(module: nn.Module) -> torch.fx.GraphModule:
    passes = (FuseRMSNorm(), FuseGatedActivation(), FuseGatedProjection())
    return run_passes(export(module, *torch.randn(2, 2, 3, 16)), passes)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("add", [False, True])
def test_norm_becomes_part_of_the_product(add: bool, gated: bool) -> None:
    reader = Gated(layer(16, 24), layer(16, 24)) if gated else layer(16, 9, bits=4, bias=True)
    module, (a, b) = Block(reader, add), torch.randn(2, 2, 3, 16)
    graph_module = assert_runs_in_torchs_pass_manager(FuseNormLinear(), block_graph(module))
    (node,) = calls(graph_module.graph, tsld.norm_linear.default, tsld.add_norm_linear.default)
    assert node.target is (tsld.add_norm_linear.default if add else tsld.norm_linear.default)
    assert node.args[-1] is gated
    assert not calls(graph_module.graph, tsld.rms_norm.default, tsld.add_rms_norm.default, tsld.lowbit_linear.default)
    torch.testing.assert_close(graph_module(a, b), module(a, b))
    assert_untouched(FuseNormLinear(), graph_module)


def test_norms_that_stay() -> None:
    for module in (
        Block(layer(16, 9), twice=True),  # two readers
        Block(nn.Linear(16, 9)),
        Block(nn.Identity()),
    ):
        assert_untouched(FuseNormLinear(), block_graph(module))


def test_fused_operators_have_fake_results() -> None:
    with torch.device("meta"):
        x, norm, packed, scales = torch.empty(2, 3, 16), torch.empty(16), torch.empty(32, 4), torch.empty(32, 1)
        linear = (packed.byte(), scales, None, None, 2, 0, 16)
        assert tsld.gated_linear(x, *linear).shape == (2, 3, 16)
        assert tsld.norm_linear(x, norm, 1e-6, *linear, False).shape == (2, 3, 32)
        y, total = tsld.add_norm_linear(x, x, norm, 1e-6, *linear, True)
        assert y.shape == (2, 3, 16) and total.shape == x.shape


def test_a_layer_of_llama_is_five_operators() -> None:
    """q/k/v with the norm, attention, output projection, gate and up with the norm and the activation, down."""
    lowered = convert(prepare(build("llama", intermediate_size=40)), backend="reference")
    graph_module = run_passes(capture(lowered, training=False, with_positions=True), decode_pipeline(2, 20))
    names = [str(n.target).split(".")[1] for n in graph_module.graph.nodes if str(n.target).startswith("tsld.")]
    layers = ["add_norm_linear", "cached_attention", "lowbit_linear", "add_norm_linear", "lowbit_linear"] * 2
    assert names == ["norm_linear", *layers[1:], "add_rms_norm"]
