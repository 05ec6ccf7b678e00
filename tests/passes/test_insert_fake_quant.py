"""InsertFakeQuant: fake quantisation between weights and linears, on anybody's graph."""

from __future__ import annotations

import logging

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn

from tests.graphs import apply, assert_runs_in_torchs_pass_manager, assert_untouched, export, text
from tests.oracles import fake_quantise
from tsld_fx import AffineWeight, QuantConfig, TernaryWeight
from tsld_fx.errors import ConfigError
from tsld_fx.passes import FoldTransposedLinear, InsertFakeQuant
from tsld_fx.passes.graph_tools import calls


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 6), nn.Linear(6, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class Tied(nn.Module):
    """An embedding whose weight is the head's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.lm_head = nn.Embedding(11, 4), nn.Linear(4, 4), nn.Linear(4, 11, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.body(self.embed(ids)))


class Twice(nn.Module):
    """One layer used two times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))


class Conv1D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 3)), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


def graph() -> fx.GraphModule:
    return export(Model(), torch.randn(2, 8))


def test_ternary_weights() -> None:
    graph_module, modified = apply(InsertFakeQuant(), graph())
    assert modified
    assert_expected_inline(
        text(graph_module),
        """\
up_weight = self.up.weight
up_bias = self.up.bias
down_weight = self.down.weight
fake_quant_default = tsld.fake_quant.default(up_weight, None, None, 'twn', 2, 0)
linear = aten.linear.default(x, fake_quant_default, up_bias)
relu = aten.relu.default(linear)
fake_quant_default_1 = tsld.fake_quant.default(down_weight, None, None, 'twn', 2, 0)
linear_1 = aten.linear.default(relu, fake_quant_default_1)
return pytree.tree_unflatten((linear_1,), self._out_spec)""",
    )


def test_learned_scales_become_parameters_of_their_layers() -> None:
    config = QuantConfig(
        weight=TernaryWeight(scale="lsq"), overrides={"down": AffineWeight(scale="pact", granularity="tensor")}
    )
    graph_module, _ = apply(InsertFakeQuant(config), graph())
    assert_expected_inline(
        text(graph_module),
        """\
up_weight = self.up.weight
up_bias = self.up.bias
down_weight = self.down.weight
up_weight_scale = self.up.weight_scale
fake_quant_default = tsld.fake_quant.default(up_weight, up_weight_scale, None, 'lsq', 2, 0)
linear = aten.linear.default(x, fake_quant_default, up_bias)
relu = aten.relu.default(linear)
down_weight_clip = self.down.weight_clip
learned_clip_default = tsld.learned_clip.default(down_weight, down_weight_clip, 4, False, -1)
getitem = learned_clip_default[0]
getitem_1 = learned_clip_default[1]
fake_quant_default_1 = tsld.fake_quant.default(down_weight, getitem, getitem_1, 'pact', 4, -1)
linear_1 = aten.linear.default(relu, fake_quant_default_1)
return pytree.tree_unflatten((linear_1,), self._out_spec)""",
    )
    assert graph_module.up.weight_scale.shape == (6, 1)
    assert graph_module.down.weight_clip.shape == (1, 1)
    assert isinstance(graph_module.up.weight_scale, nn.Parameter)
    assert graph_module.down.weight_clip.item() == 4.0


def test_zero_points_of_lsq_become_buffers() -> None:
    config = QuantConfig(weight=None, overrides={"up": AffineWeight(scale="lsq", granularity="group", group_size=4)})
    graph_module, _ = apply(InsertFakeQuant(config), graph())
    assert_expected_inline(
        text(graph_module),
        """\
up_weight = self.up.weight
up_bias = self.up.bias
down_weight = self.down.weight
up_weight_scale = self.up.weight_scale
up_weight_zero = self.up.weight_zero
fake_quant_default = tsld.fake_quant.default(up_weight, up_weight_scale, up_weight_zero, 'lsq', 4, 4)
linear = aten.linear.default(x, fake_quant_default, up_bias)
relu = aten.relu.default(linear)
linear_1 = aten.linear.default(relu, down_weight)
return pytree.tree_unflatten((linear_1,), self._out_spec)""",
    )
    assert graph_module.up.weight_zero.dtype == torch.uint8
    assert "up.weight_zero" in dict(graph_module.named_buffers())


@pytest.mark.parametrize(
    "spec",
    [
        TernaryWeight(),
        TernaryWeight("absmean", "tensor"),
        AffineWeight(4, granularity="group", group_size=2),
        AffineWeight(8, True),
    ],
)
def test_values_are_those_of_weights_quantised_by_hand(spec: TernaryWeight | AffineWeight) -> None:
    module = Model().double()
    graph_module, _ = apply(
        InsertFakeQuant(QuantConfig(weight=spec)), export(module, torch.randn(2, 8, dtype=torch.float64))
    )
    group = {"tensor": -1, "channel": 0}.get(spec.granularity, spec.group_size)
    x = torch.randn(2, 8, dtype=torch.float64)
    up, down = (
        torch.from_numpy(fake_quantise(layer.weight.detach().numpy(), spec.scheme, spec.bits, group))
        for layer in (module.up, module.down)
    )
    expected = (x @ up.T + module.up.bias).relu() @ down.T
    torch.testing.assert_close(graph_module(x), expected)


def test_conv1d_is_quantised_per_output_channel() -> None:
    module = Conv1D().double()
    graph_module = export(module, torch.randn(2, 8, dtype=torch.float64))
    graph_module, _ = apply(FoldTransposedLinear(), graph_module)
    graph_module, _ = apply(InsertFakeQuant(), graph_module)
    weight = torch.from_numpy(fake_quantise(module.weight.detach().T.numpy(), "twn", 2, 0))
    x = torch.randn(2, 8, dtype=torch.float64)
    torch.testing.assert_close(graph_module(x), x @ weight.T + module.bias)
    graph_module(x).sum().backward()
    assert module.weight.grad.shape == (8, 3)


def test_layer_used_twice_gets_one_node() -> None:
    graph_module, _ = apply(InsertFakeQuant(), export(Twice(), torch.randn(2, 4)))
    assert len(calls(graph_module.graph, torch.ops.tsld.fake_quant.default)) == 1


def test_head_tied_to_the_embedding_is_left_alone_unless_asked() -> None:
    ids = torch.randint(0, 11, (2, 3))

    def layers(config: QuantConfig) -> list[str]:
        graph_module, _ = apply(InsertFakeQuant(config), export(Tied(), ids))
        (embedding,) = calls(graph_module.graph, torch.ops.aten.embedding.default)
        assert embedding.args[0].op == "get_attr"
        return [n.meta["tsld_module"] for n in calls(graph_module.graph, torch.ops.tsld.fake_quant.default)]

    assert layers(QuantConfig()) == ["body"]
    assert layers(QuantConfig(overrides={"lm_head": AffineWeight(bits=8)})) == ["body", "lm_head"]


def test_output_embedding_of_another_name_is_what_lm_head_means() -> None:
    def layers(one: InsertFakeQuant) -> list[str]:
        graph_module, _ = apply(one, graph())
        return [n.meta["tsld_module"] for n in calls(graph_module.graph, torch.ops.tsld.fake_quant.default)]

    assert layers(InsertFakeQuant(output_embedding="down")) == ["up"]
    assert layers(InsertFakeQuant(QuantConfig(skip=()), "down")) == ["up", "down"]
    assert layers(InsertFakeQuant(QuantConfig(overrides={"down": AffineWeight()}), "down")) == ["up", "down"]
    assert layers(InsertFakeQuant(QuantConfig(overrides={"*": None}), "down")) == []


def test_new_nodes_carry_shapes_and_origins() -> None:
    config = QuantConfig(weight=AffineWeight(scale="pact"))
    graph_module, _ = apply(InsertFakeQuant(config), graph())
    for node in graph_module.graph.nodes:
        if node.op != "output":
            assert "val" in node.meta, node.name
    for node in calls(graph_module.graph, torch.ops.tsld.fake_quant.default, torch.ops.tsld.learned_clip.default):
        assert list(node.meta["nn_module_stack"].values())[-1][0] in ("up", "down")


def test_nothing_to_quantise_leaves_the_graph_untouched_and_the_pass_is_idempotent() -> None:
    assert_untouched(InsertFakeQuant(QuantConfig(weight=None)), graph())
    assert_untouched(InsertFakeQuant(), export(nn.ReLU(), torch.randn(2)))
    configs = (QuantConfig(), QuantConfig(weight=AffineWeight(scale="lsq")), QuantConfig(overrides={"up": None}))
    for config in (*configs, QuantConfig(overrides={"up": AffineWeight(), "down": AffineWeight(bits=8)})):
        graph_module, _ = apply(InsertFakeQuant(config), graph())
        assert_untouched(InsertFakeQuant(config), graph_module)


def test_runs_in_torchs_pass_manager() -> None:
    assert_runs_in_torchs_pass_manager(InsertFakeQuant(), graph())


def test_saturating_clip_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="tsld_fx"):
        apply(InsertFakeQuant(QuantConfig(weight=AffineWeight(scale="pact", clip_init=0.5))), graph())
    assert "initial clip of up (gamma 0.50) saturates" in caplog.text
    assert "clip_init" in caplog.text


def test_group_size_that_does_not_divide_is_refused_by_layer() -> None:
    spec = TernaryWeight(granularity="group", group_size=4)
    with pytest.raises(ConfigError, match="cannot quantise 'down': group_size=4 does not divide in_features=6"):
        InsertFakeQuant(QuantConfig(weight=spec))(graph())


def test_pattern_without_a_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'model\.\*' matches no linear layer.*Its linear layers are up, down"):
        InsertFakeQuant(QuantConfig(overrides={"model.*": None}))(graph())


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_layer(value: float) -> None:
    module = Model()
    with torch.no_grad():
        module.down.weight[1, 2] = value
    with pytest.raises(ConfigError, match=r"'down\.weight' holds NaN or Inf.*overrides=\{'down': None\}"):
        InsertFakeQuant()(export(module, torch.randn(2, 8)))
    _graph_module, modified = apply(
        InsertFakeQuant(QuantConfig(overrides={"down": None})), export(module, torch.randn(2, 8))
    )
    assert modified
