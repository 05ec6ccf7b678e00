"""Which backend runs, what is refused before any work, and which weights find their kernel layout."""

from __future__ import annotations

import copy
import gc
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tsld_fx
from tests.models import build, ids
from tsld_fx import AffineWeight, QuantConfig, TernaryWeight, backends, convert, cuda_linear, prepare
from tsld_fx.backends import check_backend
from tsld_fx.codegen import compiler
from tsld_fx.errors import BackendError, TsldError
from tsld_fx.lowbit_linear import LowBitLinear


def fake_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name, value in {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_name": "GPU",
        "get_device_capability": capability,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)


def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_cuda_without_a_gpu_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_gpu(monkeypatch)
    prepared = prepare(build("llama"))
    monkeypatch.setattr("tsld_fx.lowered.run_passes", lambda *_: pytest.fail("worked before it refused"))
    for call in (
        lambda: convert(prepared, backend="cuda"),
        lambda: tsld_fx.load(tmp_path / "nothing here", backend="cuda"),
    ):
        with pytest.raises(TsldError, match=r"backend='cuda'.*no NVIDIA GPU.*Install.*backend='reference'"):
            call()
    with pytest.raises(BackendError, match=r"device='cuda'.*is_available.*Install"):
        tsld_fx.load(tmp_path / "nothing here", device="cuda")


def test_gpu_that_is_too_old_or_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch, (7, 5))
    with pytest.raises(BackendError, match=r"cuda:0 \(GPU\).*capability 7\.5.*8\.0.*backend='reference'"):
        check_backend("cuda", "cpu")
    with pytest.raises(BackendError, match=r"no cuda:3 here; torch sees 1"):
        check_backend("cuda", "cuda:3")
    check_backend("auto", "cuda")


def test_machine_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise compiler.KernelBuildError("No CUDA compiler found. Install one.")

    fake_gpu(monkeypatch, (9, 0))
    monkeypatch.setattr(compiler, "find_compiler", missing)
    with pytest.raises(BackendError, match=r"No CUDA compiler found.*backend='reference'"):
        check_backend("cuda")


def test_unknown_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"device='gpu:0' is unknown.*'cuda:1'"):
        tsld_fx.load(tmp_path, device="gpu:0")


def test_too_little_memory_says_where_and_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    convert(prepare(build("llama")), backend="reference").save_pretrained(tmp_path)
    remedy = r"Out of memory on .* while moving the model.*Free memory.*tried to allocate"
    with monkeypatch.context() as patch:
        patch.setattr("tsld_fx.checkpoint.AutoModelForCausalLM.from_pretrained", full)
        with pytest.raises(BackendError, match=remedy):
            tsld_fx.load(tmp_path, device_map="cuda:0")
    with monkeypatch.context() as patch:
        patch.setattr("torch.nn.Module.to", full)
        with pytest.raises(BackendError, match=remedy):
            tsld_fx.load(tmp_path, device="meta")
        patch.setattr(backends, "_cuda_problem", lambda device: None)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        with pytest.raises(BackendError, match=r"cuda:0.*model \(0\.0 GB\)"):
            convert(prepare(build("llama")), backend="cuda")


def test_layer_that_does_not_pack_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise BackendError("Out of memory.")

    monkeypatch.setattr("tsld_fx.cpu_linear.register", full)
    with pytest.raises(BackendError, match=r"model\.layers\.0\.self_attn\.q_proj: Out of memory"):
        convert(prepare(build("llama")), backend="cpu")


def test_cuda_on_another_device_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(backends, "_cuda_problem", lambda device: None)
    with pytest.raises(BackendError, match=r"backend='cuda' cannot run on device='cpu'.*device='cuda'"):
        tsld_fx.load(tmp_path, backend="cuda", device="cpu")


def test_format_without_a_kernel_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_cuda_problem", lambda device: None)
    prepared = prepare(build("llama"), QuantConfig(weight=TernaryWeight(granularity="group", group_size=4)))
    with pytest.raises(BackendError, match=r"backend='cuda': model\.layers\.0\..*group of 32.*not 4.*reference"):
        convert(prepared, backend="cuda")


def test_eight_bit_activations_need_kernels_and_layers_that_they_serve(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    prepared = prepare(build("llama"))
    eight = prepare(build("llama"), QuantConfig(weight=AffineWeight(bits=8)))
    convert(eight, "reference").save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"activations='fp8' has no effect here: 'cpu' keeps"):
        lowered = convert(prepared, activations="fp8")
    assert all(layer.activations == "a16" for layer in lowered.lowbit_layers().values())
    with pytest.raises(BackendError, match=r"'fp8' is a mode of backend='cuda'; backend='cpu' keeps"):
        convert(prepared, "cpu", activations="fp8")
    with pytest.raises(BackendError, match=r"'add' is a mode of backend='cpu'; backend='cuda' keeps"):
        convert(prepared, "cuda", activations="add")
    monkeypatch.setattr(backends, "_cuda_problem", lambda device: None)
    fake_gpu(monkeypatch, (8, 0))
    with pytest.raises(BackendError, match=r"activations='fp8'.*Hopper.*Leave activations out"):
        convert(prepared, "cuda", activations="fp8")
    fake_gpu(monkeypatch, (9, 0))
    with pytest.raises(BackendError, match=r"activations='int8'.*one scale per channel or tensor; there is none"):
        convert(eight, "cuda", activations="int8")
    with pytest.raises(BackendError, match=r"activations='int8'.*one scale per channel or tensor; there is none"):
        tsld_fx.load(tmp_path, "cuda", activations="int8")
    backends.check_rounding("int8", "cuda", None, [(8, False), (2, False)])


def test_auto_is_the_cpu_on_the_cpu(tmp_path: Path) -> None:
    lowered = convert(prepare(build("gpt2")))
    assert lowered.backend == "cpu"
    assert all(layer.kernels == "cpu" for layer in lowered.lowbit_layers().values())
    lowered.save_pretrained(tmp_path)
    assert tsld_fx.load(tmp_path).backend == "cpu"
    assert not any(layer.kernels for layer in convert(prepare(build("gpt2")), "reference").lowbit_layers().values())


def test_unknown_backend_names_those_that_exist() -> None:
    with pytest.raises(BackendError, match=r"'fpga'.*'auto'.*'reference', 'cuda'"):
        check_backend("fpga")


# ------------------------------------------------ which weights find their layout; packing itself needs a GPU
class Packed:
    def __init__(self, packed: Tensor, *_: object) -> None:
        self.codes = packed.clone()


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> LowBitLinear:
    monkeypatch.setattr(cuda_linear, "_pack", Packed)
    return LowBitLinear(64, 16, 4, 32, zero=True)


def arguments(layer: LowBitLinear) -> tuple:
    weight = (layer.weight_packed, layer.weight_scale, layer.weight_zero)
    return (*weight, layer.bits, layer.group_size, layer.in_features)


def test_only_registered_weights_and_their_aliases_have_a_layout(layer: LowBitLinear) -> None:
    assert cuda_linear.find(*arguments(layer)) is None
    cuda_linear.register(*arguments(layer))
    found = cuda_linear.find(*arguments(layer))
    assert found is not None
    packed, *rest = arguments(layer)
    assert cuda_linear.find(packed.detach(), *rest) is found
    cuda_linear.register(*arguments(layer))
    assert cuda_linear.find(*arguments(layer)) is found
    for other in (packed.clone(), packed[:8], packed.view(8, -1)):
        assert cuda_linear.find(other, *rest) is None
    assert cuda_linear.find(packed, layer.weight_scale.clone(), *rest[1:]) is None
    assert cuda_linear.find(packed, *rest[:2], 8, 32, 32) is None
    assert cuda_linear.find(*arguments(copy.deepcopy(layer))) is None


@pytest.mark.parametrize("name", ["weight_packed", "weight_scale", "weight_zero"])
def test_change_in_place_makes_the_layout_anew_but_not_inside_a_capture(
    layer: LowBitLinear, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda_linear.register(*arguments(layer))
    before = cuda_linear.find(*arguments(layer))
    getattr(layer, name).fill_(3)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(BackendError, match=r"changed in place.*before the capture"):
            cuda_linear.find(*arguments(layer))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    after = cuda_linear.find(*arguments(layer))
    assert after is not before
    assert torch.equal(after.codes, layer.weight_packed)
    assert cuda_linear.find(*arguments(layer)) is after


def test_layout_lives_as_long_as_the_packed_tensor(layer: LowBitLinear) -> None:
    gc.collect()
    alive = len(cuda_linear._entries)
    made = copy.deepcopy(layer)
    cuda_linear.register(*arguments(made))
    packed = made.weight_packed
    del made
    assert len(cuda_linear._entries) == alive + 1  # a graph may hold it still
    del packed
    gc.collect()
    assert len(cuda_linear._entries) == alive
    assert len(cuda_linear._owners) == alive


def test_weights_of_inference_mode_can_be_registered(layer: LowBitLinear) -> None:
    with torch.inference_mode():
        made = LowBitLinear(64, 16, 2, 0)
        cuda_linear.register(*arguments(made))
    assert cuda_linear.find(*arguments(made)) is not None


def test_layers_register_where_they_arrive(layer: LowBitLinear, monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[str] = []
    monkeypatch.setattr(LowBitLinear, "_register", lambda self: places.append(self.weight_packed.device.type))
    layer.use_kernels()
    copied = copy.deepcopy(layer)
    assert copied.kernels and "kernels" not in layer.state_dict()
    layer.half()
    layer.load_state_dict(copied.state_dict())
    assert places == ["cpu"] * 4


def test_layers_on_the_cpu_that_ask_for_cuda_run_the_reference() -> None:
    lowered = convert(prepare(build("llama")), "reference")
    expected = lowered(ids()).logits
    for one in lowered.lowbit_layers().values():
        one.use_kernels()
        assert cuda_linear.find(*arguments(one)) is None
    assert torch.equal(lowered(ids()).logits, expected)
