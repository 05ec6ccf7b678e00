"""convert and load with backend='cuda': the same model as the reference, on kernels, through all of torch's doors."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tsld_fx
from tests.models import build, ids, left_padded
from tsld_fx import AffineWeight, LoweredModel, PreparedModel, QuantConfig, TernaryWeight, convert, cuda_linear, prepare
from tsld_fx.codegen import LowBitGemm
from tsld_fx.codegen.cuda_gemm import QUANTISED_TOKENS
from tsld_fx.errors import BackendError
from tsld_fx.lowbit_linear import LowBitLinear

pytestmark = pytest.mark.gpu

LAYER = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
MODEL = {torch.float16: 1e-2, torch.bfloat16: 6e-2}
DTYPES = [torch.float16, torch.bfloat16]
FORMATS = {
    "ternary": QuantConfig(),
    "4-bit": QuantConfig(weight=AffineWeight(bits=4, granularity="group", group_size=32)),
    "8-bit-head": QuantConfig(weight=TernaryWeight(granularity="tensor"), overrides={"lm_head": AffineWeight(bits=8)}),
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[LowBitGemm]:
    """Every call of a kernel is noted here."""
    seen: list[LowBitGemm] = []
    original = LowBitGemm.__call__

    def call(self: LowBitGemm, *args: object, **kwargs: object) -> Tensor:
        seen.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LowBitGemm, "__call__", call)
    return seen


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def relative(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def gpu_ids(*shape: int) -> Tensor:
    return ids(*shape).cuda()


SIZES = {"llama": {"hidden_size": 64, "intermediate_size": 160, "head_dim": 16}, "gpt2": {"n_embd": 64}}


def prepared_model(family: str, kind: str = "ternary") -> PreparedModel:
    return prepare(build(family, **SIZES[family]), FORMATS[kind])


def random_layer(
    inputs: int = 512, outputs: int = 384, bits: int = 2, dtype: torch.dtype = torch.float16
) -> LowBitLinear:
    layer = LowBitLinear(inputs, outputs, bits, 0, bias=True, device="cuda", dtype=dtype)
    layer.weight_packed.random_(0, 256)
    if bits == 2:
        layer.weight_packed.bitwise_and_(0x55)  # codes 0 and 1
    layer.weight_scale.uniform_(0.01, 0.02)
    layer.bias.normal_()
    layer.use_kernels()
    return layer


def oracle(layer: LowBitLinear, x: Tensor) -> Tensor:
    bias = 0 if layer.bias is None else layer.bias.double()
    return x.double() @ layer.dequantize().double().T + bias


def layout_of(layer: LowBitLinear) -> LowBitGemm | None:
    weight = (layer.weight_packed, layer.weight_scale, layer.weight_zero)
    return cuda_linear.find(*weight, layer.bits, layer.group_size, layer.in_features)


def all_on_kernels(lowered: LoweredModel) -> bool:
    return all(layout_of(layer) is not None for layer in lowered.lowbit_layers().values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_model_agrees_with_the_reference(family: str, kind: str, dtype: torch.dtype, calls: list) -> None:
    prepared = prepared_model(family, kind)
    before = prepared.device
    lowered = convert(prepared, backend="cuda").to(dtype)
    assert (lowered.backend, lowered.device.type, prepared.device) == ("cuda", "cuda", before)
    reference = convert(prepared, backend="reference").to("cuda", dtype)
    tokens, mask = (t.cuda() for t in left_padded())
    expected = reference(tokens, attention_mask=mask).logits[mask.bool()]
    assert not calls
    assert relative(lowered(tokens, attention_mask=mask).logits[mask.bool()], expected) <= MODEL[dtype]
    assert len(calls) == len(lowered.lowbit_layers())
    assert relative(lowered.graph_module(tokens, mask)["logits"][mask.bool()], expected) <= MODEL[dtype]
    assert len(calls) == 2 * len(lowered.lowbit_layers())
    for name, layer in lowered.lowbit_layers().items():
        for rows in (1, 27):
            x = torch.randn(rows, layer.in_features, dtype=dtype, device="cuda")
            assert relative(layer(x), oracle(layer, x)) <= LAYER[dtype], name
    made = lowered.generate(gpu_ids(2, 5), max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert made.shape == (2, 13)


def test_auto_goes_by_where_the_model_lies() -> None:
    assert convert(prepared_model("llama")).backend == "cpu"
    prepared = prepared_model("llama").to("cuda")
    lowered = convert(prepared)
    assert lowered.backend == "cuda" and all_on_kernels(lowered)
    assert convert(prepared, backend="reference").backend == "reference"
    unserved = prepare(build("llama"), QuantConfig(weight=TernaryWeight(granularity="group", group_size=4))).to("cuda")
    with pytest.warns(UserWarning, match="group of 32"):
        assert convert(unserved).backend == "reference"
    with pytest.raises(BackendError, match=r"model\.layers\.0"):
        convert(unserved, backend="cuda")


def test_wide_activations_keep_their_accuracy(calls: list) -> None:
    layer = random_layer(dtype=torch.float32)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        x = torch.randn(3, 512, dtype=dtype, device="cuda")
        assert relative(layer(x), oracle(layer, x)) <= tolerance
    assert not calls


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_of_another_type_and_strided_inputs(dtype: torch.dtype, calls: list) -> None:
    layer = random_layer(dtype=torch.float32)
    base = torch.randn(4, 6, 1100, dtype=dtype, device="cuda")
    for x in (
        base[..., :512],
        base[..., 1:1025:2],
        base.transpose(0, 1)[..., 3:515],
        base[0, 0, :512],
        base[:0, :, :512],
    ):
        y = layer(x)
        assert y.dtype == dtype and y.is_contiguous()
        if x.numel():
            assert relative(y, oracle(layer, x)) <= LAYER[dtype]
    assert len(calls) == 5


hopper = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="kernels for Hopper"
)


@hopper
@pytest.mark.parametrize("mode", ["int8", "fp8"])
def test_activations_of_8_bits_are_for_many_tokens(mode: str) -> None:
    layer, other = random_layer(), random_layer(bits=4)
    x = torch.randn(QUANTISED_TOKENS, 512, dtype=torch.float16, device="cuda")
    plain, four = layer(x), other(x)
    layer.use_kernels("cuda", mode)
    other.use_kernels("cuda", mode)
    assert torch.equal(layer(x[:-1]), plain[:-1])
    assert torch.equal(other(x), four)  # no such kernels for 4 bits
    rounded = layer(x)
    assert torch.equal(rounded, layout_of(layer)(x, layer.bias, quantise=mode))
    error = relative(rounded - layer.bias, oracle(layer, x) - layer.bias.double())
    assert 2e-3 <= error <= {"int8": 1.5e-2, "fp8": 5e-2}[mode]
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), rounded) and torch.equal(twin.cpu().cuda()(x), rounded)
    layer.use_kernels("cuda")
    assert torch.equal(layer(x), plain)


@hopper
def test_activation_mode_of_a_model_is_recorded(tmp_path: Path) -> None:
    prepared = prepared_model("llama", "8-bit-head")
    lowered = convert(prepared, backend="cuda", activations="int8").to(torch.float16)
    tokens = torch.randint(0, lowered.config.vocab_size, (QUANTISED_TOKENS // 32, 32), device="cuda")
    logits, few = lowered(tokens).logits, lowered(tokens[:1]).logits
    exact = convert(prepared, backend="cuda").to(torch.float16)
    assert 1e-3 <= relative(logits, exact(tokens).logits) <= 0.1
    assert torch.equal(few, exact(tokens[:1]).logits)
    lowered.save_pretrained(tmp_path)
    loaded = tsld_fx.load(tmp_path, device="cuda", dtype=torch.float16)
    assert {layer.activations for layer in loaded.lowbit_layers().values()} == {"int8"}
    assert (
        relative(loaded(tokens).logits, logits) <= 5e-2
    )  # rotary frequencies differ, see above, and rounding amplifies it
    with pytest.raises(BackendError, match="one scale per channel or tensor"):
        convert(prepared_model("llama", "4-bit"), backend="cuda", activations="int8")


def test_gradient_of_the_input_is_the_dense_ones() -> None:
    layer = random_layer()
    x = torch.randn(3, 512, dtype=torch.float16, device="cuda", requires_grad=True)
    with torch.enable_grad():
        y = layer(x)
        y.sum().backward()
    assert relative(y, oracle(layer, x)) <= 1e-3
    assert relative(x.grad, layer.dequantize().double().sum(0).expand(3, -1)) <= 2e-3


def test_cuda_graph_of_a_layer_on_another_stream() -> None:
    layers = nn.Sequential(random_layer(512, 256), random_layer(256, 512, bits=4))
    x = torch.randn(2, 512, dtype=torch.float16, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layers(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layers(x)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, layers(x))


def test_layout_is_freed_with_its_layer() -> None:
    random_layer()  # the device's workspace stays
    gc.collect()
    before, alive = torch.cuda.memory_allocated(), len(cuda_linear._entries)
    layer = random_layer(4096, 4096)
    held = torch.cuda.memory_allocated() - before
    assert held >= 2 * 4096 * 4096 // 4  # packed weight and kernel layout
    layer.cpu()
    gc.collect()
    assert torch.cuda.memory_allocated() == before
    layer.cuda()
    assert layout_of(layer) is not None
    del layer
    gc.collect()
    assert torch.cuda.memory_allocated() == before
    assert len(cuda_linear._entries) == alive


def test_copies_moves_and_new_weights_stay_on_kernels(calls: list) -> None:
    layer, other = random_layer(), random_layer()
    x = torch.randn(2, 512, dtype=torch.float16, device="cuda")
    twin = copy.deepcopy(layer)
    assert layout_of(twin) is not None and layout_of(twin) is not layout_of(layer)
    assert torch.equal(twin(x), layer(x))
    for assign in (False, True):
        twin = copy.deepcopy(layer)
        twin.load_state_dict(other.state_dict(), assign=assign)
        assert torch.equal(twin(x), other(x))
    with torch.no_grad():
        layer.weight_scale.mul_(2)
    assert relative(layer(x), oracle(layer, x)) <= 1e-3
    assert relative(layer.cpu().cuda()(x), oracle(layer, x)) <= 1e-3
    assert len(calls) == 8


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_layer_follows_to_another_device() -> None:
    layer = random_layer().to("cuda:1")
    x = torch.randn(2, 512, dtype=torch.float16, device="cuda:1")
    assert layout_of(layer).device == torch.device("cuda", 1)
    assert relative(layer(x), oracle(layer, x)) <= 1e-3


def test_input_and_weights_on_different_devices_are_refused() -> None:
    layer, x = random_layer(), torch.randn(2, 512, dtype=torch.float16)
    with pytest.raises(BackendError, match=r"input is on cpu, the packed weight on cuda:0.*\.to\(device\)"):
        layer(x)
    with pytest.raises(BackendError, match=r"input is on cuda:0, the packed weight on cpu"):
        layer.cpu()(x.cuda())


@pytest.mark.parametrize("dtype", DTYPES)
def test_save_and_load(tmp_path: Path, dtype: torch.dtype) -> None:
    lowered = convert(prepared_model("llama", "4-bit"), backend="cuda").to(dtype)
    converted = lowered(gpu_ids(2, 9)).logits
    lowered.save_pretrained(tmp_path)
    reference = tsld_fx.load(tmp_path, backend="reference", device="cuda", dtype=dtype)
    assert not any(layout_of(layer) for layer in reference.lowbit_layers().values())
    expected = reference(gpu_ids(2, 9)).logits
    for options in ({"device": "cuda"}, {"backend": "cuda"}, {"backend": "cuda", "device_map": "cuda"}):
        loaded = tsld_fx.load(tmp_path, dtype=dtype, **options)
        assert loaded.backend == "cuda" and loaded.device.type == "cuda" and all_on_kernels(loaded)
        logits = loaded(gpu_ids(2, 9)).logits
        assert relative(logits, expected) <= MODEL[dtype]
        # not equal: `.to(dtype)` rounded the rotary frequencies too, which a fresh model computes in float32
        assert relative(logits, converted) <= MODEL[dtype]
    on_cpu = tsld_fx.load(tmp_path)
    assert (on_cpu.backend, on_cpu.device.type) == ("cpu", "cpu")


def test_graph_compiles_in_one_piece(calls: list) -> None:
    lowered = convert(prepared_model("llama"), backend="cuda").to(torch.float16)
    tokens = gpu_ids(2, 9)
    expected = lowered(tokens).logits
    calls.clear()
    compiled = torch.compile(lowered.graph_module, backend="aot_eager", fullgraph=True)
    assert relative(compiled(tokens, torch.ones_like(tokens))["logits"], expected) <= 1e-2
    assert len(calls) == len(lowered.lowbit_layers())


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_layer_compiles_with_inductor(mode: str, calls: list) -> None:
    layer = random_layer()
    compiled = torch.compile(lambda x: torch.relu(layer(x * 2)), fullgraph=True, mode=mode)
    for _ in range(4):  # reduce-overhead: warm up, capture, replay
        x = torch.randn(3, 512, dtype=torch.float16, device="cuda")
        assert relative(compiled(x), torch.relu(oracle(layer, x * 2))) <= 1e-3
    assert len(calls) >= 2
