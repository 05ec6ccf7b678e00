"""Shape and architecture -> `Plan` (configuration, split-K, blocks): a tuned table first, else heuristics."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from tsld_fx.codegen.config import GemmConfig, shared_limit
from tsld_fx.codegen.spec import CHUNK, TILE_ROWS, KernelSpec
from tsld_fx.codegen.workspace import COUNTERS_PER_LAUNCH

_TUNED = Path(__file__).resolve().parent / "tuned"
_NEAR = math.log(1.6)  # a tuned entry serves shapes whose N and K differ by less than this factor
_MAX_SPLITS = 16
_BLOCK_MEMORY = 1024  # bytes of shared memory that the system takes of every block


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Plan:
    """A configuration, the number of blocks that share the inputs of one output tile, and, for kernels whose blocks
    walk over the output (stream, wgmma), the number of blocks per multiprocessor."""

    config: GemmConfig
    splits: int = 1
    per_sm: int = 1

    def tiles(self, m: int, row_tiles: int) -> tuple[int, int]:
        """Output tiles (stream: row groups) along the rows and along the tokens."""
        return _ceil_div(row_tiles * TILE_ROWS, self.config.block_rows), _ceil_div(m, self.config.block_tokens)

    def grid(self, m: int, row_tiles: int, multiprocessors: int) -> tuple[int, int, int]:
        rows, tokens = self.tiles(m, row_tiles)
        if self.config.persistent and self.config.cluster:  # one output tile a cluster
            return rows * tokens, 1, self.splits
        if self.config.persistent:
            return min(rows * tokens * self.splits, multiprocessors * self.per_sm), 1, 1
        if self.config.walks:
            room = multiprocessors * self.per_sm // tokens
            if self.config.cluster and self.splits > 2:  # larger clusters leave multiprocessors idle
                room = room * 10 // 11
            rows = max(1, min(rows, room // self.splits))
        return rows, tokens, self.splits

    def shared_bytes(self, spec: KernelSpec, m: int, row_tiles: int, chunks: int, multiprocessors: int) -> int:
        """Dynamic shared memory of a block, bytes."""
        groups = _ceil_div(self.tiles(m, row_tiles)[0], self.grid(m, row_tiles, multiprocessors)[0])
        return self.config.shared_bytes(spec) + self.config.shape_bytes(spec, groups, _ceil_div(chunks, self.splits))

    def counters(self, m: int, row_tiles: int, multiprocessors: int) -> int:
        """Arrival counters that a split launch uses."""
        if self.config.cluster:
            return 0
        if self.config.walks:
            return math.prod(self.grid(m, row_tiles, multiprocessors)[:2])
        return math.prod(self.tiles(m, row_tiles))

    def partial_floats(self, m: int, row_tiles: int) -> int:
        """float32 values of the partial sums of a split launch, in global memory."""
        if self.config.cluster:
            return 0
        if self.config.persistent:
            return self.splits * math.prod(self.tiles(m, row_tiles)) * self.config.block_rows * self.config.tokens
        return self.splits * m * row_tiles * TILE_ROWS


# tokens -> tiles, for what the tuned table does not cover; found on an H200, see docs/cuda.md
_STREAM = {t: GemmConfig(t, 1, 1, 16, 1, 4, "stream") for t in (1, 2, 4, 8)}
MOST_DIGIT_TOKENS = 2  # up to so many (2 at most), stream kernels take ternary weights with int8 digits of x
_MOST_DIGITS_CHUNKS = 16  # of a block of a digits kernel: its x is off by less than 1e-3 (relative Frobenius error)
_MOST_DIGIT_INPUTS = 1 << 17  # for which the sums of digits fit into 32 bits
_MANY_ROW_GROUPS = 4 * 132  # from here on a stream kernel has work enough to take four row tiles at once
_MMA = {
    1: GemmConfig(tokens=1, warps_n=1, warps_m=1, warps_k=16, row_tiles=2, stages=3),
    8: GemmConfig(tokens=8, warps_n=1, warps_m=1, warps_k=8, row_tiles=2, stages=3),
    16: GemmConfig(tokens=16, warps_n=4, warps_m=1, warps_k=4, row_tiles=2, stages=2),
    32: GemmConfig(tokens=32, warps_n=4, warps_m=1, warps_k=2, row_tiles=2, stages=3),
    64: GemmConfig(tokens=64, warps_n=4, warps_m=1, warps_k=2, row_tiles=2, stages=3),
    128: GemmConfig(tokens=128, warps_n=4, warps_m=2, warps_k=1, row_tiles=2, stages=4),
}
_WGMMA = {
    16: GemmConfig(tokens=16, warps_n=4, warps_m=1, warps_k=1, row_tiles=1, stages=6, kernel="wgmma"),
    32: GemmConfig(tokens=32, warps_n=4, warps_m=1, warps_k=1, row_tiles=1, stages=6, kernel="wgmma"),
    64: GemmConfig(tokens=64, warps_n=4, warps_m=1, warps_k=1, row_tiles=1, stages=4, kernel="wgmma"),
    256: GemmConfig(tokens=128, warps_n=4, warps_m=1, warps_k=1, row_tiles=1, stages=4, kernel="wgmma"),
    1 << 31: GemmConfig(tokens=128, warps_n=8, warps_m=1, warps_k=1, row_tiles=2, stages=4, kernel="wgmma"),
}
_WGMMA_QUANTISED = {**_WGMMA, 1 << 31: GemmConfig(256, 8, 1, 1, 1, 4, "wgmma")}  # 8-bit activations
_TILE = {  # ternary weights with one scale per row, without Hopper's instructions
    256: GemmConfig(tokens=64, warps_n=4, warps_m=1, warps_k=1, row_tiles=2, stages=5, kernel="tile"),
    1 << 31: GemmConfig(tokens=128, warps_n=4, warps_m=2, warps_k=1, row_tiles=4, stages=6, kernel="tile"),
}


@lru_cache(maxsize=8)
def tuned_table(capability: int) -> tuple[dict[str, Any], ...]:
    """Entries of `tuned/sm_XX.json`; empty where there is no file. Written by benchmarks/gemm_tune.py:

    {bits, group, quantised (where it is), n, k, m_min, m_max, config: {fields of GemmConfig}, splits, per_sm, us}
    """
    path = _TUNED / f"sm_{capability}.json"
    if not path.exists():
        return ()
    return tuple(json.loads(path.read_text())["entries"])


def _kind(entry: dict[str, Any]) -> tuple[int, bool, str | None]:
    return int(entry["bits"]), bool(entry["group"]), entry.get("quantised")


def _tuned(spec: KernelSpec, n: int, k: int, m: int) -> list[Plan]:
    """Entries that serve this M, kind of weights and kind of scale and are near in N and K, the nearest first."""

    def distance(entry: dict[str, Any]) -> float:
        return max(abs(math.log(entry["n"] / n)), abs(math.log(entry["k"] / k)))

    serving = [
        e
        for e in tuned_table(spec.capability)
        if e["m_min"] <= m <= e["m_max"]
        and GemmConfig(**e["config"]).serves(spec)
        and (_digits_serve(spec, k, m) or not e["config"].get("digits"))
    ]
    kinds = [(spec.bits, bool(spec.group), spec.quantised)]
    if spec.quantised is None:
        kinds.append((2, False, None))  # where a kind was not tuned, ternary rows are the best guess
    entries = next((found for kind in kinds if (found := [e for e in serving if _kind(e) == kind])), [])
    plans = []
    entries = sorted(entries, key=lambda e: not e["config"].get("digits"))  # at one distance those with digits first
    for entry in sorted((e for e in entries if distance(e) <= _NEAR), key=distance):
        config = GemmConfig(**entry["config"])
        if spec.group and not entry["group"] and config.kernel == "mma":  # scales take registers: smaller warp tiles
            config = replace(config, row_tiles=max(1, min(config.row_tiles, 16 // config.token_tiles)))
        if spec.group and not entry["group"] and config.kernel == "digits" and not config.cluster:
            config = replace(config, row_tiles=min(config.row_tiles, 2))
        if not config.walks:
            config = config.fitted(spec, shared_limit(spec.capability))
        plan = Plan(config, int(entry["splits"]), int(entry["per_sm"]))
        if config.kernel == "wgmma":  # found for a kind that takes less memory or fewer registers, maybe
            plan = replace(plan, per_sm=min(plan.per_sm, resident_blocks(config, spec)))
        plans.append(plan)
    return plans


def resident_blocks(config: GemmConfig, spec: KernelSpec) -> int:
    """Blocks that fit on one multiprocessor at once, for kernels whose shared memory does not depend on the shape."""
    memory = (shared_limit(spec.capability) + _BLOCK_MEMORY) // (config.shared_bytes(spec) + _BLOCK_MEMORY)
    return max(1, min(memory, 2048 // config.threads, config.least_blocks(spec)))


def _splits(plan: Plan, m: int, row_tiles: int, chunks: int, multiprocessors: int, per_sm: int) -> int:
    """Enough blocks to fill the machine once, with at least two iterations each."""
    iterations = max(1, chunks // plan.config.stage_chunks)
    wanted = multiprocessors * per_sm // math.prod(plan.tiles(m, row_tiles))
    return max(1, min(wanted, iterations // 2, _MAX_SPLITS))


def _heuristic(spec: KernelSpec, n: int, k: int, m: int, multiprocessors: int) -> Plan:
    row_tiles, chunks, limit = _ceil_div(n, TILE_ROWS), _ceil_div(k, CHUNK), shared_limit(spec.capability)
    if m <= max(_STREAM) and spec.quantised is None:
        config = _STREAM[min(t for t in _STREAM if t >= m)]
        if row_tiles >= _MANY_ROW_GROUPS and spec.bits == 2:
            config = replace(config, row_tiles=4, stages=3)
        plan = Plan(config)  # a block keeps all of x in shared memory: too much for large K
        if plan.shared_bytes(spec, m, row_tiles, chunks, multiprocessors) <= limit:
            return plan
    table = _WGMMA_QUANTISED if spec.quantised else _WGMMA if spec.hopper and m > max(_STREAM) else _MMA
    if m > 64 and not spec.hopper and _TILE[256].serves(spec):
        table = _TILE
    config = table[min((t for t in table if t >= m), default=max(table))]
    config = config.fitted(spec, limit)
    per_sm = min(resident_blocks(config, spec), max(1, 1024 // config.threads))
    plan = Plan(config, 1, per_sm)
    return replace(plan, splits=_splits(plan, m, row_tiles, chunks, multiprocessors, per_sm))


def _digits_serve(spec: KernelSpec, k: int, m: int) -> bool:
    """Whether there are stream kernels over int8 digits of x: about a third of the instructions per weight."""
    ternary = spec.bits == 2 and spec.group in (0, CHUNK) and spec.quantised is None
    return ternary and m <= MOST_DIGIT_TOKENS and k <= _MOST_DIGIT_INPUTS


def _with_digits(plan: Plan, m: int) -> Plan:
    """The same stream kernel over int8 digits, with tiles that serve these well."""
    if plan.config.kernel != "stream" or plan.splits > 1 or plan.config.digits:
        return plan
    row_tiles = 4 if plan.config.row_tiles == 4 else 2
    config = replace(plan.config, tokens=m, warps_k=12, row_tiles=row_tiles, stages=4, digits=True)
    return Plan(config)


def whole_splits(plan: Plan, chunks: int) -> Plan:
    """The plan with the most splits, up to its own, that leave no block without inputs and that share the tokens of a
    cluster equally: its token tiles (wgmma), or its tokens (digits: 1, 2, 4 or 8 blocks)."""

    def whole(splits: int) -> bool:
        full = _ceil_div(chunks, _ceil_div(chunks, splits)) == splits
        shared = plan.config.tokens // 8 if plan.config.persistent else 8
        return full and (not plan.config.cluster or shared % splits == 0)

    return replace(plan, splits=next(s for s in range(plan.splits, 0, -1) if whole(s)))


def choose(spec: KernelSpec, n: int, k: int, m: int, multiprocessors: int) -> Plan:
    """The plan for y[m, n] = x[m, k] @ weights[n, k].T on a machine with so many multiprocessors."""
    row_tiles, chunks = _ceil_div(n, TILE_ROWS), _ceil_div(k, CHUNK)

    def fits(plan: Plan) -> bool:
        most = replace(spec, norm=True) if plan.config.digits else spec  # the kernels that normalise x take more
        return plan.shared_bytes(most, m, row_tiles, chunks, multiprocessors) <= shared_limit(spec.capability)

    for plan in _tuned(spec, n, k, m):
        plan = whole_splits(plan, chunks)
        if plan.config.kernel == "digits" and _ceil_div(chunks, plan.splits) > _MOST_DIGITS_CHUNKS:
            continue
        if fits(plan):
            break
    else:
        plan = _heuristic(spec, n, k, m, multiprocessors)
    if _digits_serve(spec, k, m) and fits(_with_digits(plan, m)):
        plan = _with_digits(plan, m)
    if plan.counters(m, row_tiles, multiprocessors) > COUNTERS_PER_LAUNCH and plan.config.kernel != "stream":
        plan = replace(plan, splits=1)
    return whole_splits(plan, chunks)
