"""Files and folders that are written whole or not at all, run folders, and the metrics file."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import TrainerControl, TrainerState, TrainingArguments

from tests.tiny_runs import files_under
from tsld_fx.errors import CheckpointError
from tsld_fx.runs import MetricsFile, RunFolder, mark_whole, read_metrics
from tsld_fx.whole_files import whole_folder, write_json, write_whole


def test_interrupted_write_keeps_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "a" / "x.json"
    write_json(file, {"n": 1})
    with pytest.raises(TypeError):
        write_whole(file, 5)  # type: ignore[arg-type]
    assert json.loads(file.read_text()) == {"n": 1}
    assert files_under(tmp_path) == ["a/x.json"]


def test_whole_folder_replaces_the_old_one_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with whole_folder(target) as folder:
        (folder / "first").write_text("1")
        assert not target.exists()
    with pytest.raises(ValueError), whole_folder(target) as folder:
        (folder / "broken").write_text("")
        raise ValueError
    assert files_under(tmp_path) == ["model/first"]
    with whole_folder(target) as folder:
        (folder / "second").write_text("2")
        assert (target / "first").exists()
    assert files_under(tmp_path) == ["model/second"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_leftovers_of_killed_processes_are_removed_and_living_ones_stay(tmp_path: Path) -> None:
    target = tmp_path / "model"
    killed, young, other = (tmp_path / name for name in (".model.abcd_123", ".model.abcd_456", ".model2.abcd_123"))
    for folder in (killed, young, other):
        folder.mkdir()
        (folder / "part").write_text("")
    for folder in (killed, other):
        os.utime(folder, (time.time() - 3600,) * 2)
    with whole_folder(target) as living:
        os.utime(living, (time.time() - 3600,) * 2)
        with whole_folder(target):
            assert living.exists() and not killed.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([young.name, other.name, "model"])


def test_run_folder_writes_nothing_before_it_begins(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = RunFolder(out, {"a": 1, "b": (1, 2)})
    assert not out.exists()
    run.begin()
    assert yaml.safe_load((out / "run.yaml").read_text()) == {"a": 1, "b": [1, 2]}
    RunFolder(out, {"a": 1, "b": [1, 2]}).begin()
    assert (run.result(), run.resume_point()) == (None, None)
    run.finish({"x": 1.5})
    assert RunFolder(out, {"b": [1, 2], "a": 1}).result() == {"x": 1.5}


def test_run_folder_of_other_settings_names_the_first_difference(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run", {"a": 1, "data": {"block": 8, "files": ["x"]}}).begin()
    with pytest.raises(CheckpointError, match=r"another run: data\.block was 8 there and is 9 now"):
        RunFolder(tmp_path / "run", {"a": 1, "data": {"block": 9, "files": ["x"]}})
    with pytest.raises(CheckpointError, match=r"a was 1 there and is None now"):
        RunFolder(tmp_path / "run", {"data": {"block": 8, "files": ["x"]}})


def test_run_folder_killed_while_it_began_can_begin_again(tmp_path: Path) -> None:
    (tmp_path / ".run.yaml.k2j3h").write_text("half")
    RunFolder(tmp_path, {"a": 1}).begin()
    assert (tmp_path / "run.yaml").is_file()


def test_damaged_record_and_foreign_content(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("a: [1")
    with pytest.raises(CheckpointError, match="not valid YAML"):
        RunFolder(tmp_path, {"a": 1})
    (tmp_path / "run.yaml").rename(tmp_path / "other")
    with pytest.raises(CheckpointError, match="not empty and not a run"):
        RunFolder(tmp_path, {"a": 1})
    with pytest.raises(CheckpointError, match="a file is in the way"):
        RunFolder(tmp_path / "other", {"a": 1})


def test_text_that_changed_under_a_run_is_named(tmp_path: Path) -> None:
    train, test = tmp_path / "train.txt", tmp_path / "test.txt"
    settings = {"data": {"train": [str(train), "demo"], "test": [str(test)], "block_size": 8}}
    for file in (train, test):
        file.write_text("one")
    RunFolder(tmp_path / "run", settings).begin()
    test.unlink()
    RunFolder(tmp_path / "run", settings).begin()  # what is gone is left to who reads it
    train.write_text("two")
    with pytest.raises(CheckpointError, match=f"on other text: {train} has changed since"):
        RunFolder(tmp_path / "run", settings)
    train.write_text("one")
    RunFolder(tmp_path / "run", settings)
    (tmp_path / "run" / "data.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"data\.json: damaged"):
        RunFolder(tmp_path / "run", settings)


def test_damaged_result_and_checkpoint_name_the_file(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run", {"n": 1})
    run.begin()
    step = run.checkpoints / "checkpoint-3"
    step.mkdir(parents=True)
    torch.save({"a": torch.zeros(9)}, step / "optimizer.pt")
    save_file({"a": torch.zeros(9)}, step / "model.safetensors")
    write_json(step / "trainer_state.json", {"step": 3})
    mark_whole(run.checkpoints, 3)
    assert run.resume_point() == str(step)
    for file in (step / "optimizer.pt", step / "model.safetensors", step / "trainer_state.json"):
        kept = file.read_bytes()
        file.write_bytes(kept[: len(kept) // 2])
        with pytest.raises(CheckpointError, match=f"{file}: cut short or damaged.*Delete {step}"):
            run.resume_point()
        file.write_bytes(kept)
    (run.path / "result.json").write_text('{"steps":')
    with pytest.raises(CheckpointError, match=r"result\.json: damaged"):
        run.result()


def test_metrics_of_a_resumed_run_have_each_step_once(tmp_path: Path) -> None:
    file, control = tmp_path / "metrics.jsonl", TrainerControl()
    args = TrainingArguments(output_dir=str(tmp_path / "x"), use_cpu=True, report_to=[])

    def log(first: int, last: int) -> None:
        metrics, state = MetricsFile(file), TrainerState(global_step=first, is_world_process_zero=True)
        metrics.on_train_begin(args, state, control)
        for step in range(first + 1, last + 1):
            state.global_step, state.epoch = step, step / 10
            metrics.on_log(args, state, control, {"loss": 1.0 / step, "epoch": 9.0})

    log(0, 5)
    with file.open("a") as stream:
        stream.write('{"step": 6, "lo')
    log(3, 6)
    lines = read_metrics(file)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[4] == {"step": 5, "epoch": 0.5, "loss": 0.2}
    log(0, 2)
    assert [line["step"] for line in read_metrics(file)] == [1, 2]
    assert read_metrics(tmp_path / "absent") == []


def test_every_checkpoint_gets_a_log_line(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    for hook in ("on_step_end", "on_epoch_end"):
        control = TrainerControl(should_save=True)
        getattr(MetricsFile(tmp_path / "m"), hook)(args, TrainerState(), control)
        assert control.should_log
        control = TrainerControl(should_save=False, should_log=False)
        getattr(MetricsFile(tmp_path / "m"), hook)(args, TrainerState(), control)
        assert not control.should_log
