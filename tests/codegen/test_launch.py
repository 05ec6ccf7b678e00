"""What a call of LowBitGemm hands to the driver, with the driver replaced by a notebook."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from tsld_fx.codegen import cuda_gemm, workspace
from tsld_fx.codegen.cuda_gemm import LowBitGemm
from tsld_fx.codegen.layout import to_kernel_layout
from tsld_fx.codegen.select_config import Plan, choose
from tsld_fx.codegen.spec import KernelSpec
from tsld_fx.errors import BackendError


class Notebook:
    def __init__(self) -> None:
        self.launches: list[tuple] = []

    def launch(self, grid, shared, arguments, stream, *, overlap, cluster) -> None:
        params = arguments[0]
        self.launches.append((grid, shared, params.m, params.ldx, params.x, params.y, params.bias, overlap))


@pytest.fixture
def gemm(monkeypatch: pytest.MonkeyPatch) -> tuple[LowBitGemm, Notebook]:
    notebook, stream = Notebook(), SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(cuda_gemm, "device_facts", lambda index: ("sm_90a", 132))
    monkeypatch.setattr(cuda_gemm, "loaded_kernel", lambda *key: notebook)
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


def test_kernels_for_some_kinds_only_are_chosen_for_these() -> None:
    def kernel(bits: int, group: int, target: str, m: int, quantised: str | None = None) -> str:
        return choose(KernelSpec("fp16", bits, group, target, quantised), 4096, 4096, m, 132).config.kernel  # type: ignore[arg-type]

    for m in (100, 256, 600, 2048):
        assert kernel(2, 0, "sm_80", m) == kernel(2, 0, "compute_80", m) == "tile"
        assert kernel(2, 64, "sm_80", m) == kernel(4, 0, "sm_80", m) == kernel(8, 128, "sm_80", m) == "mma"
        assert kernel(2, 0, "sm_90a", m) == kernel(4, 0, "sm_90a", m) == "wgmma"
        assert kernel(2, 0, "sm_90a", m, "fp8") == "wgmma"
