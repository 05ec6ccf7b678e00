"""Time and peak memory of a fake-quantised training step against the plain transformers model's, on this machine.

    python benchmarks/train_step.py --model MODEL_FOLDER

The two take turns in one process for the times (the median of pairs); each runs alone in a process of its own for the
peak memory. No teacher in either. Writes benchmarks/results/train_step_<model>.json.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import ROOT, describe
from transformers import AutoModelForCausalLM

import tsld_fx
from tsld_fx.whole_files import write_json


def step_of(kind: str, folder: str, batch: int, tokens: int) -> Callable[[], None]:
    """A function that runs one optimiser step of `plain` or `fake-quantised` training."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if kind != "plain":
        model = tsld_fx.prepare(model)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ids = torch.randint(0, model.config.vocab_size, (batch, tokens))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_gigabytes(kind: str, args: argparse.Namespace) -> float:
    """Peak resident memory of three steps in a fresh process."""
    command = [sys.executable, __file__, "--model", args.model, "--peak-of", kind]
    command += ["--batch", str(args.batch), "--tokens", str(args.tokens)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent)
    return float(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--peak-of", choices=("plain", "fake-quantised"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.model = str(Path(args.model).resolve())
    if args.peak_of:
        step = step_of(args.peak_of, args.model, args.batch, args.tokens)
        for _ in range(3):
            step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
        return
    steps = {kind: step_of(kind, args.model, args.batch, args.tokens) for kind in ("plain", "fake-quantised")}
    taken: dict[str, list[float]] = {kind: [] for kind in steps}
    for step in steps.values():
        step()
    for _ in range(args.pairs):
        for kind, step in steps.items():
            start = time.perf_counter()
            step()
            taken[kind].append(time.perf_counter() - start)
    ratio = statistics.median(b / a for a, b in zip(*taken.values(), strict=True))
    peaks = {kind: peak_gigabytes(kind, args) for kind in steps}
    for kind, values in taken.items():
        print(f"{kind:15s} {statistics.median(values):6.2f} s a step   peak {peaks[kind]:5.2f} GiB")
    memory = peaks["fake-quantised"] / peaks["plain"]
    print(f"fake-quantised / plain: time {ratio:.3f}, peak memory {memory:.3f}")
    name = Path(args.model).name
    record = {
        "machine": describe(),
        "model": name,
        "shape": [args.batch, args.tokens],
        "seconds": taken,
        "peak_gib": peaks,
        "time_ratio": ratio,
        "memory_ratio": memory,
    }
    out = ROOT / "benchmarks" / "results" / f"train_step_{name}.json"
    write_json(out, record)


if __name__ == "__main__":
    main()
