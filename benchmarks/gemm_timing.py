"""Time matrix products the way decoding runs them: CUDA-graph replay over weights that rotate through memory.

One hot matrix would sit in the L2 cache; the weights of a model do not. So a graph calls one layer after another, with
weights of at least four times the L2 in all, and the time per call is the graph's time over its number of calls.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch


def rotation(weight_bytes: int, device: int = 0, times_l2: float = 4.0, least: int = 4) -> int:
    """Number of copies of a weight whose total is at least `times_l2` of the L2 cache."""
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return max(least, -(-int(times_l2 * l2) // max(weight_bytes, 1)))


def microseconds_per_call(calls: Sequence[Callable[[], object]], target_us: float = 4000.0, samples: int = 7) -> float:
    """Median over `samples` of graph replays that last about `target_us` each."""
    return microseconds_in_turn([calls], target_us, samples)[0]


def microseconds_in_turn(
    rivals: Sequence[Sequence[Callable[[], object]]], target_us: float = 4000.0, samples: int = 7
) -> list[float]:
    """The same of each rival, which take turns: a chip at its power limit treats them alike then."""
    graphs = [_captured(calls) for calls in rivals]
    counts = []
    for graph in graphs:
        _replay(graph, 2)
        counts.append(max(1, int(target_us / max(_replay(graph, 2), 1.0))))
    times = [[_replay(graph, count) for graph, count in zip(graphs, counts, strict=True)] for _ in range(samples)]
    return [
        statistics.median(of_one) / len(calls) for of_one, calls in zip(zip(*times, strict=True), rivals, strict=True)
    ]


def _captured(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def _replay(graph: torch.cuda.CUDAGraph, count: int) -> float:
    """-> microseconds of one replay."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(count):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000 / count


def warm_up(seconds: float = 1.0) -> None:
    """Keep the GPU busy until its clocks have risen; the first row would be timed at idle clocks otherwise."""
    x = torch.randn(4096, 4096, dtype=torch.float16, device="cuda")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for _ in range(20):
            torch.mm(x, x)
        torch.cuda.synchronize()


def copy_ceiling_bytes_per_second(gib: float = 4.0) -> float:
    """Device-to-device copy of random bytes: bytes read plus bytes written per second, median of ten."""
    source = torch.randint(-(2**31), 2**31 - 1, (int(gib * 2**28),), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)

    def seconds() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    seconds()
    return 2 * source.numel() * 4 / statistics.median(seconds() for _ in range(10))
