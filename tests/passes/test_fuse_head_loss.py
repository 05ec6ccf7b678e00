"""FuseHeadLoss: golden graph, what it leaves alone, and the fused graph's numbers against the plain one's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

from tests.graphs import apply, assert_runs_in_torchs_pass_manager, assert_untouched, export, text
from tests.models import build, ids
from tsld_fx import DistillConfig, QuantConfig, TernaryWeight, losses, prepare
from tsld_fx.fused_loss import HeadLoss, objective_of
from tsld_fx.passes import FuseHeadLoss, InsertFakeQuant

TSLD = FuseHeadLoss(("tsld", "gt"), (1.0, 0.5), (10.0, 1.0))


class Tiny(nn.Module):
    """An embedding and a head."""

    def __init__(self, tied: bool = False, bias: bool = False, cap: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=bias)
        self.cap = cap
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.head(torch.tanh(self.embedding(ids)))
        return torch.tanh(logits) if self.cap else logits


IDS = torch.tensor([[1, 4, 2, 9], [3, 3, 7, 0]])


def test_golden_graph() -> None:
    graph_module, modified = apply(TSLD, export(Tiny(), IDS))
    assert modified
    assert_expected_inline(
        text(graph_module),
        """\
embedding_weight = self.embedding.weight
head_weight = self.head.weight
embedding = aten.embedding.default(embedding_weight, ids)
tanh = aten.tanh.default(embedding)
head_loss_default = tsld.head_loss.default(tanh, head_weight, None, teacher_hidden, teacher_weight, teacher_bias, labels, segment_ids, token_scores, ['tsld', 'gt'], [1.0, 0.5], [10.0, 1.0], 0, None, top_indices, top_log_probs, top_rest)
getitem = head_loss_default[0]
getitem_1 = head_loss_default[1]
getitem_2 = head_loss_default[2]
return {'loss': getitem, 'loss_terms': getitem_1, 'token_scores': getitem_2}""",  # noqa: E501
    )


@pytest.mark.parametrize(("tied", "bias"), [(False, False), (True, False), (False, True)])
def test_equals_the_plain_graph(tied: bool, bias: bool) -> None:
    torch.manual_seed(0)
    tiny = Tiny(tied, bias).double()
    guide = {"teacher_hidden": torch.randn(2, 4, 5).double(), "teacher_weight": torch.randn(11, 5).double()}
    logits = tiny(IDS)
    theirs = guide["teacher_hidden"] @ guide["teacher_weight"].t()
    expected = losses.token_scaled_logit_distillation(logits, theirs, IDS) + 0.5 * losses.ground_truth(logits, IDS)
    expected.backward()
    gradients = {name: p.grad for name, p in tiny.named_parameters()}
    tiny.zero_grad()
    graph_module = assert_runs_in_torchs_pass_manager(TSLD, export(tiny, IDS))
    found = graph_module(IDS, labels=IDS, **guide)
    torch.testing.assert_close(found["loss"], expected, rtol=1e-12, atol=0)
    assert found["loss_terms"].shape == (2,)
    assert found["token_scores"].shape == (2, 3)
    found["loss"].backward()
    for name, parameter in graph_module.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[name.replace("head.weight", "embedding.weight") if tied else name]
        )


def test_new_nodes_know_their_shapes_and_a_quantised_head_stays_quantised() -> None:
    graph_module, _ = apply(InsertFakeQuant(QuantConfig(skip=())), export(Tiny(), IDS))
    graph_module, _ = apply(TSLD, graph_module)
    call = next(n for n in graph_module.graph.nodes if n.target is torch.ops.tsld.head_loss.default)
    assert call.args[1].target is torch.ops.tsld.fake_quant.default
    assert [tuple(v.shape) for v in call.meta["val"]] == [(), (2,), (2, 3)]


@pytest.mark.parametrize("module", [Tiny(cap=True), nn.Sequential(nn.Embedding(11, 6), nn.Tanh())])
def test_other_ends_are_left_alone(module: nn.Module) -> None:
    assert_untouched(TSLD, export(module, IDS))
    fused, _ = apply(TSLD, export(Tiny(), IDS))
    assert_untouched(TSLD, fused)


@pytest.mark.parametrize("family", ["gpt2", "opt_projected", "gpt_neo", "llama", "qwen3"])
def test_prepared_models_give_the_same_loss_and_gradients(family: str) -> None:
    model, tokens = build(family), ids()
    config = QuantConfig(overrides={"lm_head": TernaryWeight()} if family == "llama" else {})
    prepared, guide = prepare(model, config), torch.randn(97, 16)
    objective = objective_of(DistillConfig().terms())
    assert objective is not None
    assert prepared.fuse_head_loss(objective)
    hidden = torch.randn(2, 9, 16)
    values: list[dict[str, Any]] = []
    for fused in (True, False):
        prepared.zero_grad()
        if fused:
            out = prepared(tokens, head_loss=HeadLoss(objective, tokens, hidden, guide))
            assert out.logits is None
            loss = out.loss
        else:
            logits = prepared(tokens).logits
            loss = losses.token_scaled_logit_distillation(logits, hidden @ guide.t(), tokens)
            loss = loss + losses.ground_truth(logits, tokens)
        loss.backward()
        values.append({"loss": loss.detach(), **{n: p.grad for n, p in prepared.named_parameters()}})
    for name, value in values[0].items():
        torch.testing.assert_close(value, values[1][name], rtol=1e-4, atol=1e-5, msg=name)
