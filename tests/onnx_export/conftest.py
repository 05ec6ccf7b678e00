"""What the ONNX tests share: the operator library, built once, and traced models."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.models import ternary
from tsld_fx.errors import ExportError
from tsld_fx.onnx import graph
from tsld_fx.onnx.op_library import build_op_library, find_headers

_trace = graph.trace


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The operator library; workers of one run share it."""
    try:
        find_headers()
    except ExportError as error:
        pytest.skip(str(error))
    base = tmp_path_factory.getbasetemp()
    target = (base if worker_id == "master" else base.parent) / "ort-op" / "libtsld_ort.so"
    target.parent.mkdir(exist_ok=True)
    with FileLock(str(target) + ".lock"):
        return target if target.exists() else build_op_library(target)


@pytest.fixture(scope="session")
def kernel_calls(library: Path) -> Callable[[], int]:
    """How many times the library's kernel has run in this process."""
    function = ctypes.CDLL(str(library)).tsld_ort_calls
    function.restype = ctypes.c_int64
    return function


@cache
def _traced(family: str, kv_cache: bool, opset: int) -> Any:
    return _trace(ternary(family)[1], kv_cache, opset)


@pytest.fixture
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """export_onnx traces each model of tests.models once per process; what it lowers and writes is a clone."""

    def trace(lowered: Any, kv_cache: bool, opset: int) -> Any:
        family = lowered.config.model_type
        if family in ("gpt2", "opt", "gpt_neo", "llama") and ternary(family)[1] is lowered:
            return _traced(family, kv_cache, opset).clone()
        return _trace(lowered, kv_cache, opset)

    monkeypatch.setattr(graph, "trace", trace)
