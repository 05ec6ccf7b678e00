"""Decoding with a model of TinyLlama-1.1B's shape on the CPU: random ternary weights, an 8-bit head, tokens a second.

    python benchmarks/bench_cpu_decode.py

Each contender runs in a process of its own: greedy steps of one token through transformers' model with a KV cache,
median step (CPU seconds on 1 thread, wall-clock seconds on 2). Also: resident memory, and the share of the read
bandwidth (measured in the same process) that the weights alone account for. Writes benchmarks/results/cpu_decode.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bench_cpu_gemm import bandwidth
from machine import describe
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tsld_fx.lowbit_linear import LowBitLinear
from tsld_fx.whole_files import write_json

CONTENDERS = ("torch float32", "torch bfloat16 prepacked", "a16", "int8", "add", "a16, bfloat16", "int8, bfloat16")
SHAPE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "vocab_size": 32000}
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048}


class Prepacked(nn.Module):
    """A linear layer on oneDNN's prepacked bfloat16 weights."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


def random_lowbit(linear: nn.Linear, bits: int) -> LowBitLinear:
    layer = LowBitLinear(linear.in_features, linear.out_features, bits, 0)
    if bits == 2:  # four codes of 0, 1 or 2 a byte
        four = torch.randint(0, 3, (4, *layer.weight_packed.shape), dtype=torch.uint8)
        layer.weight_packed.copy_(four[0] | four[1] << 2 | four[2] << 4 | four[3] << 6)
    else:
        layer.weight_packed.random_(0, 256)
    layer.weight_scale.fill_(0.02 if bits == 2 else 0.02 / 128)
    return layer


def build(contender: str) -> tuple[LlamaForCausalLM, int]:
    """-> (model, bytes of weights that one step reads)."""
    low = contender.split(",")[0] if not contender.startswith("torch") else None
    dtype = torch.bfloat16 if "bfloat16" in contender else torch.float32
    config = LlamaConfig(**SHAPE, **HEADS, dtype=dtype)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to(dtype)
    size = 0
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        if low is None:
            made: nn.Module = nn.Linear(module.in_features, module.out_features, bias=False, dtype=dtype)
            made.weight.data.normal_(0, 0.02)
            size += made.weight.nbytes
            made = Prepacked(made) if "prepacked" in contender else made
        else:
            made = random_lowbit(module, 8 if name == "lm_head" else 2)
            size += made.weight_packed.nbytes
            made.use_kernels("cpu", low)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, made)
    model.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
    for norm in [m for m in model.modules() if hasattr(m, "variance_epsilon")]:
        norm.weight = nn.Parameter(torch.ones(config.hidden_size, dtype=dtype))
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval(), size


def resident() -> float:
    """Bytes in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@torch.inference_mode()
def run(contender: str, threads: int, steps: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    model, size = build(contender)
    reads = bandwidth()
    clock = time.thread_time if threads == 1 else time.perf_counter  # CPU seconds are not those of other processes
    token = torch.tensor([[1]])
    cache, taken = None, []
    for _ in range(steps + 3):
        start = clock()
        out = model(input_ids=token, past_key_values=cache, use_cache=True)
        cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        taken.append(clock() - start)
    step = statistics.median(taken[3:])
    return {
        "contender": contender, "threads": threads, "seconds_per_token": step, "tokens_per_second": 1 / step,
        "weight_bytes": size, "resident_bytes": resident(), "bandwidth": reads, "of_bandwidth": size / step / reads,
    }  # fmt: skip


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"1.1B decode, {rows[0]['threads']} thread(s)")
    names = ("", "ms/token", "tokens/s", "x fp32", "x bf16", "weights MB", "resident MB", "of bandwidth")
    for name in names:
        table.add_column(name, justify="right" if name else "left")
    base = {row["contender"]: row["seconds_per_token"] for row in rows}
    for row in rows:
        s = row["seconds_per_token"]
        ratios = (base[n] / s if n in base else float("nan") for n in CONTENDERS[:2])
        memory = (row["weight_bytes"] / 1e6, row["resident_bytes"] / 1e6)
        table.add_row(
            row["contender"], f"{1e3 * s:.1f}", f"{1 / s:.1f}", *(f"{r:.2f}" for r in ratios),
            *(f"{m:.0f}" for m in memory), f"{row['of_bandwidth']:.0%}",
        )  # fmt: skip
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu_decode.json")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(run(args.only, int(args.threads), args.steps)))
        return
    console = Console(width=130)
    record: dict[str, Any] = {**describe(), "date": time.strftime("%Y-%m-%d"), "rows": []}
    for threads in args.threads.split(","):
        rows = []
        for contender in CONTENDERS:
            command = [sys.executable, __file__, "--only", contender, "--threads", threads, "--steps", str(args.steps)]
            done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
        show(console, rows)
        record["rows"] += rows
    write_json(args.out, record)
    console.print(f"written to {args.out.name}")


if __name__ == "__main__":
    main()
