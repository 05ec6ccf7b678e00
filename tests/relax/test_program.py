"""Compiled programs of the four families: logits and generated tokens equal torch's, from the reloaded folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tsld_fx
import tsld_fx.relax
from tests.models import POSITIONS, VOCABULARY, build, ids, left_padded
from tests.relax.bare_python import bare, bare_environment
from tests.relax.reference_models import reference
from tsld_fx.relax import build_program
from tsld_fx.relax.program_request import request

FOUR = ("gpt2", "opt", "gpt_neo", "llama")
ProgramOf = Callable[[str], Path]


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("family", FOUR)
def test_logits_equal_torch_for_any_batch_and_length(family: str, program_of: ProgramOf) -> None:
    lowered = reference(family)
    program = tsld_fx.relax.load(program_of(family))
    for batch, tokens in ((2, 9), (1, 1), (3, POSITIONS)):
        x = ids(batch, tokens, seed=tokens)
        with torch.no_grad():
            expected = lowered(input_ids=x).logits
        assert relative(program(x), expected) < 1e-5
    x, mask = left_padded()
    with torch.no_grad():
        expected = lowered.graph_module(x, mask)["logits"]
    assert relative(program(x, mask), expected) < 1e-5


@pytest.mark.parametrize("family", FOUR)
def test_generation_equals_transformers(family: str, program_of: ProgramOf) -> None:
    lowered = reference(family)
    program = tsld_fx.relax.load(program_of(family))
    x, mask = left_padded((9, 5, 3), seed=3)
    for prompt, attended in ((x, mask), (ids(1, 4, seed=1), None), (ids(2, 1, seed=2), None)):
        attended = torch.ones_like(prompt) if attended is None else attended
        expected = lowered.generate(prompt, attention_mask=attended, max_new_tokens=12, do_sample=False)
        assert torch.equal(program.generate(prompt, 12, attended), expected)


def test_weights_stay_packed(program_of: ProgramOf) -> None:
    lowered = reference("llama")
    manifest = json.loads((program_of("llama") / "manifest.json").read_text())
    stored = {entry["name"]: entry for entry in manifest["weights"]}
    for name, layer in lowered.lowbit_layers().items():
        assert f"{name}.weight" not in stored
        assert stored[f"{name}.weight_packed"]["bytes"] == layer.weight_packed.numel()
    assert (program_of("llama") / "weights.bin").stat().st_size < 1.2 * sum(e["bytes"] for e in stored.values())


def test_runs_without_torch_and_without_tvm(program_of: ProgramOf, tmp_path: Path) -> None:
    environment = bare_environment(tmp_path)
    for package in ("torch", "tvm", "transformers", "tsld_fx"):
        assert bare(["-c", f"import {package}"], environment).returncode != 0
    folder = tmp_path / "copied"
    shutil.copytree(program_of("llama"), folder)
    lowered = reference("llama")
    prompt = ids(1, 5, seed=9)
    expected = lowered.generate(prompt, max_new_tokens=10, do_sample=False)[0].tolist()
    text = " ".join(map(str, prompt[0].tolist()))
    done = bare([str(folder / "run.py"), "--ids", text, "--max-new-tokens", "10", "--time"], environment)
    assert done.returncode == 0, done.stderr
    assert list(map(int, done.stdout.split())) == expected
    assert "start" in done.stderr
    refused = bare([str(folder / "run.py"), "--ids", str(VOCABULARY)], environment)
    assert refused.returncode == 2 and "error: input_ids lie in" in refused.stderr


def test_second_compilation_looks_the_library_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other weights of one architecture share the code; another size, or another buffer, does not."""
    options = {"generation": False, "batch": 1, "tokens": 4}
    first = tsld_fx.relax.compile(reference("llama"), tmp_path / "first", **options)
    other = tsld_fx.convert(tsld_fx.prepare(build("llama", seed=1)), backend="reference")
    monkeypatch.setattr(build_program, "build_library", None)  # not called again
    monkeypatch.setattr(build_program, "export_lowered", None)
    second = tsld_fx.relax.compile(other, tmp_path / "second", **options)
    assert (first / "model.so").read_bytes() == (second / "model.so").read_bytes()
    x = ids(1, 4)
    with torch.no_grad():
        assert relative(tsld_fx.relax.load(second)(x), other(input_ids=x).logits) < 1e-5
    asked = request(other, options)
    assert request(other, {**options, "tokens": 5}) != asked
    other.model.rotary_emb.inv_freq.mul_(2)
    assert request(other, options) != asked
