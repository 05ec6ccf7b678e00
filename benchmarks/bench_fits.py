"""What of a LLaMA of 7B parameters trains on one GPU: optimiser, checkpointing and batch against memory and time.

    python benchmarks/bench_fits.py                              # all cases, one after the other
    python benchmarks/bench_fits.py --shape tiny --cpu           # does it run at all
    CUDA_VISIBLE_DEVICES=1 python benchmarks/bench_fits.py --cases 5 6 7

`TSLDTrainer` as `tsld-fx train` makes it, with `training.bf16`: ternary student with float32 masters, gradients and
optimiser states, bf16 teacher, TSLD + ground truth, head and losses as one operator, gradients clipped, T = 512, random
weights and tokens. Time is the median of the steps after the first; memory is the peak of these steps. Rows are added
to benchmarks/results/fits_<shape>.json, or --out, as they are measured; one that runs out of memory is a row too.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from distill_models import SHAPES, TOKENS, Models, wait_for
from machine import ROOT, describe, updating
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback, TrainingArguments

from tsld_fx import TSLDTrainer

OPTIMIZERS = {"AdamW": "adamw_torch_fused", "Adafactor": "adafactor", "SGD": "sgd"}


@dataclass(frozen=True)
class Case:
    """One row: `OPTIMIZERS` name, whether layers are computed again, sequences of a micro-batch."""

    optimizer: str
    recompute: bool
    sequences: int

    @property
    def name(self) -> str:
        return f"{self.optimizer}, {'recomputed' if self.recompute else 'kept'}, {self.sequences} x {TOKENS}"


CASES = (
    Case("AdamW", True, 4),
    Case("AdamW", False, 1),
    Case("AdamW", True, 16),
    Case("Adafactor", False, 4),
    Case("AdamW", True, 32),
    Case("Adafactor", True, 4),
    Case("AdamW", False, 4),
    Case("SGD", True, 4),
    Case("Adafactor", False, 8),
    Case("SGD", False, 8),
)


class Clock(TrainerCallback):
    """Wall time of every step; the record of peak memory begins after the first."""

    def __init__(self, cuda: bool) -> None:
        self.cuda, self.seconds, self.start = cuda, list[float](), 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = self.now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(self.now() - self.start)
        if len(self.seconds) == 1 and self.cuda:
            torch.cuda.reset_peak_memory_stats()

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def train(models: Models, case: Case, steps: int) -> dict[str, Any]:
    """Steps of one case."""
    models.fill(recompute=False)
    cuda = models.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    clock = Clock(cuda)
    ids = torch.randint(0, models.vocabulary, (case.sequences * steps, TOKENS))
    with tempfile.TemporaryDirectory() as folder:
        TSLDTrainer(
            model=models.student,
            teacher=models.teacher,
            args=TrainingArguments(
                folder, per_device_train_batch_size=case.sequences, max_steps=steps, learning_rate=1e-5, bf16=True,
                optim=OPTIMIZERS[case.optimizer] if cuda or case.optimizer != "AdamW" else "adamw_torch",
                gradient_checkpointing=case.recompute, save_strategy="no", report_to=[], disable_tqdm=True,
                use_cpu=not cuda, logging_strategy="no",
            ),
            train_dataset=[{"input_ids": row, "labels": row} for row in ids],
            callbacks=[clock],
        ).train()  # fmt: skip
    seconds = statistics.median(clock.seconds[1:])
    peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0
    return {
        "step_seconds": seconds,
        "tokens_per_second": case.sequences * TOKENS / seconds,
        "peak_gigabytes": peak,
        "gigabytes_left_by_the_case_before": models.left,
    }


def measure(models: Models, case: Case, steps: int) -> dict[str, Any]:
    """The case's row; one that does not fit says so."""
    failed = ""
    try:
        return train(models, case, steps)
    except torch.OutOfMemoryError:
        failed = "out of memory"
    except Exception as error:  # a row that fails must not lose the others
        failed = f"{type(error).__name__}: {str(error)[:200]}"
    gc.collect()  # outside the handler, whose traceback holds the step's tensors
    return {"failed": failed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="7b")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--cases", type=int, nargs="*", help="Only these rows, from 0.")
    parser.add_argument("--start-after", type=Path, help="Capture the model, then wait until this file is there.")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    cuda = torch.cuda.is_available() and not args.cpu
    models = Models(args.shape, torch.device("cuda" if cuda else "cpu"), graph_teacher=False)
    wait_for(args.start_after)
    total = torch.cuda.get_device_properties(0).total_memory / 1e9 if cuda else 0.0
    out = args.out or ROOT / "benchmarks" / "results" / f"fits_{args.shape}.json"
    table = Table("case", "tokens/s", "step s", "peak GB", title=f"LLaMA {args.shape}, one GPU of {total:.0f} GB")
    for number in args.cases or range(len(CASES)):
        case = CASES[number]
        found = measure(models, case, args.steps)
        with updating(out) as record:
            record["machine"] = describe()
            record |= {"shape": args.shape, "parameters": models.parameters, "device_gigabytes": total}
            record.setdefault("cases", {})[case.name] = found
        print(number, case.name, found, flush=True)
        cells = ("tokens_per_second", "step_seconds", "peak_gigabytes")
        table.add_row(case.name, *([f"{found[c]:.4g}" for c in cells] if "failed" not in found else [found["failed"]]))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
