"""Tokens per second and peak memory of ONNX variants in onnxruntime on the CPU, each in a process of its own.

python benchmarks/bench_onnx.py                 # the demo's decoder and a LLaMA of 1.1 billion parameters
python benchmarks/bench_onnx.py --models demo --library libtsld_ort.so

Variants: the float32 model, `ort` and `custom` with a16 and int8 activations, `custom` with the operator library, and
MatMulNBits at accuracy_level 0 (onnxruntime's own full-precision mode, which unpacks weights at every call). Greedy
decoding after a prompt, all with a KV cache that grows. The physical limit is the bytes of the file over the measured
read bandwidth. The 1.1B model is TinyLlama's shape with random ternary weights: speed and memory do not depend on them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
ROOT = Path(__file__).resolve().parent.parent
VARIANTS = {  # name -> (dialect, activations, library)
    "float32": (None, "a16", False),
    "MatMulNBits accuracy_level 0": ("exact", "a16", False),
    "ort a16": ("ort", "a16", False),
    "ort int8": ("ort", "int8", False),
    "custom a16": ("custom", "a16", False),
    "custom int8": ("custom", "int8", False),
    "custom a16, library": ("custom", "a16", True),
    "custom int8, library": ("custom", "int8", True),
}


def main() -> None:
    """Export, then time every variant in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["demo", "llama-1.1b"], choices=["demo", "llama-1.1b"])
    parser.add_argument("--library", type=Path, help="operator library (default: build it)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12, help="tokens to generate")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--layers", type=int, default=22, help="layers of the 1.1B shape")
    parser.add_argument("--folder", type=Path, help="keep the exports here and use them again")
    parser.add_argument("--export-only", action="store_true", help="write the files into --folder and stop")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/onnx_cpu.json")
    parser.add_argument("--export", nargs=2, help=argparse.SUPPRESS)  # model, folder: the child process
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)  # file, library or '-'
    args = parser.parse_args()
    if args.export:
        print(json.dumps(export(args.export[0], Path(args.export[1]), args.layers)))
    elif args.run:
        print(json.dumps(run(Path(args.run[0]), args.run[1], args.threads, args.steps, args.prompt)))
    else:
        compare(args)


def compare(args: argparse.Namespace) -> None:
    """The table and the JSON file."""
    from machine import describe
    from rich.console import Console
    from rich.table import Table

    from tsld_fx.onnx.op_library import build_op_library
    from tsld_fx.whole_files import write_json

    report: dict[str, Any] = {
        "machine": describe(),
        "threads": args.threads,
        "steps": args.steps,
        "prompt": args.prompt,
    }
    report["read_gb_per_s"] = round(read_bandwidth(args.threads) / 1e9, 2)
    report["models"] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        library = args.library or build_op_library(folder / "libtsld_ort.so")
        for model in args.models:
            rows = {}
            child("--export", model, str(folder / model), "--layers", str(args.layers))
            if args.export_only:
                continue
            for name, (_, _, with_library) in VARIANTS.items():
                file = folder / model / file_name(name) / "model.onnx"
                given = ["--threads", str(args.threads), "--steps", str(args.steps), "--prompt", str(args.prompt)]
                used = str(library.resolve()) if with_library else "-"
                rows[name] = child("--run", str(file), used, *given)
                size = sum(f.stat().st_size for f in file.parent.glob("model.onnx*"))
                rows[name]["file_mb"] = round(size / 1e6, 1)
                print(model, name, rows[name], flush=True)
            report["models"][model] = rows
            write_json(args.out, report)
    for model, rows in report["models"].items():
        table = Table("variant", "tokens/s", "prompt tokens/s", "file MB", "peak MB", "limit tokens/s", title=model)
        for name, row in rows.items():
            limit = report["read_gb_per_s"] * 1e3 / row["file_mb"]
            cells = (row["tokens_per_s"], row["prompt_tokens_per_s"], row["file_mb"], row["peak_mb"])
            table.add_row(name, *(f"{value:.1f}" for value in cells), f"{limit:.0f}")
        Console().print(table)


def file_name(variant: str) -> str:
    """The folder of an export; with and without the library it is the same file."""
    return variant.removesuffix(", library").replace(" ", "_")


def child(*arguments: str) -> dict[str, Any]:
    """Run this script in a fresh process; its last line is JSON."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{arguments}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def export(model: str, folder: Path, layers: int) -> None:
    """Write the files of a model that are not there yet; it is traced once for all dialects."""
    import onnx

    import tsld_fx
    from tsld_fx.onnx import graph, write

    lowered = lowered_model(model, layers)
    traced, trace = None, graph.trace

    def trace_once(given: Any, kv_cache: bool, opset: int) -> Any:
        nonlocal traced
        traced = traced or trace(given, kv_cache, opset)
        return traced.clone()

    graph.trace = trace_once
    for name, (dialect, activations, _) in VARIANTS.items():
        file = folder / file_name(name) / "model.onnx"
        if dialect in (None, "exact") or file.exists():
            continue
        tsld_fx.export_onnx(lowered, file, dialect, True, activations, verify=False)
    exact = folder / file_name("MatMulNBits accuracy_level 0") / "model.onnx"
    if not exact.exists():
        proto = onnx.load(folder / "ort_int8" / "model.onnx")
        for attribute in (a for node in proto.graph.node for a in node.attribute if a.name == "accuracy_level"):
            attribute.i = 0
        exact.parent.mkdir()
        onnx.save(proto, exact)
    plain = write.Target.of(folder / "float32" / "model.onnx")
    if not plain.model.exists():
        unpack(lowered)
        with write.staged(plain) as staging:
            write.save(trace(lowered, True, 21), staging, plain)


def unpack(lowered: Any) -> None:
    """Replace every packed layer by nn.Linear over the same weight."""
    import torch

    for name, packed in lowered.lowbit_layers().items():
        linear = torch.nn.Linear(packed.in_features, len(packed.weight_packed), packed.bias is not None, device="meta")
        linear.weight = torch.nn.Parameter(packed.dequantize(), requires_grad=False)
        linear.bias = packed.bias
        lowered.set_submodule(name, linear)


def lowered_model(name: str, layers: int, vocabulary: int = 32000) -> Any:
    """The demo's decoder, or TinyLlama's shape with random codes: no float weights are made for packed layers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import tsld_fx
    from tsld_fx.model_folders import load_float

    if name == "demo":
        return tsld_fx.convert(tsld_fx.prepare(load_float("demo")), backend="reference")
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=False,
    )  # fmt: skip
    from tsld_fx.lowbit_linear import LowBitLinear
    from tsld_fx.lowered import as_lowered

    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    table = torch.tensor([sum(((i // 3**j) % 3) << (2 * j) for j in range(4)) for i in range(81)], dtype=torch.uint8)
    for path, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            packed = LowBitLinear(module.in_features, module.out_features, 2, 0)
            shape = packed.weight_packed.shape
            packed.weight_packed.copy_(table[torch.randint(81, shape, generator=generator)])
            packed.weight_scale.fill_(module.in_features**-0.5)
            model.set_submodule(path, packed)
    rotary = type(model.model.rotary_emb)(config)
    model.model.rotary_emb = rotary
    for path, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            owner, _, leaf = path.rpartition(".")
            value = torch.empty(parameter.shape).normal_(0, 0.02) if parameter.ndim > 1 else torch.ones(parameter.shape)
            setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(value, requires_grad=False))
    return as_lowered(model.eval(), "reference")


def run(file: Path, library: str, threads: int, steps: int, prompt: int) -> dict[str, Any]:
    """Tokens per second of the prompt and of the steps after it, and this process's peak memory."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    if library != "-":
        options.register_custom_ops_library(library)
    started = time.perf_counter()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    loading = time.perf_counter() - started
    names = [v.name for v in session.get_inputs()]
    past = [n for n in names if n.startswith("past_key_values.")]
    shape = next(v.shape for v in session.get_inputs() if v.name == past[0])
    cache = [np.zeros((1, shape[1], 0, shape[3]), np.float32) for _ in past]
    tokens, position, rates = np.arange(5, 5 + prompt)[None], 0, []
    for step in range(steps + 1):
        count = tokens.shape[1]
        mask = np.ones((1, position + count), np.int64)
        places = np.arange(position, position + count)[None]
        feed = {
            "input_ids": tokens,
            "attention_mask": mask,
            "position_ids": places,
            **dict(zip(past, cache, strict=True)),
        }
        begun = time.perf_counter()
        logits, *cache = session.run(None, feed)
        rates.append((time.perf_counter() - begun) / count)
        tokens, position = logits[:, -1:].argmax(-1), position + count
        if step > 3 and time.perf_counter() - started - loading > 40:  # the slow ones need no more
            break
    peak = peak_bytes() / 1e6
    return {
        "tokens_per_s": round(1 / float(np.median(rates[2:])), 2),
        "prompt_tokens_per_s": round(1 / rates[0], 1),
        "peak_mb": round(peak, 1),
        "load_s": round(loading, 2),
    }


def peak_bytes() -> int:
    """Largest resident memory of this process; ru_maxrss would count its parent's, from before exec."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def read_bandwidth(threads: int) -> float:
    """Bytes per second of reading 512 MB with torch's threads."""
    import torch

    torch.set_num_threads(threads)
    data = torch.ones(128 << 20, dtype=torch.float32)
    best = 0.0
    for _ in range(4):
        begun = time.perf_counter()
        data.sum()
        best = max(best, data.nbytes / (time.perf_counter() - begun))
    return best


if __name__ == "__main__":
    main()
