"""One process of a small training run, alone or as a rank of two: FOLDER BATCH_SIZE."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

from tests.models import build
from tests.tiny_runs import Recorder, arguments, random_rows
from tsld_fx import DistillConfig, TSLDTrainer, prepare
from tsld_fx.whole_files import write_json


def run(folder: Path, batch_size: int) -> None:
    backend = "gloo" if "WORLD_SIZE" in os.environ else None
    if backend:
        torch.distributed.init_process_group(backend)
    recorder = Recorder()
    args = arguments(
        folder, max_steps=3, per_device_train_batch_size=batch_size, ddp_backend=backend, optim="sgd", learning_rate=0.1
    )
    trainer = TSLDTrainer(
        model=prepare(build("llama")),
        teacher=build("llama", seed=7),
        distill=DistillConfig(reduction="mean"),
        args=args,
        train_dataset=random_rows(16),
        callbacks=[recorder],
    )
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save(trainer.accelerator.unwrap_model(trainer.model).state_dict(), folder / "weights.pt")
        write_json(folder / "losses.json", {"world_size": args.world_size, "loss": recorder.values("loss")})
    if args.world_size > 1:
        # gloo's threads need the GIL to let go of the last gathered tensors. Still at it when the reducer takes the
        # process group with it, they are joined with the GIL held, for ever (torch 2.11 and 2.13).
        time.sleep(0.2)
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), int(sys.argv[2]))
