"""Search tile shapes and split-K on the GPU at hand, and write the table that `select_config` reads.

    python benchmarks/gemm_tune.py --tokens 1,16,64,256,2048 --all runs/tune.json --table codegen/tuned/sm_90.json

`--table` replaces the entries of the shapes and M that were measured, for the same kind of weights, scales and
activations, and keeps the others.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gemm_timing import microseconds_per_call, rotation

from tsld_fx.codegen.build import build_kernel
from tsld_fx.codegen.config import GemmConfig, shared_limit
from tsld_fx.codegen.cuda_gemm import LowBitGemm
from tsld_fx.codegen.layout import SLACK_TILES, KernelWeights
from tsld_fx.codegen.select_config import MOST_DIGIT_TOKENS, Plan, resident_blocks, whole_splits
from tsld_fx.codegen.spec import KernelSpec, Quantised
from tsld_fx.errors import BackendError

SPLITS = (1, 2, 3, 4, 5, 6, 8)


def mma_candidates(m: int) -> list[GemmConfig]:
    tokens = next((t for t in (1, 2, 4, 8, 16, 32, 64) if t >= m), 128)
    found = []
    for wn, wk, rt, stages in itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 16), (1, 2, 4), (2, 3, 4)):
        wm = 2 if tokens == 128 else 1
        warps, accumulators = wn * wm * wk, rt * -(-tokens // (8 * wm)) * 4
        if warps not in (8, 16) or accumulators > 128 or accumulators * warps > 1024:
            continue
        if (tokens <= 8 and (wn * rt > 8 or wk < 8)) or (tokens >= 16 and (wn * rt < 4 or wk > 4)):
            continue
        found.append(GemmConfig(tokens, wn, wm, wk, rt, stages))
    return found


def stream_candidates(spec: KernelSpec, m: int) -> list[GemmConfig]:
    tokens = next(t for t in (1, 2, 4, 8, 16, 32, 64) if t >= m)
    found = [
        GemmConfig(tokens, 1, 1, warps, rt, stages, "stream")
        for warps, rt, stages in itertools.product((8, 16), (1, 2, 4), (3, 4, 6, 8))
        if rt * tokens <= 128 and rt * stages <= 16
    ]
    if m <= MOST_DIGIT_TOKENS and spec.bits == 2 and spec.group in (0, 128):
        found += [
            GemmConfig(m, 1, 1, warps, rt, stages, "stream", digits=True)
            for warps, rt, stages in itertools.product((8, 12, 16, 20, 24), (1, 2, 4), (3, 4, 5, 6))
            if rt * stages <= 16
        ]
    return found


def digits_candidates(spec: KernelSpec, m: int) -> list[GemmConfig]:
    tokens = next(t for t in (8, 16, 32, 64) if t >= m)
    if spec.hopper:
        shapes = itertools.product((8, 12, 16, 20, 24), (4,), (2, 3, 4, 5))
    else:
        shapes = itertools.product((8, 12, 16), (1, 2, 3), (2, 3, 4))
    return [
        GemmConfig(tokens, 1, 1, warps, rt, stages, "digits", cluster=spec.hopper)
        for warps, rt, stages in shapes
        if spec.hopper or (rt * tokens <= 48 and warps * rt * (stages - 1) >= 24)
    ]


def wgmma_candidates(m: int) -> list[GemmConfig]:
    found = []
    for tokens, groups, rt, stages in itertools.product((16, 32, 64, 128, 256), (1, 2), (1, 2), (3, 4, 5, 6, 8)):
        if rt * tokens > 256 or tokens >= 2 * max(m, 16) or (m >= 4 * tokens and tokens < 128):
            continue
        found.append(GemmConfig(tokens, 4 * groups, 1, 1, rt, stages, "wgmma"))
    if m <= 64:  # weights with buffers of their own, sums in clusters
        for c, cluster, ahead in itertools.product(list(found), (False, True), (0, 2, 3)):
            if c.warps_n == 4 and c.row_tiles == 1 and c.tokens >= m and (ahead == 0 or c.stages <= 4 * ahead - 3):
                found.append(replace(c, cluster=cluster, ahead=ahead))
    return list(dict.fromkeys(found))


def tile_candidates(m: int) -> list[GemmConfig]:
    found = []
    for tokens, wn, wm, rt, stages in itertools.product((64, 128, 256), (1, 2, 4), (1, 2, 4), (2, 4), (3, 5, 6)):
        per_warp = tokens // wm // 8
        if tokens >= 2 * max(m, 64) or wn * wm not in (4, 8) or not 2 <= per_warp <= 8 or rt * per_warp < 16:
            continue
        found.append(GemmConfig(tokens, wn, wm, 1, rt, stages, "tile"))
    return found


def candidates(spec: KernelSpec, m: int, kernels: str, only: str = "") -> list[GemmConfig]:
    """Configurations of these kernels that serve `m` tokens and whose names match the regular expression `only`."""
    wanted = kernels.split(",")
    found = stream_candidates(spec, m) if "stream" in wanted and m <= 64 and not spec.quantised else []
    if "digits" in wanted and m <= 64:
        found += digits_candidates(spec, m)
    if "mma" in wanted and not spec.quantised:
        found += mma_candidates(m)
    if "tile" in wanted and not spec.quantised and spec.bits == 2 and not spec.group and m > 32:
        found += tile_candidates(m)
    if "wgmma" in wanted and spec.hopper and m > 8:
        found += wgmma_candidates(m)
    limit = shared_limit(spec.capability)
    return [c for c in found if re.search(only, c.name) and c.serves(spec) and c.shared_bytes(spec) <= limit]


def random_weights(n: int, k: int, bits: int, group: int) -> KernelWeights:
    """Random valid codes, straight in kernel layout: a speed measurement needs no particular values."""
    tiles, chunks = -(-n // 16), -(-k // 128)
    padded = tiles + SLACK_TILES
    codes = torch.randint(0, 256, (padded * chunks * 256 * bits,), dtype=torch.uint8, device="cuda")
    if bits == 2:  # 10 is no ternary code
        odd = codes & 0x55
        codes = odd | ((codes & 0xAA) & (odd << 1))
    meta = None
    if group:
        scales = torch.rand(padded, chunks, 128 // group * 16, device="cuda").half().view(torch.uint8)
        zeros = torch.randint(0, 2**bits, (padded, chunks, 128 // group * 16), dtype=torch.uint8, device="cuda")
        meta = (scales if bits == 2 else torch.cat([scales, zeros], dim=2)).flatten()
    row_scale = torch.rand(tiles * 16, device="cuda")
    row_zero = torch.full((tiles * 16,), 2 ** (bits - 1), dtype=torch.uint8, device="cuda")
    return KernelWeights(codes, meta, row_scale, None if group or bits == 2 else row_zero, bits, group, n, k)


def layers(n: int, k: int, bits: int, group: int, target: str | None) -> list[LowBitGemm]:
    device = torch.device("cuda", torch.cuda.current_device())
    count = rotation(n * k * bits // 8)
    return [LowBitGemm(random_weights(n, k, bits, group), device, target) for _ in range(count)]


def plans(gemm: LowBitGemm, config: GemmConfig, m: int, quantised: Quantised | None) -> list[Plan]:
    """Split-K values and blocks per multiprocessor that make sense for this shape."""
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    spec, weights = gemm.spec("fp16", quantised), gemm.weights
    limit = shared_limit(spec.capability)
    tiles = math.prod(Plan(config).tiles(m, weights.row_tiles))
    found = []
    for splits in SPLITS:
        if config.cluster and whole_splits(Plan(config, splits), weights.chunks).splits != splits:
            continue
        per_split = -(-weights.chunks // splits)
        if config.digits and splits > 1:
            continue
        if splits > 1 and (per_split < config.stage_chunks or -(-weights.chunks // per_split) != splits):
            continue
        if config.kernel in ("mma", "tile"):
            if splits == 1 or 0.4 * multiprocessors < tiles * splits <= 4.5 * multiprocessors:
                found.append(Plan(config, splits))
        elif config.walks:
            for per_sm in (1, 2, 4) if config.kernel == "stream" else range(1, config.least_blocks(spec) + 1):
                plan = Plan(config, splits, per_sm)
                shared = plan.shared_bytes(spec, m, weights.row_tiles, weights.chunks, multiprocessors)
                if shared * per_sm <= limit and per_sm * config.threads <= 2048:
                    found.append(plan)
        elif config.cluster:
            found += [Plan(config, splits)] * (splits > 1)
        elif splits == 1 or tiles * splits <= 4.5 * multiprocessors:
            most = min(6, resident_blocks(config, spec))
            found += [Plan(config, splits, per_sm) for per_sm in range(1, most + 1)]
    return found


def tune(
    gemms: list[LowBitGemm], m: int, kernels: str, deadline: float, quantised: Quantised | None, only: str
) -> list[tuple[float, Plan]]:
    """(microseconds, plan), fastest first: every candidate and the plan in use once, the best eight again with care."""
    x = torch.randn(m, gemms[0].weights.in_features, dtype=torch.float16, device="cuda")
    results: list[tuple[float, Plan]] = []
    found = [gemms[0].plan(m, quantise=quantised)]
    for config in candidates(gemms[0].spec("fp16", quantised), m, kernels, only):
        found += plans(gemms[0], config, m, quantised)
    for plan in found:
        if time.monotonic() < deadline:
            calls = [lambda g=g, plan=plan: g(x, plan=plan, quantise=quantised) for g in gemms]
            try:
                results.append((microseconds_per_call(calls, target_us=400.0, samples=3), plan))
            except BackendError as error:
                print(f"# {plan.config.name}: {error}", file=sys.stderr)
    results.sort(key=lambda r: r[0])
    again = [
        (
            microseconds_per_call(
                [lambda g=g, p=plan: g(x, plan=p, quantise=quantised) for g in gemms], target_us=2000.0
            ),
            plan,
        )
        for _, plan in results[:8]
    ]
    return sorted(again, key=lambda r: r[0]) + results[8:]


def build_all(spec: KernelSpec, tokens: list[int], kernels: str, workers: int, only: str) -> int:
    """Compile every candidate into the cache, several at once."""
    configs = list(dict.fromkeys(c for m in tokens for c in candidates(spec, m, kernels, only)))
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda c: build_kernel(spec, c), configs))
    return len(configs)


def token_ranges(tokens: list[int]) -> dict[int, tuple[int, int]]:
    """Which M the plan found at each M serves: from above the M before (or half of it) up to it (1,024: no end)."""
    ranges, ordered = {}, sorted(tokens)
    for before, m in zip([0, *ordered], ordered, strict=False):
        ranges[m] = (max(before + 1, m // 2 + 1), m)
    if ordered[-1] >= 1024:
        ranges[ordered[-1]] = (ranges[ordered[-1]][0], 1 << 30)
    return ranges


def write_table(path: Path, found: list[dict[str, Any]], bits: int, group: int, quantised: str | None) -> None:
    """The fastest plan per shape and M, beside the entries of other kinds of weights that the file holds."""
    kept = json.loads(path.read_text())["entries"] if path.exists() else []
    winners = {(f["n"], f["k"], f["m"]): f for f in found if f["rank"] == 0}

    def superseded(entry: dict[str, Any]) -> bool:
        winner = winners.get((entry["n"], entry["k"], entry["m"]))
        kind = entry["bits"], bool(entry["group"]), entry.get("quantised")
        if winner is None or kind != (bits, bool(group), quantised):
            return False
        # other kinds of weights borrow the entry behind a winner that does not serve them
        return not GemmConfig(**winner["config"]).cluster or GemmConfig(**entry["config"]).cluster

    kept = [e for e in kept if not superseded(e)]
    ranges = token_ranges(sorted({f["m"] for f in found}))
    fields = ("bits", "group", "n", "k", "m", "us", "splits", "per_sm", "config")
    for entry in winners.values():
        low, high = ranges[entry["m"]]
        more = {"quantised": quantised} if quantised else {}
        kept.insert(0, {"m_min": low, "m_max": high, **more, **{name: entry[name] for name in fields}})
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("  " + json.dumps(e) for e in kept)
    path.write_text(f'{{"gpu": "{torch.cuda.get_device_name()}", "entries": [\n{lines}\n]}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="22016x4096,4096x11008,4096x4096")
    parser.add_argument("--tokens", default="1,16,64,256,2048")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group", type=int, default=0)
    parser.add_argument("--quantised", choices=("int8", "fp8"), help="round the activations first (timed with it)")
    parser.add_argument("--kernels", default="stream,digits,mma,tile,wgmma")
    parser.add_argument("--only", default="", help="a regular expression: configurations whose names match it")
    parser.add_argument("--target", default="sm_90a")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop searching after so long")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--build-only", action="store_true")
    parser.add_argument("--all", type=Path, help="write every measurement here")
    parser.add_argument("--table", type=Path, help="write the fastest plans here, for select_config")
    args = parser.parse_args()
    spec = KernelSpec("fp16", args.bits, args.group, args.target, args.quantised)
    tokens = [int(m) for m in args.tokens.split(",")]
    print(f"# {build_all(spec, tokens, args.kernels, args.workers, args.only)} kernels built", flush=True)
    if args.build_only:
        return
    start, found = time.monotonic(), []
    shapes = [tuple(map(int, s.split("x"))) for s in args.shapes.split(",")]
    jobs = [(n, k, m) for n, k in shapes for m in tokens]
    for index, (n, k, m) in enumerate(jobs):
        left = args.seconds - (time.monotonic() - start)
        gemms = layers(n, k, args.bits, args.group, args.target)
        ranked = tune(gemms, m, args.kernels, time.monotonic() + left / (len(jobs) - index), args.quantised, args.only)
        for rank, (us, plan) in enumerate(ranked):
            entry = {
                "n": n,
                "k": k,
                "m": m,
                "us": round(us, 2),
                "splits": plan.splits,
                "per_sm": plan.per_sm,
                "config": vars(plan.config),
            }
            if args.quantised:
                entry["quantised"] = args.quantised
            found.append({"bits": args.bits, "group": args.group, "target": args.target, "rank": rank, **entry})
            if rank < 3:
                what = f"w{args.bits} g{args.group} {n}x{k} m={m}"
                print(f"{what} {us:.2f} us {plan.config.name} x{plan.splits} p{plan.per_sm}", flush=True)
    if args.all:
        args.all.write_text(json.dumps(found))
    if args.table:
        write_table(args.table, found, args.bits, args.group, args.quantised)


if __name__ == "__main__":
    main()
