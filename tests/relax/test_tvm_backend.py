"""backend='tvm': packed layers of a torch model run what TVM compiled."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tsld_fx
from tests.models import build, ids
from tests.relax.reference_models import prepared, reference
from tsld_fx import AffineWeight, QuantConfig
from tsld_fx.errors import BackendError
from tsld_fx.relax import layer_gemm, tvm_import


def test_model_equals_the_reference_and_keeps_it_when_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    run = layer_gemm.TvmGemm.__call__
    monkeypatch.setattr(layer_gemm.TvmGemm, "__call__", lambda *a: calls.append(1) or run(*a))
    config = QuantConfig(overrides={"model.layers.1.mlp.*": AffineWeight(bits=4, granularity="group", group_size=4)})
    prepared = tsld_fx.prepare(build("llama"), config)
    reference = tsld_fx.convert(prepared, backend="reference")
    lowered = tsld_fx.convert(prepared, backend="tvm")
    assert lowered.backend == "tvm"
    x = ids(2, 9)
    with torch.no_grad():
        expected = reference(input_ids=x).logits
        result = lowered(input_ids=x).logits
    assert len(calls) == len(lowered.lowbit_layers())
    assert float((result - expected).abs().max() / expected.abs().max()) < 1e-5
    assert torch.equal(
        lowered.generate(x, max_new_tokens=6, do_sample=False), reference.generate(x, max_new_tokens=6, do_sample=False)
    )
    lowered.save_pretrained(tmp_path / "saved")
    loaded = tsld_fx.load(tmp_path / "saved", backend="tvm")
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=x).logits, result)


def test_half_activations_and_odd_views() -> None:
    layer = next(iter(reference("opt").lowbit_layers().values()))
    weight = (layer.weight_packed, layer.weight_scale, layer.weight_zero, layer.bits, layer.group_size)
    gemm = layer_gemm.TvmGemm.pack(*weight, layer.in_features)
    x = torch.randn(3, 5, 2 * layer.in_features + 1)[..., 1::2]  # strided, not aligned
    expected = torch.nn.functional.linear(x.double(), layer.dequantize().double())
    assert float((gemm(x) - expected).abs().max() / expected.abs().max()) < 1e-6
    assert gemm(x.half()).dtype == torch.float16
    assert gemm(x[:0]).shape == (0, 5, layer.out_features)


def test_without_tvm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise tvm_import.PackageNotFoundError(name)

    monkeypatch.setattr(tvm_import, "version", absent)
    with pytest.raises(BackendError, match=r"backend='tvm'.*pip install 'tsld-fx\[tvm\]'.*backend='reference'"):
        tsld_fx.convert(prepared("opt"), backend="tvm")


def test_tvm_pins_no_thread() -> None:
    """Pinned to one core, torch's own threads would wait for each other; in a process whose pool is not started yet."""
    code = (
        "import os, torch\n"
        "from tsld_fx.packing import pack\n"
        "from tsld_fx.relax.layer_gemm import TvmGemm\n"
        "before = os.sched_getaffinity(0)\n"
        "gemm = TvmGemm.pack(pack(torch.ones(64, 64, dtype=torch.uint8), 2), torch.ones(64, 1), None, 2, 0, 64)\n"
        "gemm(torch.ones(2, 64))\n"
        "assert os.sched_getaffinity(0) == before"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
