"""The kernel that ends a decoding step: the next token of each sequence, and what is kept of it."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tsld_fx.codegen.decode_kernels import DTYPES, launch

if TYPE_CHECKING:
    from tsld_fx.decode.state import StepState


class StepParams(ctypes.Structure):
    """Mirrors `decode_step.cuh`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("logits", "chosen", "tokens", "positions", "history", "counts")),
        *((name, ctypes.c_void_p) for name in ("finished", "eos", "pad")),
        ("logits_stride", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("vocabulary", "length", "eos_count")),
    ]


def likeliest_supported(logits: Tensor) -> bool:
    """Whether the kernel finds the likeliest token itself: fp16 or bf16 logits [B, V]."""
    return logits.is_cuda and logits.dtype in DTYPES and logits.stride(-1) == 1 and logits.shape[-1] > 0


def take_token(state: StepState, logits: Tensor | None, chosen: Tensor | None) -> None:
    """`state.take(chosen)` in one kernel; with logits [B, V] in place of `chosen` [B], of the likeliest tokens."""
    batch, length = state.history.shape
    pointers = (logits, chosen, state.tokens, state.positions, state.history, state.counts, state.finished, state.eos)
    params = StepParams(
        *(None if t is None else t.data_ptr() for t in (*pointers, state.pad)),
        0 if logits is None else logits.stride(0),
        0 if logits is None else logits.shape[1],
        length, state.eos.numel(),
    )  # fmt: skip
    dtype = torch.float16 if logits is None else logits.dtype
    launch("take_token", dtype, state.tokens.device.index, (batch, 1, 1), params)
