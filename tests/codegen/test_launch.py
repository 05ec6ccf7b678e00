"""What a call of LowBitGemm hands to the driver, with the driver replaced by a notebook."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tsld_fx.codegen import QuantisedActivations, cuda_gemm, quantise, workspace
from tsld_fx.codegen.cuda_gemm import LowBitGemm
from tsld_fx.codegen.layout import to_kernel_layout
from tsld_fx.codegen.render import QuantiseConfig, render
from tsld_fx.codegen.select_config import Plan, choose
from tsld_fx.codegen.spec import KernelSpec
from tsld_fx.errors import BackendError


class Notebook:
    def __init__(self) -> None:
        self.launches: list[tuple] = []
        self.params: list[Any] = []

    def launch(self, grid, shared, arguments, stream, *, overlap, cluster=None) -> None:
        params = arguments[0]
        self.params.append(params)
        if isinstance(params, quantise.QuantiseParams):
            self.rounding_blocks = grid
        else:
            self.launches.append((grid, shared, params.m, params.ldx, params.x, params.y, params.bias, overlap))


@pytest.fixture
def gemm(monkeypatch: pytest.MonkeyPatch) -> tuple[LowBitGemm, Notebook]:
    notebook, stream = Notebook(), SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(cuda_gemm, "device_facts", lambda index: ("sm_90a", 132))
    monkeypatch.setattr(cuda_gemm, "loaded_kernel", lambda spec, config, _: render(spec, [config]) and notebook)
    monkeypatch.setattr(quantise, "device_facts", lambda index: ("sm_90a", 132))
    monkeypatch.setattr(quantise, "_kernel", lambda *key: notebook)
    monkeypatch.setattr(cuda_gemm, "ensure_context", lambda index: None)
    monkeypatch.setattr(cuda_gemm, "tensor_map", lambda *_: cuda_gemm.GemmParams())
    buffers = torch.zeros(1 << 20), torch.zeros(2048, dtype=torch.int32)
    monkeypatch.setattr(workspace, "split_k_buffers", lambda *_: buffers)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: stream)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "device", lambda *_: contextlib.nullcontext())
    packed = torch.randint(0, 81, (96, 50), dtype=torch.uint8) & 0x55
    weights = to_kernel_layout(packed, torch.ones(96, 1), None, 2, 0, 200)
    return LowBitGemm(weights, torch.device("cpu")), notebook


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_launches_follow_the_plan_and_the_tensors(gemm: tuple[LowBitGemm, Notebook], dtype: torch.dtype) -> None:
    layer, notebook = gemm
    activation = "fp16" if dtype == torch.float16 else "bf16"
    for m in (1, 5, 1, 300, 5, 40):
        x, bias = torch.randn(m, 200, dtype=dtype), torch.randn(96, dtype=dtype)
        y = layer(x, bias)
        spec = KernelSpec(activation, 2, 0, "sm_90a")
        plan = choose(spec, 96, 200, m, 132)
        expected = (plan.grid(m, 6, 132), plan.shared_bytes(spec, m, 6, 2, 132), m, 200)
        assert notebook.launches[-1] == (*expected, x.data_ptr(), y.data_ptr(), bias.data_ptr(), True)
    assert len(layer._prepared) == 4


def test_a_plan_of_the_callers_own_is_not_kept(gemm: tuple[LowBitGemm, Notebook]) -> None:
    layer, notebook = gemm
    x = torch.randn(3, 200, dtype=torch.float16)
    own = Plan(layer.plan(3).config, 2)
    layer(x, plan=own, overlap=False)
    assert notebook.launches[-1][0] == own.grid(3, 6, 132) and notebook.launches[-1][-1] is False
    layer(x)
    assert notebook.launches[-1][0] == layer.plan(3).grid(3, 6, 132)
    with pytest.raises(BackendError, match="digits of x add up all inputs in one block"):
        layer(x[:1], plan=Plan(layer.plan(1).config, 2))


def test_prepared_launches_are_bounded(gemm: tuple[LowBitGemm, Notebook], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_gemm, "_KEPT", 3)
    for m in range(1, 9):
        gemm[0](torch.randn(m, 200, dtype=torch.float16))
    assert len(gemm[0]._prepared) <= 3


def test_one_rounding_serves_several_products(gemm: tuple[LowBitGemm, Notebook]) -> None:
    layer, notebook = gemm
    x = torch.randn(3, 4, 250, dtype=torch.bfloat16)[..., :200]  # rows that are not aligned
    rounded = layer.quantise(x, "fp8")
    (made,) = notebook.params
    assert (made.m, made.k, made.ldx, made.ldq) == (12, 200, 200, 256)
    assert (made.q, made.scale) == (rounded.values.data_ptr(), rounded.scales.data_ptr())
    assert rounded.shape == x.shape and rounded.values.shape == (3, 4, 256) and rounded.scales.shape == (3, 4)
    for _ in range(2):
        y = layer(rounded)
        params = notebook.params[-1]
        assert y.shape == (3, 4, 96) and y.dtype == torch.bfloat16
        assert (params.x, params.x_scale, params.m, params.ldx) == (made.q, made.scale, 12, 256)
    assert len(notebook.params) == 3
    plan = layer.plan(12, "bf16", "fp8")
    assert notebook.launches[-1][0] == plan.grid(12, 6, 132)
    layer(x, quantise="fp8")
    assert len(notebook.params) == 5
    for shape in ((200,), (0, 200), (2, 0, 200)):
        rounded = layer.quantise(torch.randn(shape, dtype=torch.float16), "int8")
        assert rounded.shape == torch.Size(shape) and layer(rounded).shape == (*shape[:-1], 96)
    assert len(notebook.params) == 7  # one token; nothing for none
    for m in (700, 7000):  # blocks walk over more tokens than the machine holds blocks
        layer.quantise(torch.randn(m, 200, dtype=torch.float16), "int8")
        assert notebook.rounding_blocks == (min(m, 132 * QuantiseConfig.of(2).blocks), 1, 1)
    notebook.params.clear()
    empty = LowBitGemm(to_kernel_layout(torch.zeros(96, 0).byte(), torch.ones(96, 1), None, 2, 0, 0), layer.device)
    rounded = empty.quantise(torch.randn(3, 0, dtype=torch.float16), "int8")
    bias = torch.randn(96, dtype=torch.float16)
    assert not rounded.scales.any() and torch.equal(empty(rounded, bias), bias.expand(3, -1))
    assert not empty(rounded).any() and not notebook.params


def test_rounding_is_refused_before_any_launch(gemm: tuple[LowBitGemm, Notebook]) -> None:
    layer, notebook = gemm
    x = torch.randn(5, 200, dtype=torch.float16)
    rounded = layer.quantise(x, "int8")
    notebook.params.clear()

    def of(bits: int, k: int, **change: Any) -> LowBitGemm:
        packed = torch.zeros(96, k * bits // 8, dtype=torch.uint8)
        other = LowBitGemm(to_kernel_layout(packed, torch.ones(96, 1), None, bits, 0, k), torch.device("cpu"))
        vars(other).update(change)
        return other

    def like(**change: Any) -> QuantisedActivations:
        return replace(rounded, **change)

    stream = layer.plan(5)
    assert stream.config.kernel == "stream"
    for call, said in (
        (lambda: layer.quantise(x.double(), "int8"), "float64 activations"),
        (lambda: layer.quantise(x[:, :199], "int8"), "in_features=200"),
        (lambda: layer.quantise(x.to("meta"), "int8"), r"x is on meta.*x\.to\('cpu'\)"),
        (lambda: layer.quantise(x, "int4"), "'int8' or 'fp8'"),  # type: ignore[arg-type]
        (lambda: layer.quantise(x, None), "'int8' or 'fp8'"),  # type: ignore[arg-type]
        (lambda: layer.quantise(rounded, "int8"), "rounded to int8 already"),  # type: ignore[arg-type]
        (lambda: layer(rounded, quantise="fp8"), "rounded to int8 already"),
        (lambda: layer(rounded, torch.zeros(96)), "bias must be torch.float16"),
        (lambda: layer(rounded, plan=stream), "16-bit activations only"),
        (lambda: of(2, 256)(rounded), "in_features=256"),
        (lambda: of(4, 200)(rounded), "only for ternary"),
        (lambda: of(4, 200).quantise(x, "fp8"), "only for ternary"),
        (lambda: of(2, 200, _target="compute_80")(rounded), "Hopper"),
        (lambda: of(2, 200, _target="compute_80")(x[:0], quantise="int8"), "Hopper"),
        (lambda: of(2, 200, device=torch.device("meta"))(rounded), r"x is on cpu.*before it is rounded"),
        (lambda: like(kind="int4"), "'int8' or 'fp8'"),
        (lambda: like(dtype=torch.float32), "float32 rounded to 'int8'"),
        (lambda: like(in_features=300), r"uint8 \[5, 384\]"),
        (lambda: like(values=rounded.values[:4]), r"uint8 \[5, 256\]"),
        (lambda: like(values=rounded.values.char()), "got torch.int8"),
        (lambda: like(scales=rounded.scales.half()), "contiguous float32"),
        (lambda: like(values=rounded.values.t().contiguous().t()), "contiguous uint8"),
    ):  # fmt: skip
        with pytest.raises(BackendError, match=said):
            call()
    assert not notebook.params


def test_kernels_for_some_kinds_only_are_chosen_for_these() -> None:
    def kernel(bits: int, group: int, target: str, m: int, quantised: str | None = None) -> str:
        return choose(KernelSpec("fp16", bits, group, target, quantised), 4096, 4096, m, 132).config.kernel  # type: ignore[arg-type]

    for m in (100, 256, 600, 2048):
        assert kernel(2, 0, "sm_80", m) == kernel(2, 0, "compute_80", m) == "tile"
        assert kernel(2, 64, "sm_80", m) == kernel(4, 0, "sm_80", m) == kernel(8, 128, "sm_80", m) == "mma"
        assert kernel(2, 0, "sm_90a", m) == kernel(4, 0, "sm_90a", m) == "wgmma"
        assert kernel(2, 0, "sm_90a", m, "fp8") == "wgmma"
