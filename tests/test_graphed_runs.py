"""The driver of the training tables: its fast ways against the plain losses."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.models import build
from tsld_fx import DistillConfig, QuantConfig

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from graphed_runs import Plan, run_together
from graphed_step import Models, Ways, no_checks

PLAIN = Ways(bf16=False, causal=False, fused=False, cached=False)
FAST = Ways(bf16=False)
QUIET = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def blocks(count: int = 12, tokens: int = 17) -> Tensor:
    return torch.randint(0, 97, (count, tokens), generator=torch.Generator().manual_seed(3))


def loss_and_gradients(family: str, method: str, ways: Ways) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    changes = QUIET if family == "gpt2" else {}
    models = Models(partial(build, family, 0, **changes), blocks(), ways)
    parameters = models.student(QuantConfig())
    samples = torch.tensor([7, 2, 9])
    with no_checks():
        total, values = models.loss(QuantConfig(), DistillConfig(method))(parameters, blocks()[samples], samples)
    total.backward()
    return total, values, {n: p.grad for n, p in parameters.items() if p.grad is not None}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("method", ["gt", "logit", "logit_gt", "tsld", "l2l"])
def test_the_fast_ways_change_no_loss_and_no_gradient(family: str, method: str) -> None:
    expected, theirs = loss_and_gradients(family, method, PLAIN), loss_and_gradients(family, method, FAST)
    torch.testing.assert_close(theirs[0], expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(theirs[1], expected[1].to(theirs[1].dtype), rtol=1e-5, atol=1e-6)
    assert theirs[2].keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        torch.testing.assert_close(theirs[2][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_runs_side_by_side_are_the_runs_alone() -> None:
    quant, data, stream = QuantConfig(), blocks(), blocks().flatten()
    plans = [Plan(f"{m}-{s}", quant, DistillConfig(m), s, 6, 2, 1e-3, 2) for m, s in (("tsld", 0), ("gt", 1))]
    make = partial(build, "gpt2", 0, **QUIET)
    together = run_together(plans, Models(make, data, FAST), data, stream, lambda text: None)
    for plan, found in zip(plans, together, strict=True):
        alone = run_together([plan], Models(make, data, PLAIN), data, stream, lambda text: None)[0]
        assert found.best_step == alone.best_step
        assert found.validation == pytest.approx(alone.validation, rel=1e-4)
        losses = [[m["loss"] for m in r.metrics if "loss" in m] for r in (found, alone)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
