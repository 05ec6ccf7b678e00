"""CausalAttention: unpadded batches without a mask tensor."""

import pytest
import torch

from tests.models import UNQUANTISED, build, ids
from tsld_fx import prepare
from tsld_fx.passes.causal_attention import CausalAttention
from tsld_fx.passes.graph_tools import argument, aten, calls
from tsld_fx.passes.runner import run_passes
from tsld_fx.prepared import PreparedModel


def masks(model: PreparedModel) -> list[object]:
    found = calls(model.graph_module.graph, aten.scaled_dot_product_attention.default)
    return [(argument(n, 3, "attn_mask"), argument(n, 5, "is_causal", False)) for n in found]


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_whole_blocks_need_no_mask(family: str) -> None:
    model = prepare(build(family), UNQUANTISED).eval()
    batch = ids(3, 11)
    expected = model(input_ids=batch).logits
    before = len(model.graph_module.graph.nodes)
    run_passes(model.graph_module, [CausalAttention(11)])
    assert set(masks(model)) == {(None, True)}
    assert len(model.graph_module.graph.nodes) < before  # the nodes that made the mask are gone
    torch.testing.assert_close(model(input_ids=batch).logits, expected, rtol=1e-5, atol=1e-5)
    shorter = model(input_ids=batch[:, :5]).logits
    torch.testing.assert_close(shorter, expected[:, :5], rtol=1e-5, atol=1e-5)


def test_a_sliding_window_within_the_block_stays() -> None:
    model = prepare(build("mistral", sliding_window=4), UNQUANTISED).eval()
    run_passes(model.graph_module, [CausalAttention(9)])
    assert all(mask is not None and not causal for mask, causal in masks(model))
    run_passes(model.graph_module, [CausalAttention(4)])  # blocks that the window holds whole
    assert set(masks(model)) == {(None, True)}


def test_dropout_stays() -> None:
    model = prepare(build("gpt2"), UNQUANTISED).train()
    rates = {
        argument(n, 4, "dropout_p") for n in calls(model.graph_module.graph, aten.scaled_dot_product_attention.default)
    }
    run_passes(model.graph_module, [CausalAttention(8)])
    found = calls(model.graph_module.graph, aten.scaled_dot_product_attention.default)
    assert {argument(n, 4, "dropout_p") for n in found} == rates and rates.pop() > 0
    model.eval()
    assert {argument(n, 4, "dropout_p") for n in found} == {0.0}
