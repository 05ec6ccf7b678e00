"""Run settings: YAML and options in, one record out, and every mistake named before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tiny_runs import float_folder, run_cli, settings, write_yaml
from tsld_fx.cli.commands import _settings
from tsld_fx.comparison import read_runs
from tsld_fx.config import AffineWeight, TernaryWeight
from tsld_fx.errors import ConfigError
from tsld_fx.settings import DataSettings, RunSettings, read_yaml

FULL: dict[str, Any] = {
    "model": "m",
    "teacher": "t",
    "data": {"train": ["a.txt"], "validation": ["v.txt"], "test": ["b.txt"], "block_size": 64},
    "quant": {"weight": {"bits": 4, "scale": "lsq"}, "overrides": {"*.down_proj": None}, "skip": []},
    "distill": {"losses": [{"kind": "tsld", "weight": 0.5}, {"kind": "gt"}], "separate_documents": True},
    "training": {"max_steps": 7, "learning_rate": 0.01},
    "checkpoint_steps": 3,
    "keep": "best",
}


def test_settings_survive_yaml() -> None:
    first = RunSettings.from_dict(FULL)
    again = RunSettings.from_dict(yaml.safe_load(yaml.safe_dump(first.to_dict())))
    assert again == first
    assert again.to_dict() == first.to_dict()
    assert first.quant.weight == AffineWeight(bits=4, scale="lsq")
    assert first.data.train == ("a.txt",)


def test_what_is_left_out_or_null_takes_its_default() -> None:
    bare = RunSettings.from_dict({"model": "demo"})
    assert bare == RunSettings("demo")
    assert RunSettings.from_dict({"model": "demo", "teacher": None, "quant": None, "training": None}) == bare
    assert bare.quant.weight == TernaryWeight()
    assert bare.distill.method == "tsld"
    assert (bare.data.train, bare.data.validation) == (("demo",), ("demo",))
    assert DataSettings(train="a.txt").train == ("a.txt",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modle": "x"}, r"unknown key 'modle'. Known keys: model, teacher"),
        ({"model": None}, "'model' is missing"),
        ({"model": 5}, "model must be a folder or a name, got 5"),
        ({"teacher": ["x"]}, "teacher must be a folder or a name"),
        ({"data": {"trian": "x"}}, r"data: unknown key 'trian'"),
        ({"data": "a.txt"}, "data: expected a mapping of train, validation"),
        ({"model": "m"}, "data.train is empty"),
        ({"model": "m", "data": {"train": []}}, "data.train is empty"),
        ({"data": {"train": 5}}, "data.train must be a name or a list of names, got 5"),
        ({"data": {"block_size": 1}}, "block_size must be a whole number of at least 2, got 1"),
        ({"data": {"block_size": "16"}}, "block_size must be a whole number"),
        ({"quant": 2}, "quant: expected a mapping of weight, overrides"),
        ({"quant": {"wieght": {}}}, "quant: unknown key 'wieght'"),
        ({"quant": {"weight": {"bits": 3}}}, "bits=3 is not one of 4, 8"),
        ({"distill": "tsld"}, "distill: expected a mapping of method"),
        ({"distill": {"method": "magic"}}, "method='magic' is not one of gt, logit"),
        ({"distill": {"tau": 3}}, "distill: unknown key 'tau'"),
        ({"training": {"lr": 1}}, "'lr' is not a field of transformers.TrainingArguments"),
        ({"training": {"learning_rate": "1e-4"}}, "in YAML write 1.0e-4, not 1e-4"),
        ({"training": {"seed": "zero"}}, "training.seed must be a number, got 'zero'"),
        ({"training": {"bf16": "yes"}}, "training.bf16 must be true or false, got 'yes'"),
        ({"training": {"learning_rate": -1.0e-4}}, "training.learning_rate must be positive, got -0.0001"),
        ({"training": {"num_train_epochs": 0}}, "training.num_train_epochs must be more than 0, got 0"),
        ({"data": {"train": "a.txt", "test": "b.jsonl"}}, "data.train: text; data.test: task files"),
        ({"data": {"train": "a.txt"}, "keep": "best"}, "keep='best' goes by the validation loss"),
        ({"training": {"eval_strategy": "no"}, "keep": "best"}, "keep='best' goes by the validation loss"),
        ({"parallel": "ddp"}, "parallel: expected a mapping of mode"),
        ({"parallel": {"schedule": "2f2b"}}, "parallel.schedule='2f2b' is not one of gpipe"),
        ({"training": {"output_dir": "x"}}, "training.output_dir is set by tsld_fx"),
        ({"training": {"save_steps": 5}}, "checkpoint_steps, keep"),
        ({"training": {"max_steps": 0}}, "max_steps must be a whole number of at least 1, got 0"),
        ({"training": {"per_device_train_batch_size": 0}}, "whole number of at least 1, got 0"),
        ({"training": ["max_steps"]}, "training: expected a mapping"),
        ({"checkpoint_steps": 0}, "checkpoint_steps must be a whole number of at least 1, got 0"),
        ({"checkpoint_steps": "5"}, "checkpoint_steps must be a whole number"),
        ({"keep": "first"}, "keep='first' is not 'best' or 'last'"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        RunSettings.from_dict({"model": "demo", **change})
    out = tmp_path / "out"
    outcome = run_cli("train", "--config", write_yaml(tmp_path / "run.yaml", {"model": "demo", **change}), "--out", out)
    assert outcome.code == 2
    assert len(outcome.err.strip().splitlines()) == 1, outcome.err
    assert not out.exists()


@pytest.mark.parametrize("training", [{"lr_scheduler_type": "zigzag"}, {"eval_strategy": "never"}])
def test_values_that_transformers_refuses(training: dict[str, Any], tmp_path: Path) -> None:
    file = write_yaml(tmp_path / "run.yaml", settings(training=training))
    outcome = run_cli("train", "--config", file, "--out", tmp_path / "out")
    assert outcome.code == 2
    assert next(iter(training.values())) in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1, outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: [unclosed\nx: 1\n", "not valid YAML"),
        ("model: für".encode("latin-1"), "not valid YAML"),
        (b"- a\n- b\n", "expected a mapping at the top level"),
        (b"", "expected a mapping at the top level"),
    ],
)
def test_bad_yaml_files(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    for command, words in (("train", ["--config", file]), ("compare", [file]), ("inspect", ["x", "--config", file])):
        if command == "inspect":
            words = [float_folder(), "--config", file]
        outcome = run_cli(command, *words, *([] if command == "inspect" else ["--out", tmp_path / "out"]))
        assert outcome.code == 2, outcome.err
        assert message in outcome.err and str(file) in outcome.err
        assert len(outcome.err.strip().splitlines()) == 1, outcome.err
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path / "absent.yaml")


def test_options_win_over_the_file_and_keep_the_rest_of_it(tmp_path: Path) -> None:
    file = write_yaml(tmp_path / "run.yaml", FULL)
    data = {"train": ["c.txt"], "validation": None, "test": [], "block_size": None}
    merged = _settings(
        file, "other", data, {"max_steps": 9}, {"teacher": None, "quant": {"weight": {"scale": "absmean"}}}
    )
    first = RunSettings.from_dict(FULL)
    assert (merged.model, merged.teacher) == ("other", "t")
    assert merged.data == DataSettings(train=("c.txt",), validation=("v.txt",), test=("b.txt",), block_size=64)
    assert merged.training == {"max_steps": 9, "learning_rate": 0.01}
    assert merged.quant.weight == TernaryWeight(scale="absmean")
    assert merged.quant.overrides == first.quant.overrides
    assert merged.distill == first.distill


def test_runs_of_a_comparison_overlay_what_they_share() -> None:
    runs = read_runs({"shared": FULL, "runs": {"a": None, "b": {"training": {"max_steps": 2}, "keep": "last"}}})
    assert runs["a"] == RunSettings.from_dict(FULL)
    assert runs["b"].training == {"max_steps": 2, "learning_rate": 0.01}
    assert (runs["b"].keep, runs["b"].data) == ("last", runs["a"].data)


def test_runs_may_have_numbers_for_names() -> None:
    runs = read_runs({"shared": FULL, "runs": {4: {"keep": "last"}, 8: None}, "seeds": {8: [0, 1]}})
    assert list(runs) == ["4", "8-seed0", "8-seed1"]
    assert runs["4"].keep == "last" and runs["8-seed1"].training["seed"] == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"shared": FULL}, "compare: 'runs' is empty"),
        ({"shared": FULL, "runs": []}, "compare: 'runs' is empty"),
        ({"shared": FULL, "methods": {}}, "compare: unknown key 'methods'"),
        ({"shared": {"modle": 1}, "runs": {"a": {}}}, "shared: unknown key 'modle'"),
        ({"shared": 5, "runs": {"a": {}}}, "shared: expected a mapping"),
        ({"shared": FULL, "runs": {"a": 5}}, r"runs\.a: expected a mapping"),
        ({"shared": FULL, "runs": {"a": {"distill": {"method": "magic"}}}}, "method='magic'"),
        ({"runs": {"a": {}}}, r"runs\.a: 'model' is missing"),
        *(
            ({"shared": FULL, "runs": {name: {}}}, f"runs: '{name}' cannot be the name of a run and its folder")
            for name in ("", "../a", "a/b", ".a", "teacher", "table.json")
        ),
        ({"shared": FULL, "runs": {"a": {}, "a-seed0": {}}, "seeds": {"a": [0]}}, "would have the folder 'a-seed0'"),
    ],
)
def test_mistakes_in_a_comparison(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_runs(config)
