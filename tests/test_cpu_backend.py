"""convert and load with backend='cpu': the same model as the reference, on kernels, through all of torch's doors."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import tsld_fx
from tests.models import build, ids
from tsld_fx import AffineWeight, QuantConfig, TernaryWeight, backends, convert, cpu_linear, prepare
from tsld_fx.codegen.compiler import KernelBuildError
from tsld_fx.codegen.cpu import compiler, library
from tsld_fx.errors import BackendError, CheckpointError
from tsld_fx.lowbit_linear import LowBitLinear


def layer(bits: int = 2, group_size: int = 0, zero: bool = False, bias: bool = False) -> LowBitLinear:
    made = LowBitLinear(64, 48, bits, group_size, zero=zero, bias=bias)
    made.weight_packed.random_(0, 256)
    if bits == 2:
        made.weight_packed.copy_(made.weight_packed & 0x55)  # no code 3
    made.weight_scale.uniform_(0.5, 1.0)
    if zero:
        made.weight_zero.random_(0, 2**bits)
    if bias:
        made.bias.data.normal_()
    return made


def weight_of(one: LowBitLinear) -> tuple:
    return one.weight_packed, one.weight_scale, one.weight_zero, one.bits, one.group_size, one.in_features


def close(y: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-3) -> bool:
    return float((y - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_model_on_the_kernels_agrees_with_the_reference(family: str) -> None:
    config = QuantConfig(skip=(), overrides={"re:.*(down|fc2|c_proj).*": AffineWeight(bits=4), "lm_head": None})
    prepared = prepare(build(family), config)
    lowered, reference = convert(prepared), convert(prepared, "reference")
    assert (lowered.backend, reference.backend) == ("cpu", "reference")
    assert all(one.kernels == "cpu" for one in lowered.lowbit_layers().values())
    with torch.no_grad():
        expected = reference(ids()).logits
        assert close(lowered(ids()).logits, expected)
        assert torch.allclose(lowered.graph_module(ids(), torch.ones_like(ids()))["logits"], expected, atol=1e-4)
    assert lowered.generate(ids(), max_new_tokens=4, do_sample=False).shape[1] == ids().shape[1] + 4


def test_eight_bit_head() -> None:
    config = QuantConfig(skip=(), overrides={"lm_head": AffineWeight(bits=8)})
    prepared = prepare(build("llama"), config)
    lowered = convert(prepared, "cpu")
    assert lowered.lowbit_layers()["lm_head"].bits == 8
    with torch.no_grad():
        assert close(lowered(ids()).logits, convert(prepared, "reference")(ids()).logits)


def test_activations_are_recorded_and_come_back(tmp_path: Path) -> None:
    prepared = prepare(build("llama"))
    default, rough, sums = (convert(prepared, "cpu", activations=name) for name in ("a16", "int8", "add"))
    with torch.no_grad():
        expected = convert(prepared, "reference")(ids()).logits
        outputs = [m(ids()).logits for m in (default, rough, sums)]
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    assert close(outputs[0], expected) and close(outputs[1], expected, 0.1) and close(outputs[2], expected, 1e-5)
    rough.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["activations"] == "int8"
    loaded = tsld_fx.load(tmp_path)
    assert loaded.backend == "cpu"
    with torch.no_grad():
        assert torch.equal(loaded(ids()).logits, outputs[1])
        assert torch.equal(tsld_fx.load(tmp_path, activations="a16")(ids()).logits, outputs[0])
    with pytest.warns(UserWarning, match=r"int8.*'reference' keeps activations"):
        tsld_fx.load(tmp_path, backend="reference")


def test_checkpoint_without_or_with_an_unknown_mode(tmp_path: Path) -> None:
    convert(prepare(build("llama"))).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    assert config["quantization_config"].pop("activations") == "a16"
    file.write_text(json.dumps(config))  # as earlier versions wrote it
    assert tsld_fx.load(tmp_path).config.quantization_config.activations == "a16"
    config["quantization_config"]["activations"] = "int3"
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"'int3' is unknown.*'a16', 'int8', 'add'"):
        tsld_fx.load(tmp_path)


def test_modes_that_cannot_be_are_refused_before_any_work(tmp_path: Path) -> None:
    prepared = prepare(build("llama"))
    with pytest.raises(BackendError, match=r"'int4' is unknown.*'a16', 'int8', 'add'"):
        convert(prepared, activations="int4")
    with pytest.raises(BackendError, match=r"'int8' is a mode of backend='cpu'.*'reference' keeps"):
        convert(prepared, "reference", activations="int8")
    with pytest.raises(BackendError, match=r"'add' is a mode of backend='cpu'"):
        tsld_fx.load(tmp_path / "nothing here", "reference", activations="add")
    with pytest.raises(BackendError, match=r"backend='cpu': the model lies on cuda:0.*device='cpu'"):
        backends.check_backend("cpu", "cuda:0")


def test_machine_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    prepared = prepare(build("llama"))
    library.library.cache_clear()
    monkeypatch.setenv("TSLD_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("TSLD_CXX", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    try:
        with pytest.raises(BackendError, match=r"backend='cpu': No C\+\+ compiler found.*apt install g\+\+"):
            convert(prepared, "cpu")
        with pytest.warns(UserWarning, match=r"runs the reference implementation, not CPU kernels: No C\+\+ compiler"):
            assert convert(prepared).backend == "reference"
        monkeypatch.setenv("TSLD_CXX", "no-such-compiler")
        with pytest.raises(BackendError, match=r"no-such-compiler does not run.*TSLD_CXX"):
            backends.check_backend("cpu")
    finally:
        library.library.cache_clear()


def test_earlier_build_serves_where_the_compiler_is_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    built = library.build()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("TSLD_CXX", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    assert library.build().read_bytes() == built.read_bytes()


def test_failing_build_shows_what_the_compiler_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "c++"
    script.write_text(
        "#!/bin/sh\n[ $1 = --version ] && echo old compiler 1 && exit\necho 'error: no C++17' >&2\nexit 1\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("TSLD_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TSLD_CXX", str(script))
    compiler._compiler.cache_clear()
    with pytest.raises(KernelBuildError, match=r"(?s)old compiler 1.*error: no C\+\+17.*TSLD_CXX"):
        library.build()
    assert not list((tmp_path / "cache").glob("*"))


def test_level_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    best = library.level()
    monkeypatch.setenv("TSLD_CPU_LEVEL", "portable")
    assert library.level() == 0
    monkeypatch.setenv("TSLD_CPU_LEVEL", "avx9")
    with pytest.raises(BackendError, match=r"TSLD_CPU_LEVEL='avx9': this CPU runs portable"):
        library.level()
    monkeypatch.delenv("TSLD_CPU_LEVEL")
    assert library.level() == best


def test_nothing_is_built_or_loaded_by_the_import(tmp_path: Path) -> None:
    code = "import sys, tsld_fx; print([m for m in sys.modules if m.startswith('tsld_fx.codegen.cpu')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------ the layer
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("mode", ["plain", "no_grad", "inference", "compiled", "vmap", "op"])
def test_layer_runs_the_kernels_through_every_door(bits: int, mode: str) -> None:
    one = layer(bits, 16, zero=bits != 2, bias=True)
    one.use_kernels("cpu")
    x = torch.randn(3, 7, 64)
    expected = cpu_linear.find(*weight_of(one))(x, one.bias)
    if mode == "vmap":
        assert torch.equal(torch.func.vmap(one)(x), expected)
    elif mode == "op":
        packed, scale, zero, *rest = weight_of(one)
        assert torch.equal(torch.ops.tsld.lowbit_linear(x, packed.detach(), scale, zero, one.bias, *rest), expected)
    elif mode == "compiled":
        assert torch.equal(torch.compile(one, backend="aot_eager", fullgraph=True)(x), expected)
    else:
        with {"plain": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[mode]():
            assert torch.equal(one(x), expected)


def test_gradients_flow_through_the_kernels() -> None:
    one = layer(bias=True)
    one.use_kernels("cpu")
    x = torch.randn(5, 64, requires_grad=True)
    one(x).sum().backward()
    torch.testing.assert_close(x.grad, one.dequantize().sum(0).expand(5, -1))


def test_float64_keeps_the_reference() -> None:
    one, x = layer(), torch.randn(4, 64, dtype=torch.float64)
    expected = one(x)
    one.use_kernels("cpu")
    assert torch.equal(one(x), expected)


def test_wrong_width_is_refused() -> None:
    one = layer()
    one.use_kernels("cpu")
    with pytest.raises(BackendError, match="the input has 63 features, the packed weight 64"):
        one(torch.randn(2, 63))


@pytest.mark.parametrize("name", ["weight_packed", "weight_scale", "weight_zero"])
def test_change_in_place_is_seen(name: str) -> None:
    one, x = layer(4, 0, zero=True), torch.randn(2, 64)
    one.use_kernels("cpu", "int8")
    one(x)
    getattr(one, name).fill_(3)
    fresh = copy.deepcopy(one)
    assert torch.equal(one(x), fresh(x))
    assert cpu_linear.find(*weight_of(one)).activations == "int8"


def test_swapped_buffers_are_not_mistaken_for_the_registered_ones() -> None:
    one, other, x = layer(), layer(), torch.randn(2, 64)
    one.use_kernels("cpu")
    expected = other(x)
    one.weight_packed, one.weight_scale = other.weight_packed, other.weight_scale
    assert torch.equal(one(x), expected)  # the reference: nobody registered these
    one.weight_packed.data = layer().weight_packed
    assert not torch.equal(one(x), expected)


def test_copies_and_state() -> None:
    one, x = layer(bias=True), torch.randn(3, 64)
    one.use_kernels("cpu", "int8")
    expected = one(x)
    assert not any("_entry" in key for key in one.state_dict())
    copied = copy.deepcopy(one)
    assert cpu_linear.find(*weight_of(copied)) is not cpu_linear.find(*weight_of(one))
    assert torch.equal(copied(x), expected)
    buffer = io.BytesIO()
    torch.save(one, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), expected)
    blank = layer(bias=True)
    blank.use_kernels("cpu", "int8")
    blank.load_state_dict(one.state_dict())
    assert torch.equal(blank(x), expected)
    half = one.bfloat16()
    assert half.weight_scale.dtype == torch.float32
    assert half(x.bfloat16()).dtype == torch.bfloat16


def test_auto_says_nothing_where_the_kernels_run() -> None:
    prepared = prepare(build("llama"), QuantConfig(weight=TernaryWeight(granularity="group", group_size=4)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert convert(prepared).backend == "cpu"
