"""CUDA programs are built without a GPU: machine code of TVM's kernels and ours, and no source."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tsld_fx.relax
from tests.models import ids
from tests.relax.cuda_model import lowered
from tests.relax.reference_models import reference
from tsld_fx.codegen.compiler import KernelBuildError, find_compiler
from tsld_fx.errors import BackendError, CheckpointError
from tsld_fx.relax.cuda_build import check_no_source, gencode


def has_nvcc() -> bool:
    try:
        find_compiler("nvcc")
    except KernelBuildError:
        return False
    return True


needs_nvcc = pytest.mark.skipif(not has_nvcc(), reason="no nvcc on this machine")


@needs_nvcc
def test_built_without_a_gpu(tmp_path: Path) -> None:
    """In a process of its own: the driver's stand-in must not reach other tests."""
    code = (
        "import sys, tsld_fx.relax\n"
        "from tests.relax.cuda_model import lowered\n"
        "tsld_fx.relax.compile(lowered(), sys.argv[1], target='cuda', generation=False, max_rows=1)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "program")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    library = (tmp_path / "program" / "model.so").read_bytes()
    for text in (b"__global__", b"__launch_bounds__", b"#include"):
        assert text not in library
    assert b"tsld_w2_fp16_row_stream" in library or b"tsld_w2_fp16_row" in library
    assert b"compute_80" in library or b".target sm_80" in library
    manifest = json.loads((tmp_path / "program" / "manifest.json").read_text())
    assert manifest["target"]["kind"] == "cuda" and manifest["max_rows"] == 1
    if not torch.cuda.is_available():
        with pytest.raises(CheckpointError, match=r"cuda|CUDA"):
            tsld_fx.relax.load(tmp_path / "program")


def test_embedded_source_is_refused() -> None:
    check_no_source(b"\x7fELF machine code", ["a kernel"])
    for library, compiled in ((b"extern __global__ void f()", ["a kernel"]), (b"machine code", [])):
        with pytest.raises(BackendError, match="embedded CUDA source"):
            check_no_source(library, compiled)


def test_layers_that_no_kernel_serves_are_named(tmp_path: Path) -> None:
    from tsld_fx.relax.cuda_kernels import kernel_layouts
    from tsld_fx.relax.translate import export_lowered

    model = reference("llama")  # 44 inputs in down_proj
    with pytest.raises(BackendError, match=r"model\.layers\.0\.mlp\.down_proj has 44 inputs.*QuantConfig\.skip"):
        kernel_layouts(export_lowered(model, 1, 4), model)


def test_flags_name_machine_code_and_ptx() -> None:
    flags = gencode(("sm_90", "sm_80"))
    assert flags == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_80,code=compute_80",
    ]


def test_reference_of_the_gpu_test_is_near_float32() -> None:
    from tests.relax.cuda_model import with_half_layers

    model, x = lowered(), ids(2, 9)
    with torch.no_grad():
        exact = model(input_ids=x).logits
    error = float((with_half_layers(model, x) - exact).abs().max() / exact.abs().max())
    assert 0 < error < 5e-3
