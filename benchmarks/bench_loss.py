"""Peak memory and time of head + loss: on whole logits, fused, and Liger-Kernel's nearest distillation losses.

    python benchmarks/bench_loss.py                 # needs a CUDA GPU; Liger rows need the package liger-kernel

Forward and backward of TSLD + ground truth (logit + ground truth where named) from hidden states [4, 2048, 4096] to the
gradients of hidden states and head. `autocast`: a float32 master of the head under bf16 autocast, as in training here;
`bf16`: all in bfloat16, as Liger takes it. Memory is the peak above what was allocated before, without the head's
own gradient. Liger has no token scales: its rows are the cheaper mean of KL + cross-entropy. The ideal row is the
matrix products alone, at the rate measured in this run. Writes benchmarks/results/loss_<gpu>.json.
"""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from machine import ROOT, describe
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import linear

from tsld_fx import DistillConfig, losses
from tsld_fx.whole_files import write_json

TSLD, LOGIT = DistillConfig("tsld"), DistillConfig("logit_gt")


class Case:
    """Inputs of one shape and precision."""

    def __init__(self, batch: int, tokens: int, hidden: int, vocabulary: int, masters: bool, frozen: bool) -> None:
        self.masters, self.frozen = masters, frozen
        make: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
        self.hidden = torch.randn(batch, tokens, hidden, **make).requires_grad_()
        self.theirs = torch.randn(batch, tokens, hidden, **make)
        self.weight = (torch.randn(vocabulary, hidden, **make) * 0.02).to(torch.float32 if masters else torch.bfloat16)
        self.weight.requires_grad_(not frozen)
        self.guide = torch.randn(vocabulary, hidden, **make) * 0.02
        self.labels = torch.randint(0, vocabulary, (batch, tokens), device="cuda")
        self.scores: Tensor | None = None

    def plain(self, distill: DistillConfig) -> Tensor:
        ours = linear(self.hidden, self.weight)
        with torch.no_grad():
            theirs = linear(self.theirs, self.guide)
        total = torch.zeros((), device="cuda")
        for term in distill.terms():
            if term.kind == "gt":
                total = total + losses.ground_truth(ours, self.labels)
            elif term.kind == "logit":
                total = total + losses.logit_distillation(ours, theirs, self.labels)
            else:
                total = total + losses.token_scaled_logit_distillation(ours, theirs, self.labels)
        return total

    def fused(self, distill: DistillConfig, cached: bool = False, chunk: int = 0) -> Tensor:
        scores = self.scores if cached else None
        result = losses.fused_head_loss(
            self.hidden, self.weight, self.theirs, self.guide, self.labels, distill,
            token_scores=scores, chunk_tokens=chunk,
        )  # fmt: skip
        self.scores = result.token_scores if result.token_scores is not None else self.scores
        return result.loss

    def liger_chunked(self, compiled: bool) -> Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(weight_hard_loss=1.0, weight_soft_loss=1.0, beta=0.0, compiled=compiled)
        return loss(*self._flat())

    def liger_triton(self) -> Tensor:
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

        return LigerFusedLinearJSD(jsd_beta=0.0)(*self._flat())

    def _flat(self) -> tuple[Tensor, ...]:
        width = self.hidden.shape[-1]
        ours, theirs = (t[:, :-1].reshape(-1, width) for t in (self.hidden, self.theirs))
        return ours, self.weight, theirs, self.guide, self.labels[:, 1:].reshape(-1)

    def run(self, loss: Callable[[], Tensor]) -> None:
        with torch.autocast("cuda", torch.bfloat16) if self.masters else nullcontext():
            value = loss()
        value.backward()
        self.hidden.grad = self.weight.grad = None

    def measure(self, loss: Callable[[], Tensor], repeats: int) -> dict[str, float]:
        """Median milliseconds and peak GB without the head's gradient."""
        self.run(loss)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.run(loss)
        own = 0 if self.frozen else self.weight.numel() * self.weight.element_size()
        peak = torch.cuda.max_memory_allocated() - before - own
        times = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self.run(loss)
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        return {"ms": sorted(times)[len(times) // 2], "fastest_ms": min(times), "peak_gb": peak / 1e9}


def limited(seconds: int, work: Callable[[], dict[str, float]]) -> dict[str, Any]:
    """The result, or what went wrong (a peer that fails or compiles for ever must not end the run)."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        return work()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]}
    finally:
        signal.alarm(0)
        torch.cuda.empty_cache()


def matmul_rate() -> float:
    """FLOP/s of a large bf16 matrix product here."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(10):
        a @ b
    end.record()
    torch.cuda.synchronize()
    return 10 * 2 * 8192**3 / start.elapsed_time(end) * 1e3


def rows_of(case: Case, vocabulary: int, repeats: int, long: int) -> dict[str, dict[str, Any]]:
    """Every variant on one case."""
    variants: dict[str, Callable[[], Tensor]] = {
        "plain tsld": lambda: case.plain(TSLD),
        "plain logit": lambda: case.plain(LOGIT),
        "fused tsld": lambda: case.fused(TSLD),
        "fused tsld, cached scales": lambda: case.fused(TSLD, cached=True),
        "fused logit": lambda: case.fused(LOGIT),
        f"fused tsld, chunk {long}": lambda: case.fused(TSLD, chunk=long),
        f"fused tsld, chunk {long}, cached scales": lambda: case.fused(TSLD, cached=True, chunk=long),
    }
    if not case.masters and not case.frozen:
        variants |= {
            "liger chunked": lambda: case.liger_chunked(False),
            "liger chunked, compiled": lambda: case.liger_chunked(True),
            "liger triton (no ground truth)": lambda: case.liger_triton(),
        }
    return {name: limited(20, lambda v=variant: case.measure(v, repeats)) for name, variant in variants.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32_000, 128_256])
    parser.add_argument("--shape", type=int, nargs=3, default=[4, 2048, 4096], metavar=("B", "T", "H"))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--long", type=int, default=1024, help="a chunk shorter than a sequence: two teacher passes")
    args = parser.parse_args()
    batch, tokens, hidden = args.shape
    rate = matmul_rate()
    record: dict[str, Any] = {"machine": describe(), "shape": args.shape, "matmul_tflops": rate / 1e12, "results": {}}
    name = torch.cuda.get_device_name().replace("NVIDIA ", "").replace(" ", "_").lower()
    out = ROOT / "benchmarks" / "results" / f"loss_{name}.json"
    for vocabulary in args.vocabularies:
        for masters, frozen in ((True, False), (False, False), (True, True)):
            key = f"V={vocabulary} {'autocast' if masters else 'bf16'}{' frozen head' if frozen else ''}"
            case = Case(batch, tokens, hidden, vocabulary, masters, frozen)
            rows = rows_of(case, vocabulary, args.repeats, args.long)
            products = 3 if frozen else 4
            ideal = products * 2 * batch * tokens * hidden * vocabulary / rate * 1e3
            record["results"][key] = {"ideal_ms": ideal, "rows": rows}
            show(key, ideal, rows)
            write_json(out, record)
            del case
            torch.cuda.empty_cache()


def show(key: str, ideal: float, rows: dict[str, dict[str, Any]]) -> None:
    table = Table(
        "variant", "ms", "/ plain", "peak GB", "plain / it", title=f"{key} (matrix products alone {ideal:.1f} ms)"
    )
    plain = rows["plain tsld"]
    for name, row in rows.items():
        if "failed" in row:
            table.add_row(name, row["failed"])
            continue
        ratios = (
            (f"{row['ms'] / plain['ms']:.3f}", f"{plain['peak_gb'] / row['peak_gb']:.1f}")
            if "ms" in plain
            else ("", "")
        )
        table.add_row(name, f"{row['ms']:.1f}", ratios[0], f"{row['peak_gb']:.3f}", ratios[1])
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
