"""Rendered source: goldens, purity, and that the chosen configurations fit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tsld_fx.codegen.config import GemmConfig, shared_limit
from tsld_fx.codegen.render import QuantiseConfig, render, render_quantise
from tsld_fx.codegen.select_config import Plan, choose
from tsld_fx.codegen.spec import KernelSpec
from tsld_fx.codegen.workspace import COUNTERS_PER_LAUNCH
from tsld_fx.errors import BackendError

ONE_TOKEN = GemmConfig(tokens=1, warps_n=1, warps_m=1, warps_k=16, row_tiles=1, stages=6, kernel="stream")
MANY_TOKENS = GemmConfig(tokens=128, warps_n=8, warps_m=1, warps_k=1, row_tiles=2, stages=4, kernel="wgmma")


FEW_TOKENS = GemmConfig(tokens=16, warps_n=4, warps_m=1, warps_k=4, row_tiles=2, stages=3)


def test_goldens(golden) -> None:
    golden("w2_fp16_row_sm80.cu", render(KernelSpec("fp16", 2), [ONE_TOKEN, FEW_TOKENS]))
    narrow = KernelSpec("fp16", 2, 0, "sm_90a", "int8")
    golden("w2_int8_fp16_row_sm90a.cu", render(narrow, [MANY_TOKENS]) + render_quantise(narrow, QuantiseConfig.of(32)))
    golden("w4_bf16_g128_sm90a.cu", render(KernelSpec("bf16", 4, 128, "sm_90a"), [FEW_TOKENS, MANY_TOKENS]))


def test_importing_builds_nothing_and_needs_no_gpu(tmp_path: Path) -> None:
    code = """
import subprocess
started = []
class Recorder(subprocess.Popen):
    def __init__(self, command, *args, **kwargs):
        started.append(str(command))
        super().__init__(command, *args, **kwargs)
subprocess.Popen = Recorder
import tsld_fx.codegen, torch
assert not torch.cuda.is_initialized()
assert not any("nvcc" in command or "ptxas" in command for command in started), started
"""
    cache = tmp_path / "cache"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "TSLD_CACHE_DIR": str(cache)})
    assert not cache.exists() or not list(cache.iterdir())


@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_90", "sm_90a", "sm_100", "compute_80"])
@pytest.mark.parametrize(("bits", "group"), [(2, 0), (2, 32), (4, 128), (8, 0), (8, 32)])
def test_every_choice_fits_and_covers(target: str, bits: int, group: int) -> None:
    check_choices(KernelSpec("fp16", bits, group, target))


def test_every_choice_for_activations_of_8_bits_fits_and_covers() -> None:
    check_choices(KernelSpec("fp16", 2, 0, "sm_90a", "int8"))


def check_choices(spec: KernelSpec) -> None:
    for n, k in [(1, 1), (4096, 4096), (22016, 4096), (4096, 11008), (128256, 8192), (31, 100000)]:
        for m in (1, 2, 3, 7, 16, 33, 64, 65, 500, 100000):
            plan = choose(spec, n, k, m, 132)
            config, chunks, row_tiles = plan.config, -(-k // 128), -(-n // 16)
            assert plan.shared_bytes(spec, m, row_tiles, chunks, 132) <= shared_limit(spec.capability)
            rows, tokens = plan.tiles(m, row_tiles)
            assert rows * config.block_rows >= n and tokens * config.block_tokens >= m
            assert 1 <= plan.splits <= chunks
            assert -(-chunks // plan.splits) * (plan.splits - 1) < chunks, "an empty split"
            assert plan.splits == 1 or plan.counters(m, row_tiles, 132) <= COUNTERS_PER_LAUNCH
            assert config.kernel != "wgmma" or spec.hopper


def test_plan_grids() -> None:
    assert Plan(FEW_TOKENS, 3).grid(17, 17, 132) == (3, 2, 3)  # 128 x 16 outputs per block
    assert Plan(MANY_TOKENS, 3).grid(200, 17, 132) == (12, 1, 1)  # 256 x 128, blocks walk over tiles and splits
    assert Plan(MANY_TOKENS, 3).grid(2000, 170, 132) == (132, 1, 1)
    assert Plan(ONE_TOKEN, 2, 2).grid(1, 256, 132) == (132, 1, 2)  # 256 row groups on 132 blocks each


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: KernelSpec("fp32", 2), "fp32"),  # type: ignore[arg-type]
        (lambda: KernelSpec("fp16", 3), "3-bit"),
        (lambda: KernelSpec("fp16", 4, 48), "group of 48"),
        (lambda: KernelSpec("fp16", 4, 0, "sm_75"), "sm_75"),
        (lambda: GemmConfig(96, 8, 1, 1, 1, 4, "wgmma"), "32, 64, 128 or 256 tokens"),
        (lambda: KernelSpec("fp16", 4, 0, "sm_90a", "int8"), "only for ternary"),
        (lambda: KernelSpec("fp16", 2, 0, "sm_90a", "int4"), "'int8' or 'fp8'"),  # type: ignore[arg-type]
        (lambda: KernelSpec("fp16", 2, 0, "sm_80", "fp8"), "Hopper"),
        (lambda: render(KernelSpec("fp16", 2, 0, "sm_90a", "fp8"), [FEW_TOKENS]), "16-bit activations only"),
        (lambda: render_quantise(KernelSpec("fp16", 2), QuantiseConfig.of(1)), "nothing to quantise"),
        (lambda: render(KernelSpec("fp16", 2, 0, "sm_80"), [MANY_TOKENS]), "sm_90a"),
        (lambda: GemmConfig(256, 8, 1, 1, 4, 4).fitted(KernelSpec("fp16", 8), 40000), "shared memory"),
    ],
)
def test_refusals(make, said: str) -> None:
    with pytest.raises(BackendError, match=said):
        make()
