"""One process of tiny distributed trainings: a JSON list of cases on the command line, results in their folders."""

from __future__ import annotations

import copy
import json
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.captures import remember_captures
from tests.models import build
from tests.tiny_runs import Recorder, arguments, random_rows
from tsld_fx import DistillConfig, PreparedModel, TSLDTrainer, prepare
from tsld_fx.distributed import DistributedTrainer, ParallelConfig
from tsld_fx.distributed.ranks import Ranks
from tsld_fx.errors import TsldError
from tsld_fx.preparation import graph_model
from tsld_fx.runs import last_whole_checkpoint
from tsld_fx.whole_files import write_json

TRAINING = {"max_steps": 3, "per_device_train_batch_size": 2, "optim": "sgd", "learning_rate": 0.1}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@cache
def models(family: str, layers: int) -> tuple[PreparedModel, PreparedModel]:
    """A student and a teacher, to copy."""
    sizes = {"num_hidden_layers": layers, **(NO_DROPOUT if family == "gpt2" else {})}
    return prepare(build(family, **sizes)), graph_model(build(family, seed=7, **sizes), None, ())


def run(case: dict[str, Any]) -> None:
    """Train as the case says; the first process writes weights.pt and lines.json."""
    folder, recorder = Path(case["folder"]), Recorder()
    student, teacher = (copy.deepcopy(m) for m in models(case.get("family", "llama"), case.get("layers", 4)))
    given: dict[str, Any] = {
        "model": student,
        "teacher": teacher,
        "distill": DistillConfig(method=case.get("method", "tsld"), **case.get("distill", {})),
        "args": arguments(folder, **{**TRAINING, **case.get("training", {})}),
        "train_dataset": random_rows(64),
        "callbacks": [recorder],
    }
    if "parallel" not in case:
        one = TSLDTrainer(**given)
        one.train()
        finish(folder, one.model, recorder)
        return
    ranks = Ranks.start(given["args"].use_cpu)
    trainer = DistributedTrainer(**given, parallel=ParallelConfig(**case["parallel"]), ranks=ranks)
    if "breaks" in case and ranks.rank == ranks.world_size - 1:
        break_at(trainer, **case["breaks"])
    trainer.train(last_whole_checkpoint(folder) if case.get("resume") else None)
    trainer.save_checkpoint()
    model = trainer.whole_model()
    if model is not None:
        finish(folder, model, recorder)


def break_at(trainer: DistributedTrainer, step: int, how: str) -> None:
    """Spoil the objective of this process from a step on."""
    plain = trainer.engine._objective

    def spoilt(*given: Any) -> torch.Tensor:
        if trainer.state.global_step < step:
            return plain(*given)
        if how == "raise":
            raise RuntimeError("out of coffee")
        loss = plain(*given) * float("nan")
        trainer.engine.losses["loss"][-1] = loss.detach()
        return loss

    trainer.engine._objective = spoilt  # type: ignore[method-assign]


def finish(folder: Path, model: torch.nn.Module, recorder: Recorder) -> None:
    torch.save({n: v.cpu() for n, v in model.state_dict().items()}, folder / "weights.pt")
    keys = ("step", "loss", "loss_tsld", "grad_norm", "learning_rate")
    lines = [{k: line[k] for k in keys if k in line} for line in recorder.lines if "loss" in line]
    write_json(folder / "lines.json", lines)


def run_all(cases: list[dict[str, Any]]) -> None:
    """Run the cases in turn; a refused one leaves error_<rank>.json."""
    for case in cases:
        folder = Path(case["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        rank = int(os.environ.get("RANK", 0))
        try:
            run(case)
        except TsldError as error:
            write_json(folder / f"error_{rank}.json", {"kind": type(error).__name__, "text": str(error)})
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    remember_captures()
    run_all(json.loads(sys.argv[1]))
