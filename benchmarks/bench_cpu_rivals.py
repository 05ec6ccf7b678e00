"""The peers of bench_cpu_gemm.py: llama.cpp's TQ2_0, onnxruntime's MatMulNBits, torch float32 and prepacked bfloat16.

Each function returns calls that multiply x [tokens, k] by copies of one weight [n, k] and return y [tokens, n].
llama.cpp comes as the sdist of llama-cpp-python from PyPI; only ggml is built, with native flags, in build/ggml.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tarfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
GGML = ROOT / "build" / "ggml"
LLAMA_CPP_PYTHON = "0.3.36"
TQ2_0 = 35  # enum ggml_type
Call = Callable[[Tensor], Tensor]


def build_ggml() -> Path:
    """Download and build ggml unless that was done; -> the folder of its libraries."""
    out = GGML / "out"
    if not list(out.rglob("libggml-cpu.so")):
        GGML.mkdir(parents=True, exist_ok=True)
        name = f"llama-cpp-python=={LLAMA_CPP_PYTHON}"
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python", name]
        subprocess.run([*pip, "-d", str(GGML)], check=True)
        with tarfile.open(GGML / f"llama_cpp_python-{LLAMA_CPP_PYTHON}.tar.gz") as archive:
            archive.extractall(GGML, filter="data")
        source = GGML / f"llama_cpp_python-{LLAMA_CPP_PYTHON}" / "vendor" / "llama.cpp" / "ggml"
        (source / "ggml.pc.in").touch()  # the sdist leaves it out, CMake wants it
        options = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DGGML_OPENMP=ON", "-DBUILD_SHARED_LIBS=ON"]
        options += ["-DGGML_BUILD_TESTS=OFF", "-DGGML_BUILD_EXAMPLES=OFF"]
        subprocess.run(["cmake", "-S", str(source), "-B", str(out), *options], check=True)
        subprocess.run(["cmake", "--build", str(out), "-j2"], check=True)
    return out


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


@lru_cache(maxsize=1)
def _ggml() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    out = build_ggml()
    base, cpu = (ctypes.CDLL(str(next(out.rglob(f"lib{n}.so"))), ctypes.RTLD_GLOBAL) for n in ("ggml-base", "ggml-cpu"))
    pointer, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    base.ggml_init.argtypes, base.ggml_init.restype = [_InitParams], pointer
    base.ggml_new_tensor_2d.argtypes, base.ggml_new_tensor_2d.restype = [pointer, i32, i64, i64], pointer
    base.ggml_mul_mat.argtypes, base.ggml_mul_mat.restype = [pointer, pointer, pointer], pointer
    base.ggml_new_graph.argtypes, base.ggml_new_graph.restype = [pointer], pointer
    base.ggml_build_forward_expand.argtypes = [pointer, pointer]
    base.ggml_get_data.argtypes, base.ggml_get_data.restype = [pointer], pointer
    base.ggml_row_size.argtypes, base.ggml_row_size.restype = [i32, i64], ctypes.c_size_t
    base.ggml_quantize_chunk.argtypes = [i32, pointer, pointer, i64, i64, i64, pointer]
    base.ggml_quantize_chunk.restype = ctypes.c_size_t
    cpu.ggml_graph_plan.argtypes, cpu.ggml_graph_plan.restype = [pointer, i32, pointer], _Plan
    cpu.ggml_graph_compute.argtypes = [pointer, ctypes.POINTER(_Plan)]
    cpu.ggml_cpu_init()
    return base, cpu


def tq2_0(weight: Tensor, copies: int, tokens: int) -> list[Call]:
    """ggml_mul_mat with TQ2_0 weights; its activations are quantised to int8 (Q8_K) inside."""
    base, cpu = _ggml()
    n, k = weight.shape
    size = base.ggml_row_size(TQ2_0, k) * n
    packed = np.empty(size, dtype=np.uint8)
    base.ggml_quantize_chunk(TQ2_0, weight.data_ptr(), packed.ctypes.data, 0, n, k, None)
    calls = []
    for _ in range(copies):
        memory = size + 4 * tokens * (n + 3 * k) + (16 << 20)
        context = base.ggml_init(_InitParams(memory, None, False))
        w = base.ggml_new_tensor_2d(context, TQ2_0, k, n)
        ctypes.memmove(base.ggml_get_data(w), packed.ctypes.data, size)
        x = base.ggml_new_tensor_2d(context, 0, k, tokens)
        y = base.ggml_mul_mat(context, w, x)
        graph = base.ggml_new_graph(context)
        base.ggml_build_forward_expand(graph, y)
        calls.append(_GgmlCall(base, cpu, graph, x, y, (tokens, n)))
    return calls


class _GgmlCall:
    def __init__(self, base: Any, cpu: Any, graph: int, x: int, y: int, shape: tuple[int, int]) -> None:
        self.cpu, self.graph, self.shape = cpu, graph, shape
        self.x, self.y = base.ggml_get_data(x), base.ggml_get_data(y)
        self.plans: dict[int, tuple[_Plan, np.ndarray]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        ctypes.memmove(self.x, x.data_ptr(), 4 * x.numel())
        threads = torch.get_num_threads()
        if threads not in self.plans:
            plan = self.cpu.ggml_graph_plan(self.graph, threads, None)
            work = np.empty(max(plan.work_size, 1), dtype=np.uint8)
            plan.work_data = work.ctypes.data
            self.plans[threads] = plan, work
        self.cpu.ggml_graph_compute(self.graph, ctypes.byref(self.plans[threads][0]))
        rows = (ctypes.c_float * (self.shape[0] * self.shape[1])).from_address(self.y)
        return torch.frombuffer(rows, dtype=torch.float32).view(self.shape)


class _Plan(ctypes.Structure):
    _fields_ = [
        ("work_size", ctypes.c_size_t),
        ("work_data", ctypes.c_void_p),
        ("n_threads", ctypes.c_int),
        ("threadpool", ctypes.c_void_p),
        ("abort_callback", ctypes.c_void_p),
        ("abort_callback_data", ctypes.c_void_p),
        ("use_ref", ctypes.c_bool),
    ]


def torch_float32(weight: Tensor, copies: int, tokens: int) -> list[Call]:
    """F.linear in float32."""
    return [lambda x, w=w: torch.nn.functional.linear(x, w) for w in [weight.clone() for _ in range(copies)]]


def torch_bfloat16(weight: Tensor, copies: int, tokens: int) -> list[Call]:
    """oneDNN's linear with prepacked bfloat16 weights (F.linear in bfloat16 is slower than float32 for one token)."""
    calls: list[Call] = []
    for _ in range(copies):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16(), tokens)
        calls.append(lambda x, w=packed: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""))
    return calls


def matmul_nbits(weight: Tensor, copies: int, tokens: int) -> list[Call]:
    """onnxruntime MatMulNBits of 2 bits, blocks of 128, int8 activations (accuracy level 4)."""
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper

    n, k = weight.shape
    codes = (weight.sign() + 1).to(torch.uint8).view(n, k // 128, 32, 4)
    packed = sum(codes[..., i] << (2 * i) for i in range(4)).contiguous().numpy()
    scales = weight.abs().amax(1, keepdim=True).expand(n, k // 128).contiguous().numpy()
    zeros = np.full((n, -(-k // 128 // 4)), 0b01010101, dtype=np.uint8)
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s", "z"], ["y"], domain="com.microsoft",
        K=k, N=n, bits=2, block_size=128, accuracy_level=4,
    )  # fmt: skip
    made = [
        helper.make_tensor("w", TensorProto.UINT8, packed.shape, packed.tobytes(), raw=True),
        helper.make_tensor("s", TensorProto.FLOAT, [scales.size], scales.tobytes(), raw=True),
        helper.make_tensor("z", TensorProto.UINT8, [zeros.size], zeros.tobytes(), raw=True),
    ]
    io = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [tokens, size]) for name, size in (("x", k), ("y", n))]
    graph = helper.make_graph([node], "m", io[:1], io[1:], made)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0" if torch.get_num_threads() > 1 else "1")
    data = model.SerializeToString()
    sessions = [ort.InferenceSession(data, options, providers=["CPUExecutionProvider"]) for _ in range(copies)]
    return [lambda x, s=s: torch.from_numpy(s.run(None, {"x": x.numpy()})[0]) for s in sessions]
