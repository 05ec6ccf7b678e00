"""SetDropout: a graph captured in train mode switches between train and eval mode."""

from __future__ import annotations

import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn
from torch.nn import functional

from tests.graphs import apply, assert_runs_in_torchs_pass_manager, assert_untouched, text
from tsld_fx.passes import SetDropout


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = functional.scaled_dot_product_attention(x, x, x, dropout_p=0.25)
        return functional.dropout(y, 0.1, training=True)


def captured() -> fx.GraphModule:
    return torch.export.export(Attention(), (torch.randn(1, 2, 3, 4),), strict=False).module(check_guards=False)


def test_dropout_goes_off_and_comes_back_with_its_rates() -> None:
    graph_module, trained = captured(), text(captured())
    graph_module, modified = apply(SetDropout(training=False), graph_module)
    assert modified
    assert_expected_inline(
        text(graph_module),
        """\
scaled_dot_product_attention = aten.scaled_dot_product_attention.default(x, x, x, None, 0.0)
dropout = aten.dropout.default(scaled_dot_product_attention, 0.1, False)
return pytree.tree_unflatten((dropout,), self._out_spec)""",
    )
    graph_module, modified = apply(SetDropout(training=True), graph_module)
    assert modified
    assert text(graph_module) == trained


def test_eval_mode_is_calm_and_train_mode_is_not() -> None:
    x = torch.randn(1, 2, 3, 4)
    graph_module, _ = apply(SetDropout(training=False), captured())
    expected = functional.scaled_dot_product_attention(x, x, x)
    torch.testing.assert_close(graph_module(x), expected)
    graph_module, _ = apply(SetDropout(training=True), graph_module)
    assert not torch.equal(graph_module(x), graph_module(x))
    torch.manual_seed(3)
    ours = graph_module(x)
    torch.manual_seed(3)
    assert torch.equal(ours, Attention()(x))


def test_mode_that_a_graph_is_in_leaves_it_untouched() -> None:
    assert_untouched(SetDropout(training=True), captured())
    calm, _ = apply(SetDropout(training=False), captured())
    assert_untouched(SetDropout(training=False), calm)
    linear = torch.export.export(nn.Linear(3, 2), (torch.randn(1, 3),)).module(check_guards=False)
    assert_untouched(SetDropout(training=False), linear)


def test_runs_in_torchs_pass_manager() -> None:
    graph_module = assert_runs_in_torchs_pass_manager(SetDropout(training=False), captured())
    x = torch.randn(1, 2, 3, 4)
    assert torch.equal(graph_module(x), graph_module(x))
