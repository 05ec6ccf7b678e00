"""The stream kernel over int8 digits, compiled for the host: the same headers, a block's threads as coroutines.

It needs g++ and no GPU. Blocks run from the first thread and from the last, which shows missing barriers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch

from tests.codegen.host_kernels import BLOCKS, TYPES, Problem, aligned, build, relative
from tsld_fx.codegen.config import GemmConfig
from tsld_fx.codegen.cuda_gemm import GemmParams
from tsld_fx.codegen.select_config import Plan
from tsld_fx.codegen.spec import KernelSpec


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ctypes.CDLL]:
    folder = tmp_path_factory.mktemp("on_host")

    def library(dtype: torch.dtype, config: GemmConfig, norm: bool, gated: bool, group: int = 0) -> ctypes.CDLL:
        return build(folder, "stream.cc", dtype, config, group, NORM=norm, GATED=gated)

    return library


@pytest.mark.parametrize(
    ("kind", "rows", "inputs", "tokens", "row_tiles", "warps", "dtype", "group"),
    [
        ("plain", 96, 256, 1, 1, 2, torch.float16, 0),
        ("plain", 52, 1000, 2, 2, 4, torch.bfloat16, 0),
        ("norm", 48, 2304, 1, 1, 2, torch.float16, 0),
        ("added", 80, 136, 2, 4, 4, torch.float16, 0),
        ("gated", 208, 512, 1, 2, 4, torch.bfloat16, 0),
        ("all", 208, 1000, 2, 2, 4, torch.float16, 0),
        ("all", 96, 2304, 1, 4, 2, torch.bfloat16, 0),
        ("plain", 116, 1000, 1, 4, 2, torch.float16, 128),
        ("all", 208, 1000, 2, 2, 4, torch.bfloat16, 128),
    ],
)
def test_against_float64(
    built: Callable[..., ctypes.CDLL], kind: str, rows: int, inputs: int, tokens: int, row_tiles: int, warps: int,
    dtype: torch.dtype, group: int,
) -> None:  # fmt: skip
    norm, added, gated = kind in ("norm", "added", "all"), kind in ("added", "all"), kind in ("gated", "all")
    config = GemmConfig(tokens, 1, 1, warps, row_tiles, 3, "stream", digits=True)
    problem = Problem(rows, inputs, tokens, dtype, group)
    for backwards in (0, 1):
        got = problem.run(built, config, norm, added, gated, backwards)
        assert relative(got, problem.expected(norm, added, gated)) <= TYPES[dtype][1] * (1 + gated)
    if added:
        assert torch.equal(problem.total, problem.x + problem.residual)


def test_fewer_tokens_than_the_kernel_takes(built: Callable[..., ctypes.CDLL]) -> None:
    config = GemmConfig(2, 1, 1, 2, 1, 3, "stream", digits=True)
    for tokens in (1, 3):
        problem = Problem(33, 70, tokens, torch.float16)
        problem.x = aligned(torch.nn.functional.pad(problem.x, (0, 2)))[:, :70]  # rows of whole 16-byte vectors
        weights = problem.packed
        y = torch.full((tokens, 33), torch.nan, dtype=torch.float16)
        held = [problem.x, weights.codes, None, weights.row_scale, None, None, y]
        params = GemmParams(
            *(None if t is None else t.data_ptr() for t in held), None, None, 72,
            tokens, 33, 70, weights.row_tiles, weights.chunks, weights.chunks, None,
        )  # fmt: skip
        plan = Plan(config)
        grid = plan.grid(tokens, weights.row_tiles, BLOCKS)
        shared = plan.shared_bytes(KernelSpec("fp16", 2), tokens, weights.row_tiles, weights.chunks, BLOCKS)
        library = built(torch.float16, config, False, False)
        assert library.run(ctypes.byref(params), ctypes.sizeof(params), *grid, shared, 0) == 0
        assert relative(y, problem.x.double() @ problem.weight.T) <= 1e-3


@pytest.mark.parametrize(("dtype", "group"), [(torch.float16, 0), (torch.bfloat16, 0), (torch.bfloat16, 128)])
def test_extreme_activations(built: Callable[..., ctypes.CDLL], dtype: torch.dtype, group: int) -> None:
    """Each value meets +1, -1 and 0; the others are far smaller or of any size."""
    config = GemmConfig(2, 1, 1, 2, 1, 3, "stream", digits=True)
    info = torch.finfo(dtype)
    step = info.smallest_normal * info.eps if group else 0.0  # scales of groups are rounded
    largest = 65504.0 if dtype is torch.float16 else 1e38
    for value in (largest, info.smallest_normal, 6e-8, -0.0, torch.inf, torch.nan):
        for others in (0.0, 1.0 if value < 1e38 or dtype is torch.float16 else 1e33):
            problem = Problem(64, 256, 2, dtype, group)
            problem.x *= others
            problem.x[1, 33] = value
            problem.bias.zero_()
            got, expected = problem.run(built, config, False, False, False, 0), problem.expected(False, False, False)
            bounds = {"rtol": TYPES[dtype][1], "atol": 2e-3 * others + step}
            torch.testing.assert_close(got.double(), expected.to(dtype).double(), **bounds, equal_nan=True)
    problem = Problem(64, 256, 2, dtype, group)
    problem.x[0, 7] = torch.nan
    got, expected = (problem.run(built, config, True, False, False, 0), problem.expected(True, False, False))
    assert bool(got[0].isnan().all()) and relative(got[1], expected[1]) <= TYPES[dtype][1]
