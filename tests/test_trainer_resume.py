"""Checkpoints of TSLDTrainer: whole or ignored, and a resumed training has the bits of an uninterrupted one."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests.models import build
from tests.tiny_runs import Recorder, arguments, random_rows, read_json
from tests.two_processes import run as train_alone_or_as_rank
from tsld_fx import PreparedModel, QuantConfig, TernaryWeight, TSLDTrainer, prepare
from tsld_fx.runs import last_whole_checkpoint


@cache
def with_dropout() -> PreparedModel:
    return prepare(build("gpt2"), QuantConfig(weight=TernaryWeight(scale="lsq")))


def trainer(folder: Path, steps: int = 8, **changes: Any) -> tuple[TSLDTrainer, Recorder]:
    recorder = Recorder()
    args = arguments(
        folder, max_steps=steps, save_strategy="steps", save_steps=2, lr_scheduler_type="linear", weight_decay=0.01
    )
    given = {"train_dataset": random_rows(20), "callbacks": [recorder], **changes}
    given["callbacks"] = [*given["callbacks"], recorder]
    model = copy.deepcopy(with_dropout())
    return TSLDTrainer(model=model, teacher=build("gpt2", seed=7), args=args, **given), recorder


class Stop(TrainerCallback):
    """Raises after a step, as a kill would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def lines(recorder: Recorder) -> dict[int, tuple[float, float]]:
    return {line["step"]: (line["loss"], line["loss_tsld"]) for line in recorder.lines if "loss" in line}


def test_resumed_training_has_the_bits_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, expected = trainer(tmp_path / "whole")
    whole.train()
    broken, _ = trainer(tmp_path / "broken", callbacks=[Stop(5)])
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    half_written = tmp_path / "broken" / "checkpoint-6"
    half_written.mkdir()
    (half_written / "trainer_state.json").write_text("{")
    again, found = trainer(tmp_path / "broken")
    again.train(resume_from_checkpoint=True)
    assert sorted(lines(found)) == [5, 6, 7, 8]
    assert lines(found) == {step: line for step, line in lines(expected).items() if step > 4}
    assert len(whole.model.learned_scales()) == 8
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    assert last_whole_checkpoint(tmp_path / "broken") == tmp_path / "broken" / "checkpoint-8"


def test_last_whole_checkpoint_is_the_highest_marked_one(tmp_path: Path) -> None:
    assert last_whole_checkpoint(tmp_path) is None
    running, _ = trainer(tmp_path, steps=4)
    running.train()
    for name in ("checkpoint-10", "checkpoint-4-old", "checkpoint-x"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-4-old" / "tsld_whole").touch()
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    (tmp_path / "checkpoint-4" / "tsld_whole").unlink()
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_checkpoint_written_over_an_older_one_is_not_whole_until_it_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer(tmp_path, steps=2)[0].train()
    assert last_whole_checkpoint(tmp_path) is not None
    running, _ = trainer(tmp_path, steps=2)

    def cut_short(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "_save_optimizer_and_scheduler", cut_short)
    with pytest.raises(KeyboardInterrupt):
        running.train()
    assert last_whole_checkpoint(tmp_path) is None


def test_resume_at_the_last_step_trains_no_more_but_more_steps_can_be_asked_for(tmp_path: Path) -> None:
    first, _ = trainer(tmp_path, steps=4)
    first.train()
    again, log = trainer(tmp_path, steps=4)
    assert again.train(resume_from_checkpoint=True).global_step == 4
    assert not log.lines
    for name, value in first.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    longer, log = trainer(tmp_path, steps=6)
    assert longer.train(resume_from_checkpoint=True).global_step == 6
    assert sorted(lines(log)) == [5, 6]


def test_two_processes_get_the_loss_and_weights_of_one(tmp_path: Path) -> None:
    """Gloo on the CPU: 2 x 2 sequences per step against 4 in one process; TSLD with reduction='mean'."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    root, processes = Path(__file__).parents[1], []
    for rank in range(2):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "WORLD_SIZE": "2"}
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-m", "tests.two_processes", str(tmp_path / "of2"), "2"]
        processes.append(subprocess.Popen(command, env=environment, cwd=root, stderr=subprocess.PIPE, text=True))
    train_alone_or_as_rank(tmp_path / "of1", 4)
    for process in processes:
        _, err = process.communicate(timeout=150)
        assert process.returncode == 0, err
    both, one = (read_json(tmp_path / f"of{n}" / "losses.json") for n in (2, 1))
    assert both["world_size"] == 2
    assert both["loss"] == pytest.approx(one["loss"], rel=1e-5)
    ours, theirs = (torch.load(tmp_path / f"of{n}" / "weights.pt") for n in (2, 1))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5, msg=name)
