"""`LowBitGemm`: packed low-bit weights of one linear layer on a GPU, and the call that multiplies with them."""

from __future__ import annotations

import contextlib
import ctypes
import math
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from tsld_fx.codegen import workspace
from tsld_fx.codegen.activations import QuantisedActivations, aligned_rows, check_inputs
from tsld_fx.codegen.build import loaded_kernel
from tsld_fx.codegen.devices import cuda_device, device_facts
from tsld_fx.codegen.driver import LoadedKernel, ensure_context, tensor_map
from tsld_fx.codegen.layout import KernelWeights, to_kernel_layout
from tsld_fx.codegen.quantise import quantise_tokens
from tsld_fx.codegen.select_config import Plan, choose, whole_splits
from tsld_fx.codegen.spec import Activation, KernelSpec, Quantised
from tsld_fx.errors import BackendError

QUANTISED_TOKENS = 1024  # from so many tokens on, rounding activations to 8 bits is faster than not (docs/cuda.md)
_KEPT = 512  # numbers of tokens whose launches are kept prepared, per layer


class GemmParams(ctypes.Structure):
    """Arguments of a kernel; mirrors `cuda_templates/tsld/params.cuh`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weights", "meta", "row_scale", "row_zero", "bias", "y")),
        *((name, ctypes.c_void_p) for name in ("partial", "counters")),
        ("ldx", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("m", "n", "k", "row_tiles", "chunks", "chunks_per_split")),
        *((name, ctypes.c_void_p) for name in ("x_scale", "norm_weight", "residual", "total")),
        ("eps", ctypes.c_float),
    ]


@dataclass(frozen=True)
class _Prepared:
    """What launches with one number of tokens share."""

    plan: Plan
    spec: KernelSpec
    kernel: LoadedKernel
    grid: tuple[int, int, int]
    shared: int
    floats: int  # of partial sums; 0 without a split


class LowBitGemm:
    """y = x @ dequantised(weights).T + bias for fp16 or bf16 x, accumulated in float32, rounded once.

    target: what to build kernels for; default the device's own architecture. "compute_80" builds PTX that the
    driver compiles (how the A100 code path is tested on a newer GPU).
    """

    def __init__(self, weights: KernelWeights, device: torch.device, target: str | None = None) -> None:
        self.device = device
        native, self._multiprocessors = device_facts(device.index)
        self._target = target or native
        self.weights = weights
        self._overlap = self.spec("fp16").capability >= 90  # the code for sm_80 does not wait for earlier kernels
        self._prepared: dict[tuple[int, Activation, Quantised | None, bool, bool], _Prepared] = {}
        self.rounding: Quantised | None = None  # of calls with QUANTISED_TOKENS tokens or more

    @classmethod
    def pack(
        cls,
        packed: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        bits: int,
        group_size: int,
        in_features: int,
        device: torch.device | str | int = "cuda",
        target: str | None = None,
    ) -> LowBitGemm:
        """Take one layer in the canonical packed format (see `layout`) to `device`, in kernel layout."""
        where = cuda_device(device)
        device_facts(where.index)
        try:
            parts = [None if t is None else t.detach().to(where) for t in (packed, scales, zeros)]
            assert parts[0] is not None and parts[1] is not None
            weights = to_kernel_layout(parts[0], parts[1], parts[2], bits, group_size, in_features)
            workspace.prepare(where)
            torch.cuda.synchronize(where)  # kernels prefetch weights before they wait for the stream
        except torch.OutOfMemoryError as error:
            raise BackendError(
                f"Out of memory on {where} while packing {list(packed.shape)} weights of {bits} bits. Free GPU memory, "
                f"or pack on another device. ({error})"
            ) from error
        return cls(weights, where, target)

    def round_activations(self, mode: str) -> None:
        """Round x of later calls to 8 bits (`int8`, `fp8`) where that has kernels and pays; other modes keep x.

        It has kernels for ternary weights with one scale per row on Hopper, and pays from QUANTISED_TOKENS tokens on.
        """
        serves = self.weights.bits == 2 and not self.weights.group and self.spec("fp16").hopper
        self.rounding = next((kind for kind in get_args(Quantised) if serves and kind == mode), None)

    def plan(self, m: int, activation: Activation = "fp16", quantise: Quantised | None = None) -> Plan:
        """The configuration that a call with `m` tokens runs."""
        weights = self.weights
        return choose(
            self.spec(activation, quantise), weights.out_features, weights.in_features, max(m, 1), self._multiprocessors
        )

    def spec(self, activation: Activation, quantise: Quantised | None = None) -> KernelSpec:
        """What a call with such activations computes."""
        return KernelSpec(activation, self.weights.bits, self.weights.group, self._target, quantise)

    def quantise(self, x: Tensor, kind: Quantised) -> QuantisedActivations:
        """x [..., in_features] rounded to 8 bits (`int8`, `fp8`), for calls of this layer and of others that take the
        same inputs: `gemm(gemm.quantise(x, kind))` has the bits of `gemm(x, quantise=kind)`.

        One scale per token: its largest magnitude over 127 (int8) or 448 (fp8). On the current stream.
        """
        activation = check_inputs(x, None, kind, self.weights, self.device)
        with self._current_device():
            return quantise_tokens(x, self.spec(activation, kind))

    def __call__(
        self,
        x: Tensor | QuantisedActivations,
        bias: Tensor | None = None,
        *,
        plan: Plan | None = None,
        overlap: bool | None = None,
        quantise: Quantised | None = None,
    ) -> Tensor:
        """x [..., in_features] -> [..., out_features], on the current stream; any strides, any number of tokens.

        x: fp16 or bf16, or what `quantise` made of such. plan: run this configuration instead of the chosen one
        (tuning). overlap: False launches without overlap with the kernel before (see `LoadedKernel.launch`); otherwise
        Hopper and later overlap. quantise: round x to 8 bits first, one scale per token (its largest magnitude):
        faster with many tokens, and inexact; default what `round_activations` says.
        """
        activation = check_inputs(x, bias, quantise, self.weights, self.device)
        m, kind = math.prod(x.shape[:-1]), quantise
        if isinstance(x, QuantisedActivations):
            kind = x.kind
        elif kind is None and plan is None and m >= QUANTISED_TOKENS:
            kind = self.rounding
        if kind is not None:
            self.spec(activation, kind)  # refuses what these weights or this GPU have no kernel for
        y = torch.empty(*x.shape[:-1], self.weights.out_features, dtype=x.dtype, device=self.device)
        if y.numel() == 0:
            return y
        if self.weights.in_features == 0:
            return y.copy_(bias) if bias is not None else y.zero_()
        with self._current_device():
            prepared = self._prepare(m, activation, kind, plan)  # refuses a plan that does not fit
            if kind is not None and isinstance(x, Tensor):
                x = quantise_tokens(x, prepared.spec)
            if isinstance(x, QuantisedActivations):
                self._launch(x.values.view(m, -1), x.scales, bias, y, prepared, overlap)
            else:
                self._launch(aligned_rows(x.reshape(m, -1)), None, bias, y, prepared, overlap)
        return y

    def _current_device(self) -> contextlib.AbstractContextManager[object]:
        """Makes the layer's device the current one; switching takes longer than asking."""
        if torch.cuda.current_device() == self.device.index:
            return contextlib.nullcontext()
        return torch.cuda.device(self.device)

    def _prepare(
        self,
        m: int,
        activation: Activation,
        quantise: Quantised | None,
        plan: Plan | None = None,
        norm: bool = False,
        gated: bool = False,
    ) -> _Prepared:
        """Kernel and launch shape for `m` tokens; those of the chosen plan are kept."""
        key = (m, activation, quantise, norm, gated)
        found = self._prepared.get(key) if plan is None else None
        if found is not None:
            return found
        spec = replace(self.spec(activation, quantise), norm=norm, gated=gated)
        tiles, chip = self.weights.row_tiles, self._multiprocessors
        chosen = plan or self.plan(m, activation, quantise)
        if chosen.splits > 1 and chosen.counters(m, tiles, chip) > workspace.COUNTERS_PER_LAUNCH:
            raise BackendError(f"{chosen} splits more than {workspace.COUNTERS_PER_LAUNCH} output tiles; use splits=1.")
        if chosen.config.cluster and (whole := whole_splits(chosen, self.weights.chunks)) != chosen:
            raise BackendError(
                f"{chosen}: blocks of a cluster would not share inputs and tokens equally; use splits={whole.splits}."
            )
        if chosen.splits > 1 and chosen.config.digits:
            raise BackendError(f"{chosen}: kernels over digits of x add up all inputs in one block; use splits=1.")
        made = _Prepared(
            chosen, spec, loaded_kernel(spec, chosen.config, self.device.index), chosen.grid(m, tiles, chip),
            chosen.shared_bytes(spec, m, tiles, self.weights.chunks, chip),
            chosen.partial_floats(m, tiles) if chosen.splits > 1 else 0,
        )  # fmt: skip
        if plan is None:
            if len(self._prepared) >= _KEPT:
                self._prepared.clear()
            self._prepared[key] = made
        return made

    def _launch(
        self, rows: Tensor, x_scale: Tensor | None, bias: Tensor | None, y: Tensor, prepared: _Prepared,
        overlap: bool | None = None, norm: tuple[Tensor, Tensor | None, Tensor | None, float] | None = None,
    ) -> None:  # fmt: skip
        """Enqueue one kernel; rows [m, k] with 16-byte aligned rows, or quantised ones with their scales [m].

        norm: (weight, residual, where x + residual goes, eps) of kernels that normalise x.
        """
        weights, m, plan = self.weights, rows.shape[0], prepared.plan
        stream = torch.cuda.current_stream(self.device).cuda_stream
        partial: Tensor | None = None
        counters: Tensor | None = None
        if prepared.floats:
            partial, counters = workspace.split_k_buffers(self.device, prepared.floats, stream)
        bias = None if bias is None else bias.contiguous()
        params = GemmParams(
            *(
                None if t is None else t.data_ptr()
                for t in (rows, weights.codes, weights.meta, weights.row_scale, weights.row_zero, bias, y)
            ),
            None if partial is None else partial.data_ptr(),
            None if counters is None else counters.data_ptr(),
            rows.stride(0) if m > 1 else -(-rows.shape[1] // 8) * 8,
            *(m, weights.out_features, weights.in_features, weights.row_tiles, weights.chunks),
            -(-weights.chunks // plan.splits),
            None if x_scale is None else x_scale.data_ptr(),
            *(None if t is None else t.data_ptr() for t in (norm[:3] if norm else ())),
        )
        if norm:
            params.eps = norm[3]
        ensure_context(self.device.index)
        arguments: list[ctypes.Structure] = [params]
        if plan.config.tensor_copies:
            shape = (m, rows.shape[1], params.ldx)
            arguments.append(tensor_map(rows.data_ptr(), rows.dtype, *shape, plan.config.tokens))
        overlaps = self._overlap and overlap is not False
        cluster = (1, 1, plan.splits) if plan.config.cluster and plan.splits > 1 else None
        prepared.kernel.launch(prepared.grid, prepared.shared, arguments, stream, overlap=overlaps, cluster=cluster)
