"""Linear layers of a runtime module: weights in kernel layout, computed by the module's own compiled library."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tsld_fx.errors import BackendError

torch.library.define(
    "tsld::kernel_linear",
    "(Tensor x, Tensor codes, Tensor? meta, Tensor row_scale, Tensor? row_zero, Tensor? bias, str library, "
    "str function, int out_features) -> Tensor",
)


class KernelLibrary:
    """The compiled kernels of one runtime module. Opening it needs no GPU; calling does."""

    def __init__(self, path: Path) -> None:
        try:
            import tvm_ffi
        except ImportError:
            raise BackendError(
                f"{path}: a runtime module is called through tvm-ffi. Run `pip install apache-tvm-ffi`."
            ) from None
        try:
            self._module = tvm_ffi.load_module(str(path))
        except Exception as error:
            raise BackendError(
                f"{path}: cannot be opened ({error}). Build the module again on a machine with this system's "
                "libraries and this version of apache-tvm-ffi."
            ) from error
        self._functions: dict[str, Any] = {}
        self._plans: dict[tuple[str, int, int], tuple[int, ...]] = {}

    def function(self, name: str) -> Any:
        """A function of the library.

        Raises:
            BackendError: the library has no such function: it was built for other shapes.
        """
        if name not in self._functions:
            if not self._module.implements_function(name):
                raise BackendError(
                    f"the runtime module has no function {name!r}: it was built for other shapes. Build it again."
                )
            self._functions[name] = self._module[name]
        return self._functions[name]

    def plan(self, name: str, tokens: int, capability: int, multiprocessors: int) -> tuple[int, ...]:
        """What a call launches: kernel, splits, grid (3), shared bytes, floats of partial sums, counters."""
        return tuple(int(v) for v in self.function(f"{name}_plan")(tokens, capability, multiprocessors))

    def workspace(self, name: str, tokens: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Partial sums and counters of one call on the current stream, None where it needs none."""
        from tsld_fx.codegen import workspace

        key = (name, tokens, device.index)
        if key not in self._plans:
            properties = torch.cuda.get_device_properties(device)
            capability = 10 * properties.major + properties.minor
            self._plans[key] = self.plan(name, tokens, capability, properties.multi_processor_count)
        _, splits, *_, floats, _ = self._plans[key]
        if splits == 1 or floats == 0:
            return None, None
        return workspace.split_k_buffers(device, floats, torch.cuda.current_stream(device).cuda_stream)


@lru_cache(maxsize=64)
def open_library(path: str) -> KernelLibrary:
    """The library at `path`, opened once per process.

    Raises:
        BackendError: it cannot be opened, or tvm-ffi is missing.
    """
    return KernelLibrary(Path(path))


@torch.library.impl("tsld::kernel_linear", "cuda")
def _kernel_linear(
    x: Tensor, codes: Tensor, meta: Tensor | None, row_scale: Tensor, row_zero: Tensor | None, bias: Tensor | None,
    library: str, function: str, out_features: int,
) -> Tensor:  # fmt: skip
    from tsld_fx.codegen.activations import aligned_rows

    if codes.device != x.device:
        raise BackendError(f"the input is on {x.device}, the weights on {codes.device}. Move one with .to(device).")
    opened = open_library(library)
    y = torch.empty(*x.shape[:-1], out_features, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    rows = aligned_rows(x.detach().reshape(-1, x.shape[-1]))
    try:
        partial, counters = opened.workspace(function, rows.shape[0], x.device)
        opened.function(function)(
            rows, codes, meta, row_scale, row_zero, bias, y.view(-1, out_features), partial, counters
        )
    except (RuntimeError, ValueError, TypeError) as error:
        raise BackendError(f"runtime module: {error}") from error
    return y


@torch.library.impl("tsld::kernel_linear", "cpu")
def _kernel_linear_cpu(x: Tensor, codes: Tensor, *rest: Any) -> Tensor:
    raise BackendError(
        f"a runtime module holds CUDA kernels; the input is on {x.device}, the weights on {codes.device}. Move the "
        "model and its input to a CUDA device, or load a checkpoint of the model instead."
    )


@torch.library.register_fake("tsld::kernel_linear")
def _(x: Tensor, codes: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], rest[-1]))


class RuntimeLinear(nn.Module):
    """y = x W^T + b with W in kernel layout (`codegen/layout.py`).

    Buffers: `weight_codes` uint8, `weight_row_scale` float32, and where the format has them `weight_meta` uint8
    (scales per group) and `weight_row_zero` uint8. Parameter: `bias` [out] or None.
    """

    weight_codes: Tensor
    weight_row_scale: Tensor
    weight_meta: Tensor | None
    weight_row_zero: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, shapes: dict[str, int], bias: bool, function: str, library: str,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        """An empty layer on the meta device; `shapes`: buffer name (without `weight_`) -> number of elements."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.function, self.library = function, library
        for name in ("codes", "row_scale", "meta", "row_zero"):
            kind = torch.float32 if name == "row_scale" else torch.uint8
            made = torch.empty(shapes[name], dtype=kind, device="meta") if name in shapes else None
            self.register_buffer(f"weight_{name}", made)
        made = torch.empty(out_features, dtype=dtype, device="meta") if bias else None
        self.register_parameter("bias", None if made is None else nn.Parameter(made, requires_grad=False))
        self.dtype = dtype

    @property
    def weight(self) -> Tensor:
        """Shape and type [out, in] of the weight, on the meta device: the module holds no dense weight.

        It says of itself that it is initialised: some `_init_weights` (GPT-2's) reach for their children's weights.
        """
        made = torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")
        made._is_hf_initialized = True  # type: ignore[attr-defined]
        return made

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], fp16 or bf16 as the module was built."""
        return torch.ops.tsld.kernel_linear(
            x, self.weight_codes, self.weight_meta, self.weight_row_scale, self.weight_row_zero, self.bias,
            self.library, self.function, self.out_features,
        )  # fmt: skip

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        scale = self.weight_row_scale
        super()._apply(fn, recurse)
        if self.weight_row_scale.dtype != torch.float32:
            self.weight_row_scale = scale.to(self.weight_row_scale.device)
        return self

    def extra_repr(self) -> str:
        """Shape and function, as `print(model)` shows them."""
        return f"{self.in_features}, {self.out_features}, {self.function}, bias={self.bias is not None}"
