"""How attention over a static cache is shared out: query heads of a block, blocks of a head, threads.

Plans are compared by a rough estimate of their time. Its constants make the plans chosen the fastest or nearly so among
those that `benchmarks/bench_attention.py --search` measured on an H200; elsewhere they are a guess.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from tsld_fx.codegen.config import shared_limit

_MOST_ROWS = 8  # query heads that one block computes together
_CLUSTERS = (2, 4, 8)  # blocks of a cluster
_SPLITS = (1, 2, 3, 4, 8, 16)
_LEAST_KEYS = 48  # cached positions for which a share of its own pays
_REGISTERS = 65536  # of a multiprocessor


@dataclass(frozen=True)
class AttentionPlan:
    """rows: query heads that one block computes with the same keys and values. splits: blocks that share the cached
    positions of these heads. cluster: whether those form a cluster (Hopper) instead of meeting in global memory."""

    rows: int
    splits: int
    cluster: bool
    threads: int

    def resident(self, head_dim: int, capability: int) -> int:
        """Blocks that fit on a multiprocessor at once."""
        gathered = 1 if wide(self.rows, head_dim) else 8 * self.rows
        shares = self.threads // 32 * self.rows + gathered  # decode_attention.cuh, Shared
        memory = ring_bytes(self.threads) + shares * (head_dim + 2) * 4 + 1024
        registers = self.threads * (40 + 18 * self.rows)
        return max(1, min((shared_limit(capability) + 1024) // memory, _REGISTERS // registers))


def wide(rows: int, head_dim: int) -> bool:
    """Whether the results of a block's heads take so much shared memory that it has 128 threads and no cluster."""
    return rows * head_dim > 512


def ring_bytes(threads: int) -> int:
    """Dynamic shared memory of a block: keys and values on their way; mirrors `DecodeAttention::kAhead`."""
    return 32 * threads * (8 if threads > 128 else 10)


def _plans(
    batch: int, heads: int, kv_heads: int, head_dim: int, length: int, capability: int, multiprocessors: int
) -> Iterator[AttentionPlan]:
    for rows in (r for r in range(1, _MOST_ROWS + 1) if heads // kv_heads % r == 0):
        for splits in (s for s in _SPLITS if s == 1 or s * _LEAST_KEYS <= length):
            few = rows == 1 and length <= 100 * splits  # so that two fit beside the product before them
            plan = AttentionPlan(rows, splits, False, 128 if wide(rows, head_dim) or few else 256)
            # clusters need their blocks side by side; where the machine is nearly full they would have to wait
            room = 0.73 * multiprocessors * plan.resident(head_dim, capability)
            fits = batch * heads // rows * splits <= room
            if capability >= 90 and splits in _CLUSTERS and not wide(rows, head_dim) and fits:
                plan = AttentionPlan(rows, splits, True, plan.threads)
            yield plan


def _microseconds(
    plan: AttentionPlan, batch: int, heads: int, kv_heads: int, head_dim: int, length: int, capability: int,
    multiprocessors: int,
) -> float:  # fmt: skip
    """A block alone on a multiprocessor waits for memory; several share its arithmetic; more than fit take turns."""
    alone = (6.0 + 2.5 * plan.rows) * (1.6 if plan.threads == 128 else 1.0)  # for 1,000 positions of 128
    together = 1.7 + 2.1 * plan.rows
    blocks: float = -(-batch * heads // plan.rows * plan.splits // multiprocessors)
    resident = plan.resident(head_dim, capability)
    if plan.cluster and 1 < blocks < resident:
        blocks = min(resident, blocks + 1.3)  # clusters do not spread evenly
    turns, last = divmod(blocks, resident)
    work = turns * max(alone, resident * together) + (max(alone, last * together) if last else 0.0)
    compute = work * (-(-length // plan.splits) + 24) * head_dim / 128e3
    megabytes = 4e-6 * batch * length * head_dim  # of the keys and values of one head
    memory = max(0.16 * megabytes * kv_heads, 0.23 * megabytes * heads / plan.rows)  # all of it once; what L2 delivers
    meeting = 0.59 * (1 + 0.03 * plan.splits * plan.rows) if plan.splits > 1 and not plan.cluster else 0.0
    return (compute**2.5 + memory**2.5) ** 0.4 + meeting + 0.87 * plan.rows * head_dim / 128


@lru_cache(maxsize=1024)
def attention_plan(
    batch: int, heads: int, kv_heads: int, head_dim: int, length: int, capability: int, multiprocessors: int
) -> AttentionPlan:
    """The plan for one token of `batch` sequences, up to `length` cached positions (what the cache holds)."""
    shape = (batch, heads, kv_heads, head_dim, length, capability, multiprocessors)
    return min(_plans(*shape), key=lambda plan: _microseconds(plan, *shape))


def scratch_floats(
    batch: int, heads: int, kv_heads: int, head_dim: int, length: int, capability: int, multiprocessors: int
) -> int:
    """float32 values that attention of up to `batch` sequences needs: counters (zero) first, then results of shares."""
    most = 0
    for b in range(1, batch + 1):
        plan = attention_plan(b, heads, kv_heads, head_dim, length, capability, multiprocessors)
        most = max(most, b * heads * plan.splits * (head_dim + 2))
    return batch * heads + most
