"""The driver of the training tables: its fast ways against the plain losses."""

import sys
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.models import build
from tsld_fx import DistillConfig, QuantConfig
from tsld_fx.perplexity import perplexity

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from graphed_runs import Plan, run_together
from graphed_step import Models, Ways, no_checks

PLAIN = Ways(bf16=False, causal=False, fused=False, cached=False)
FAST = Ways(bf16=False, stacked=True)
QUIET = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def blocks(count: int = 12, tokens: int = 17) -> Tensor:
    return torch.randint(0, 97, (count, tokens), generator=torch.Generator().manual_seed(3))


@cache
def models_of(family: str, ways: Ways) -> Models:
    return Models(partial(build, family, 0, **(QUIET if family == "gpt2" else {})), blocks(), ways)


def loss_and_gradients(family: str, method: str, ways: Ways) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    models = models_of(family, ways)
    parameters = models.students(QuantConfig(), 1)
    with no_checks():
        found = models.loss(QuantConfig(), [DistillConfig(method)], 3)(parameters, torch.tensor([[7, 2, 9]]))
    total, values = found[0]
    total.backward()
    return total, values, {n: p.grad for n, p in parameters.items() if p.grad is not None}


@pytest.mark.parametrize(
    ("family", "method"), [("gpt2", "gt"), ("gpt2", "tsld"), ("gpt2", "l2l"), ("llama", "logit"), ("llama", "logit_gt")]
)
def test_the_fast_ways_change_no_loss_and_no_gradient(family: str, method: str) -> None:
    expected, theirs = loss_and_gradients(family, method, PLAIN), loss_and_gradients(family, method, FAST)
    torch.testing.assert_close(theirs[0], expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(theirs[1], expected[1].to(theirs[1].dtype), rtol=1e-5, atol=1e-6)
    assert theirs[2].keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        torch.testing.assert_close(theirs[2][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_stacked_runs_are_the_runs_alone(family: str) -> None:
    models, methods = models_of(family, FAST), ["tsld", "gt", "logit_gt"]
    samples = torch.tensor([[7, 2], [1, 5], [3, 0]])
    alone = models.students(QuantConfig(), 1)
    several = models.students(QuantConfig(), 3)
    with torch.no_grad():  # three different models
        for index, value in enumerate(several.values()):
            value += 0.01 * torch.randn(value.shape, generator=torch.Generator().manual_seed(index))
    found = models.loss(QuantConfig(), [DistillConfig(m) for m in methods], 2)(several, samples)
    torch.stack([total for total, _ in found]).sum().backward()
    for run, method in enumerate(methods):
        for name, value in alone.items():
            value.data, value.grad = several[name].detach()[run : run + 1].clone(), None
        total, values = models.loss(QuantConfig(), [DistillConfig(method)], 2)(alone, samples[run : run + 1])[0]
        total.backward()
        torch.testing.assert_close(found[run][0], total, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[run][1], values, rtol=1e-5, atol=1e-6)
        for name, value in alone.items():
            torch.testing.assert_close(several[name].grad[run], value.grad[0], rtol=1e-3, atol=1e-6, msg=name)


def test_runs_side_by_side_are_the_runs_alone() -> None:
    plans = [
        Plan(f"{m}-{s}", QuantConfig(), DistillConfig(m), s, 6, 2, 1e-3, 2)
        for m, s in (("tsld", 0), ("gt", 1), ("l2l", 2))
    ]
    score = partial(perplexity, tokens=blocks().flatten(), length=17)
    together = run_together(plans, models_of("gpt2", FAST), score, lambda text: None)
    for plan, found in zip(plans, together, strict=True):
        alone = run_together([plan], models_of("gpt2", PLAIN), score, lambda text: None)[0]
        assert found.best_step == alone.best_step
        assert found.validation == pytest.approx(alone.validation, rel=1e-4)
        losses = [[m["loss"] for m in r.metrics if "loss" in m] for r in (found, alone)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
