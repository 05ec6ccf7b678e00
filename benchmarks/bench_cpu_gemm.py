"""The CPU kernels against llama.cpp's TQ2_0, onnxruntime's MatMulNBits and torch, ternary weights, one process.

    python benchmarks/bench_cpu_gemm.py

One token on 4096 x 14336 over more than 1 GB of rotating weights, 128 and 512 tokens on 4096 x 4096; 1 and 2 threads.
Contenders take turns call by call; times are medians. The read bandwidth is measured in the same run. Writes
benchmarks/results/cpu_gemm.json. The first run downloads llama-cpp-python's sdist from PyPI and builds ggml.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bench_cpu_rivals as rivals
import torch
from machine import describe
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tsld_fx.codegen.cpu.gemm import CpuGemm
from tsld_fx.codegen.cpu.library import LEVELS, level
from tsld_fx.packing import pack

CASES = ((4096, 14336, 1), (4096, 4096, 128), (4096, 4096, 512))
ROTATION = 1.1e9  # bytes


def ours(codes: Tensor, scale: float, copies: int, activations: str, use_level: str | None) -> list[CpuGemm]:
    n, k = codes.shape
    first = CpuGemm.pack(pack(codes, 2), torch.full((n, 1), scale), None, 2, 0, k, activations, use_level)
    return [first, *(_copy(first) for _ in range(copies - 1))]


def _copy(gemm: CpuGemm) -> CpuGemm:
    from tsld_fx.codegen.cpu.gemm import _aligned

    data = _aligned(gemm.data.numel())
    data.copy_(gemm.data)
    return CpuGemm(data, gemm.out_features, gemm.in_features, gemm.activations, gemm.level)


def bandwidth(seconds: float = 1.0) -> float:
    """Bytes per second that torch's threads read from memory: sums over 1 GB of int64."""
    data = torch.ones(1 << 27, dtype=torch.int64)
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        data.sum()
        best = max(best, data.numel() * 8 / (time.perf_counter() - start))
    return best


def contenders(n: int, k: int, tokens: int, codes: Tensor, scale: float) -> Iterator[tuple[str, list, Tensor, float]]:
    """Name, calls over rotating weights, the x they take, bytes of one weight."""
    weight = (codes.float() - 1) * scale
    x = torch.randn(tokens, k)
    copies = max(2, round(ROTATION / (n * k / 4)) if tokens == 1 else 4)
    few = max(2, round(ROTATION / (n * k * 4)))
    for name, activations, dtype in (
        ("int8", "int8", torch.float32),
        ("a16, float32 x", "a16", torch.float32),
        ("a16, bfloat16 x", "a16", torch.bfloat16),
        ("add", "add", torch.float32),
    ):
        if name != "add" or tokens == 1:
            yield f"tsld_fx {name}", ours(codes, scale, copies, activations, None), x.to(dtype), n * k / 4
    if tokens == 1 and level() > 1:
        yield "tsld_fx int8, AVX2 only", ours(codes, scale, copies, "int8", "avx2"), x, n * k / 4
    yield "llama.cpp TQ2_0", rivals.tq2_0(weight, copies, tokens), x, n * k * 66 / 256
    yield "onnxruntime 2 bits", rivals.matmul_nbits(weight, copies, tokens), x, n * k * 0.28
    yield "torch float32", rivals.torch_float32(weight, few, tokens), x, n * k * 4
    yield "torch bfloat16 prepacked", rivals.torch_bfloat16(weight, 2 * few, tokens), x.bfloat16(), n * k * 2


def measure(calls: list[Callable[[Tensor], Tensor]], x: Tensor, seconds: float) -> float:
    """Median seconds of a call, one weight after another."""
    for call in calls[:2]:
        call(x)
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken) < 5:
        call = calls[len(taken) % len(calls)]
        start = time.perf_counter()
        call(x)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def case(n: int, k: int, tokens: int, threads: int, seconds: float) -> list[dict[str, Any]]:
    codes = torch.randint(0, 3, (n, k), dtype=torch.uint8)
    scale, rows = 0.02, []
    for name, calls, x, size in contenders(n, k, tokens, codes, scale):
        expected = x[:8].double() @ ((codes.double() - 1) * scale).T
        error = float((calls[0](x)[:8].double() - expected).norm() / expected.norm())
        taken = measure(calls, x, seconds)
        row = {"n": n, "k": k, "tokens": tokens, "threads": threads, "contender": name, "seconds": taken}
        rows.append({**row, "relative_error": error, "bytes_per_second": size / taken})
        del calls
    return rows


def show(console: Console, rows: list[dict[str, Any]], reads: float) -> None:
    first = rows[0]
    title = f"{first['n']} x {first['k']}, {first['tokens']} token(s), {first['threads']} thread(s); "
    table = Table(title=title + f"memory reads {reads / 1e9:.1f} GB/s")
    names = ("", "ms", "x TQ2_0", "x torch bf16", "x torch fp32", "of bandwidth", "TOP/s", "relative error")
    for name in names:
        table.add_column(name, justify="right" if name else "left")
    by_name = {row["contender"]: row["seconds"] for row in rows}
    for row in rows:
        s = row["seconds"]
        against = (by_name[name] / s for name in ("llama.cpp TQ2_0", "torch bfloat16 prepacked", "torch float32"))
        tops = 2e-12 * row["n"] * row["k"] * row["tokens"] / s
        share = f"{row['bytes_per_second'] / reads:.0%}" if row["tokens"] == 1 else ""
        error = f"{row['relative_error']:.1e}"
        table.add_row(row["contender"], f"{1e3 * s:.3f}", *(f"{a:.2f}" for a in against), share, f"{tops:.2f}", error)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--seconds", type=float, default=1.5, help="per contender and case")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu_gemm.json")
    args = parser.parse_args()
    rivals.build_ggml()
    console = Console(width=130)
    record: dict[str, Any] = {**describe(), "level": LEVELS[level()], "date": time.strftime("%Y-%m-%d")}
    record |= {"llama_cpp_python": rivals.LLAMA_CPP_PYTHON, "bandwidth": {}, "rows": []}
    for threads in map(int, args.threads.split(",")):
        torch.set_num_threads(threads)
        reads = record["bandwidth"][str(threads)] = bandwidth()
        for n, k, tokens in CASES:
            rows = case(n, k, tokens, threads, args.seconds)
            show(console, rows, reads)
            record["rows"] += rows
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    console.print(f"written to {args.out.name}")


if __name__ == "__main__":
    main()
