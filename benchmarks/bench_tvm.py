"""TVM on the CPU: time to compile, to start and to run a packed decoder, and the size of what is deployed.

python benchmarks/bench_tvm.py                   # a model of LLaMA's shape, random ternary weights
python benchmarks/bench_tvm.py --shape tinyllama-1.1b

Peers in the same run: the same decoder in torch, float32 (dense weights), and in torch with the packed layers on
backend="cpu". The physical limit is the time to read the packed weights once at the memory bandwidth measured here.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import describe
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import tsld_fx
import tsld_fx.relax
from tsld_fx.whole_files import write_json

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.relax.bare_python import bare, bare_environment

SHAPES = {
    "demo": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 2048, "tie_word_embeddings": True},
    "llama-110m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
                   "num_key_value_heads": 12, "vocab_size": 32000},
    "tinyllama-1.1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
                       "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000},
}  # fmt: skip


def best(call: Callable[[], object], repeats: int) -> float:
    """The median of some runs after one warm-up, seconds."""
    call()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def timed(call: Callable[[], object]) -> tuple[float, object]:
    """-> (seconds, result) of one call."""
    begun = time.perf_counter()
    result = call()
    return time.perf_counter() - begun, result


def bandwidth() -> float:
    """Bytes per second that this process reads, 512 MB summed by torch."""
    data = torch.ones(128 << 20)
    return data.numel() * 4 / best(lambda: data.sum(), 5)


def start_time(folder: Path) -> tuple[float, float]:
    """-> (process from start to its first new token, of which loading), seconds, without torch; the least of three."""
    environment = bare_environment(folder.parent)
    found = []
    for _ in range(3):
        begun = time.perf_counter()
        done = bare([str(folder / "run.py"), "--ids", "5", "--max-new-tokens", "1", "--time"], environment)
        done.check_returncode()
        found.append((time.perf_counter() - begun, float(done.stderr.split("start ")[1].split()[0])))
    return min(found)


def main() -> None:
    """Measure and write benchmarks/results/tvm_<shape>.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-110m")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=2048, **SHAPES[arguments.shape])).eval()
    lowered = tsld_fx.convert(tsld_fx.prepare(model), backend="cpu")
    ids = torch.randint(0, 1000, (1, arguments.prompt))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["TSLD_CACHE_DIR"] = str(folder / "cache")
        cold, _ = timed(lambda: tsld_fx.relax.compile(lowered, folder / "program", runtime=True))
        warm, _ = timed(lambda: tsld_fx.relax.compile(lowered, folder / "program", runtime=True))
        program = tsld_fx.relax.load(folder / "program")
        sizes = {path.name: path.stat().st_size for path in sorted((folder / "program").iterdir())}
        rows: dict[str, dict[str, float]] = {}
        runs: dict[str, Callable[[int], object]] = {
            "torch float32": lambda n: model.generate(ids, max_new_tokens=n, min_new_tokens=n, do_sample=False),
            "backend='cpu', packed": lambda n: lowered.generate(
                ids, max_new_tokens=n, min_new_tokens=n, do_sample=False
            ),
            "TVM, packed": lambda n: program.generate(ids, n, eos_token_id=[]),
        }
        for label, run in runs.items():
            prefill = best(lambda run=run: run(1), arguments.repeats)  # type: ignore[misc]
            whole = best(lambda run=run: run(1 + arguments.new_tokens), arguments.repeats)  # type: ignore[misc]
            rows[label] = {"prefill_s": prefill, "decode_s_per_token": (whole - prefill) / arguments.new_tokens}
        rate = bandwidth()
        started, loading = start_time(folder / "program")
    limit = sizes["weights.bin"] / rate
    result = {
        **describe(), "shape": arguments.shape, "prompt": arguments.prompt, "new_tokens": arguments.new_tokens,
        "compile_cold_s": cold, "compile_cached_s": warm, "process_start_to_token_s": started, "load_s": loading,
        "bytes": sizes, "bandwidth_bytes_per_s": rate, "decode_limit_s_per_token": limit, "runs": rows,
    }  # fmt: skip
    table = Table(
        "", f"prefill {arguments.prompt}, ms", "decode, ms/token", "x torch float32", "of the bandwidth limit"
    )
    dense = rows["torch float32"]["decode_s_per_token"]
    for label, row in rows.items():
        step = row["decode_s_per_token"]
        share = f"{limit / step:.0%}" if "TVM" in label else ""
        table.add_row(label, f"{row['prefill_s'] * 1e3:.1f}", f"{step * 1e3:.2f}", f"{dense / step:.2f}", share)
    console = Console()
    console.print(table)
    console.print(f"compile {cold:.1f} s, again {warm:.1f} s; run.py from start to its first token {started:.2f} s")
    console.print({name: f"{size / 1e6:.2f} MB" for name, size in sizes.items()})
    out = arguments.out or Path(__file__).parent / "results" / f"tvm_{arguments.shape}.json"
    write_json(out, result)


if __name__ == "__main__":
    main()
