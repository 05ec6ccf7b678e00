"""Bad input gets one TsldError that says what is wrong, where, and how to mend it, and leaves nothing half-done."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tsld_fx
from tests.models import POSITIONS, VOCABULARY, build, ids, ternary, unquantised
from tsld_fx import AffineWeight, QuantConfig, TernaryWeight, TsldError, convert, errors, losses, prepare
from tsld_fx.errors import BackendError, CheckpointError, ConfigError, DataError, PassError, TrainingError


def message(error: type[TsldError], call: Callable[[], object], *parts: str) -> str:
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    assert isinstance(caught.value, TsldError)
    for part in parts:
        assert part in text, text
    assert text[-1] in ".)", f"one or more whole sentences: {text!r}"
    assert "\n" not in text, "one line, which the command line prints"
    return text


def test_all_errors_share_one_base() -> None:
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == "tsld_fx.errors"]
    assert len(classes) >= 7
    assert all(issubclass(c, TsldError) for c in classes)
    assert tsld_fx.TsldError is TsldError


def test_pattern_that_matches_nothing_lists_the_layers() -> None:
    config = QuantConfig(overrides={"model.layer.*": AffineWeight()})
    message(
        ConfigError,
        lambda: prepare(build("llama"), config),
        "'model.layer.*'",
        "matches no linear layer",
        "model.layers.0.self_attn.q_proj",
    )


def test_group_size_that_does_not_divide_names_layer_and_sizes() -> None:
    config = QuantConfig(weight=TernaryWeight(granularity="group", group_size=32))
    message(
        ConfigError,
        lambda: prepare(build("llama"), config),
        "group_size=32",
        "in_features=44",
        "model.layers.0.mlp.down_proj",
        "QuantConfig.overrides",
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named_at_prepare_and_at_convert(value: float) -> None:
    model = build("llama")
    name = "model.layers.1.mlp.up_proj"
    with torch.no_grad():
        model.get_submodule(name).weight[3, 4] = value
    message(ConfigError, lambda: prepare(model), f"'{name}.weight'", "NaN or Inf", "overrides")
    prepared = prepare(build("llama"))
    with torch.no_grad():
        prepared.get_submodule(name).weight[3, 4] = value
    message(PassError, lambda: convert(prepared), f"'{name}'", "NaN or Inf", "checkpoint")


def test_failed_prepare_leaves_the_model_usable() -> None:
    model = build("llama").train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    bad = QuantConfig(weight=TernaryWeight("lsq"), overrides={"no.such.layer": None})
    for _ in range(2):
        message(ConfigError, lambda: prepare(model, bad), "no.such.layer")
    assert model.training
    assert {n for n, _ in model.named_parameters()} == before.keys()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert prepare(model)(ids()).logits.shape == (2, 9, VOCABULARY)


def test_model_that_is_quantised_or_prepared_already_is_refused() -> None:
    prepared, lowered = ternary("llama")
    message(ConfigError, lambda: prepare(prepared), "prepared already")
    message(ConfigError, lambda: prepare(lowered), "quantised already", "float checkpoint")


def test_convert_wants_a_prepared_model_and_a_known_backend() -> None:
    prepared, lowered = ternary("llama")
    message(ConfigError, lambda: convert(build("llama")), "LlamaForCausalLM", "prepare")
    message(ConfigError, lambda: convert(lowered), "prepare", "tsld_fx.load")
    message(BackendError, lambda: convert(prepared, backend="cuda-13"), "'cuda-13'", "'reference'")


def test_teacher_with_another_vocabulary_gives_both_shapes() -> None:
    _, student = unquantised("llama")
    teacher = build("llama", vocab_size=VOCABULARY + 3)
    ours, theirs = student(ids()).logits, teacher(ids()).logits
    message(
        TrainingError,
        lambda: losses.token_scaled_logit_distillation(ours, theirs, ids()),
        str(VOCABULARY),
        str(VOCABULARY + 3),
        "vocabulary",
    )


def test_labels_out_of_range_and_batches_without_labels() -> None:
    _, prepared = unquantised("gpt2")
    labels = ids()
    labels[1, 3] = VOCABULARY
    message(DataError, lambda: prepared(ids(), labels=labels), f"labels[1, 3] = {VOCABULARY}", "tokenizer")
    nothing = torch.full_like(labels, -100)
    message(DataError, lambda: prepared(ids(), labels=nothing), "-100", "nothing to learn from")
    one_token = ids(2, 1)
    message(DataError, lambda: prepared(one_token, labels=one_token), "nothing to learn from")
    message(DataError, lambda: prepared(ids(), labels=labels[:, :-1]), "[2, 9, 97]", "[2, 8]")


def test_prompt_longer_than_the_models_positions_gives_both_lengths() -> None:
    for family in ("gpt2", "opt", "gpt_neo"):
        prepared, lowered = ternary(family)
        long = ids(1, POSITIONS + 2)
        message(DataError, lambda p=prepared, x=long: p(x), str(POSITIONS + 2), str(POSITIONS), "Shorten")
        message(
            DataError, lambda m=lowered, x=long: m.generate(x, max_new_tokens=1), str(POSITIONS + 2), str(POSITIONS)
        )


def test_inputs_that_no_graph_takes_are_named() -> None:
    prepared, lowered = ternary("llama")
    message(DataError, lambda: prepared(ids().float()), "token numbers", "torch.float32 [2, 9]")
    message(DataError, lambda: prepared(ids()[:, :0]), "[2, 0]")
    message(DataError, lambda: prepared([[1, 2]]), "list")
    message(DataError, lambda: prepared(ids() + VOCABULARY), "outside", str(VOCABULARY), "tokenizer")
    message(DataError, lambda: prepared(ids(), attention_mask=ids()[:, :5]), "attention_mask [2, 5]", "[2, 9]")
    message(DataError, lambda: prepared(ids(), labels=ids().float()), "labels are torch.float32")
    message(DataError, lambda: lowered.generate(ids()[0], max_new_tokens=1), "[9]", "generate(**encoded)")
    message(DataError, lambda: lowered.generate(ids() + VOCABULARY, max_new_tokens=1), "outside", str(VOCABULARY))
    message(DataError, lambda: lowered.generate({"input_ids": ids()}, max_new_tokens=1), "dict", "generate(**encoded)")


def test_configurations_of_another_class_are_named() -> None:
    model = build("llama")
    message(ConfigError, lambda: prepare(model, {"weight": None}), "expected a QuantConfig", "QuantConfig.from_dict")
    message(ConfigError, lambda: prepare(model, TernaryWeight()), "expected a QuantConfig, got TernaryWeight")
    message(ConfigError, lambda: prepare(model, distill="tsld"), "expected a DistillConfig, got 'tsld'")
    message(ConfigError, lambda: convert(unquantised("llama")[1]), "every layer in full precision", "nothing to pack")


def test_refused_save_or_load_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(TsldError):
        tsld_fx.load(tmp_path / "missing")
    with pytest.raises(TsldError):
        tsld_fx.load_prepared(tmp_path / "missing")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    for model in ternary("llama"):
        message(CheckpointError, lambda m=model: m.save_pretrained(tmp_path / "file"), "a file is in the way")
