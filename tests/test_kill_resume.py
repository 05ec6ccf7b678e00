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

from tests.tiny_runs import read_json, run_cli, settings, start_cli, workspace, write_yaml
from tsld_fx.runs import last_whole_checkpoint, read_metrics

pytestmark = pytest.mark.xdist_group("kill_resume")
STEPS, EVERY = 60, 5
KEPT = ("step", "epoch", "loss", "loss_tsld", "loss_gt", "grad_norm", "learning_rate", "eval_loss", "eval_perplexity")


@cache
def config_file() -> Path:
    """LSQ scales, dropout and logging steps that do not fall on checkpoints."""
    from tests.tiny_runs import float_folder

    run = settings(
        model=str(float_folder("gpt2")),
        quant={"weight": {"scale": "lsq"}},
        training={"max_steps": STEPS, "eval_steps": 20, "logging_steps": 7},
        checkpoint_steps=EVERY,
    )
    return write_yaml(workspace() / "kill.yaml", run)


@cache
def uninterrupted() -> Path:
    out = workspace() / "uninterrupted"
    process = start_cli("train", "--config", config_file(), "--out", out)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


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


def check_same(out: Path) -> None:
    expected = uninterrupted()
    assert logged(out) == logged(expected)
    assert {line["step"] for line in logged(out) if "loss" in line} >= {7, 14, *range(EVERY, STEPS + 1, EVERY)}
    ours, theirs = read_json(out / "result.json"), read_json(expected / "result.json")
    for key in ("teacher", "ptq", "student", "steps", "best_step"):
        assert ours[key] == theirs[key], key
    weights = "model/model.safetensors"
    assert (out / weights).read_bytes() == (expected / weights).read_bytes()


def test_run_killed_twice_ends_like_one_that_was_never_stopped(tmp_path: Path) -> None:
    out = tmp_path / "killed"
    for step in (EVERY, 4 * EVERY):
        with training(out) as process:
            wait_for_checkpoint(process, out, step)
            process.kill()
            process.communicate()
            assert process.returncode == -signal.SIGKILL
        assert not (out / "result.json").exists(), "it was killed too late to show anything"
    process = start_cli("train", "--config", config_file(), "--out", out)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "resuming from" in err
    check_same(out)


def test_ctrl_c_stops_without_a_traceback_and_the_run_resumes(tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    with training(out) as process:
        wait_for_checkpoint(process, out, EVERY)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "the same command resumes" in err
    assert not (out / "result.json").exists()
    before = last_whole_checkpoint(out / "checkpoints")
    outcome = run_cli("train", "--config", config_file(), "--out", out)
    assert outcome.code == 0, outcome.err
    assert before is not None and f"checkpoint-{before.name.rpartition('-')[2]}" in " ".join(outcome.err.split())
    assert [line["step"] for line in logged(out)] == [line["step"] for line in logged(uninterrupted())]


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
