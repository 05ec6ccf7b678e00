"""The digits kernels (x as two bytes), compiled for the host; on Hopper with the blocks of a cluster at once and matrix
instructions that run as late as the kernel allows.

It needs g++ and no GPU. Blocks run from the first thread and from the last, which shows missing barriers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch

from tests.codegen.host_kernels import TYPES, Problem, build, relative
from tsld_fx.codegen.config import GemmConfig
from tsld_fx.codegen.select_config import Plan, whole_splits


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ctypes.CDLL]:
    folder = tmp_path_factory.mktemp("on_host")

    def library(dtype: torch.dtype, config: GemmConfig, norm: bool, gated: bool, group: int = 0) -> ctypes.CDLL:
        return build(folder, "digits.cc", dtype, config, group, HOPPER=config.cluster)

    return library


@pytest.mark.parametrize("hopper", [True, False])
@pytest.mark.parametrize(
    ("rows", "inputs", "tokens", "warps", "stages", "splits", "dtype", "group"),
    [
        (208, 1096, 16, 8, 3, 2, torch.float16, 0),  # an odd number of chunks, which no split shares equally
        (208, 1096, 16, 8, 2, 2, torch.float16, 128),
        (76, 264, 5, 8, 3, 1, torch.bfloat16, 128),
        (400, 520, 13, 4, 4, 2, torch.bfloat16, 0),  # several row groups a block
        (272, 2056, 9, 12, 3, 4, torch.float16, 128),
        (64, 128, 17, 8, 3, 1, torch.float16, 128),  # one chunk; tokens of two blocks
    ],
)
def test_against_float64(
    built: Callable[..., ctypes.CDLL], hopper: bool, rows: int, inputs: int, tokens: int, warps: int, stages: int,
    splits: int, dtype: torch.dtype, group: int,
) -> None:  # fmt: skip
    config = GemmConfig(16, 1, 1, warps, 4 if hopper else 2, stages, "digits", cluster=hopper)
    problem = Problem(rows, inputs, tokens, dtype, group)
    splits = whole_splits(Plan(config, splits), problem.packed.chunks).splits
    for backwards in (0, 1):
        got = problem.run(built, config, False, False, False, backwards, splits)
        assert relative(got, problem.expected(False, False, False)) <= TYPES[dtype][1]


@pytest.mark.parametrize(("dtype", "group"), [(torch.float16, 0), (torch.bfloat16, 128)])
def test_tokens_without_digits(built: Callable[..., ctypes.CDLL], dtype: torch.dtype, group: int) -> None:
    """Inf, NaN and values that no power of two lifts, beside plain tokens."""
    config = GemmConfig(16, 1, 1, 8, 4, 3, "digits", cluster=True)
    problem = Problem(64, 512, 9, dtype, group)
    problem.x[1, 5], problem.x[3, 300] = torch.inf, torch.nan
    problem.x[6] = torch.finfo(dtype).smallest_normal
    problem.bias.zero_()
    got, expected = problem.run(built, config, False, False, False, 0, 2), problem.expected(False, False, False)
    for token in range(9):
        if token in (1, 3):
            torch.testing.assert_close(got[token].double(), expected[token], equal_nan=True)
            assert not got[token].isfinite().any()
        else:
            assert relative(got[token], expected[token]) <= TYPES[dtype][1], token
