"""`CpuGemm`: packed low-bit weights of one linear layer in the CPU's kernel layout, and the call that multiplies."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from tsld_fx.codegen.cpu.library import LEVELS, level, library, torch_pool
from tsld_fx.errors import BackendError
from tsld_fx.packing import packed_width
from tsld_fx.quantizers import scale_shape

ACTIVATIONS = ("a16", "int8", "add")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CALL = struct.Struct("=QQQQQqqqiiii")  # tsld_cpu_call of kernels/tsld_cpu.cpp
_get_threads = torch.get_num_threads


def check_activations(name: str) -> None:
    """Refuse an unknown activation mode.

    Raises:
        BackendError: it names those that exist.
    """
    if name not in ACTIVATIONS:
        raise BackendError(f"activations={name!r} is unknown. Use one of {', '.join(map(repr, ACTIVATIONS))}.")


@dataclass(eq=False)
class CpuGemm:
    """y = x @ dequantised(weights).T + bias for float32, bfloat16 or float16 x on the CPU.

    The result has the same bits whatever the number of threads, the kernels' level and the other rows of x.

    Attributes:
        data: uint8, the kernel layout (kernels/tsld_cpu.h describes it), 64-byte aligned.
        activations: `a16`, `int8` or `add`; may be changed at any time.
        level: which of LEVELS runs, by index.
    """

    data: Tensor
    out_features: int
    in_features: int
    activations: str
    level: int

    def __post_init__(self) -> None:
        pool = torch_pool()
        self._linear = library().tsld_cpu_linear
        self._pointer = self.data.data_ptr()
        self._pool = ctypes.addressof(pool) if pool is not None else 0

    @classmethod
    def pack(
        cls,
        packed: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        bits: int,
        group_size: int,
        in_features: int,
        activations: str = "a16",
        use_level: str | None = None,
    ) -> CpuGemm:
        """Bring one layer in the canonical packed format into the kernel layout. Runs on one core.

        Args:
            packed: uint8 [out, ceil(in * bits / 8)]; scales and zeros as in tsld::lowbit_linear.
            use_level: one of LEVELS instead of the best that the CPU has.

        Raises:
            BackendError: no kernel can be built here, no such level or activation mode, or tensors of another format.
        """
        check_activations(activations)
        _check_format(packed, scales, zeros, bits, group_size, in_features)
        lib, rows = library(), packed.shape[0]
        best = int(lib.tsld_cpu_level())
        if use_level is not None and use_level not in LEVELS[: best + 1]:
            raise BackendError(f"level {use_level!r}: this CPU runs {', '.join(LEVELS[: best + 1])}.")
        if not rows or not in_features:
            raise BackendError(f"no CPU kernel for a layer of {rows} x {in_features} features; run the reference.")
        packed, scales = packed.detach().contiguous(), scales.detach().float().contiguous()
        zeros = None if zeros is None else zeros.detach().contiguous()
        group = group_size if group_size > 0 else in_features
        data = _aligned(lib.tsld_cpu_packed_bytes(bits, rows, in_features, group, int(zeros is not None)))
        lib.tsld_cpu_pack(
            bits, rows, in_features, group, packed.data_ptr(), scales.data_ptr(), int(group_size != -1),
            None if zeros is None else zeros.data_ptr(), data.data_ptr(),
        )  # fmt: skip
        return cls(data, rows, in_features, activations, level() if use_level is None else LEVELS.index(use_level))

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in_features] -> [..., out_features] in x's dtype, on torch's threads. bias: any float dtype.

        Raises:
            BackendError: x is of another size, or memory ran out.
        """
        if x.shape[-1] != self.in_features:
            raise BackendError(
                f"tsld::lowbit_linear: the input has {x.shape[-1]} features, the packed weight {self.in_features}. "
                "Give activations of the layer that this weight was packed from."
            )
        if not x.is_contiguous():
            x = x.contiguous()
        y = x.new_empty((*x.shape[:-1], self.out_features))
        offsets = None if bias is None else bias.float().contiguous()
        failed = self._linear(
            _CALL.pack(
                self._pointer, self._pool, x.data_ptr(), 0 if offsets is None else offsets.data_ptr(), y.data_ptr(),
                self.in_features, self.out_features, x.numel() // self.in_features,
                self.level, ACTIVATIONS.index(self.activations), _DTYPES[x.dtype],
                _get_threads() if self._pool else 1,
            )
        )  # fmt: skip
        if failed:
            raise BackendError("tsld::lowbit_linear: out of memory for the activations. Give fewer tokens at once.")
        return y


def _check_format(
    packed: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, in_features: int
) -> None:
    if bits not in (2, 4, 8) or (group_size > 0 and in_features % group_size):
        raise BackendError(
            f"the CPU kernels take 2, 4 or 8 bits and groups that divide a row, not {bits} bits and groups of "
            f"{group_size} in {in_features}."
        )
    width, shape = packed_width(in_features, bits), scale_shape(packed.shape[0], in_features, group_size)
    right = packed.dtype == torch.uint8 and tuple(packed.shape) == (packed.shape[0], width)
    right = right and tuple(scales.shape) == shape and scales.is_floating_point()
    if not right or (zeros is not None and (zeros.dtype != torch.uint8 or tuple(zeros.shape) != shape)):
        found = [f"{t.dtype} {list(t.shape)}" for t in (packed, scales, zeros) if t is not None]
        raise BackendError(
            f"the CPU kernels take packed uint8 {[packed.shape[0], width]}, float scales {list(shape)} and uint8 zeros "
            f"of the same shape; got {', '.join(found)}. Give what tsld_fx.packing.pack makes."
        )


def _aligned(size: int) -> Tensor:
    """Uninitialised uint8 [size] that starts at a multiple of 64 bytes, of 2 MiB if large."""
    step = 2 << 20 if size >= 2 << 20 else 64
    room = torch.empty(size + step, dtype=torch.uint8)
    start = -room.data_ptr() % step
    library().tsld_cpu_large_pages(room.data_ptr() + start, size)
    return room[start : start + size]
