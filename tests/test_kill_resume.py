"""kill -9 and Ctrl-C during `tsld-fx train`: the same command goes on, to the same bits."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_runs import float_folder, read_json, run_cli, settings, start_cli, workspace, write_yaml
from tsld_fx.runs import last_whole_checkpoint, read_metrics

pytestmark = pytest.mark.xdist_group("kill_resume")
STEPS, EVERY = 50, 5
KEPT = ("step", "epoch", "loss", "loss_tsld", "loss_gt", "grad_norm", "learning_rate", "eval_loss", "eval_perplexity")


@cache
def config_file() -> Path:
    """LSQ scales, dropout and logging steps that do not fall on checkpoints."""
    run = settings(
        model=str(float_folder("gpt2")),
        quant={"weight": {"scale": "lsq"}},
        training={"max_steps": STEPS, "eval_steps": 20, "logging_steps": 7},
        checkpoint_steps=EVERY,
    )
    return write_yaml(workspace() / "kill.yaml", run)


@contextlib.contextmanager
def training(out: Path) -> Iterator[subprocess.Popen[str]]:
    process = start_cli("train", "--config", config_file(), "--out", out)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for_checkpoint(process: subprocess.Popen[str], out: Path, step: int) -> None:
    """Return as soon as a whole checkpoint of at least `step` exists."""
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        found = last_whole_checkpoint(out / "checkpoints")
        if found is not None and int(found.name.rpartition("-")[2]) >= step:
            return
        time.sleep(0.002)
    pytest.fail(f"no checkpoint of step {step} in {out}; exit code {process.poll()}")


def logged(out: Path) -> list[dict[str, Any]]:
    lines = [{k: line[k] for k in KEPT if k in line} for line in read_metrics(out / "metrics.jsonl")]
    return [line for line in lines if len(line) > 2]


def same_as(out: Path, expected: Path) -> None:
    assert logged(out) == logged(expected)
    ours, theirs = read_json(out / "result.json"), read_json(expected / "result.json")
    for key in ("teacher", "ptq", "student", "steps", "best_step"):
        assert ours[key] == theirs[key], key
    weights = "model/model.safetensors"
    assert (out / weights).read_bytes() == (expected / weights).read_bytes()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many threads as the processes have, so that sums are made in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_run_stopped_by_ctrl_c_then_killed_ends_like_one_that_never_stopped(one_thread: None, tmp_path: Path) -> None:
    out, expected = tmp_path / "stopped", tmp_path / "uninterrupted"
    with training(out) as process:
        wait_for_checkpoint(process, out, EVERY)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "the same command resumes" in err
    assert not (out / "result.json").exists()
    with training(out) as process:
        before = last_whole_checkpoint(out / "checkpoints")
        assert before is not None
        wait_for_checkpoint(process, out, int(before.name.rpartition("-")[2]) + EVERY)
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "result.json").exists(), "it was killed too late to show anything"
    outcome = run_cli("train", "--config", config_file(), "--out", out)
    assert outcome.code == 0, outcome.err
    assert "resuming from" in outcome.err
    assert run_cli("train", "--config", config_file(), "--out", expected).code == 0
    same_as(out, expected)
    assert {line["step"] for line in logged(out) if "loss" in line} >= {7, 14, *range(EVERY, STEPS + 1, EVERY)}


def test_run_killed_between_its_last_checkpoint_and_its_result_trains_no_step_more(tmp_path: Path) -> None:
    run = settings(training={"max_steps": 10, "eval_steps": 5})
    file, out = write_yaml(tmp_path / "run.yaml", run), tmp_path / "run"
    assert run_cli("train", "--config", file, "--out", out).code == 0
    first, weights = read_json(out / "result.json"), (out / "model" / "model.safetensors").read_bytes()
    (out / "result.json").unlink()
    assert run_cli("train", "--config", file, "--out", out).code == 0
    again = read_json(out / "result.json")
    assert (again["student"], again["steps"]) == (first["student"], 10)
    assert (out / "model" / "model.safetensors").read_bytes() == weights


def test_finished_run_is_returned_without_work(tmp_path: Path) -> None:
    file, out = write_yaml(tmp_path / "run.yaml", settings(training={"max_steps": 2})), tmp_path / "run"
    first = run_cli("train", "--config", file, "--out", out)
    changed = (out / "model" / "model.safetensors").stat().st_mtime_ns
    again = run_cli("train", "--config", file, "--out", out)
    assert (first.code, again.code) == (0, 0)
    assert again.out.split() == first.out.split()
    assert (out / "model" / "model.safetensors").stat().st_mtime_ns == changed
