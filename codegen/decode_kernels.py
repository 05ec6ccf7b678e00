"""The kernels between the products of a decoding step: RMSNorm, gated activation, attention over a static cache.

Each is rendered, built and cached as the products are. `supported` functions say for which tensors a kernel exists;
elsewhere the operators of `tsld_fx.decode_ops` compute in plain torch.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from tsld_fx.codegen.attention_plan import AttentionPlan, attention_plan, ring_bytes
from tsld_fx.codegen.cache import KernelCache
from tsld_fx.codegen.compiler import find_compiler
from tsld_fx.codegen.devices import device_facts
from tsld_fx.codegen.driver import LoadedKernel, ensure_context, load_kernel
from tsld_fx.codegen.render import environment

Kind = Literal["rms_norm", "silu_mul", "attention", "take_token"]
DTYPES = {torch.float16: "Fp16", torch.bfloat16: "Bf16"}
HEAD_DIMS = (8, 16, 32, 64, 128, 256)
THREADS = {"rms_norm": 256, "silu_mul": 128, "take_token": 1024}


class NormParams(ctypes.Structure):
    """Mirrors `decode_elementwise.cuh`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "residual", "weight", "sum", "y")),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int),
        ("eps", ctypes.c_float),
    ]


class GateParams(ctypes.Structure):
    """Mirrors `decode_elementwise.cuh`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("gate", "up", "y")),
        *((name, ctypes.c_int64) for name in ("gate_stride", "up_stride", "rows")),
        *((name, ctypes.c_int) for name in ("columns", "step")),
    ]


class AttentionParams(ctypes.Structure):
    """Mirrors `decode_attention.cuh`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "cos", "sin", "positions", "key_cache", "value_cache")),
        *((name, ctypes.c_void_p) for name in ("out", "partial", "counters")),
        *((name, ctypes.c_int64) for name in ("q_stride", "k_stride", "v_stride")),
        *((name, ctypes.c_int) for name in ("heads", "kv_heads", "length", "splits", "clustered", "tables")),
        ("scale", ctypes.c_float),
    ]


def render(kind: Kind, dtype: torch.dtype, head_dim: int = 0, rows: int = 0, threads: int = 256) -> tuple[str, str]:
    """-> (source, name of the kernel). head_dim, rows, threads: of attention. Pure."""
    shape = f"_d{head_dim}_r{rows}" if kind == "attention" else ""
    name = f"tsld_{kind}_{DTYPES[dtype].lower()}{shape}"
    threads = THREADS.get(kind, threads)
    source = environment().get_template("decode.cu.j2").render(
        title=f"Decoding step: {kind}", name=name, kind=kind, type=DTYPES[dtype], head_dim=head_dim, rows=rows,
        threads=threads, ring_bytes=ring_bytes(threads),
    )  # fmt: skip
    return source, name


@lru_cache(maxsize=64)
def _kernel(
    kind: Kind, dtype: torch.dtype, head_dim: int, rows: int, threads: int, device: int
) -> tuple[LoadedKernel, bool]:
    """-> (kernel, whether launches may overlap)."""
    target, _ = device_facts(device)
    capability, _ = chip(device)
    ensure_context(device)
    source, name = render(kind, dtype, head_dim, rows, threads)
    binary, _ = KernelCache.default().get_or_build(source, target, find_compiler())
    kernel = load_kernel(binary, name, threads)
    if kind == "attention":
        kernel.allow_shared(ring_bytes(threads), device)
    return kernel, capability >= 90


def launch(
    kind: Kind, dtype: torch.dtype, device: int, grid: tuple[int, int, int], params: ctypes.Structure,
    head_dim: int = 0, plan: AttentionPlan | None = None,
) -> None:  # fmt: skip
    """Enqueue one of the kernels on the device's current stream, building it first where that was not done yet."""
    rows, threads = (plan.rows, plan.threads) if plan else (0, THREADS[kind])
    kernel, overlap = _kernel(kind, dtype, head_dim, rows, threads, device)
    shared = ring_bytes(threads) if plan else 0
    shape = (1, plan.splits, 1) if plan and plan.cluster else None
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        kernel.launch(grid, shared, [params], stream, overlap=overlap, cluster=shape)


def _aligned(*tensors: Tensor) -> bool:
    return all(t.data_ptr() % 16 == 0 and t.stride(-1) == 1 for t in tensors)


def norm_supported(x: Tensor, weight: Tensor) -> bool:
    """Whether `rms_norm` has a kernel: fp16 or bf16, whole 16-byte vectors."""
    return x.dtype in DTYPES and weight.dtype == x.dtype and x.shape[-1] % 8 == 0 and x.numel() > 0


def rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor | None]:
    """-> (y, x + residual or None), both of x's shape."""
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    y, total = torch.empty_like(x), None if residual is None else torch.empty_like(x)
    columns = x.shape[-1]
    rows = x.numel() // columns
    pointers = (None if t is None else t.data_ptr() for t in (x, residual, weight, total, y))
    launch("rms_norm", x.dtype, x.device.index, (rows, 1, 1), NormParams(*pointers, rows, columns, eps))
    return y, total


def gate_supported(gate: Tensor, up: Tensor) -> bool:
    """Whether `silu_mul` has a kernel: fp16 or bf16, rows of whole 16-byte vectors at one distance."""
    return (
        gate.dtype in DTYPES and up.dtype == gate.dtype and gate.shape == up.shape and gate.shape[-1] % 8 == 0
        and gate.numel() > 0 and _aligned(gate, up) and all(_row_stride(t) % 8 == 0 for t in (gate, up))
    )  # fmt: skip


def _row_stride(t: Tensor) -> int:
    """Elements between rows of the last dimension, 1 (no multiple of 8) where they differ."""
    if t.numel() == t.shape[-1]:
        return t.shape[-1]
    try:
        return t.view(-1, t.shape[-1]).stride(0)
    except RuntimeError:
        return 1


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, contiguous."""
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _launch_gate(y, gate.data_ptr(), up.data_ptr(), _row_stride(gate), _row_stride(up), 1)
    return y


def taking_turns_supported(both: Tensor) -> bool:
    """Whether `silu_mul_taking_turns` has a kernel: fp16 or bf16, contiguous."""
    return both.dtype in DTYPES and both.shape[-1] % 16 == 0 and both.numel() > 0 and both.is_contiguous()


def silu_mul_taking_turns(both: Tensor) -> Tensor:
    """[..., 2F], 8 features of gate and the same 8 of up taking turns -> silu(gate) * up [..., F]."""
    width = both.shape[-1]
    y = torch.empty(*both.shape[:-1], width // 2, dtype=both.dtype, device=both.device)
    start = both.data_ptr()
    _launch_gate(y, start, start + 8 * both.element_size(), width, width, 2)
    return y


def _launch_gate(y: Tensor, gate: int, up: int, gate_stride: int, up_stride: int, step: int) -> None:
    columns = y.shape[-1]
    rows = y.numel() // columns
    params = GateParams(gate, up, y.data_ptr(), gate_stride, up_stride, rows, columns, step)
    blocks = min(-(-rows * columns // 8 // THREADS["silu_mul"]), 1 << 16)
    launch("silu_mul", y.dtype, y.device.index, (blocks, 1, 1), params)


def chip(device: int) -> tuple[int, int]:
    """(compute capability, multiprocessors) of a device, as `attention_plan` takes them."""
    target, multiprocessors = device_facts(device)
    return int(target.split("_")[1].rstrip("a")), multiprocessors


def attention_supported(q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None) -> bool:
    """Whether `attention` has a kernel: one token, fp16 or bf16, a head size of HEAD_DIMS."""
    tensors = [t for t in (q, k, v, cos, sin) if t is not None]
    return (
        q.shape[1] == 1 and q.dtype in DTYPES and q.shape[3] in HEAD_DIMS and q.shape[0] > 0
        and all(t.dtype == q.dtype and t.data_ptr() % 16 == 0 for t in tensors) and _aligned(q, k, v)
        and all(t.stride(2) == t.shape[3] and t.stride(0) % 8 == 0 for t in (q, k, v))
    )  # fmt: skip


def attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, positions: Tensor,
    key_cache: Tensor, value_cache: Tensor, scratch: Tensor, scale: float, plan: AttentionPlan | None = None,
) -> Tensor:  # fmt: skip
    """q [B, 1, heads, D], k and v [B, 1, kv_heads, D], caches [>= B, kv_heads, L, D] -> [B, 1, heads, D].

    cos, sin: [B, 1, D], or [L, D] of all positions. plan: instead of the chosen one (tuning).
    """
    batch, _, heads, head_dim = q.shape
    kv_heads, length = k.shape[2], key_cache.shape[2]
    plan = plan or attention_plan(batch, heads, kv_heads, head_dim, length, *chip(q.device.index))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tables = [None if t is None else t.contiguous() for t in (cos, sin)]
    positions = positions.contiguous()
    counters = key_cache.shape[0] * heads
    params = AttentionParams(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), *(None if t is None else t.data_ptr() for t in tables),
        positions.data_ptr(), key_cache.data_ptr(), value_cache.data_ptr(), out.data_ptr(),
        scratch.data_ptr() + 4 * counters, scratch.data_ptr(),
        q.stride(0), k.stride(0), v.stride(0), heads, kv_heads, length, plan.splits,
        plan.cluster, cos is not None and cos.dim() == 2, scale,
    )  # fmt: skip
    grid = (batch * heads // plan.rows, plan.splits, 1)
    launch("attention", q.dtype, q.device.index, grid, params, head_dim, plan)
    return out
