"""Run every kind of CUDA kernel once over ragged shapes, under NVIDIA's compute-sanitizer.

    python -m tests.gpu.sanitize            # memcheck and racecheck; exit status 0 where both find nothing
    python -m tests.gpu.sanitize --plain    # without the tools: only the numerics

Each call is checked against the float64 product as well, so that a kernel that does nothing does not count as clean.
racecheck leaves out the wgmma kernels: there one lane tells the producer that its warp has read a buffer, after a
matrix instruction that the whole warp has issued together, and the tool takes only barriers for synchronisation.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from tests.gpu.conftest import Layer, random_layer
from tsld_fx.codegen import LowBitGemm
from tsld_fx.codegen.build import build_kernel
from tsld_fx.codegen.config import GemmConfig
from tsld_fx.codegen.devices import device_facts
from tsld_fx.codegen.select_config import Plan
from tsld_fx.codegen.spec import KernelSpec

Case = tuple[Layer, int, Plan, str | None, str | None]  # weights, tokens, plan, activations' 8-bit type, target
KINDS = ((2, 0), (2, 32), (2, 128), (4, 0), (4, 128), (8, 0), (8, 64))  # bits, group
STREAM = [
    Plan(GemmConfig(t, 1, 1, 8, rows, 4, "stream"), splits) for t, rows, splits in ((1, 1, 1), (4, 2, 3), (8, 1, 2))
]
STREAM_DIGITS = [Plan(GemmConfig(t, 1, 1, 12, rows, 4, "stream", digits=True), 1) for t, rows in ((1, 2), (2, 4))]
MMA = [
    Plan(GemmConfig(1, 1, 1, 8, 2, 3), 1),
    Plan(GemmConfig(16, 4, 1, 2, 2, 2), 3),
    Plan(GemmConfig(128, 4, 2, 1, 2, 3), 2),
]
TILE = [Plan(GemmConfig(128, 4, 2, 1, 4, 3, "tile"), 1), Plan(GemmConfig(64, 4, 1, 1, 2, 5, "tile"), 3)]
WGMMA = [
    Plan(GemmConfig(16, 4, 1, 1, 1, 4, "wgmma"), 3),
    Plan(GemmConfig(64, 4, 1, 1, 2, 3, "wgmma"), 1),
    Plan(GemmConfig(128, 8, 1, 1, 1, 3, "wgmma"), 2),
]
WGMMA_TERNARY = [  # one scale per row or 128 inputs
    Plan(GemmConfig(64, 4, 1, 1, 1, 4, "wgmma", cluster=True), 2),
    Plan(GemmConfig(32, 8, 1, 1, 1, 4, "wgmma", ahead=2), 3),
]
CLUSTER = [
    Plan(GemmConfig(t, 1, 1, w, 4, 4, "digits", cluster=True), splits) for t, w, splits in ((16, 16, 2), (32, 8, 1))
]
DIGITS = [Plan(GemmConfig(16, 1, 1, 8, 2, 3, "digits"), 2), Plan(GemmConfig(8, 1, 1, 16, 1, 4, "digits"), 1)]
QUANTISED = [
    Plan(GemmConfig(64, 4, 1, 1, 1, 4, "wgmma"), 2),
    Plan(GemmConfig(256, 8, 1, 1, 1, 3, "wgmma"), 1),
]


def cases(wgmma: bool) -> Iterator[Case]:
    """N and K end within a tile and a chunk, M within the tokens of a block; splits take unequal shares."""
    hopper = device_facts(torch.cuda.current_device())[0] == "sm_90a"
    asynchronous = hopper and wgmma
    for bits, group in KINDS:
        layer = random_layer(299, 1187, bits, group)
        plans = STREAM + MMA + (WGMMA if asynchronous else [])
        if bits == 2 and not group:
            plans += TILE
        if bits == 2 and group in (0, 128):
            plans += STREAM_DIGITS + DIGITS + (CLUSTER if hopper else []) + (WGMMA_TERNARY if asynchronous else [])
        for plan in plans:
            if group and plan.config.kernel == "mma" and plan.config.tokens == 128:
                plan = Plan(GemmConfig(128, 4, 2, 1, 1, 3), plan.splits)
            before_hopper = plan.config.kernel in ("mma", "tile") or plan in DIGITS
            target = "compute_80" if before_hopper and hopper else None
            m = plan.config.tokens + (5 if plan.config.tokens > 8 else 0)  # one staged token serves one token only
            yield layer, m, plan, None, target
        if bits == 2 and not group and asynchronous:
            for plan in QUANTISED:
                for kind in ("int8", "fp8"):
                    yield layer, plan.config.tokens + 7, plan, kind, None


def spec_of(case: Case) -> KernelSpec:
    layer, _, _, quantise, target = case
    native = device_facts(torch.cuda.current_device())[0]
    return KernelSpec("fp16", layer.bits, max(layer.group_size, 0), target or native, quantise)  # type: ignore[arg-type]


def run(wgmma: bool) -> int:
    """-> number of wrong results."""
    all_cases = list(cases(wgmma))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda case: build_kernel(spec_of(case), case[2].config), all_cases))
    wrong = 0
    for layer, m, plan, quantise, target in all_cases:
        gemm = LowBitGemm.pack(*layer.arguments(), target=target)
        x = torch.randn(m, layer.k, dtype=torch.float16, device="cuda")
        bias = torch.randn(layer.weight.shape[0], dtype=torch.float16, device="cuda")
        expected = x.double() @ layer.weight.T + bias.double()
        error = float((gemm(x, bias, plan=plan, quantise=quantise).double() - expected).norm() / expected.norm())  # type: ignore[arg-type]
        good = error <= {None: 1e-3, "int8": 2e-2, "fp8": 6e-2}[quantise]
        wrong += not good
        kind = f"w{layer.bits} g{layer.group_size} {quantise or 'fp16'} {target or 'native'}"
        print(f"{kind} m={m} {plan.config.name} x{plan.splits}: {error:.1e}{'' if good else ' WRONG'}", flush=True)
    print(f"{len(all_cases)} kernels, {wrong} wrong")
    return wrong


def sanitize(tools: list[str]) -> int:
    """-> number of tools that found something."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        sys.exit("compute-sanitizer is not on PATH; it is part of the CUDA toolkit. Or pass --plain.")
    failed = 0
    for name in tools:
        command = [tool, "--tool", name, "--kernel-regex", "kns=tsld_", "--error-exitcode", "9", "--print-limit", "20"]
        child = [
            sys.executable,
            "-m",
            "tests.gpu.sanitize",
            "--plain",
            *(["--no-wgmma"] if name == "racecheck" else []),
        ]
        status = subprocess.run([*command, *child], check=False).returncode
        print(f"{name}: {'clean' if status == 0 else f'exit status {status}'}", flush=True)
        failed += status != 0
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", default="memcheck,racecheck", help="of compute-sanitizer")
    parser.add_argument("--plain", action="store_true", help="run the kernels without compute-sanitizer")
    parser.add_argument(
        "--no-wgmma", action="store_true", help="leave out the kernels that wait for asynchronous copies"
    )
    args = parser.parse_args()
    sys.exit(min(run(not args.no_wgmma) if args.plain else sanitize(args.tools.split(",")), 1))
