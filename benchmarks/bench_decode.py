"""Tokens per second of a LLaMA-7B shape with random ternary weights against the same model in fp16, on one GPU.

    python benchmarks/bench_decode.py

Both sides decode greedily from a context of random tokens, one CUDA graph replay per token. The fp16 model runs twice:
through this project's decoder (fused attention, norms and activation around cuBLAS products), and as transformers runs
it with a static cache and torch.compile (mode reduce-overhead); ratios are over the faster of the two. The bound is
the time to read every weight and the cached keys and values once at the copy ceiling of the same run.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from gemm_timing import copy_ceiling_bytes_per_second, microseconds_per_call, rotation
from llama_shape import HIDDEN, INNER, VOCABULARY, dense_model, random_linear, ternary_model
from machine import describe
from rich.console import Console
from rich.table import Table
from torch import nn

from tsld_fx import cuda_linear
from tsld_fx.codegen import select_config
from tsld_fx.decode import Decoder
from tsld_fx.decode.options import Options
from tsld_fx.decode.select import Selection
from tsld_fx.lowbit_linear import LowBitLinear
from tsld_fx.whole_files import write_json

PRODUCTS = {
    "q/k/v": (3 * HIDDEN, HIDDEN),
    "o": (HIDDEN, HIDDEN),
    "gate/up": (2 * INNER, HIDDEN),
    "down": (HIDDEN, INNER),
}


def bytes_per_token(model: Any, batch: int, context: int) -> tuple[int, int]:
    """(weights, keys and values) that one step reads; of packed layers the packed weight and its scales."""
    weights = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "embed_tokens" not in n)
    weights += sum(
        b.numel() * b.element_size() for m in model.modules() if isinstance(m, LowBitLinear) for b in m.buffers()
    )
    return weights, 2 * 2 * model.config.num_hidden_layers * HIDDEN * context * batch


def decoder_us(decoder: Decoder, batch: int, context: int, steps: int) -> dict[str, float]:
    """Microseconds of a step at this context (graph replays), of a prefill, and of a token of a whole `generate`."""
    ids = torch.randint(0, VOCABULARY, (batch, context), device="cuda")
    mask, options = torch.ones_like(ids), Options(2, Selection(), 1.0, 1.0, (), 0)
    for _ in range(3):  # the second captures the prefill
        decoder.generate(ids, mask, options)
    torch.cuda.synchronize()
    start = time.perf_counter()
    decoder.generate(ids, mask, options)
    torch.cuda.synchronize()
    prefill = time.perf_counter() - start
    step = decoder._step(decoder._bucket(batch), options.selection)
    samples = []
    for _ in range(5):
        step.state.positions.fill_(context)
        step.state.counts.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(steps):
            step.run()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) * 1000 / steps)
    start = time.perf_counter()
    decoder.generate(ids, mask, Options(steps, Selection(), 1.0, 1.0, (2,), 0))
    torch.cuda.synchronize()
    whole = time.perf_counter() - start
    return {"step_us": statistics.median(samples), "prefill_ms": prefill * 1e3, "generate_ms": whole * 1e3}


def compiled_us(model: Any, batch: int, context: int, steps: int) -> float:
    """Microseconds per token of transformers' generate with a static cache, which it compiles."""
    ids = torch.randint(3, VOCABULARY, (batch, context), device="cuda")

    def seconds(new: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
            cache_implementation="static", pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds(steps)
    seconds(steps)
    return statistics.median(seconds(steps) - seconds(steps // 4) for _ in range(3)) / (steps - steps // 4) * 1e6


def kernel_times(decoder: Decoder, batch: int) -> list[dict[str, Any]]:
    """Kernels of one step, longest first: name, launches, microseconds in all."""
    step = decoder._step(decoder._bucket(batch), Selection())
    step.state.positions.fill_(512)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step.run()
        torch.cuda.synchronize()
    rows = [
        {"kernel": e.key[:100], "launches": e.count, "us": e.self_device_time_total} for e in profile.key_averages()
    ]
    return sorted(rows, key=lambda r: -r["us"])


def eager_call_us(dtype: torch.dtype = torch.float16, calls: int = 2000) -> dict[str, float]:
    """Host time of one call of a layer without a graph: what launches cost in Python."""
    layer = random_linear(nn.Linear(1024, 1024, device="meta"), 2)
    layer.use_kernels()
    x = torch.randn(1, 1024, dtype=dtype, device="cuda")
    with torch.no_grad():
        for _ in range(50):
            layer(x)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            layer(x)
        lowbit = time.perf_counter() - start
        torch.cuda.synchronize()
        weight = torch.randn(1024, 1024, dtype=dtype, device="cuda")
        start = time.perf_counter()
        for _ in range(calls):
            nn.functional.linear(x, weight)
        dense = time.perf_counter() - start
    torch.cuda.synchronize()
    return {"lowbit_linear": lowbit / calls * 1e6, "torch_linear": dense / calls * 1e6}


def measure(decoder: Decoder, model: Any, args: Any, batch: int, ceiling: float) -> dict[str, Any]:
    weights, cache = bytes_per_token(model, batch, args.context)
    bound = (weights + cache) / ceiling * 1e6
    times = decoder_us(decoder, batch, args.context, args.steps)
    return {
        "batch": batch, **times, "tokens_per_second": batch / times["step_us"] * 1e6, "weight_bytes": weights,
        "cache_bytes": cache, "bound_us": bound, "share_of_bound": bound / times["step_us"],
    }  # fmt: skip


def product_us(digit_tokens: int) -> dict[str, float]:
    """Microseconds of each product of a layer at one token, alone, over rotating weights."""
    found = {}
    for name, (rows, inputs) in PRODUCTS.items():
        like = nn.Linear(inputs, rows, device="meta")
        layers = [random_linear(like, 2) for _ in range(rotation(rows * inputs // 4))]
        for layer in layers:
            layer.use_kernels()
        x = torch.randn(1, inputs, dtype=torch.float16, device="cuda")
        select_config.MOST_DIGIT_TOKENS = digit_tokens
        found[name] = microseconds_per_call([lambda layer=layer, x=x: layer(x) for layer in layers], samples=5)
    return found


def some_logits(decoder: Decoder, context: int) -> torch.Tensor:
    """Logits of one token after a prompt of random tokens, the same at every call, in float64."""
    ids = torch.arange(context, device="cuda")[None] * 7 % VOCABULARY
    decoder._prefill._run(ids, torch.tensor([context - 1], device="cuda"))
    logits = decoder.graphs.decode(ids[:, :1], torch.full_like(ids[:, :1], context))["logits"]
    return logits.double()


def with_digits(tokens: int) -> None:
    """Let stream kernels take int8 digits for up to so many tokens, from now on."""
    select_config.MOST_DIGIT_TOKENS = tokens
    for entry in list(cuda_linear._entries.values()):
        entry.gemm._prepared.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--head-bits", type=int, choices=(8, 16), default=16)
    parser.add_argument(
        "--digit-tokens", type=int, default=select_config.MOST_DIGIT_TOKENS, help="see select_config.py"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile (runs with the first batch)")
    parser.add_argument("--no-ternary", action="store_true")
    parser.add_argument("--no-fp16", action="store_true")
    parser.add_argument("--kernels", action="store_true", help="also record the kernels of one step")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "decode_llama7b.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    ceiling = copy_ceiling_bytes_per_second(2.0)
    result: dict[str, Any] = {"machine": describe(), "copy_ceiling_bytes_per_second": ceiling, "context": args.context}
    result |= {"digit_tokens": args.digit_tokens, "peak_bytes": {}, "held_bytes": {}}
    with torch.no_grad():
        if not args.no_ternary:
            ternary(result, args, ceiling)
        if not args.no_fp16:
            fp16(result, args, ceiling)
            report(result, args)
            write(result, args)
        if not args.no_ternary and args.kernels:
            result["eager_call_us"] = eager_call_us()
            result["product_us"] = {f"{n} digit tokens": product_us(n) for n in sorted({0, args.digit_tokens})}
            print(result["product_us"], flush=True)
    write(result, args)


def ternary(result: dict[str, Any], args: Any, ceiling: float) -> None:
    with_digits(args.digit_tokens)
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    lowered = ternary_model(args.layers, args.head_bits)
    built = time.perf_counter()
    decoder = lowered.compile_decode(max(args.batch), args.context + args.steps + 2, check=False)
    result["build_seconds"] = {"model": built - start, "compile_decode": time.perf_counter() - built}
    result["held_bytes"]["ternary"] = torch.cuda.memory_allocated()
    result["ternary"] = []
    for batch in args.batch:
        result["ternary"].append(measure(decoder, lowered, args, batch, ceiling))
        result["peak_bytes"]["ternary"] = torch.cuda.max_memory_allocated()
        print(json.dumps(result["ternary"][-1]), flush=True)
        if batch == 1 and args.digit_tokens:  # the same with the 16-bit kernels
            row, ours = result["ternary"][-1], some_logits(decoder, args.context)
            with_digits(0)
            decoder._steps.clear()
            row["without_digits_us"] = decoder_us(decoder, 1, args.context, args.steps)["step_us"]
            theirs = some_logits(decoder, args.context)
            row["logits_difference"] = float((ours - theirs).norm() / theirs.norm())
            with_digits(args.digit_tokens)
            decoder._steps.clear()
            print({name: row[name] for name in ("without_digits_us", "logits_difference")}, flush=True)
        write(result, args)
    if args.kernels:
        result["kernels"] = kernel_times(decoder, args.batch[0])
        for row in result["kernels"][:12]:
            print(f"{row['us']:9.1f} us {row['launches']:5d} x {row['kernel']}", flush=True)
    write(result, args)
    del decoder, lowered
    gc.collect()
    torch.cuda.empty_cache()


def fp16(result: dict[str, Any], args: Any, ceiling: float) -> None:
    torch.cuda.reset_peak_memory_stats()
    model = dense_model(args.layers)
    decoder = Decoder(model, max(args.batch), args.context + args.steps + 2, check=False)
    result["fp16"] = []
    for batch in args.batch:
        result["fp16"].append(measure(decoder, model, args, batch, ceiling))
        result["peak_bytes"]["fp16"] = torch.cuda.max_memory_allocated()
        print(json.dumps(result["fp16"][-1]), flush=True)
        write(result, args)
    del decoder
    gc.collect()
    if args.no_compile:
        return
    try:
        result["fp16"][0]["compiled_us"] = compiled_us(model, args.batch[0], args.context, args.steps)
    except Exception as error:  # its own business; the other figures stand
        result["compile_error"] = repr(error)[:500]
        print("torch.compile:", result["compile_error"], flush=True)
    del model
    gc.collect()
    torch.cuda.empty_cache()


def write(result: dict[str, Any], args: Any) -> None:
    write_json(args.out, result)


def report(result: dict[str, Any], args: Any) -> None:
    table = Table(title=f"decoding, {args.layers} layers, context {args.context}, {args.head_bits}-bit head")
    for column in ("batch", "ternary us", "tokens/s", "of the bound", "fp16 us", "compiled us", "ratio"):
        table.add_column(column, justify="right")
    for index, row in enumerate(result.get("ternary", [])):
        cells = [
            row["batch"],
            f"{row['step_us']:.0f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['share_of_bound']:.0%}",
        ]
        if "fp16" in result:
            dense = result["fp16"][index]
            best = min(dense["step_us"], dense.get("compiled_us", dense["step_us"]))
            row["ratio"] = best / row["step_us"]
            cells += [
                f"{dense['step_us']:.0f}",
                f"{dense.get('compiled_us', float('nan')):.0f}",
                f"{row['ratio']:.2f}x",
            ]
        table.add_row(*map(str, cells))
    Console().print(table)
    print("peak GiB:", {k: round(v / 2**30, 2) for k, v in result["peak_bytes"].items()})


if __name__ == "__main__":
    main()
