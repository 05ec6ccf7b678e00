"""Checkpoints of converted models: what is in the folder, what comes back, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import tsld_fx
from tests.models import FAMILIES, build, ids, ternary
from tsld_fx import AffineWeight, LoweredModel, QuantConfig, TernaryWeight, convert, prepare
from tsld_fx.errors import BackendError, CheckpointError

MIXED = QuantConfig(
    weight=TernaryWeight(granularity="group", group_size=4),
    overrides={
        "*.o_proj": AffineWeight(bits=4),
        "*.q_proj": AffineWeight(bits=8, symmetric=True, granularity="tensor"),
        "*.0.mlp.up_proj": None,
        "lm_head": AffineWeight(bits=8, granularity="group", group_size=8),
    },
)


@pytest.fixture(scope="module")
def mixed() -> LoweredModel:
    return convert(prepare(build("llama"), MIXED))


@pytest.fixture(scope="module")
def saved(mixed: LoweredModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    mixed.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_model_comes_back_bit_for_bit(family: str, tmp_path: Path) -> None:
    _, lowered = ternary(family)
    lowered.save_pretrained(tmp_path)
    loaded = tsld_fx.load(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        logits = lowered(ids()).logits
        assert torch.equal(loaded(ids()).logits, logits)
        expected = tsld_fx.load(tmp_path, backend="reference")(ids()).logits
        assert torch.equal(plain(ids()).logits, expected)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert isinstance(loaded, LoweredModel)
    assert type(plain).__name__ == type(build(family)).__name__
    assert loaded.state_dict().keys() == lowered.state_dict().keys()
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


def test_folder_has_the_names_and_formats_of_the_contract(mixed: LoweredModel, saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    layer = "model.layers.1.self_attn.o_proj"
    assert tensors[f"{layer}.weight_packed"].dtype == torch.uint8
    assert tensors[f"{layer}.weight_packed"].shape == (32, 16)
    assert tensors[f"{layer}.weight_scale"].dtype == torch.float32
    assert tensors[f"{layer}.weight_scale"].shape == (32, 1)
    assert tensors[f"{layer}.weight_zero"].dtype == torch.uint8
    assert f"{layer}.weight" not in tensors
    assert tensors["model.layers.1.self_attn.q_proj.weight_scale"].shape == (1, 1)
    assert "model.layers.1.self_attn.q_proj.weight_zero" not in tensors
    assert tensors["model.layers.1.mlp.down_proj.weight_packed"].shape == (32, 11)
    assert tensors["model.layers.1.mlp.down_proj.weight_scale"].shape == (32, 11)
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.float32
    assert tensors["lm_head.weight_zero"].shape == (97, 4)
    config = json.loads((saved / "config.json").read_text())
    quantization = config["quantization_config"]
    assert quantization["quant_method"] == "tsld_fx"
    assert quantization["format_version"] == 1
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "tsld_fx" not in config
    assert QuantConfig.from_dict(quantization["quant"]) == MIXED


def test_mixed_formats_come_back_bit_for_bit_and_as_a_graph(mixed: LoweredModel, saved: Path) -> None:
    loaded = tsld_fx.load(saved, device="cpu")
    with torch.no_grad():
        logits = mixed(ids()).logits
        assert torch.equal(loaded(ids()).logits, logits)
        in_graph = loaded.graph_module(ids(), torch.ones_like(ids()))["logits"]
    torch.testing.assert_close(in_graph, logits, rtol=1e-5, atol=1e-6)
    lowered_nodes = [n for n in loaded.graph_module.graph.nodes if n.target is torch.ops.tsld.lowbit_linear.default]
    assert len(lowered_nodes) == 14
    generated = loaded.generate(ids(2, 4), max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(generated, mixed.generate(ids(2, 4), max_new_tokens=5, do_sample=False, eos_token_id=None))


def test_eight_bit_head_tied_to_the_embedding_comes_back(tmp_path: Path) -> None:
    for family in ("gpt2", "qwen3"):
        head = AffineWeight(bits=8, scale="lsq")
        lowered = convert(prepare(build(family), QuantConfig(overrides={"lm_head": head})))
        lowered.save_pretrained(tmp_path / family)
        loaded = tsld_fx.load(tmp_path / family)
        assert torch.equal(loaded(ids()).logits, lowered(ids()).logits)
        assert torch.equal(loaded.get_input_embeddings().weight, lowered.get_input_embeddings().weight)


def test_sharded_checkpoint_comes_back(mixed: LoweredModel, tmp_path: Path) -> None:
    mixed.save_pretrained(tmp_path, max_shard_size="12KB")
    shards = list(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert torch.equal(tsld_fx.load(tmp_path)(ids()).logits, mixed(ids()).logits)
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=shards[1].name):
        tsld_fx.load(tmp_path)


def test_saving_what_was_loaded_gives_the_same_file(saved: Path, tmp_path: Path) -> None:
    tsld_fx.load(saved).save_pretrained(tmp_path)
    ours, theirs = load_file(tmp_path / "model.safetensors"), load_file(saved / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) and ours[n].dtype == theirs[n].dtype for n in ours)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_load_keeps_the_scales_in_float32(mixed: LoweredModel, saved: Path, dtype: torch.dtype) -> None:
    loaded = tsld_fx.load(saved, dtype=dtype)
    assert loaded.model.embed_tokens.weight.dtype == dtype
    for name, layer in loaded.lowbit_layers().items():
        assert layer.weight_scale.dtype == torch.float32
        assert torch.equal(layer.dequantize(), mixed.lowbit_layers()[name].dequantize())
    with torch.no_grad():
        logits = loaded(ids()).logits
        assert logits.dtype == dtype
        exact = mixed(ids()).logits
        assert (logits.float() - exact).abs().max() < 0.05 * exact.abs().max()
        assert loaded.graph_module(ids(), torch.ones_like(ids()))["logits"].dtype == dtype


def edit_json(file: Path, change: Callable[[dict], object]) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def refuse(folder: Path, *said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        tsld_fx.load(folder)
    for part in said:
        assert part in str(caught.value)


def test_missing_folder_and_missing_config_are_refused(folder: Path) -> None:
    refuse(folder / "nowhere", "nowhere", "no such folder", "save_pretrained")
    (folder / "config.json").unlink()
    refuse(folder, "config.json", "not a model's folder")


@pytest.mark.parametrize("text", ["{ not json", "[1, 2]", ""])
def test_config_that_is_no_json_object_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    refuse(folder, "config.json", "JSON", "save it again")


def test_config_that_is_not_text_is_refused(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe\x00\x80")
    refuse(folder, "config.json", "not valid JSON")


@pytest.mark.parametrize("kept", [0, 5, 300, -1, -1000])
def test_weights_cut_short_are_refused(folder: Path, kept: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refuse(folder, "model.safetensors", "cut short or damaged")


def test_missing_weights_file_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refuse(folder, "model.safetensors", "missing")


@pytest.mark.parametrize("index", ["{ not json", "{}", '{"weight_map": 3}'])
def test_damaged_index_of_shards_is_refused(folder: Path, index: str) -> None:
    (folder / "model.safetensors.index.json").write_text(index)
    refuse(folder, "model.safetensors.index.json")


@pytest.mark.parametrize("version", [0, 2, "1.5", None])
def test_another_format_version_is_refused(folder: Path, version: object) -> None:
    edit_json(folder / "config.json", lambda c: c["quantization_config"].update(format_version=version))
    refuse(folder, f"format_version {version}", "reads version 1")


@pytest.mark.parametrize("leaf", ["weight_packed", "weight_scale", "weight_zero"])
def test_missing_tensor_is_refused_by_name(folder: Path, leaf: str) -> None:
    name = f"model.layers.0.self_attn.o_proj.{leaf}"
    edit_tensors(folder, lambda t: t.pop(name))
    refuse(folder, name, "missing")


def test_missing_norm_is_refused_by_name(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.pop("model.norm.weight"))
    refuse(folder, "model.norm.weight", "missing")


def test_ternary_code_three_is_refused(folder: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight_packed"
    edit_tensors(folder, lambda t: t[name].__setitem__((2, 1), 0b0011_0000))
    refuse(folder, "model.layers.0.self_attn.k_proj", "code 3")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scale_that_is_not_finite_is_refused(folder: Path, value: float) -> None:
    name = "model.layers.0.self_attn.k_proj.weight_scale"
    edit_tensors(folder, lambda t: t[name].__setitem__((0, 0), value))
    refuse(folder, "model.layers.0.self_attn.k_proj", "NaN or Inf")


@pytest.mark.parametrize("leaf", ["weight_packed", "weight_scale", "weight_zero"])
def test_tensor_of_another_shape_is_refused_by_name(folder: Path, leaf: str) -> None:
    name = f"model.layers.0.self_attn.o_proj.{leaf}"
    edit_tensors(folder, lambda t: t.update({name: t[name][:-1].clone()}))
    refuse(folder, "model.layers.0.self_attn.o_proj")


def test_layer_that_the_model_does_not_have_is_refused(folder: Path) -> None:
    def rename(config: dict) -> None:
        layers = config["quantization_config"]["layers"]
        layers["model.layers.9.q"] = layers["lm_head"]

    edit_json(folder / "config.json", rename)
    refuse(folder, "model.layers.9.q", "LlamaForCausalLM")


@pytest.mark.parametrize("layers", [{"lm_head": {"bits": 8}}, {"lm_head": 3}, [1], "all"])
def test_unreadable_layer_table_is_refused(folder: Path, layers: object) -> None:
    edit_json(folder / "config.json", lambda c: c["quantization_config"].update(layers=layers))
    refuse(folder, "layers")


def test_unpacked_model_is_refused_with_the_way_to_load_it(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "plain")
    refuse(tmp_path / "plain", "not a converted model", "from_pretrained")
    prepare(build("llama")).save_pretrained(tmp_path / "prepared")
    refuse(tmp_path / "prepared", "not a converted model", "load_prepared")
    with pytest.raises(CheckpointError, match="not a prepared model"):
        tsld_fx.load_prepared(tmp_path / "plain")


def test_damaged_prepared_checkpoint_is_refused(tmp_path: Path) -> None:
    prepare(build("llama")).save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*missing"):
        tsld_fx.load_prepared(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*cut short"):
        tsld_fx.load_prepared(tmp_path)


def test_norm_of_another_shape_is_refused_with_both_shapes(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({"model.norm.weight": torch.ones(31)}))
    refuse(folder, "model.norm.weight", "[31]", "[32]")


def test_unknown_architecture_is_refused(folder: Path) -> None:
    edit_json(folder / "config.json", lambda c: c.update(model_type="no_such_model"))
    refuse(folder, "no_such_model")


@pytest.mark.parametrize("value", [[1], "tsld_fx", 3])
def test_quantisation_entry_that_is_no_table_is_refused(folder: Path, value: object) -> None:
    edit_json(folder / "config.json", lambda c: c.update(quantization_config=value))
    refuse(folder, "not a converted model")


def test_unknown_backend_is_refused_with_those_that_exist(saved: Path) -> None:
    for call in (lambda: tsld_fx.load(saved, backend="fpga"), lambda: convert(prepare(build("llama")), "fpga")):
        with pytest.raises(BackendError, match=r"fpga.*auto.*reference"):
            call()
