"""No process of FSDP2 or of a pipeline ever holds the logits of a micro-batch, in training or in evaluation."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.distributed.rank import models
from tests.models import VOCABULARY, ids
from tsld_fx import DistillConfig, fused_loss, fused_loss_chunks, quantizers
from tsld_fx.distributed.data import as_batch
from tsld_fx.distributed.engine import Engine
from tsld_fx.distributed.fsdp import FsdpEngine
from tsld_fx.distributed.pipeline import PipelineEngine
from tsld_fx.distributed.ranks import Ranks

BATCH, TOKENS = 4, 11  # B * T is more than the width of the models, whose transposed head is [H, V]
CHUNK = 5  # tokens whose logits the fused operator holds at a time


class LogitRows(TorchDispatchMode):
    """Records how many rows [rows, V] the largest result of an operator has."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.tsld.head_loss_gradient.default:  # look inside
            with self:
                return fused_loss._head_loss_gradient(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.ndim and value.shape[-1] == VOCABULARY:
                self.most = max(self.most, value.numel() // VOCABULARY)
        return result


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    found = Ranks.start(use_cpu=True)
    yield found
    found.stop()


def engine_of(mode: str, family: str, distill: DistillConfig, ranks: Ranks, recompute: bool = False) -> Engine:
    student, teacher = (copy.deepcopy(model) for model in models(family, 2))
    if recompute:
        student.gradient_checkpointing_enable()
    if mode == "fsdp":
        return FsdpEngine(student, teacher, distill, ranks)
    return PipelineEngine(student, teacher, distill, ranks, schedule=mode, micro_batches=2)


def step(engine: Engine, evaluate: bool = True) -> tuple[int, list[float], list[float]]:
    """Most rows of logits in one step and an evaluation of both models; losses and sums of gradients."""
    batches = [as_batch({"input_ids": (i := ids(BATCH, TOKENS, seed)), "labels": i}) for seed in (0, 1)]
    with LogitRows() as seen:
        engine.forward_backward(batches)
        found = list(engine.take_losses().values())
        if evaluate:
            found += [*engine.nll(batches), *engine.nll(batches, of_teacher=True)]
    sums = [float(p.grad.double().square().sum()) for p in engine.parameters.values() if p.grad is not None]
    return seen.most, found, sums


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # untied head, tied head
@pytest.mark.parametrize("mode", ["fsdp", "1f1b", "zbv"])
def test_logits_never_exist(mode: str, family: str, ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_loss_chunks, "MOST_TOKENS", CHUNK)
    most, found, sums = step(engine_of(mode, family, DistillConfig(), ranks))
    rows, expected, expected_sums = step(engine_of(mode, family, DistillConfig(fused=False), ranks))
    assert rows >= BATCH * TOKENS  # the check sees whole logits where there are some
    assert most < BATCH * TOKENS
    assert found == pytest.approx(expected, rel=1e-5)
    assert sums == pytest.approx(expected_sums, rel=1e-4)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_pipeline_quantises_each_weight_once_a_step(
    recompute: bool, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    plain = quantizers.fake_quantize
    monkeypatch.setattr(quantizers, "fake_quantize", lambda *given: calls.append(1) or plain(*given))
    engine = engine_of("1f1b", "llama", DistillConfig(), ranks, recompute)
    for steps in (1, 2):
        step(engine, evaluate=False)
        assert len(calls) == steps * 14  # two layers of seven


def test_losses_that_need_whole_logits_take_them(ranks: Ranks) -> None:
    engine = engine_of("fsdp", "llama", DistillConfig(method="l2l"), ranks)
    assert engine.fused is None
    assert step(engine)[0] >= BATCH * TOKENS
