"""The prompt's pass through the prefill graph; as CUDA graphs for sizes that come again."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from tsld_fx.decode.graphs import DecodeGraphs

MOST_TOKENS = 4096  # of a captured prompt, all sequences together; larger ones keep the device busy without a capture
_MOST_GRAPHS = 8


class Prefill:
    """Prompts [B, T] -> logits of the token after each.

    Operator by operator, a prefill of a few hundred tokens takes several times as long to launch as to compute. So
    with `cuda_graphs` the second prompt of a size is captured and later ones replay it. Sizes are numbers of sequences
    and of tokens, the latter rounded up by an eighth at most; the most recently used ones are kept.
    """

    def __init__(self, graphs: DecodeGraphs, cuda_graphs: bool) -> None:
        self._graphs, self._cuda_graphs = graphs, cuda_graphs
        self._captured: OrderedDict[tuple[int, int], _Captured | None] = OrderedDict()  # None: seen once
        self._pool: Any = None

    def __call__(self, ids: Tensor, last: Tensor) -> Tensor:
        """ids int64 [B, T], tokens to the left of each row; last int64 [B], their last places -> logits [B, V]."""
        batch, tokens = ids.shape
        size = (batch, rounded_up(tokens, self._graphs.length))
        if not self._cuda_graphs or batch * size[1] > MOST_TOKENS:
            return self._run(ids, last)
        if size not in self._captured:
            self._captured[size] = None
            if len(self._captured) > _MOST_GRAPHS:
                self._captured.popitem(last=False)
            return self._run(ids, last)
        self._captured.move_to_end(size)
        found = self._captured[size]
        if found is None:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            found = self._captured[size] = _Captured(self._run, size, ids.device, self._pool)
        return found(ids, last)

    def _run(self, ids: Tensor, last: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape[0], -1)
        logits: Tensor = self._graphs.prefill(ids, positions, last)["logits"][:, -1]
        return logits


class _Captured:
    """One size's CUDA graph, with its inputs and output."""

    def __init__(self, run: Any, size: tuple[int, int], device: torch.device, pool: Any) -> None:
        self._ids = torch.zeros(size, dtype=torch.long, device=device)
        self._last = torch.zeros(size[0], dtype=torch.long, device=device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run(self._ids, self._last)  # builds kernels
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._logits = run(self._ids, self._last)

    def __call__(self, ids: Tensor, last: Tensor) -> Tensor:
        self._ids[:, : ids.shape[1]] = ids  # the rest holds any token: what they write is overwritten before it is seen
        self._last.copy_(last)
        self._graph.replay()
        return self._logits


def rounded_up(tokens: int, most: int) -> int:
    """The next number of tokens that a captured graph takes: eight to every doubling, multiples of 16."""
    step = max(16, 1 << max((tokens - 1).bit_length() - 4, 0))
    return min(-(-tokens // step) * step, most)
