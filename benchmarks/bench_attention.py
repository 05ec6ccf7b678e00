"""Attention of one new token per sequence over a static cache, against torch's scaled_dot_product_attention on one GPU.

    python benchmarks/bench_attention.py

CUDA graphs over caches that rotate through at least four times the L2. Ours includes rotary embedding and the cache
update, torch's does not. The bound is the time to read the cached keys and values at the copy ceiling of the same run.
`--search` also times other plans (blocks that share a head, clusters, threads), to see whether the choice is good.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gemm_timing import copy_ceiling_bytes_per_second, microseconds_per_call, rotation, warm_up
from machine import describe
from torch.nn.functional import scaled_dot_product_attention

from tsld_fx.codegen import decode_kernels
from tsld_fx.codegen.attention_plan import AttentionPlan, attention_plan, scratch_floats, wide
from tsld_fx.whole_files import write_json

SHAPES = ((32, 32, 128), (32, 8, 128), (12, 12, 64))  # LLaMA-7B, LLaMA-3 8B, GPT-2
ROOM = 256  # positions of the cache behind the last


def other_plans(heads: int, kv_heads: int, head_dim: int, position: int) -> Iterator[AttentionPlan]:
    """Those that exist for these heads, with at least 32 positions a block."""
    together = [rows for rows in range(1, 9) if heads // kv_heads % rows == 0]
    for rows, threads, splits in itertools.product(together, (128, 256), (1, 2, 3, 4, 8, 16, 32, 64)):
        for cluster in (False, True):
            exists = not (wide(rows, head_dim) and (cluster or threads == 256)) and (not cluster or splits in (2, 4, 8))
            if exists and splits * 32 <= position:
                yield AttentionPlan(rows, splits, cluster, threads)


def bench(shape: tuple[int, int, int], position: int, batch: int, search: bool, ceiling: float) -> dict[str, Any]:
    heads, kv_heads, size = shape
    length = position + ROOM
    normal = partial(torch.randn, dtype=torch.float16, device="cuda")
    read = 2 * 2 * batch * kv_heads * position * size
    caches = [
        (normal(batch, kv_heads, length, size), normal(batch, kv_heads, length, size)) for _ in range(rotation(read))
    ]
    q, k, v = (normal(batch, 1, h, size) for h in (heads, kv_heads, kv_heads))
    cos, sin = normal(length, size), normal(length, size)
    positions = torch.full((batch,), position, device="cuda")
    chip = decode_kernels.chip(0)
    plan = attention_plan(batch, heads, kv_heads, size, length, *chip)
    floats = max(scratch_floats(batch, heads, kv_heads, size, length, *chip), batch * heads * (1 + 64 * (size + 2)))
    scratch = torch.zeros(floats, device="cuda")

    def ours(plan: AttentionPlan, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return decode_kernels.attention(q, k, v, cos, sin, positions, keys, values, scratch, size**-0.5, plan)

    def theirs(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        past = (t[:, :, : position + 1] for t in (keys, values))
        return scaled_dot_product_attention(q.transpose(1, 2), *past, enable_gqa=heads != kv_heads)

    def us(function: Any) -> float:
        return microseconds_per_call([partial(function, *cache) for cache in caches], target_us=1500.0, samples=5)

    us(partial(ours, plan))  # the first timing of a shape is slower
    row: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "head_dim": size, "position": position, "batch": batch}
    row |= {**vars(plan), "us": us(partial(ours, plan)), "torch_us": us(theirs), "bound_us": read / ceiling * 1e6}
    if search:
        expected = ours(plan, *caches[0]).float()
        row["searched"] = []
        for other in other_plans(*shape, position):
            assert (ours(other, *caches[0]).float() - expected).norm() <= 2e-3 * expected.norm()
            row["searched"].append({**vars(other), "us": us(partial(ours, other))})
        row["searched"].sort(key=lambda found: found["us"])
    print_row(row)
    return row


def print_row(row: dict[str, Any]) -> None:
    def plan(p: dict[str, Any]) -> str:
        return f"{p['rows']} heads, {p['splits']}{' in a cluster' * p['cluster']}, {p['threads']} threads"

    text = f"{row['heads']}/{row['kv_heads']} heads of {row['head_dim']}, {row['position']:>5} x {row['batch']:<3}"
    text += (
        f" ours {row['us']:7.2f} us ({plan(row)})  torch {row['torch_us']:7.2f} ({row['torch_us'] / row['us']:.2f}x)"
    )
    text += f"  bound {row['bound_us']:6.2f} = {row['bound_us'] / row['us']:4.0%}"
    if "searched" in row:
        best = row["searched"][0]
        text += f"  best {best['us']:7.2f} ({plan(best)})"
    print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join("/".join(map(str, shape)) for shape in SHAPES))
    parser.add_argument("--positions", default="512,2000,8000")
    parser.add_argument("--batch", default="1,2,4,8,16,32,64")
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--out", type=Path, help="default benchmarks/results/attention_<gpu>.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_attention.py needs an NVIDIA GPU that torch can use.")
    gpu = torch.cuda.get_device_name()
    ceiling = copy_ceiling_bytes_per_second()
    record: dict[str, Any] = {**describe(), "cuda": torch.version.cuda, "date": time.strftime("%Y-%m-%d")}
    record |= {"copy_bytes_per_s": ceiling, "rows": []}
    out = args.out or Path(__file__).parent / "results" / f"attention_{gpu.split()[-1].lower()}.json"
    warm_up()
    for text in args.shapes.split(","):
        shape: Any = tuple(map(int, text.split("/")))
        for position, batch in itertools.product(*(map(int, t.split(",")) for t in (args.positions, args.batch))):
            if 4 * batch * shape[1] * (position + ROOM) * shape[2] * 4 > 60e9:  # four caches at least
                continue
            record["rows"].append(bench(shape, position, batch, args.search, ceiling))
            write_json(out, record)
    print(f"written to {out}")


if __name__ == "__main__":
    main()
