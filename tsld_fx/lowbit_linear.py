"""LowBitLinear: a linear layer over a packed weight, in place of nn.Linear or GPT-2's Conv1D."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tsld_fx import cpu_linear, cuda_linear, ops  # noqa: F401  (ops registers tsld::lowbit_linear)
from tsld_fx.errors import CheckpointError
from tsld_fx.packing import dequantize, packed_width
from tsld_fx.quantizers import scale_shape


class LowBitLinear(nn.Module):
    """y = x W^T + b with W packed; computes through torch.ops.tsld.lowbit_linear.

    Buffers: `weight_packed` uint8 [out, bytes], `weight_scale` float32 [out, groups], [out, 1] or [1, 1],
    `weight_zero` uint8 in the scales' shape (affine, asymmetric only). Parameter: `bias` [out] or None.
    The packed weight and its scales keep their dtypes under `.half()` and `.to(dtype)`.

    With `use_kernels()` the layer runs the kernels of one kind of device wherever it lies on one: their copy of the
    weight is made when the layer arrives there, is no part of its state, and is freed with it.
    """

    kernels: str | None = None  # whose kernels run: those of "cpu" or "cuda", or "tvm"'s on the CPU
    activations = "a16"  # how the CPU's kernels take x
    _entry: Any = None  # the CPU's kernel layout, while the layer is there

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int,
        *,
        zero: bool = False,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if bits not in (2, 4, 8):
            raise CheckpointError(f"LowBitLinear: bits={bits!r} is not 2, 4 or 8.")
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size = bits, group_size
        shape = scale_shape(out_features, in_features, group_size)
        packed = torch.zeros(out_features, packed_width(in_features, bits), dtype=torch.uint8, device=device)
        self.register_buffer("weight_packed", packed)
        self.register_buffer("weight_scale", torch.zeros(shape, dtype=torch.float32, device=device))
        zeros = torch.zeros(shape, dtype=torch.uint8, device=device) if zero else None
        self.register_buffer("weight_zero", zeros)
        made = (
            nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype), requires_grad=False) if bias else None
        )
        self.register_parameter("bias", made)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features] in the dtype of x."""
        if not torch.compiler.is_compiling() and self._entry is not None and cpu_linear.is_plain_call(x):
            buffers = self._buffers
            if buffers["weight_zero"] is None and self._entry.fits(buffers["weight_packed"], buffers["weight_scale"]):
                return self._entry.gemm(x, self._parameters["bias"])  # what the operator would do, a third of its time
        return torch.ops.tsld.lowbit_linear(
            x, self.weight_packed, self.weight_scale, self.weight_zero, self.bias,
            self.bits, self.group_size, self.in_features,
        )  # fmt: skip

    def use_kernels(self, device_type: str = "cuda", activations: str = "a16") -> None:
        """Run kernels from now on: on `cuda` for fp16 and bf16 activations, on `cpu` for these and float32.

        Args:
            activations: `a16`, `int8`, `fp8` or `add`, see `convert`.

        Raises:
            BackendError: no kernel serves this layer or its device, or too little memory.
        """
        self.kernels, self.activations = device_type, activations
        self._register()

    def _register(self) -> None:
        packed, self._entry = self.weight_packed, None
        place = "cpu" if self.kernels == "tvm" else self.kernels
        if place != packed.device.type or type(packed) is not Tensor:  # no fake tensors
            return
        weight = (packed, self.weight_scale, self.weight_zero, self.bits, self.group_size, self.in_features)
        if self.kernels == "cuda":
            cuda_linear.register(*weight, self.activations)
        else:
            self._entry = cpu_linear.register(*weight, "tvm" if self.kernels == "tvm" else self.activations)

    def dequantize(self) -> Tensor:
        """The float32 weight [out_features, in_features] that the codes stand for."""
        return dequantize(
            self.weight_packed,
            self.weight_scale,
            self.weight_zero,
            self.bits,
            self.group_size,
            self.in_features,
        )

    @property
    def weight(self) -> Tensor:
        """The dequantised weight, for code that reads `layer.weight`; made anew each time, writing to it does nothing.

        It says of itself that it is initialised: some `_init_weights` (GPT-2's) reach for their children's weights.
        """
        dense = self.dequantize()
        dense._is_hf_initialized = True
        return dense

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        scale = self.weight_scale
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != torch.float32:
            self.weight_scale = scale.to(self.weight_scale.device)
        self._register()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_entry"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._register()  # deep copies

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._register()

    def extra_repr(self) -> str:
        """Shape and format, as `print(model)` shows them."""
        groups = {0: "channel", -1: "tensor"}.get(self.group_size, f"group {self.group_size}")
        kind = "ternary" if self.bits == 2 else f"{self.bits}-bit"
        return f"{self.in_features}, {self.out_features}, {kind}, per {groups}, bias={self.bias is not None}"
