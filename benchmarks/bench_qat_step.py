r"""Time and peak memory of a training step at LLaMA-1B shape: QAT against plain distillation, TSLD against L2L.

    python benchmarks/bench_qat_step.py               # needs a CUDA GPU; --layers, --hidden ... for other shapes

One step is teacher forward, student forward, losses, backward and AdamW (fused, float32 masters) under bf16 autocast,
random weights of meta-llama/Llama-3.2-1B's shape. `kd`: the same graph without fake-quant; `qat`: ternary (TWN)
weights; each eager and compiled; `logit`, `plain logits`, `accumulate` and `l2l` vary one thing. Writes
benchmarks/results/qat_step_<gpu>.json after every row. Rows that differ by a few percent are told apart in turn:

    python benchmarks/bench_qat_step.py --in-turn --repeats 15 --steps 5 \
        --rows "qat compiled, logit;qat compiled;kd compiled" --out benchmarks/results/qat_in_turn_h200.json
"""

from __future__ import annotations

import argparse
import copy
import gc
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from machine import ROOT, describe
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from tsld_fx import DistillConfig, QuantConfig, losses, prepare
from tsld_fx.fused_loss import HeadLoss, objective_of
from tsld_fx.headless import without_head
from tsld_fx.preparation import graph_model
from tsld_fx.weight_cache import WeightCache
from tsld_fx.whole_files import write_json


class Run:
    """One student, its teacher and an optimiser."""

    def __init__(self, args: argparse.Namespace, model: Any, teacher: Any, quant: QuantConfig, method: str, **how: Any):
        self.args, self.how = args, how
        self.distill = DistillConfig(method, fused=how.get("fused", True))
        student = prepare(copy.deepcopy(model), quant).train()
        self.student = self.run_student = student
        self.objective = objective_of(self.distill.terms()) if self.distill.fused else None
        self.head = without_head(teacher) if self.objective else None
        self.body = self.head.body if self.head else graph_model(teacher, None, self.distill.taps).eval()
        if self.objective is not None:
            assert student.fuse_head_loss(self.objective)
        else:
            student.set_taps(self.distill.taps)
        if how.get("compiled"):
            self.run_student, self.body = torch.compile(student, fullgraph=True), torch.compile(self.body)
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=args.device == "cuda")
        shape = (args.batch, args.tokens)
        self.ids = torch.randint(0, args.vocabulary, shape, device=args.device)
        self.cache = WeightCache()

    def step(self) -> None:
        micro = self.how.get("accumulate", 1)
        for _ in range(micro):
            with torch.autocast(self.args.device, torch.bfloat16):
                if micro > 1 and self.how.get("share", True):
                    with self.cache:
                        loss = self.loss()
                else:
                    loss = self.loss()
            loss.backward()
        self.optimizer.step()
        self.cache.clear()
        self.optimizer.zero_grad()

    def loss(self) -> torch.Tensor:
        with torch.no_grad():
            theirs = self.body(input_ids=self.ids, use_cache=False)
        if self.objective is not None and self.head is not None:
            values = HeadLoss(self.objective, self.ids, theirs.logits, self.head.weight, self.head.bias)
            return self.run_student(input_ids=self.ids, head_loss=values).loss
        ours = self.run_student(input_ids=self.ids)
        total = torch.zeros((), device=self.args.device)
        for term in self.distill.terms():
            if term.kind == "gt":
                total = total + losses.ground_truth(ours.logits, self.ids)
            elif term.kind == "logit":
                total = total + losses.logit_distillation(ours.logits, theirs.logits, self.ids)
            elif term.kind == "tsld":
                total = total + losses.token_scaled_logit_distillation(ours.logits, theirs.logits, self.ids)
            elif term.kind == "hidden":
                total = total + losses.hidden_state_distillation(ours.hidden_states, theirs.hidden_states, None)
            else:
                total = total + losses.attention_distillation(ours.attention_scores, theirs.attention_scores, None)
        return total


class Timing:
    """One row: milliseconds of a step in each repeat, peak GB, and seconds until the third step (compilation)."""

    def __init__(self, args: argparse.Namespace, make: Callable[[], Run]) -> None:
        self.args, self.cuda = args, args.device == "cuda"
        self.all_ms: list[float] = []
        start = time.perf_counter()
        self.run = make()
        for _ in range(3):
            self.run.step()
        self.wait()
        self.warm = time.perf_counter() - start
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def repeat(self) -> None:
        begin = time.perf_counter()
        for _ in range(self.args.steps):
            self.run.step()
        self.wait()
        self.all_ms.append((time.perf_counter() - begin) / self.args.steps * 1e3)

    def result(self) -> dict[str, Any]:
        peak = torch.cuda.max_memory_allocated() / 1e9 if self.cuda else 0.0
        return {"ms": median(self.all_ms), "all_ms": self.all_ms, "peak_gb": peak, "warm_up_s": self.warm}


def measure(args: argparse.Namespace, make: Callable[[], Run]) -> dict[str, Any]:
    """One row alone."""
    timing = Timing(args, make)
    for _ in range(args.repeats):
        timing.repeat()
    return timing.result()


def measure_in_turn(args: argparse.Namespace, rows: dict[str, Callable[[], Run]]) -> dict[str, dict[str, Any]]:
    """All rows held at once, one repeat of each after another, so that what disturbs the host disturbs all."""
    timings = {name: Timing(args, make) for name, make in rows.items()}
    for _ in range(args.repeats):
        for timing in timings.values():
            timing.repeat()
    results = {name: timing.result() for name, timing in timings.items()}
    first = next(iter(timings.values())).all_ms
    for name, timing in timings.items():
        ratios = [ours / base for ours, base in zip(timing.all_ms, first, strict=True)]
        results[name]["over_first"] = median(ratios)
        del results[name]["peak_gb"]  # it is that of all together
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = {"layers": 16, "hidden": 2048, "intermediate": 8192, "heads": 32, "kv_heads": 8, "vocabulary": 128_256}
    for name, value in {**model, "batch": 4, "tokens": 512, "repeats": 5, "steps": 4}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--rows", help="subset of the rows, separated by semicolons")
    parser.add_argument("--in-turn", action="store_true", help="hold all rows at once and time them in turn")
    parser.add_argument("--out", type=Path, help="default benchmarks/results/qat_step_<gpu>.json")
    parser.add_argument("--tf32", action="store_true", help="for what autocast leaves in float32")
    args = parser.parse_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LlamaConfig(
        vocab_size=args.vocabulary, hidden_size=args.hidden, intermediate_size=args.intermediate,
        num_hidden_layers=args.layers, num_attention_heads=args.heads, num_key_value_heads=args.kv_heads,
        head_dim=args.hidden // args.heads, max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device(args.device):
        model = LlamaForCausalLM(config)
        teacher = LlamaForCausalLM(config).bfloat16().eval()
    ternary, plain = QuantConfig(), QuantConfig(weight=None)

    def run(quant: QuantConfig, method: str = "tsld", **how: Any) -> Callable[[], Run]:
        return lambda: Run(args, model, teacher, quant, method, **how)

    rows: dict[str, Callable[[], Run]] = {
        "kd compiled": run(plain, compiled=True),
        "qat compiled": run(ternary, compiled=True),
        "qat compiled, logit": run(ternary, "logit_gt", compiled=True),
        "kd": run(plain),
        "qat": run(ternary),
        "qat, logit": run(ternary, "logit_gt"),
        "qat, plain logits": run(ternary, fused=False),
        "qat, l2l": run(ternary, "l2l", fused=False),
        "qat, 4 micro-batches": run(ternary, accumulate=4),
        "qat, 4 micro-batches, quantised each time": run(ternary, accumulate=4, share=False),
    }
    names = args.rows.split(";") if args.rows else list(rows)
    machine = (
        torch.cuda.get_device_name().replace("NVIDIA ", "").replace(" ", "_").lower()
        if args.device == "cuda"
        else "cpu"
    )
    out = args.out or ROOT / "benchmarks" / "results" / f"qat_step_{machine}.json"
    args.out = out.name
    record: dict[str, Any] = {"machine": describe(), "shape": vars(args), "rows": {}}
    if args.in_turn:
        record["rows"] = measure_in_turn(args, {name: rows[name] for name in names})
        write_json(out, record)
        for name, result in record["rows"].items():
            print(f"{name}: {result['ms']:.2f} ms, {result['over_first']:.3f} of the first in the same turn")
        return
    table = Table(
        "step", "ms", "peak GB", "warm-up s", title=f"LLaMA {args.layers} x {args.hidden}, {args.batch} x {args.tokens}"
    )
    for name in names:
        try:
            record["rows"][name] = result = measure(args, rows[name])
            cells = (f"{result['ms']:.1f}", f"{result['peak_gb']:.2f}", f"{result['warm_up_s']:.0f}")
        except Exception as error:  # one row that fails must not lose the others
            record["rows"][name] = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
            cells = (record["rows"][name]["failed"], "", "")
        table.add_row(name, *cells)
        print(name, *cells, flush=True)
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
            write_json(out, record)
    Console(width=100).print(table)
    pairs = (
        ("qat compiled", "kd compiled"),
        ("qat compiled", "qat compiled, logit"),
        ("qat", "kd"),
        ("qat", "qat, logit"),
    )
    for ours, base in pairs:
        found = [record["rows"].get(k, {}).get("ms") for k in (ours, base)]
        if all(found):
            print(f"{ours} / {base}: time {found[0] / found[1]:.3f}")


if __name__ == "__main__":
    main()
