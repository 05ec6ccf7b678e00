"""Bad input on the command line: exit code 2, one line that says what, where and how to mend it, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertForMaskedLM, T5Config
from transformers import T5ForConditionalGeneration as T5

from tests.models import POSITIONS
from tests.tiny_runs import (
    BLOCK,
    VOCABULARY,
    Outcome,
    files_under,
    float_folder,
    run_cli,
    settings,
    start_cli,
    text_file,
    tokenizer,
    workspace,
    write_yaml,
)
from tsld_fx import prepare
from tsld_fx.errors import CheckpointError
from tsld_fx.model_folders import load_float

pytestmark = pytest.mark.xdist_group("cli_refusals")


def refused(outcome: Outcome, *parts: object) -> str:
    """Check exit code and shape of an error, and that it holds every part; returns the message."""
    lines = [line for line in outcome.err.splitlines() if line.strip()]
    assert outcome.code == 2, (outcome.code, outcome.err)
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in outcome.err + outcome.out
    for part in parts:
        assert str(part) in lines[0]
    return lines[0]


def train(folder: Path, **changes: Any) -> Outcome:
    """`train` with a YAML file; whatever is refused must leave no output folder."""
    file = write_yaml(folder / "run.yaml", settings(**changes))
    outcome = run_cli("train", "--config", file, "--out", folder / "out")
    assert not (folder / "out").exists(), files_under(folder / "out")
    return outcome


@cache
def converted() -> Path:
    folder = workspace() / "converted"
    assert run_cli("convert", float_folder(), "--out", folder).code == 0
    return folder


def copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


# ---------------------------------------------------------------- models
SMALL = {"vocab_size": VOCABULARY, "d_model": 16, "max_position_embeddings": 32}
ENCODER_DECODERS: dict[str, Callable[[], Any]] = {
    "t5": lambda: T5(T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)),
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(**SMALL, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    ),
}


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_encoder_decoder_model(name: str, tmp_path: Path) -> None:
    ENCODER_DECODERS[name]().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    refused(train(tmp_path, model=str(tmp_path / "model")), tmp_path / "model", "encoder-decoder", "decoder-only")


def test_model_that_is_not_causal(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    refused(train(tmp_path, model=str(tmp_path / "model")), "not causal", "AutoModelForCausalLM")


@pytest.mark.parametrize("command", ["train", "eval", "convert", "generate", "inspect"])
def test_truncated_weights(command: str, tmp_path: Path) -> None:
    folder = copied(float_folder(), tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    words: dict[str, list[object]] = {
        "train": ["--train", text_file("train"), "--out", tmp_path / "out"],
        "eval": ["--text", text_file("test")],
        "convert": ["--out", tmp_path / "out"],
        "generate": ["--prompt", "the cat"],
        "inspect": [],
    }
    refused(run_cli(command, folder, *words[command]), weights, "cut short or damaged", "Copy it again")
    assert not (tmp_path / "out").exists()


def test_weights_that_lack_a_tensor_are_not_filled_with_random_ones(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = copied(float_folder(), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(run_cli("eval", folder, "--text", text_file("test")), "'model.layers.1.mlp.up_proj.weight' is missing")


def test_other_format_version(tmp_path: Path) -> None:
    folder = copied(converted(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (folder / "config.json").write_text(json.dumps(config))
    outcome = run_cli("eval", folder, "--text", text_file("test"), "--length", BLOCK)
    refused(outcome, "format_version 99", "reads version 1", "convert the model again")


def test_converted_model_cannot_be_trained_or_converted(tmp_path: Path) -> None:
    refused(train(tmp_path, model=str(converted())), converted(), "converted already", "Give the float model")
    outcome = run_cli("convert", converted(), "--out", tmp_path / "again")
    refused(outcome, "converted already")
    assert not (tmp_path / "again").exists()


def test_missing_model_and_folder_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(run_cli("eval", tmp_path / "absent", "--text", text_file("test")), tmp_path / "absent", "Give a folder")
    refused(run_cli("eval", tmp_path / "empty", "--text", text_file("test")), "no config.json in it")


def test_unknown_backend(tmp_path: Path) -> None:
    outcome = run_cli("convert", float_folder(), "--out", tmp_path / "out", "--backend", "abacus")
    refused(outcome, "backend='abacus'", "'reference'")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- what to quantise, which teacher
def test_override_pattern_that_matches_nothing(tmp_path: Path) -> None:
    outcome = train(tmp_path, quant={"overrides": {"re:.*experts.*": None}})
    refused(outcome, "'re:.*experts.*' matches no linear layer", "model.layers.0.self_attn.q_proj", "Patterns match")


def test_group_size_that_does_not_divide(tmp_path: Path) -> None:
    words = ["--train", text_file("train"), "--validation", text_file("validation"), "--block-size", BLOCK]
    out = tmp_path / "out"
    outcome = run_cli("train", float_folder(), *words, "--granularity", "group", "--group-size", 7, "--out", out)
    refused(outcome, "group_size=7", "32")
    assert not out.exists()


def test_teacher_with_another_vocabulary(tmp_path: Path) -> None:
    outcome = train(tmp_path, teacher=str(float_folder("llama", VOCABULARY + 8)))
    refused(outcome, f"vocabulary has {VOCABULARY + 8} tokens, the student's {VOCABULARY}", "one tokenizer")


def test_tokenizer_with_more_tokens_than_the_model(tmp_path: Path) -> None:
    small = float_folder("llama", 30)
    refused(train(tmp_path, model=str(small)), "outside the model's vocabulary of 30 tokens", "tokenizer that belongs")
    outcome = run_cli("eval", small, "--text", text_file("test"), "--length", BLOCK)
    refused(outcome, "outside the model's vocabulary of 30 tokens")


def test_trained_model_is_no_float_one_and_a_run_in_the_middle_is_no_model(tmp_path: Path) -> None:
    prepare(load_float(str(float_folder()))).save_pretrained(tmp_path / "run" / "model")
    for change in ({"model": str(tmp_path / "run")}, {"teacher": str(tmp_path / "run" / "model")}):
        refused(train(tmp_path, **change), tmp_path / "run" / "model", "trained to low bits", "Give the float model")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "run.yaml").write_text("{}")
    outcome = run_cli("convert", tmp_path / "begun", "--out", tmp_path / "packed")
    refused(outcome, tmp_path / "begun", "this run has not finished", "it resumes")


def test_schedule_without_a_pipeline(tmp_path: Path) -> None:
    file = write_yaml(tmp_path / "run.yaml", settings())
    outcome = run_cli("train", "--config", file, "--schedule", "1f1b", "--out", tmp_path / "out")
    refused(outcome, "--schedule 1f1b belongs to pipelines", "--parallel pipeline")


# ---------------------------------------------------------------- output folders
def test_output_folder_of_another_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    base = settings(training={"max_steps": 1})
    assert run_cli("train", "--config", write_yaml(tmp_path / "a.yaml", base), "--out", out).code == 0
    before = {name: (out / name).read_bytes() for name in files_under(out)}
    other = write_yaml(tmp_path / "b.yaml", base | {"training": base["training"] | {"learning_rate": 2.0e-3}})
    outcome = run_cli("train", "--config", other, "--out", out)
    refused(outcome, out, "training.learning_rate was 0.003 there and is 0.002 now", "Choose another output folder")
    refused(run_cli("finetune", "--config", tmp_path / "a.yaml", "--out", out), "command was 'train'")
    comparison = write_yaml(tmp_path / "c.yaml", {"shared": base, "runs": {"x": {}}})
    refused(run_cli("compare", comparison, "--out", out), "belongs to a single run")
    assert {name: (out / name).read_bytes() for name in files_under(out)} == before


@pytest.mark.parametrize("command", ["train", "finetune", "compare", "convert"])
def test_foreign_folder_that_is_not_empty(command: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    run = settings()
    file = write_yaml(tmp_path / "run.yaml", {"shared": run, "runs": {"x": {}}} if command == "compare" else run)
    words = {"compare": [file], "convert": [float_folder()]}.get(command, ["--config", file])
    refused(run_cli(command, *words, "--out", out), out, "not empty", "Choose another")
    assert files_under(out) == ["thesis.tex"]


@pytest.mark.parametrize("command", ["train", "compare", "convert"])
def test_file_in_the_way_of_the_output_folder(command: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("a file")
    file = write_yaml(tmp_path / "run.yaml", {"shared": settings(), "runs": {"x": {}}})
    single = write_yaml(tmp_path / "single.yaml", settings())
    words = {"compare": [file], "convert": [float_folder()], "train": ["--config", single]}[command]
    refused(run_cli(command, *words, "--out", out), out, "a file is in the way")
    assert out.read_text() == "a file"


def test_convert_never_replaces_its_own_source(tmp_path: Path) -> None:
    source = copied(float_folder(), tmp_path / "model")
    for out in (source, tmp_path):
        refused(run_cli("convert", source, "--out", out, "--force"), "is or holds the model to convert")
    assert files_under(source) == files_under(float_folder())


# ---------------------------------------------------------------- generation
def test_prompt_longer_than_the_positions(tmp_path: Path) -> None:
    prompt = "the cat sees a fish. " * 10
    outcome = run_cli("generate", float_folder(), "--prompt", prompt, "--max-new-tokens", 5)
    refused(outcome, "5 more are asked for", f"{POSITIONS} positions", "Shorten the prompt")
    refused(run_cli("generate", float_folder(), "--prompt", "", "--max-new-tokens", 5), "the prompt is empty")
    refused(run_cli("generate", float_folder(), "--prompt", "the", "--temperature", -1), "temperature=-1")


# ---------------------------------------------------------------- the traceback
def test_traceback_only_when_asked_for_and_exit_code_of_the_process(tmp_path: Path) -> None:
    plain = start_cli("eval", tmp_path / "absent", "--text", text_file("test"))
    out, err = plain.communicate(timeout=60)
    refused(Outcome(plain.returncode, out, err), tmp_path / "absent")
    with pytest.raises(CheckpointError, match="absent"):  # Python prints it
        run_cli("--traceback", "eval", tmp_path / "absent", "--text", text_file("test"))


def test_inspect_refuses_another_quantisation_for_a_model_that_carries_its_own(tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    assert run_cli("convert", float_folder(), "--out", packed).code == 0
    outcome = run_cli("inspect", packed, "--config", write_yaml(tmp_path / "q.yaml", {"quant": {}}))
    assert outcome.code == 2
    assert "carries its own quantisation" in outcome.err
