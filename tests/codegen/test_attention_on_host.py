"""The attention kernel of a decoding step, compiled for the host: the same header, a block's threads as coroutines.

It needs g++ and no GPU. Shares of the cached positions meet in global memory; clusters run on GPUs only.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch

from tsld_fx.codegen.decode_kernels import AttentionParams
from tsld_fx.cuda_templates import TEMPLATE_DIR

HERE = Path(__file__).parent / "on_host"
THREADS, HEAD_DIM, LENGTH = 64, 32, 384


@pytest.mark.parametrize(("heads_per_block", "dtype"), [(1, torch.float16), (4, torch.bfloat16)])
def test_against_float64(tmp_path: Path, heads_per_block: int, dtype: torch.dtype) -> None:
    kind = {torch.float16: "Fp16", torch.bfloat16: "Bf16"}[dtype]
    macros = {"TYPE": kind, "HEAD_DIM": HEAD_DIM, "HEADS": heads_per_block, "THREADS": THREADS}
    command = ["g++", "-O1", "-std=c++20", "-w", "-shared", "-fPIC", *(f"-D{n}={v}" for n, v in macros.items())]
    library = tmp_path / "attention.so"
    subprocess.run([*command, f"-I{HERE}", f"-I{TEMPLATE_DIR}", str(HERE / "attention.cc"), "-o", library], check=True)
    run = ctypes.CDLL(str(library)).run
    torch.manual_seed(0)
    batch, kv_heads = 2, 2
    heads = kv_heads * heads_per_block
    for splits, positions in ((1, (0, 383)), (3, (95, 5)), (2, (16, 64))):
        q = torch.randn(batch, heads, HEAD_DIM).to(dtype)
        k, v = (torch.randn(batch, kv_heads, HEAD_DIM).to(dtype) for _ in range(2))
        keys, values = (torch.full((batch, kv_heads, LENGTH, HEAD_DIM), torch.nan, dtype=dtype) for _ in range(2))
        for row, position in enumerate(positions):
            for cache in (keys, values):
                cache[row, :, :position] = torch.randn(kv_heads, position, HEAD_DIM).to(dtype)
        expected = []
        for row, position in enumerate(positions):
            all_k, all_v = (
                torch.cat([cache[row, :, :position], new[row, :, None]], 1)
                .double()
                .repeat_interleave(heads_per_block, 0)
                for cache, new in ((keys, k), (values, v))
            )
            scores = (q[row].double()[:, None] @ all_k.transpose(1, 2)) * HEAD_DIM**-0.5
            expected.append((scores.softmax(-1) @ all_v)[:, 0])
        out = torch.full((batch, heads, HEAD_DIM), torch.nan, dtype=dtype)
        units = batch * kv_heads
        partial = torch.full((units * splits * heads_per_block * (HEAD_DIM + 2),), torch.nan)
        counters = torch.zeros(units, dtype=torch.int32)
        at = torch.tensor(positions)
        params = AttentionParams(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), None, None, at.data_ptr(), keys.data_ptr(), values.data_ptr(),
            out.data_ptr(), partial.data_ptr(), counters.data_ptr(), heads * HEAD_DIM, kv_heads * HEAD_DIM,
            kv_heads * HEAD_DIM, heads, kv_heads, LENGTH, splits, 0, 0, HEAD_DIM**-0.5,
        )  # fmt: skip
        assert run(ctypes.byref(params), ctypes.sizeof(params), units, splits, splits % 2) == 0
        assert not counters.any()
        error = (out.double() - torch.stack(expected)).norm() / torch.stack(expected).norm()
        assert float(error) <= (1e-3 if dtype is torch.float16 else 8e-3)
        for row, position in enumerate(positions):
            assert torch.equal(keys[row, :, position], k[row]) and torch.equal(values[row, :, position], v[row])
