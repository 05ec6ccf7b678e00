"""Training steps as CUDA graphs: the same losses and weights as ordinary steps."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import build
from tests.tiny_runs import Recorder, arguments, random_rows
from tsld_fx import DistillConfig, TSLDTrainer, prepare

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("method", ["tsld", "logit"])
def test_replayed_steps_train_alike(method: Any, bf16: bool, tmp_path: Path) -> None:
    model, logs, weights = prepare(build("llama")), [], []
    for graph in (True, False):
        recorder = Recorder()
        trainer = TSLDTrainer(
            model=copy.deepcopy(model), teacher=build("llama", seed=7), train_dataset=random_rows(32),
            distill=DistillConfig(method, cuda_graph=graph), callbacks=[recorder],
            args=arguments(tmp_path, use_cpu=False, max_steps=12, max_grad_norm=1.0, bf16=bf16),
        )  # fmt: skip
        trainer.train()
        captured = [g for g in trainer._step_graphs.values() if g._graph is not None]
        assert len(captured) == graph
        names = ("loss", "loss_gt") if method == "tsld" else ("loss",)
        logs.append({name: recorder.values(name) for name in names})
        weights.append({n: p.detach().cpu() for n, p in trainer.model.named_parameters()})
    for name, values in logs[0].items():
        assert values == pytest.approx(logs[1][name], rel=1e-2 if bf16 else 1e-4), name
    if not bf16:
        for name, value in weights[0].items():
            torch.testing.assert_close(value, weights[1][name], rtol=1e-3, atol=1e-4, msg=name)


def test_a_step_that_cannot_be_captured_goes_on(tmp_path: Path) -> None:
    rows = random_rows(32)
    rows.columns["segment_ids"] = torch.arange(12).ge(5).long().expand(32, 12).contiguous()
    recorder = Recorder()
    trainer = TSLDTrainer(
        model=prepare(build("llama")), teacher=build("llama", seed=7), train_dataset=rows, callbacks=[recorder],
        distill=DistillConfig(cuda_graph=True, separate_documents=True),
        args=arguments(tmp_path, use_cpu=False, max_steps=8),
    )  # fmt: skip
    trainer.train()
    assert len(recorder.values("loss")) == 8
