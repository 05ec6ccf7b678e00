"""The commands of `tsld-fx` on a tiny model: finetune, train, convert, generate."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tsld_fx
from tests.tiny_runs import (
    BLOCK,
    float_folder,
    read_json,
    run_cli,
    settings,
    text_file,
    tokenizer,
    workspace,
    write_yaml,
)
from tsld_fx import recipes
from tsld_fx.model_folders import load_any
from tsld_fx.perplexity import perplexity
from tsld_fx.preparation import load_prepared
from tsld_fx.runs import read_metrics
from tsld_fx.text_data import tokenize

pytestmark = pytest.mark.xdist_group("cli")


@cache
def mixed_run() -> Path:
    """A finished run under bfloat16 autocast with ternary, 4-bit and full-precision layers."""
    quant = {
        "weight": {"scale": "twn"},
        "overrides": {"*.down_proj": {"bits": 4, "granularity": "group", "group_size": 11}, "*.q_proj": None},
    }
    run = settings(quant=quant, data={"test": [str(text_file("test"))]}, training={"bf16": True})
    file = write_yaml(workspace() / "mixed.yaml", run)
    with mock.patch.object(recipes, "TSLDTrainer", wraps=recipes.TSLDTrainer) as trainer:
        outcome = run_cli("train", "--config", file, "--out", workspace() / "mixed")
    assert outcome.code == 0, outcome.err
    assert trainer.call_args.kwargs["teacher"].dtype == torch.bfloat16
    return workspace() / "mixed"


@cache
def packed() -> Path:
    outcome = run_cli("convert", mixed_run(), "--out", workspace() / "mixed_packed")
    assert outcome.code == 0, outcome.err
    assert "every packed weight equals the trained one bit for bit" in outcome.out
    return workspace() / "mixed_packed"


def stream(name: str) -> torch.Tensor:
    return tokenize([text_file(name).read_text()], tokenizer())


def test_train_leaves_config_metrics_plots_result_and_a_model_of_that_result() -> None:
    out = mixed_run()
    result = read_json(out / "result.json")
    assert yaml.safe_load((out / "run.yaml").read_text())["training"]["max_steps"] == 6
    assert {line["step"] for line in read_metrics(out / "metrics.jsonl")} >= {2, 3, 4, 6}
    assert {p.name for p in (out / "plots").iterdir()} == {"loss.png", "perplexity.png"}
    assert (out / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")
    for split in ("validation", "test"):
        assert result["teacher"][split] == pytest.approx(
            perplexity(load_any(str(float_folder())), stream(split), BLOCK).perplexity
        )
        trained = perplexity(load_prepared(out / "model"), stream(split), BLOCK).perplexity
        assert result["student"][split] == pytest.approx(trained)
        assert result["student"][split] < result["ptq"][split]


def test_train_by_options_is_train_by_yaml(tmp_path: Path) -> None:
    run = settings(
        quant={"weight": {"bits": 4, "scale": "pact", "granularity": "group", "group_size": 4}},
        distill={"method": "logit_gt"}, training={"max_steps": 3},
    )  # fmt: skip
    rest = {"data": {}, "training": run["training"]}
    words: list[object] = [
        float_folder(), "--config", write_yaml(tmp_path / "rest.yaml", rest), "--out", tmp_path / "options",
        "--train", text_file("train"), "--validation", text_file("validation"), "--block-size", BLOCK, "--bits", 4,
        "--scale", "pact", "--granularity", "group", "--group-size", 4, "--method", "logit_gt", "--steps", 3,
    ]  # fmt: skip
    assert run_cli("train", *words).code == 0
    file = write_yaml(tmp_path / "all.yaml", run)
    assert run_cli("train", "--config", file, "--out", tmp_path / "yaml").code == 0
    one, other = (load_file(tmp_path / kind / "model" / "model.safetensors") for kind in ("options", "yaml"))
    assert set(one) == set(other)
    assert any(name.endswith("weight_clip") for name in one)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_separate_documents_reach_the_loss_through_the_command(tmp_path: Path) -> None:
    losses = []
    for separate in (False, True):
        run = settings(distill={"separate_documents": separate}, training={"max_steps": 1, "logging_steps": 1})
        for index in range(30):
            (tmp_path / f"{index}.txt").write_text("the cat sees a fish.\n" * (1 + index % 3))
        run["data"]["train"] = [str(tmp_path / f"{index}.txt") for index in range(30)]
        out = tmp_path / str(separate)
        assert run_cli("train", "--config", write_yaml(tmp_path / "run.yaml", run), "--out", out).code == 0
        losses.append(read_metrics(out / "metrics.jsonl")[0])
    assert losses[0]["loss_gt"] == losses[1]["loss_gt"]
    assert losses[1]["loss_tsld"] > losses[0]["loss_tsld"] * 1.1


# ---------------------------------------------------------------- finetune
def overfit(**training: Any) -> dict[str, Any]:
    """Few samples and a high rate: the validation loss falls, then rises."""
    values = {"learning_rate": 2.0e-2, "num_train_epochs": 12, "lr_scheduler_type": "constant", **training}
    run = settings(training={**values, "eval_strategy": "epoch", "logging_steps": 3, "save_total_limit": 20})
    del run["training"]["max_steps"]
    return run


def test_finetune_keeps_the_best_epoch_stops_and_resumes_to_the_same_end(tmp_path: Path) -> None:
    few = tmp_path / "few.txt"
    few.write_text("".join(text_file("train").read_text().splitlines(keepends=True)[:24]))
    run = overfit()
    run["data"]["train"] = [str(few)]
    words = ["finetune", "--config", write_yaml(tmp_path / "run.yaml", run), "--out", tmp_path / "out", "--patience", 2]
    outcome = run_cli(*words)
    assert outcome.code == 0, outcome.err
    out, result = tmp_path / "out", read_json(tmp_path / "out" / "result.json")
    curve = {line["step"]: line["eval_loss"] for line in read_metrics(out / "metrics.jsonl") if "eval_loss" in line}
    steps, best = sorted(curve), min(curve, key=lambda step: curve[step])
    assert (result["best_step"], result["steps"]) == (best, steps[-1])
    assert steps.index(best) == len(steps) - 3, "it goes on for two epochs without improvement"
    assert len(steps) < 12
    assert result["model"]["validation"] < result["start"]["validation"]
    kept = AutoModelForCausalLM.from_pretrained(out / "model")
    assert result["model"]["validation"] == pytest.approx(perplexity(kept, stream("validation"), BLOCK).perplexity)
    weights = (out / "model" / "model.safetensors").read_bytes()
    for lost in ([], [steps[-1]]):  # killed before the result, and before the last checkpoint
        (out / "result.json").unlink()
        for step in lost:
            shutil.rmtree(out / "checkpoints" / f"checkpoint-{step}")
        assert run_cli(*words).code == 0
        again = read_json(out / "result.json")
        assert {k: again[k] for k in ("model", "steps", "best_step")} == {
            k: result[k] for k in ("model", "steps", "best_step")
        }
        assert (out / "model" / "model.safetensors").read_bytes() == weights


def test_finetune_needs_validation_text(tmp_path: Path) -> None:
    run = settings(data={"validation": []})
    outcome = run_cli("finetune", "--config", write_yaml(tmp_path / "run.yaml", run), "--out", tmp_path / "out")
    assert outcome.code == 2 and "needs validation text" in outcome.err
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- convert
def test_converted_run_has_the_trained_weights_and_logits() -> None:
    prepared, lowered = load_prepared(mixed_run() / "model").eval(), tsld_fx.load(packed())
    tokens = stream("test")[: 2 * BLOCK].view(2, BLOCK)
    with torch.no_grad():
        torch.testing.assert_close(lowered(tokens).logits, prepared(tokens).logits, rtol=1e-5, atol=1e-5)
    names = {name: layer.bits for name, layer in lowered.lowbit_layers().items()}
    assert len(names) == 12
    assert {bits for name, bits in names.items() if name.endswith("down_proj")} == {4}
    assert not any(name.endswith(("q_proj", "lm_head")) for name in names)
    again = AutoModelForCausalLM.from_pretrained(packed())
    assert torch.equal(again(tokens).logits, tsld_fx.load(packed(), backend="reference")(tokens).logits)


def test_convert_takes_the_model_folder_too_and_replaces_only_with_force(tmp_path: Path) -> None:
    out = tmp_path / "packed"
    assert run_cli("convert", mixed_run() / "model", "--out", out).code == 0
    assert (out / "model.safetensors").read_bytes() == (packed() / "model.safetensors").read_bytes()
    (out / "stale").touch()
    refused = run_cli("convert", mixed_run(), "--out", out)
    assert refused.code == 2 and "not empty" in refused.err and (out / "stale").exists()
    assert run_cli("convert", mixed_run(), "--out", out, "--force", "--backend", "reference").code == 0
    assert not (out / "stale").exists()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_float_model_is_packed_without_training_with_an_8_bit_head_if_asked_for(family: str, tmp_path: Path) -> None:
    for bits in (None, 8):
        out = tmp_path / str(bits)
        words = [] if bits is None else ["--head-bits", bits]
        outcome = run_cli("convert", float_folder(family), "--out", out, *words)
        assert outcome.code == 0, outcome.err
        layers = tsld_fx.load(out).lowbit_layers()
        assert layers["lm_head"].bits == 8 if bits else "lm_head" not in layers
        assert {layer.bits for name, layer in layers.items() if name != "lm_head"} == {2}
    refused = run_cli("convert", float_folder(family), "--out", tmp_path / "x", "--head-bits", 3)
    assert refused.code == 2 and "8 bits" in refused.err
    refused = run_cli("convert", mixed_run(), "--out", tmp_path / "x", "--head-bits", 8)
    assert refused.code == 2 and "packed as it was trained" in refused.err
    assert not (tmp_path / "x").exists()


# ---------------------------------------------------------------- generate
def test_greedy_text_of_run_and_packed_model_is_that_of_transformers_generate() -> None:
    inputs = tokenizer()("the cat", return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(packed())
    made = model.generate(inputs["input_ids"], max_new_tokens=12, do_sample=False, pad_token_id=0)
    expected = tokenizer().decode(made[0], skip_special_tokens=True)
    for folder in (packed(), mixed_run()):
        outcome = run_cli("generate", folder, "--prompt", "the cat", "--max-new-tokens", 12)
        assert (outcome.code, outcome.out.rstrip("\n")) == (0, expected.rstrip("\n"))


def test_sampling_repeats_with_its_seed_and_changes_with_another() -> None:
    words = ["generate", packed(), "--prompt", "my", "--max-new-tokens", 20, "--temperature", 1.5, "--top-p", 0.95]
    texts = [run_cli(*words, "--seed", seed).out for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("my")
