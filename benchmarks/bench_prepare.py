"""Time and memory of `prepare` on a LLaMA of 32 layers: the capture by torch.export, the passes, the view by layers.

    python benchmarks/bench_prepare.py                    # LLaMA-7B's shape on the meta device: no weights in memory
    python benchmarks/bench_prepare.py --hidden 512       # a narrow one with weights on the CPU

The peer is what any tool over torch.export pays: the bare export, in the same run. Writes
benchmarks/results/prepare_<hidden>.json.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import torch
from machine import ROOT, describe
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from tsld_fx import prepare
from tsld_fx.capture import capture
from tsld_fx.passes.runner import PassTrace
from tsld_fx.whole_files import write_json


def llama(hidden: int, layers: int) -> LlamaForCausalLM:
    """LLaMA-7B's proportions; on the meta device where the weights would not fit."""
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 11008 // 4096, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=32, vocab_size=32000, max_position_embeddings=2048,
    )  # fmt: skip
    with torch.device("meta" if hidden > 1024 else "cpu"):
        return LlamaForCausalLM(config)


def peak() -> float:
    """Peak resident memory of this process, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=32)
    args = parser.parse_args()
    prepare(llama(64, 2))  # imports and caches
    model, before = llama(args.hidden, args.layers), peak()
    bare, _ = timed(lambda: capture(model))
    passes: list[PassTrace] = []
    whole, prepared = timed(lambda: prepare(llama(args.hidden, args.layers), listener=passes.append))
    view, _ = timed(prepared.layer_view)
    result = {
        "machine": describe(),
        "hidden": args.hidden,
        "layers": args.layers,
        "parameters": sum(p.numel() for p in prepared.parameters()),
        "nodes": len(prepared.graph_module.graph.nodes),
        "seconds": {"capture alone": bare, "prepare": whole, "view by layers": view},
        "seconds_of_passes": {p.name: p.seconds for p in passes},
        "peak_gigabytes": {"before": before, "after": peak()},
    }
    table = Table(
        "step", "seconds", title=f"LLaMA, {args.layers} layers, hidden {args.hidden}, {result['nodes']} nodes"
    )
    for name, seconds in {**result["seconds"], **result["seconds_of_passes"]}.items():
        table.add_row(name, f"{seconds:.2f}")
    Console().print(table, f"resident memory: {before:.2f} GB before, {peak():.2f} GB at its peak")
    file = ROOT / "benchmarks" / "results" / f"prepare_{args.hidden}.json"
    write_json(file, result)


if __name__ == "__main__":
    main()
