"""Packed checkpoints in the Hugging Face world: shards, device maps, pipelines, caches, assisted decoding, cards."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, pipeline
from transformers.utils import is_hqq_available, is_optimum_quanto_available

import tsld_fx
from tests.models import POSITIONS, build, ids, ternary
from tests.tiny_runs import float_folder, run_cli, tokenizer
from tsld_fx import AffineWeight, LoweredModel, QuantConfig, convert, prepare
from tsld_fx.errors import DataError
from tsld_fx.lowbit_linear import LowBitLinear
from tsld_fx.model_folders import load_float

PAPER = ("gpt2", "opt", "gpt_neo", "llama")
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoweredModel, Path]:
    folder = tmp_path_factory.mktemp("sharded")
    config = QuantConfig(overrides={"lm_head": AffineWeight(bits=8)})
    lowered = convert(prepare(load_float(str(float_folder())), config), backend="reference")
    lowered.save_pretrained(folder, max_shard_size="10KB")
    tokenizer().save_pretrained(folder)
    return lowered, folder


MAPS: dict[str, Any] = {
    "cpu": "cpu",
    "auto": "auto",
    "dict": {"": "cpu"},
    "parts": {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu",
              "lm_head": "cpu"},
}  # fmt: skip


@pytest.mark.parametrize("name", MAPS)
def test_sharded_checkpoint_loads_under_every_device_map(name: str, sharded: tuple[LoweredModel, Path]) -> None:
    lowered, folder = sharded
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    tokens = ids(vocabulary=100)
    for loaded in (
        AutoModelForCausalLM.from_pretrained(folder, device_map=MAPS[name]),
        tsld_fx.load(folder, backend="reference", device_map=MAPS[name]),
    ):
        assert sum(isinstance(m, LowBitLinear) for m in loaded.modules()) == 15
        assert torch.equal(loaded(tokens).logits, lowered(tokens).logits)


def test_layers_offloaded_to_disk_compute_the_same(sharded: tuple[LoweredModel, Path], tmp_path: Path) -> None:
    lowered, folder = sharded
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
              "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path)
    assert next(loaded.model.layers[1].parameters()).device.type == "meta"
    assert torch.equal(loaded(ids(vocabulary=100)).logits, lowered(ids(vocabulary=100)).logits)


def test_saving_again_through_transformers_keeps_every_tensor(
    sharded: tuple[LoweredModel, Path], tmp_path: Path
) -> None:
    lowered, folder = sharded
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path, max_shard_size="20KB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ours, theirs = again.state_dict(), lowered.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)


def test_text_generation_pipeline(sharded: tuple[LoweredModel, Path]) -> None:
    lowered, folder = sharded
    prompt = "the cat sees"
    made = pipeline("text-generation", model=str(folder), device_map="cpu")(prompt, return_full_text=False, **GREEDY)
    words = tokenizer()
    whole = lowered.generate(**words(prompt, return_tensors="pt"), **GREEDY, pad_token_id=0)
    start = len(words(prompt)["input_ids"])
    assert made[0]["generated_text"] == words.decode(whole[0, start:], skip_special_tokens=True)


CACHES = ["dynamic", "static", "offloaded", "offloaded_static", "quantized"]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", PAPER)
def test_every_cache_that_the_float_model_runs_gives_its_tokens(family: str, cache: str) -> None:
    """What the family's own class can do with a cache here, the packed model can do too."""
    model, lowered = build(family), ternary(family)[1]
    if cache == "quantized" and not (is_optimum_quanto_available() or is_hqq_available()):
        with pytest.raises(ImportError):
            lowered.generate(ids(2, 5), **GREEDY, cache_implementation=cache)
        return
    options = {**GREEDY, "cache_implementation": cache, "disable_compile": True}
    try:
        own = model.generate(ids(2, 5), **options)
    except (ValueError, RuntimeError, AssertionError, AttributeError, TypeError) as error:
        with pytest.raises(type(error)):
            lowered.generate(ids(2, 5), **options)
        assert cache.startswith("offloaded")  # they need a GPU
        return
    if not torch.equal(own, model.generate(ids(2, 5), **GREEDY)):
        assert (family, cache) == ("gpt_neo", "static")  # transformers' own GPT-Neo goes astray with this cache
        return
    assert torch.equal(lowered.generate(ids(2, 5), **options), lowered.generate(ids(2, 5), **GREEDY))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_assisted_decoding_gives_the_greedy_tokens(family: str) -> None:
    lowered, float_model = ternary(family)[1], build(family)
    plain = lowered.generate(ids(1, 5), **GREEDY)
    assert torch.equal(lowered.generate(ids(1, 5), assistant_model=float_model, **GREEDY), plain)
    assert torch.equal(lowered.generate(ids(1, 5), prompt_lookup_num_tokens=2, **GREEDY), plain)
    draft = build(family).generate(ids(1, 5), **GREEDY)
    assert torch.equal(build(family).generate(ids(1, 5), assistant_model=lowered, **GREEDY), draft)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_more_new_tokens_than_learned_positions_are_refused(family: str) -> None:
    lowered = ternary(family)[1]
    room = POSITIONS + 1 - 5  # the last token needs no position
    for options in ({"max_new_tokens": room + 1}, {"max_length": POSITIONS + 2}):
        with pytest.raises(DataError, match=str(POSITIONS)):
            lowered.generate(ids(1, 5), do_sample=False, eos_token_id=None, **options)
    made = lowered.generate(ids(1, 5), max_new_tokens=room, do_sample=False, eos_token_id=None)
    assert made.shape[1] == POSITIONS + 1


# ---------------------------------------------------------------- the model card
def test_card_tells_formats_and_sizes(sharded: tuple[LoweredModel, Path]) -> None:
    text = (sharded[1] / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: transformers\n")
    for part in ("LlamaForCausalLM", "| 2 (ternary) | output channel | 14 |", "| 8 | output channel | 1 |",
                 "is not recorded", "tags: [tsld_fx, quantized, ternary]"):  # fmt: skip
        assert part in text


def test_card_of_somebody_else_is_left_alone(sharded: tuple[LoweredModel, Path], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine\n")
    sharded[0].save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine\n"


def test_card_of_a_training_run_tells_method_data_and_figures(tmp_path: Path) -> None:
    from tests.tiny_runs import settings, text_file, write_yaml

    config = write_yaml(tmp_path / "run.yaml", settings(training={"max_steps": 2, "eval_steps": 2}))
    for words in (("train", "--config", config, "--out", tmp_path / "run"),
                  ("convert", tmp_path / "run", "--out", tmp_path / "packed")):  # fmt: skip
        done = run_cli(*words)
        assert done.code == 0, done.err
    text = (tmp_path / "packed" / "README.md").read_text()
    for part in ("| method | tsld |", f"| training text | {text_file('train').name} |", "| steps | 2 |", "this model",
                 "full-precision teacher", "validation"):  # fmt: skip
        assert part in text
    assert str(tmp_path) not in text and str(text_file("train").parent) not in text


# ---------------------------------------------------------------- devices on the command line
def test_device_and_dtype_of_eval_and_generate(sharded: tuple[LoweredModel, Path], tmp_path: Path) -> None:
    folder = sharded[1]
    done = run_cli("generate", folder, "--prompt", "the cat", "--max-new-tokens", 3, "--dtype", "bfloat16")
    assert done.code == 0, done.err
    prepare(load_float(str(float_folder()))).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    for words, said in (
        ((folder, "--device", "cuda:7"), "cuda"),
        ((folder, "--device", "tpu"), "tpu"),
        ((folder, "--dtype", "int8"), "int8"),
        ((tmp_path, "--dtype", "float16"), "Convert it first"),
    ):
        done = run_cli("generate", words[0], "--prompt", "the cat", *words[1:])
        assert done.code == 2 and said in done.err


# ---------------------------------------------------------------- a light import
def fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_help_and_import_need_neither_torch_nor_transformers() -> None:
    code = """
import sys
sys.argv = ["tsld-fx", "--help"]
import tsld_fx
from tsld_fx.cli import main
try:
    main()
except SystemExit:
    pass
print([name for name in ("torch", "transformers") if name in sys.modules])
"""
    assert fresh(code).endswith("[]")


def test_operators_and_quantiser_are_there_whatever_is_imported_first(sharded: tuple[LoweredModel, Path]) -> None:
    code = f"""
import tsld_fx
import torch
torch.ops.tsld.lowbit_linear.default
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained({str(sharded[1])!r}).lm_head).__name__)
"""
    assert fresh(code).endswith("LowBitLinear")
    assert fresh("import tsld_fx.packing, wave, torch; print(torch.ops.tsld.fake_quant.default)") == (
        "tsld.fake_quant.default"
    )
