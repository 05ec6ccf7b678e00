"""InsertDistillationHooks: hidden states and attention scores as named outputs."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn
from torch.nn import functional

from tests.graphs import apply, assert_runs_in_torchs_pass_manager, assert_untouched, export, text
from tsld_fx.errors import PassError
from tsld_fx.passes import InsertDistillationHooks

BOTH = InsertDistillationHooks(("hidden_states", "attention_scores"))


class Layer(nn.Module):
    """Two heads over four features; the key is scaled so that it differs from the query."""

    def __init__(self, eager: bool, masked: bool) -> None:
        super().__init__()
        self.eager, self.masked, self.linear = eager, masked, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        query = x.view(x.shape[0], x.shape[1], 2, 2).transpose(1, 2)
        key = query * 0.5
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril() if self.masked else None
        if self.eager:
            scores = query @ key.transpose(-1, -2) * 2**-0.5
            if mask is not None:
                scores = scores.masked_fill(~mask, -1e30)
            y = scores.softmax(-1) @ query
        else:
            y = functional.scaled_dot_product_attention(query, key, query, attn_mask=mask)
        return x + self.linear(y.transpose(1, 2).reshape_as(x))


class Decoder(nn.Module):
    def __init__(self, eager: bool = False, masked: bool = True, layers: int = 2) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(Layer(eager, masked) for _ in range(layers)), nn.Linear(4, 7)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def graph(**options: bool | int) -> tuple[nn.Module, fx.GraphModule]:
    module = Decoder(**options)
    return module, export(module, torch.randn(2, 3, 4))


def test_hidden_states_become_outputs() -> None:
    graph_module, modified = apply(InsertDistillationHooks(("hidden_states",)), graph(layers=1, masked=False)[1])
    assert modified
    assert_expected_inline(
        text(graph_module),
        """\
layers_0_linear_weight = getattr(self.layers, "0").linear.weight
layers_0_linear_bias = getattr(self.layers, "0").linear.bias
head_weight = self.head.weight
head_bias = self.head.bias
view = aten.view.default(x, [2, 3, 2, 2])
transpose = aten.transpose.int(view, 1, 2)
mul = aten.mul.Tensor(transpose, 0.5)
scaled_dot_product_attention = aten.scaled_dot_product_attention.default(transpose, mul, transpose)
transpose_1 = aten.transpose.int(scaled_dot_product_attention, 1, 2)
reshape_as = aten.reshape_as.default(transpose_1, x)
linear = aten.linear.default(reshape_as, layers_0_linear_weight, layers_0_linear_bias)
add = aten.add.Tensor(x, linear)
linear_1 = aten.linear.default(add, head_weight, head_bias)
return {'logits': linear_1, 'hidden_states.0': add}""",
    )


def test_scores_are_recomputed_beside_a_fused_attention() -> None:
    graph_module, _ = apply(InsertDistillationHooks(("attention_scores",)), graph(layers=1, masked=False)[1])
    assert_expected_inline(
        text(graph_module),
        """\
layers_0_linear_weight = getattr(self.layers, "0").linear.weight
layers_0_linear_bias = getattr(self.layers, "0").linear.bias
head_weight = self.head.weight
head_bias = self.head.bias
view = aten.view.default(x, [2, 3, 2, 2])
transpose = aten.transpose.int(view, 1, 2)
mul = aten.mul.Tensor(transpose, 0.5)
transpose_int = aten.transpose.int(mul, -2, -1)
matmul_default = aten.matmul.default(transpose, transpose_int)
mul_tensor = aten.mul.Tensor(matmul_default, 0.7071067811865476)
scaled_dot_product_attention = aten.scaled_dot_product_attention.default(transpose, mul, transpose)
transpose_1 = aten.transpose.int(scaled_dot_product_attention, 1, 2)
reshape_as = aten.reshape_as.default(transpose_1, x)
linear = aten.linear.default(reshape_as, layers_0_linear_weight, layers_0_linear_bias)
add = aten.add.Tensor(x, linear)
linear_1 = aten.linear.default(add, head_weight, head_bias)
return {'logits': linear_1, 'attention_scores.0': mul_tensor}""",
    )


def test_pass_without_taps_only_names_the_logits() -> None:
    graph_module, modified = apply(InsertDistillationHooks(), graph(layers=1, masked=False)[1])
    assert modified
    assert list(graph_module(torch.randn(2, 3, 4))) == ["logits"]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("eager", [False, True])
def test_values_are_those_of_the_layers(eager: bool, masked: bool) -> None:
    module, graph_module = graph(eager=eager, masked=masked)
    graph_module, _ = apply(BOTH, graph_module)
    x = torch.randn(2, 3, 4)
    out = graph_module(x)
    assert list(out) == ["logits", *(f"{tap}.{i}" for tap in ("hidden_states", "attention_scores") for i in (0, 1))]
    torch.testing.assert_close(out["logits"], module(x))
    causal = torch.ones(3, 3, dtype=torch.bool).tril()
    for index, layer in enumerate(module.layers):
        query = x.view(2, 3, 2, 2).transpose(1, 2)
        scores = query @ (query * 0.5).transpose(-1, -2) * 2**-0.5
        torch.testing.assert_close(out[f"attention_scores.{index}"][..., causal], scores[..., causal])
        assert torch.isfinite(out[f"attention_scores.{index}"]).all()
        x = layer(x)
        torch.testing.assert_close(out[f"hidden_states.{index}"], x)


def test_last_value_that_leaves_a_layer_is_its_hidden_state() -> None:
    class Side(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            side = x.sin()
            return side, x + side.cos()

    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Side()])

        def forward(self, x: Tensor) -> Tensor:
            side, y = self.layers[0](x)
            return side * y

    graph_module, _ = apply(InsertDistillationHooks(("hidden_states",)), export(Skipping(), torch.randn(2, 3, 4)))
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(graph_module(x)["hidden_states.0"], x + x.sin().cos())


def test_gradients_flow_through_the_taps() -> None:
    module, graph_module = graph()
    graph_module, _ = apply(BOTH, graph_module)
    graph_module(torch.randn(2, 3, 4))["attention_scores.1"].sum().backward()
    assert module.layers[0].linear.weight.grad.abs().sum() > 0


def test_grouped_queries_and_an_explicit_scale() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Identity()])

        def forward(self, query: Tensor, key: Tensor) -> Tensor:
            y = functional.scaled_dot_product_attention(query, key, key, scale=0.3, enable_gqa=True)
            return y.flatten(2)

    graph_module = export(Grouped(), torch.randn(2, 4, 3, 5), torch.randn(2, 2, 3, 5))
    graph_module, _ = apply(InsertDistillationHooks(("attention_scores",)), graph_module)
    query, key = torch.randn(2, 4, 3, 5), torch.randn(2, 2, 3, 5)
    expected = torch.stack([query[:, h] @ key[:, h // 2].transpose(-1, -2) * 0.3 for h in range(4)], dim=1)
    torch.testing.assert_close(graph_module(query, key)["attention_scores.0"], expected)


def test_additive_mask_is_in_the_scores() -> None:
    class Additive(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    x, mask = torch.randn(1, 2, 3, 4), torch.randn(1, 1, 3, 3)
    graph_module, _ = apply(InsertDistillationHooks(("attention_scores",)), export(Additive(), x, mask))
    torch.testing.assert_close(graph_module(x, mask)["attention_scores.0"], x @ x.mT * 0.5 + mask)


def test_taps_go_on_and_off_without_a_trace() -> None:
    _, graph_module = graph()
    graph_module, _ = apply(InsertDistillationHooks(), graph_module)
    plain = str(graph_module.graph)
    assert_untouched(InsertDistillationHooks(), graph_module)
    graph_module, _ = apply(BOTH, graph_module)
    assert_untouched(BOTH, graph_module)
    graph_module, modified = apply(InsertDistillationHooks(("hidden_states",)), graph_module)
    assert modified
    assert list(graph_module(torch.randn(2, 3, 4))) == ["logits", "hidden_states.0", "hidden_states.1"]
    graph_module, _ = apply(InsertDistillationHooks(), graph_module)
    assert str(graph_module.graph) == plain


def test_new_nodes_carry_shapes() -> None:
    graph_module, _ = apply(BOTH, graph()[1])
    for node in graph_module.graph.nodes:
        if node.op != "output":
            assert "val" in node.meta, node.name


def test_runs_in_torchs_pass_manager() -> None:
    assert_runs_in_torchs_pass_manager(BOTH, graph()[1])


def test_unknown_tap_and_graph_without_layers_are_refused() -> None:
    with pytest.raises(PassError, match=r"unknown tap 'logit'. Known taps: hidden_states, attention_scores"):
        InsertDistillationHooks(("logit",))(graph()[1])
    with pytest.raises(PassError, match=r"found no hidden states in this graph.*method without taps"):
        InsertDistillationHooks(("hidden_states",))(export(nn.Linear(4, 4), torch.randn(2, 4)))
    with pytest.raises(PassError, match="found no attention scores"):
        InsertDistillationHooks(("attention_scores",))(export(nn.Linear(4, 4), torch.randn(2, 4)))


def test_refused_graph_is_left_as_it_was() -> None:
    graph_module = export(nn.Linear(4, 4), torch.randn(2, 4))
    before = str(graph_module.graph)
    with pytest.raises(PassError):
        BOTH(graph_module)
    assert str(graph_module.graph) == before
