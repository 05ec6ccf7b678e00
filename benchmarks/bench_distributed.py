"""Distilling a LLaMA of 7B parameters (random weights) on one GPU, and with FSDP2 and pipelines on several.

    torchrun --nproc-per-node 2 benchmarks/bench_distributed.py
    torchrun --nproc-per-node 2 benchmarks/bench_distributed.py --shape tiny --cpu   # does it run at all

Ternary student with float32 masters under bf16 autocast, every layer recomputed (but where activations are kept), fused
AdamW with float32 states, bf16 teacher, TSLD + ground truth, head and losses as one operator, T = 512. Each process
first trains the whole of it on its own GPU (the peer: what one GPU does), then the processes together: FSDP2 with
float32 and with bf16 gathers, and pipelines. Peak memory is that of steps after the first, with everything of the case
before freed.

Bubble share of a pipeline: 1 - busy / (processes * wall) over the schedule alone (the student's forward and backward
passes). Busy is the time inside the stages' forward and backward actions by CUDA events, which begin after what an
action waits for has arrived; wall is the slowest process's time from a common start. It contains what stages of
unequal cost wait for each other (`imbalance`: 1 - mean busy / longest busy). Beside it stands the share of the schedule
with equal stages, (processes - 1) / (processes - 1 + stages per process * micro-batches); zero-bubble aims below it.
Writes benchmarks/results/distributed_<shape>_<processes>.json, or --out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from distill_models import SEQUENCES, SHAPES, TOKENS, Models, wait_for
from machine import ROOT, describe
from rich.console import Console
from rich.table import Table

from tsld_fx import DistillConfig
from tsld_fx.distributed.config import SCHEDULES
from tsld_fx.distributed.data import to_device
from tsld_fx.distributed.fsdp import FsdpEngine
from tsld_fx.distributed.objective import fused_objective, head_loss
from tsld_fx.distributed.pipeline import PipelineEngine
from tsld_fx.distributed.ranks import Ranks
from tsld_fx.whole_files import write_json


def adamw(parameters: Sequence[torch.nn.Parameter], device: torch.device) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=1e-5, fused=device.type == "cuda")


def seconds_of(step: Callable[[], None], ranks: Ranks, repeats: int, together: bool = True) -> float:
    """Median wall time of a step after one to warm up, at which the record of peak memory begins."""
    found = []
    for index in range(repeats + 1):
        if together:
            ranks.barrier()
        start = time.perf_counter()
        step()
        _wait(ranks)
        found.append(time.perf_counter() - start)
        if index == 0 and ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
    return statistics.median(found[1:])


def _wait(ranks: Ranks) -> None:
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()


def one_gpu(models: Models, ranks: Ranks, repeats: int) -> dict[str, Any]:
    """Student, teacher and optimiser on one GPU, one micro-batch a step."""
    models.fill()
    student, teacher, device = models.student.train(), models.teacher.eval(), ranks.device
    optimizer, batch = adamw(list(student.parameters()), device), to_device(models.batches(1)[0], device)
    feed = {name: batch[name] for name in ("input_ids", "attention_mask")}
    objective = fused_objective(DistillConfig(), student, teacher)
    assert objective is not None

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                taught = teacher.head_input(**feed)
            guide = head_loss(DistillConfig(), objective, models.vocabulary, taught, batch["labels"])
            loss = student(**feed, head_loss=guide).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return {"step_seconds": seconds_of(step, ranks, repeats, together=False), "tokens": SEQUENCES * TOKENS}


def fsdp(models: Models, ranks: Ranks, repeats: int, param_dtype: str) -> dict[str, Any]:
    """One micro-batch per process and step."""
    models.fill()
    engine = FsdpEngine(models.student, models.teacher, DistillConfig(), ranks, bf16=True, param_dtype=param_dtype)
    assert engine.fused is not None
    optimizer, batches = adamw(list(engine.parameters.values()), ranks.device), models.batches(1)

    def step() -> None:
        engine.zero_grad()
        engine.forward_backward(batches)
        engine.losses.clear()
        optimizer.step()

    tokens = SEQUENCES * TOKENS * ranks.world_size
    return {"step_seconds": seconds_of(step, ranks, repeats), "tokens": tokens}


class Busy:
    """Time inside the forward and backward actions of this process's stages."""

    actions = ("forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk")

    def __init__(self, engine: PipelineEngine) -> None:
        self.cuda, self.spans = engine.ranks.device.type == "cuda", list[tuple[Any, Any]]()
        schedule = engine._schedule
        for stage in getattr(schedule, "_stages", None) or [schedule._stage]:
            for name in self.actions:
                setattr(stage, name, self._timed(getattr(stage, name)))

    def _timed(self, action: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            result = action(*args, **kwargs)
            self.spans.append((start, self.now()))
            return result

        return run

    def now(self) -> Any:
        """A point of this process's computation: an event on the stream, or the clock."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        """Seconds between two points that have passed."""
        return start.elapsed_time(end) / 1e3 if self.cuda else end - start

    def take(self) -> float:
        """Seconds since the last call."""
        spans, self.spans = self.spans, []
        return sum(self.between(*span) for span in spans)


def pipeline(
    models: Models, ranks: Ranks, repeats: int, schedule: str, count: int, recompute: bool = True
) -> dict[str, Any]:
    """Whole steps, and the schedule alone for its bubble."""
    models.fill(recompute)
    engine = PipelineEngine(
        models.student, models.teacher, DistillConfig(), ranks, schedule=schedule, micro_batches=count, bf16=True
    )
    assert engine.fused is not None
    optimizer, batches = adamw(list(engine.parameters.values()), ranks.device), models.batches(count)

    def step() -> None:
        engine.zero_grad()
        engine.forward_backward(batches)
        engine.losses.clear()
        optimizer.step()

    seconds = seconds_of(step, ranks, repeats)
    busy, runs, teaching = Busy(engine), [], []
    for _ in range(repeats):
        engine.zero_grad()
        ranks.barrier()
        begin = time.perf_counter()
        engine.teach(batches)
        _wait(ranks)
        teaching.append(time.perf_counter() - begin)
        ranks.barrier()
        start = busy.now()
        engine.run_schedule()
        end = busy.now()
        _wait(ranks)
        each = ranks.gather((busy.take(), busy.between(start, end)))
        runs.append({"busy": [b for b, _ in each], "wall": max(wall for _, wall in each)})
        engine.losses.clear()
    shares = [1 - sum(run["busy"]) / (len(run["busy"]) * run["wall"]) for run in runs]
    uneven = [1 - statistics.mean(run["busy"]) / max(run["busy"]) for run in runs]
    chunks = SCHEDULES[schedule][1]
    return {
        "step_seconds": seconds,
        "tokens": SEQUENCES * TOKENS * count,
        "micro_batches": count,
        "teacher_seconds": statistics.median(teaching),
        "schedule_seconds": statistics.median(run["wall"] for run in runs),
        "schedule_runs": runs,
        "bubble_share": statistics.median(shares),
        "bubble_share_of_equal_stages": (ranks.world_size - 1) / (ranks.world_size - 1 + chunks * count),
        "imbalance": statistics.median(uneven),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="7b")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--micro-batches", type=int, help="Of a pipeline's step; default four per process.")
    parser.add_argument("--cases", nargs="*", help="Only these.")
    parser.add_argument("--start-after", type=Path, help="Capture the models, then wait until this file is there.")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    ranks = Ranks.start(args.cpu)
    torch.manual_seed(ranks.rank)
    models, world = Models(args.shape, ranks.device), ranks.world_size
    wait_for(args.start_after)
    count = args.micro_batches or 4 * world
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        "one GPU": lambda: one_gpu(models, ranks, args.repeats),
        "1f1b": lambda: pipeline(models, ranks, args.repeats, "1f1b", count),
        "fsdp, float32 gathers": lambda: fsdp(models, ranks, args.repeats, "float32"),
        "zero_bubble, activations kept": lambda: pipeline(models, ranks, args.repeats, "zero_bubble", count, False),
        "interleaved_1f1b": lambda: pipeline(models, ranks, args.repeats, "interleaved_1f1b", count),
        "fsdp, bfloat16 gathers": lambda: fsdp(models, ranks, args.repeats, "bfloat16"),
        "1f1b, activations kept": lambda: pipeline(models, ranks, args.repeats, "1f1b", count, False),
    }
    result: dict[str, Any] = {
        "machine": describe(), "shape": args.shape, "parameters": models.parameters, "processes": world,
        "micro_batch": [SEQUENCES, TOKENS], "seconds_to_prepare": models.seconds, "cases": {},
    }  # fmt: skip
    out = args.out or ROOT / "benchmarks" / "results" / f"distributed_{args.shape}_{world}.json"
    for name, case in cases.items():
        if args.cases and name not in args.cases:
            continue
        start = time.perf_counter()
        try:
            found = case()
        except torch.OutOfMemoryError as error:  # on every process, as they hold the same: the next case may fit
            result["cases"][name] = {"failed": str(error)[:200]}
            continue
        cuda = ranks.device.type == "cuda"
        peaks = ranks.gather(torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0)
        found |= {"tokens_per_second": found["tokens"] / found["step_seconds"], "peak_gigabytes": peaks}
        found["gigabytes_left_by_the_case_before"] = models.left
        result["cases"][name] = found | {"seconds_in_all": time.perf_counter() - start}
        if ranks.is_first:
            print(name, {k: v for k, v in found.items() if k != "schedule_runs"}, flush=True)
            write_json(out, result)
    if ranks.is_first:
        show(result)
    ranks.stop()


def show(result: dict[str, Any]) -> None:
    title = f"LLaMA {result['shape']}, {result['parameters'] / 1e9:.2f}B parameters, {result['processes']} processes"
    table = Table("case", "tokens/s", "step s", "peak GB per device", "bubble (equal stages)", title=title)
    for name, case in result["cases"].items():
        if "failed" in case:
            table.add_row(name, "out of memory")
            continue
        peaks = ", ".join(f"{p:.1f}" for p in case["peak_gigabytes"])
        bubble = ""
        if "bubble_share" in case:
            bubble = f"{case['bubble_share']:.1%} ({case['bubble_share_of_equal_stages']:.1%})"
        table.add_row(name, f"{case['tokens_per_second']:.0f}", f"{case['step_seconds']:.2f}", peaks, bubble)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
