"""Kernels over digits compiled for the host, and random problems for them."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tsld_fx import decode_ops
from tsld_fx.codegen.config import GemmConfig
from tsld_fx.codegen.cuda_gemm import GemmParams
from tsld_fx.codegen.layout import to_kernel_layout
from tsld_fx.codegen.select_config import Plan
from tsld_fx.codegen.spec import KernelSpec
from tsld_fx.cuda_templates import TEMPLATE_DIR
from tsld_fx.decode_linear_ops import silu_mul_taking_turns
from tsld_fx.packing import pack

HERE = Path(__file__).parent / "on_host"
TYPES = {torch.float16: ("Fp16", 1e-3), torch.bfloat16: ("Bf16", 8e-3)}
BLOCKS = 3


def build(
    folder: Path, source: str, dtype: torch.dtype, config: GemmConfig, group: int, **flag: bool
) -> ctypes.CDLL:  # fmt: skip
    """Compile `on_host/source` for a configuration; the same one gives the library made before."""
    macros: dict[str, object] = {
        "TYPE": TYPES[dtype][0], "GROUP": group, "TOKENS": config.tokens, "WARPS": config.warps_k,
        "ROW_TILES": config.row_tiles, "STAGES": config.stages, **{name: str(on).lower() for name, on in flag.items()},
    }  # fmt: skip
    out = folder / ("_".join(map(str, macros.values())) + ".so")
    if not out.exists():
        flags = [f"-D{name}={value}" for name, value in macros.items()]
        command = ["g++", "-O1", "-std=c++20", "-w", "-shared", "-fPIC", *flags, f"-I{HERE}", f"-I{TEMPLATE_DIR}"]
        subprocess.run([*command, str(HERE / source), "-o", str(out)], check=True)
    return ctypes.CDLL(str(out))


def aligned(tensor: Tensor) -> Tensor:
    """A copy whose memory starts at a multiple of 16 bytes, with NaN or large codes behind it."""
    raw = torch.full((tensor.numel() * tensor.element_size() + 64,), 0x7F, dtype=torch.uint8)
    start = -raw.data_ptr() % 16
    out = raw[start : start + tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
    return out.copy_(tensor)


class Problem:
    """Random ternary weights and activations, and one launch on them."""

    def __init__(self, rows: int, inputs: int, tokens: int, dtype: torch.dtype, group: int = 0) -> None:
        torch.manual_seed(0)
        codes = torch.randint(0, 3, (rows, inputs), dtype=torch.uint8)
        scales = torch.rand(rows, -(-inputs // group) if group else 1) + 0.5
        each = scales.double().repeat_interleave(group or inputs, 1)[:, :inputs]
        self.weight = (codes.double() - 1) * each
        self.packed = to_kernel_layout(pack(codes, 2), scales, None, 2, group, inputs)
        self.x, self.residual = (aligned(torch.randn(tokens, inputs).to(dtype)) for _ in range(2))
        self.norm_weight, self.bias = (
            aligned((torch.rand(inputs) + 0.5).to(dtype)),
            aligned(torch.randn(rows).to(dtype)),
        )
        self.total = torch.full_like(self.x, torch.nan)

    def run(
        self,
        built: Callable[..., ctypes.CDLL],
        config: GemmConfig,
        norm: bool,
        added: bool,
        gated: bool,
        backwards: int,
        splits: int = 1,
    ) -> Tensor:
        weights, (tokens, inputs) = self.packed, self.x.shape
        y = torch.full((tokens, weights.out_features // (2 if gated else 1)), torch.nan, dtype=self.x.dtype)
        plan = Plan(config, splits)
        activation, group = TYPES[self.x.dtype][0].lower(), weights.group
        spec = KernelSpec(activation, 2, group, norm=norm, gated=gated)  # type: ignore[arg-type]
        grid = plan.grid(tokens, weights.row_tiles, BLOCKS)
        shared = plan.shared_bytes(spec, tokens, weights.row_tiles, weights.chunks, BLOCKS)
        held = [self.x, weights.codes, weights.meta, weights.row_scale, weights.row_zero, self.bias, y]
        partial = torch.full((plan.partial_floats(tokens, weights.row_tiles),), torch.nan)
        counters = torch.zeros(64, dtype=torch.int32)
        params = GemmParams(
            *(None if t is None else t.data_ptr() for t in held), partial.data_ptr(), counters.data_ptr(), inputs,
            tokens, weights.out_features, inputs, weights.row_tiles, weights.chunks, -(-weights.chunks // splits), None,
        )  # fmt: skip
        if norm:
            params.norm_weight, params.eps = self.norm_weight.data_ptr(), 1e-5
        if added:
            params.residual, params.total = self.residual.data_ptr(), self.total.data_ptr()
        library = built(self.x.dtype, config, norm, gated, group)
        assert library.run(ctypes.byref(params), ctypes.sizeof(params), *grid, shared, backwards) == 0
        assert not counters.any()
        return y

    def expected(self, norm: bool, added: bool, gated: bool) -> Tensor:
        x = self.x + self.residual if added else self.x
        if norm:
            x = decode_ops.rms_norm(x, self.norm_weight, 1e-5)
        y = x.double() @ self.weight.T + self.bias.double()
        return silu_mul_taking_turns(y.to(self.x.dtype).double()) if gated else y


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs).norm() / theirs.norm())
