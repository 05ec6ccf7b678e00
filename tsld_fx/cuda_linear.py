"""Which packed weights have a CUDA kernel layout: made by `register`, found by tsld::lowbit_linear, freed with them.

A layout is found by the memory that the packed weight and its scales lie in, so that aliases of them (detached
tensors, inputs of a compiled graph) find it too. Weights that nobody registered run the plain-torch reference.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from tsld_fx.errors import BackendError

if TYPE_CHECKING:
    from tsld_fx.codegen import LowBitGemm

KERNEL_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(eq=False)
class _Entry:
    gemm: LowBitGemm
    versions: tuple[int, ...]
    storages: tuple[StorageWeakRef, ...]  # while these live, no other storage has the addresses in the entry's key


_entries: WeakValueDictionary[Hashable, _Entry] = WeakValueDictionary()
_owners: Any = WeakTensorKeyDictionary()  # packed tensor -> its entry, which lives as long


def register(
    packed: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, in_features: int
) -> None:
    """Give a packed weight on a CUDA device its kernel layout, unless it has one. Not inside a graph capture.

    Raises:
        BackendError: no kernel serves this format or this device, or too little memory.
    """
    if find(packed, scales, zeros, bits, group_size, in_features) is None:
        gemm = _pack(packed, scales, zeros, bits, group_size, in_features)
        storages = tuple(StorageWeakRef(t.untyped_storage()) for t in (packed, scales, zeros) if t is not None)
        entry = _Entry(gemm, _versions(packed, scales, zeros), storages)
        _entries[_key(packed, scales, zeros, bits, group_size, in_features)] = entry
    _owners[packed] = _entries[_key(packed, scales, zeros, bits, group_size, in_features)]


def find(
    packed: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, in_features: int
) -> LowBitGemm | None:
    """The kernel layout of a registered weight, made again if the weight was changed in place; else None.

    Raises:
        BackendError: the weight was changed, and a CUDA graph is being captured, which packing cannot be part of.
    """
    entry = _entries.get(_key(packed, scales, zeros, bits, group_size, in_features))
    if entry is None:
        return None
    versions = _versions(packed, scales, zeros)
    if entry.versions != versions:
        if torch.cuda.is_current_stream_capturing():
            raise BackendError(
                "tsld::lowbit_linear: the packed weight was changed in place, and its kernel layout cannot be made "
                "again while a CUDA graph is captured. Run the layer once before the capture."
            )
        entry.gemm = _pack(packed, scales, zeros, bits, group_size, in_features)
        entry.versions = versions
    return entry.gemm


def _pack(
    packed: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, in_features: int
) -> LowBitGemm:
    from tsld_fx.codegen import LowBitGemm

    return LowBitGemm.pack(packed, scales, zeros, bits, group_size, in_features, packed.device)


def _key(packed: Tensor, scales: Tensor, zeros: Tensor | None, *numbers: int) -> Hashable:
    places = (
        None if t is None else (t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride())
        for t in (packed, scales, zeros)
    )
    return (*places, *numbers)


def _versions(*tensors: Tensor | None) -> tuple[int, ...]:
    """Counters that grow when a tensor is written in place; inference tensors have none."""
    return tuple(0 if t is None or t.is_inference() else t._version for t in tensors)
