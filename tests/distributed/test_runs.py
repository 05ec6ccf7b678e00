"""`tsld-fx train` under torchrun: the files of a single process, kill and resume, errors told once."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.launch import torchrun
from tests.tiny_runs import Outcome, files_under, float_folder, read_json, run_cli, settings, write_yaml
from tsld_fx.runs import last_whole_checkpoint, read_metrics

pytestmark = pytest.mark.xdist_group("distributed")
STEPS = 9  # one epoch but for its last step, which is not full: the Trainer takes it, ours does not


def spread(file: Path, mode: dict[str, str], **training: Any) -> Path:
    """A run of `STEPS` steps, spread over processes."""
    values = {"max_steps": STEPS, "gradient_accumulation_steps": 2, "eval_steps": 6, "logging_steps": 5}
    run = settings(model=str(float_folder("llama")), training={**values, **training}, checkpoint_steps=3, parallel=mode)
    return write_yaml(file, run)


def in_this_process(*words: object) -> Outcome:
    """The command line as the only process of its run."""
    return run_cli(*words)


def test_killed_pipeline_resumes_on_one_process_and_leaves_the_files_of_a_single_one(tmp_path: Path) -> None:
    file = spread(tmp_path / "run.yaml", {"mode": "pipeline", "schedule": "1f1b"})
    out, expected, plain = (tmp_path / name for name in ("killed", "whole", "trainer"))
    process = torchrun(2, "train", "--config", file, "--out", out)
    end = time.monotonic() + 150
    while last_whole_checkpoint(out / "checkpoints") is None and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    found = last_whole_checkpoint(out / "checkpoints")
    assert found is not None and not (out / "result.json").exists(), err
    outcome = in_this_process("train", "--config", file, "--out", out)
    assert outcome.code == 0, outcome.err
    assert "resuming from" in outcome.err
    assert in_this_process("train", "--config", file, "--out", expected).code == 0
    same_run(out, expected)

    single = spread(tmp_path / "single.yaml", {"mode": "ddp"})
    assert in_this_process("train", "--config", single, "--out", plain).code == 0
    same_run(out, plain, steps=False, weights=1e-3)
    outside = [{f for f in files_under(folder) if not f.startswith("checkpoints")} for folder in (out, plain)]
    assert outside[0] == outside[1]
    assert in_this_process("convert", out, "--out", tmp_path / "packed").code == 0


def same_run(ours: Path, theirs: Path, steps: bool = True, weights: float = 2e-4) -> None:
    """Results and weights are equal but for rounding, and so is what was logged at the same steps.

    AdamW and the ternary threshold turn rounding into small steps; a weight can move by 0.027 in all.
    """
    first, second = read_json(ours / "result.json"), read_json(theirs / "result.json")
    for name in ("teacher", "ptq", "student"):
        assert first[name] == pytest.approx(second[name], rel=2e-3)
    assert first["steps"] == second["steps"] == STEPS
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (ours, theirs))
    assert one.keys() == other.keys()
    for name, value in other.items():
        assert (one[name] - value).abs().mean() < weights, name
    logged = [{r["step"]: r["loss"] for r in read_metrics(f / "metrics.jsonl") if "loss" in r} for f in (ours, theirs)]
    common = logged[0].keys() & logged[1].keys()
    assert len(common) >= 4
    assert not steps or logged[0].keys() == logged[1].keys()
    for step in common:
        assert logged[0][step] == pytest.approx(logged[1][step], rel=2e-3)


def test_data_parallel_run_writes_each_file_once(tmp_path: Path) -> None:
    file = spread(tmp_path / "run.yaml", {"mode": "ddp"}, max_steps=4, eval_steps=2)
    process = torchrun(2, "train", "--config", file, "--out", tmp_path / "run")
    said, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert said.count("the model, metrics and plots are in") == 1
    result = read_json(tmp_path / "run" / "result.json")
    assert result["steps"] == 4 and set(result) >= {"teacher", "ptq", "student"}
    steps = [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "eval_loss" in line]
    assert steps == [2, 4]
    assert torch.isfinite(load_file(tmp_path / "run" / "model" / "model.safetensors")["model.norm.weight"]).all()


def test_nan_on_one_data_parallel_process_is_told_once(tmp_path: Path) -> None:
    told_once(tmp_path, "nan", "training stopped at step 3: the loss of process 1 is nan")


def told_once(folder: Path, breaks: str, cause: str, **training: Any) -> None:
    """A data-parallel run that breaks on one process ends on both, with one error and a whole checkpoint."""
    file = spread(folder / "run.yaml", {"mode": "ddp"}, **training)
    words = ("train", "--config", file, "--out", folder / "run")
    process = torchrun(2, *words, module="tests.distributed.broken_run", TSLD_TEST_BREAKS=breaks)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 1
    assert err.count("error: training stopped") + err.count("error: process") == err.count(f"error: {cause}") == 1, err
    assert last_whole_checkpoint(folder / "run" / "checkpoints") == folder / "run" / "checkpoints" / "checkpoint-3"
    assert not (folder / "run" / "result.json").exists()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--parallel", "pipeline", "--schedule", "2f2b"), "parallel.schedule='2f2b' is not one of gpipe"),
        (("--parallel", "tensor"), "parallel.mode='tensor' is not one of ddp, fsdp, pipeline"),
        (("--parallel", "pipeline", "--schedule", "zbv"), "zbv needs at least two per process"),
    ],
)
def test_bad_words_are_refused_before_a_file_is_written(words: tuple[str, ...], part: str, tmp_path: Path) -> None:
    file = write_yaml(tmp_path / "run.yaml", settings())
    outcome = in_this_process("train", "--config", file, "--out", tmp_path / "run", *words)
    assert outcome.code == 2
    assert part in outcome.err
    assert not (tmp_path / "run").exists()


def test_resume_with_other_settings_is_refused(tmp_path: Path) -> None:
    file = spread(tmp_path / "run.yaml", {"mode": "fsdp"}, max_steps=1)
    assert in_this_process("train", "--config", file, "--out", tmp_path / "run").code == 0
    again = in_this_process("train", "--config", file, "--out", tmp_path / "run", "--parallel", "pipeline")
    assert again.code == 2
    assert "parallel.mode was 'fsdp' there and is 'pipeline' now" in again.err
