"""The CPU kernels against llama.cpp's TQ2_0, onnxruntime's MatMulNBits and torch, ternary weights, one process.

    python benchmarks/bench_cpu_gemm.py

One token on 4096 x 14336 over more than 1 GB of rotating weights, 128 and 512 tokens on 4096 x 4096; 1 and 2 threads.
Contenders take turns; times are medians, of CPU seconds on 1 thread, of wall-clock seconds on 2. The read bandwidth is
measured in the same run. Writes
benchmarks/results/cpu_gemm.json. The first run downloads llama-cpp-python's sdist from PyPI and builds ggml.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
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
from tsld_fx.whole_files import write_json

CASES = ((4096, 14336, 1), (4096, 4096, 128), (4096, 4096, 512))
ROTATION = 1.1e9  # bytes


def ours(codes: Tensor, scale: float, copies: int) -> list[CpuGemm]:
    """Copies of one packed layer; every activation mode and level reads the same layout."""
    n, k = codes.shape
    arguments = (pack(codes, 2), torch.full((n, 1), scale), None, 2, 0, k)
    return [CpuGemm.pack(*arguments) for _ in range(copies)]


def as_mode(gemms: list[CpuGemm], activations: str, use_level: int | None = None) -> list[CpuGemm]:
    wanted = gemms[0].level if use_level is None else use_level
    return [CpuGemm(g.data, g.out_features, g.in_features, activations, wanted) for g in gemms]


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
    packed = ours(codes, scale, copies)
    for name, activations, dtype in (
        ("int8", "int8", torch.float32),
        ("a16, float32 x", "a16", torch.float32),
        ("a16, bfloat16 x", "a16", torch.bfloat16),
        ("add", "add", torch.float32),
    ):
        if name != "add" or tokens == 1:
            yield f"tsld_fx {name}", as_mode(packed, activations), x.to(dtype), n * k / 4
    if tokens == 1 and level() > 1:
        yield "tsld_fx int8, AVX2 only", as_mode(packed, "int8", 1), x, n * k / 4
    yield "llama.cpp TQ2_0", rivals.tq2_0(weight, copies, tokens), x, n * k * 66 / 256
    yield "onnxruntime 2 bits", rivals.matmul_nbits(weight, copies, tokens), x, n * k * 0.28
    yield "torch float32", rivals.torch_float32(weight, few, tokens), x, n * k * 4
    yield "torch bfloat16 prepacked", rivals.torch_bfloat16(weight, 2 * few, tokens), x.bfloat16(), n * k * 2


def case(n: int, k: int, tokens: int, threads: int, seconds: float) -> list[dict[str, Any]]:
    """Contenders take turns of a few calls; the median call of each, one weight after another."""
    clock = time.thread_time if threads == 1 else time.perf_counter  # CPU seconds are not those of other processes
    codes, scale = torch.randint(0, 3, (n, k), dtype=torch.uint8), 0.02
    racing = list(contenders(n, k, tokens, codes, scale))
    taken: dict[str, list[float]] = {name: [] for name, *_ in racing}
    end = time.perf_counter() + seconds * len(racing)
    while time.perf_counter() < end or min(map(len, taken.values())) < 12:
        for name, calls, x, _ in racing:
            for turn in range(4):  # the first finds its code and threads cold
                start = clock()
                calls[(len(taken[name]) + turn) % len(calls)](x)
                if turn:
                    taken[name].append(clock() - start)
    rows = []
    for name, calls, x, size in racing:
        expected = x[:8].double() @ ((codes.double() - 1) * scale).T
        error = float((calls[0](x)[:8].double() - expected).norm() / expected.norm())
        median = statistics.median(taken[name])
        row = {"n": n, "k": k, "tokens": tokens, "threads": threads, "contender": name, "seconds": median}
        rows.append({**row, "relative_error": error, "bytes_per_second": size / median})
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
    write_json(args.out, record)
    console.print(f"written to {args.out.name}")


if __name__ == "__main__":
    main()
