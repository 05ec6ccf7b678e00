"""Low-bit GEMM against cuBLAS fp16, humming-kernels and gemlite on one GPU.

    python benchmarks/bench_gemm.py

CUDA graphs over weights that rotate through at least four times the L2; every kernel multiplies the same ternary
values (per-channel scales, fp16 activations). Prints microseconds, ratios and bytes per second against the copy
ceiling of the same run, and writes everything to benchmarks/results/. humming and gemlite are skipped where they are
not installed (`pip install humming-kernels tabulate gemlite`).
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import gemm_rivals
import torch
from gemm_timing import copy_ceiling_bytes_per_second, microseconds_in_turn, microseconds_per_call, rotation, warm_up
from machine import describe
from torch import Tensor

from tsld_fx.codegen import LowBitGemm
from tsld_fx.codegen.compiler import find_compiler
from tsld_fx.codegen.layout import kernel_group
from tsld_fx.whole_files import write_json

SHAPES = ((22016, 4096), (4096, 11008), (4096, 4096))
TOKENS = (1, 16, 64, 256, 2048)


def random_layer(n: int, k: int, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """-> (packed uint8, scales float32, dense float32 weight), ternary values whatever the bits."""
    ternary = torch.randint(0, 3, (n, k), dtype=torch.int32, device="cuda") - 1
    codes = ternary + (1 if bits == 2 else 2 ** (bits - 1))
    per_byte = 8 // bits
    parts = codes.view(n, -1, per_byte)
    packed = sum(parts[:, :, i] << (bits * i) for i in range(per_byte)).to(torch.uint8)
    groups = k // group_size if group_size else 1
    scales = torch.rand(n, groups, device="cuda") * 0.02 + 0.01
    dense = ternary.float() * scales.repeat_interleave(k // groups, dim=1)
    return packed, scales, dense


def ours(packed: Tensor, scales: Tensor, bits: int, group_size: int, k: int, args: Any) -> list[LowBitGemm]:
    first = LowBitGemm.pack(packed, scales, None, bits, group_size, k, target=args.target)
    copies = [first]
    for _ in range(rotation(first.weights.nbytes) - 1):
        copies.append(LowBitGemm.pack(packed, scales, None, bits, group_size, k, target=args.target))
    return copies


def relative_error(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


def bench_shape(n: int, k: int, args: Any, ceiling: float) -> list[dict[str, Any]]:
    packed, scales, dense = random_layer(n, k, args.bits, args.group_size)
    gemms = ours(packed, scales, args.bits, args.group_size, k, args)
    dense_calls = gemm_rivals.cublas(dense, rotation(2 * n * k))
    rival = None if args.no_humming else gemm_rivals.humming(dense, rotation(n * k // 4))
    tuning_rival = None
    if args.bits == 2 and not args.no_gemlite:
        tuning_rival = gemm_rivals.gemlite(dense, scales, rotation(n * k // 4), args.gemlite_config)
    rows = []
    for m in args.tokens:
        x = torch.randn(m, k, dtype=torch.float16, device="cuda")
        expected = x.double() @ dense.double().T
        row: dict[str, Any] = {"n": n, "k": k, "m": m, "bits": args.bits, "group_size": args.group_size}
        plan = gemms[0].plan(m)
        row |= {"config": plan.config.name, "splits": plan.splits}
        row["ours_us"] = microseconds_per_call([partial(g, x) for g in gemms])
        row["ours_error"] = relative_error(gemms[0](x), expected)
        for kind in args.quantised:
            rounded = gemms[0].quantise(x, kind)
            rivals = [partial(g, x, quantise=kind) for g in gemms], [partial(g, rounded) for g in gemms]
            row[f"ours_{kind}_us"], row[f"ours_{kind}_product_us"] = microseconds_in_turn(rivals)
            row[f"ours_{kind}_error"] = relative_error(gemms[0](rounded), expected)
        if args.no_overlap_too:
            row["ours_no_overlap_us"] = microseconds_per_call([partial(g, x, overlap=False) for g in gemms])
        row["cublas_us"] = microseconds_per_call([partial(f, x) for f in dense_calls])
        if rival is not None:
            row["humming_us"] = microseconds_per_call([partial(f, x) for f in rival])
            row["humming_error"] = relative_error(rival[0](x), expected)
        if tuning_rival is not None:
            tuning_rival[0](x)  # tunes itself, which no graph can capture
            row["gemlite_us"] = microseconds_per_call([partial(f, x) for f in tuning_rival])
            row["gemlite_error"] = relative_error(tuning_rival[0](x), expected)
        moved = gemms[0].weights.nbytes + 2 * m * (n + k)
        row["ours_bytes_per_s"] = moved / row["ours_us"] * 1e6
        row["of_copy_ceiling"] = row["ours_bytes_per_s"] / ceiling
        row["ours_tflops"] = 2e-6 * m * n * k / row["ours_us"]
        rows.append(row)
        print_row(row)
    return rows


def print_row(row: dict[str, Any]) -> None:
    text = f"{row['n']:>6}x{row['k']:<6} M={row['m']:<5} ours {row['ours_us']:8.2f} us"
    if "ours_no_overlap_us" in row:
        text += f" (alone {row['ours_no_overlap_us']:7.2f})"
    for kind in ("int8", "fp8"):
        if f"ours_{kind}_us" in row:
            us, product = row[f"ours_{kind}_us"], row[f"ours_{kind}_product_us"]
            text += f"  {kind} {us:8.2f} ({row['cublas_us'] / us:5.2f}x), product {product:8.2f} "
            text += f"({row['cublas_us'] / product:5.2f}x, err {row[f'ours_{kind}_error']:.0e})"
    text += f"  cuBLAS {row['cublas_us']:8.2f} ({row['cublas_us'] / row['ours_us']:5.2f}x)"
    for rival in ("humming", "gemlite"):
        if f"{rival}_us" in row:
            text += f"  {rival} {row[f'{rival}_us']:8.2f} ({row[f'{rival}_us'] / row['ours_us']:5.2f}x)"
    text += f"  {row['ours_bytes_per_s'] / 1e12:5.2f} TB/s = {row['of_copy_ceiling']:4.0%}"
    print(text + f"  {row['ours_tflops']:6.1f} TFLOP/s  err {row['ours_error']:.1e}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(f"{n}x{k}" for n, k in SHAPES))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--bits", type=int, default=2, choices=(2, 4, 8))
    parser.add_argument("--group-size", type=int, default=0)
    parser.add_argument(
        "--quantised",
        type=lambda text: text.split(","),
        default=[],
        help="int8,fp8: activations of 8 bits too, rounded in the call and before it",
    )
    parser.add_argument("--target", help='build for this target; "compute_80" runs the A100 code path through PTX')
    parser.add_argument("--no-humming", action="store_true")
    parser.add_argument("--no-gemlite", action="store_true")
    parser.add_argument("--gemlite-config", type=Path, help="where gemlite keeps what it has tuned")
    parser.add_argument("--no-overlap-too", action="store_true", help="also time without overlapping launches")
    parser.add_argument("--out", type=Path, help="default benchmarks/results/gemm_<gpu>_w<bits>....json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_gemm.py needs an NVIDIA GPU that torch can use.")
    args.tokens = [int(m) for m in args.tokens.split(",")]
    kernel_group(args.group_size, 1 << 30)
    gpu = torch.cuda.get_device_name()
    ceiling = copy_ceiling_bytes_per_second()
    print(f"{gpu}, torch {torch.__version__}, copy ceiling {ceiling / 1e12:.2f} TB/s (read + write)", flush=True)
    kind = f"w{args.bits}_g{args.group_size}" + (f"_{args.target}" if args.target else "")
    out = args.out or Path(__file__).parent / "results" / f"gemm_{gpu.split()[-1].lower()}_{kind}.json"
    record: dict[str, Any] = {
        **describe(),
        "cuda": torch.version.cuda,
        "compiler": find_compiler().version,
        "date": time.strftime("%Y-%m-%d"),
        "copy_bytes_per_s": ceiling,
        "rows": [],
    }
    warm_up()
    for shape in args.shapes.split(","):
        n, k = map(int, shape.split("x"))
        record["rows"] += bench_shape(n, k, args, ceiling)
        write_json(out, record)
        if args.gemlite_config is not None and not args.no_gemlite:
            gemm_rivals.save_gemlite(args.gemlite_config)
        torch.cuda.empty_cache()
    print(f"written to {out}")


if __name__ == "__main__":
    main()
