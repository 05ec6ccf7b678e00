"""SplitOffHead: golden graph, what it leaves alone, and hidden states that the head turns into the plain logits."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline

from tests.graphs import apply, assert_untouched, export, text
from tests.models import build, ids
from tests.passes.test_fuse_head_loss import IDS, Tiny
from tsld_fx import QuantConfig, prepare
from tsld_fx.passes import SplitOffHead


def test_golden_graph() -> None:
    graph_module, modified = apply(SplitOffHead(), export(Tiny(bias=True), IDS))
    assert modified
    assert_expected_inline(
        text(graph_module),
        """\
embedding_weight = self.embedding.weight
head_weight = self.head.weight
head_bias = self.head.bias
embedding = aten.embedding.default(embedding_weight, ids)
tanh = aten.tanh.default(embedding)
return {'head_input': tanh, 'head_weight': head_weight, 'head_bias': head_bias}""",
    )


def test_other_ends_are_left_alone() -> None:
    assert_untouched(SplitOffHead(), export(Tiny(cap=True), IDS))
    split, _ = apply(SplitOffHead(), export(Tiny(), IDS))
    assert_untouched(SplitOffHead(), split)


@pytest.mark.parametrize("family", ["gpt2", "opt_projected", "llama"])
def test_the_head_makes_the_plain_logits_of_what_is_given_out(family: str) -> None:
    prepared, tokens = prepare(build(family), QuantConfig()).eval(), ids()
    given = prepared.head_input(tokens)
    expected = prepared(tokens).logits
    assert torch.equal(torch.nn.functional.linear(*given), expected)
    prepared.gradient_checkpointing_enable()  # by layers
    again = prepared.head_input(tokens)
    assert torch.equal(again.hidden, given.hidden) and again.weight is given.weight
