"""Which packed weights have a kernel layout: made by `register`, found by tsld::lowbit_linear, freed with them.

A layout is found by the memory that the packed weight and its scales lie in, so that aliases of them (detached
tensors, inputs of a compiled graph) find it too. Weights that nobody registered run the plain-torch reference.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary, ref

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(eq=False)
class Entry:
    """One kernel layout (`gemm`), and what it was made of."""

    gemm: Any
    options: tuple[Any, ...]
    versions: tuple[int, ...]
    storages: tuple[StorageWeakRef, ...]  # while these live, no other storage has the addresses in the entry's key
    packed: ref[Tensor]  # the tensors that were registered, and where their data lay
    scales: ref[Tensor]
    places: tuple[int, int]

    def fits(self, packed: Tensor, scales: Tensor) -> bool:
        """Whether these very tensors were registered and neither was written or swapped since: quicker than `find`."""
        same: bool = self.packed() is packed and self.scales() is scales
        return (
            same
            and self.places == (packed.data_ptr(), scales.data_ptr())
            and (packed.is_inference() or self.versions[:2] == (packed._version, scales._version))
        )


class KernelRegistry:
    """Kernel layouts of one kind of device.

    Args:
        pack: (packed, scales, zeros, bits, group_size, in_features, *options) -> the layout.
        before_repacking: called before a weight that was changed in place is packed again; may raise.
    """

    def __init__(self, pack: Callable[..., Any], before_repacking: Callable[[], None] = lambda: None) -> None:
        self.entries: WeakValueDictionary[Hashable, Entry] = WeakValueDictionary()
        self.owners: Any = WeakTensorKeyDictionary()  # packed tensor -> its entry, which lives as long
        self._pack, self._before_repacking = pack, before_repacking

    def register(
        self,
        packed: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        bits: int,
        group_size: int,
        in_features: int,
        *options: Any,
    ) -> Entry:
        """Give a packed weight its kernel layout, unless it has one with these options. Not inside a graph capture.

        Raises:
            BackendError: no kernel serves this format or this device, or too little memory.
        """
        weight = (packed, scales, zeros, bits, group_size, in_features)
        key = _key(*weight)
        entry = self.entries.get(key)
        if entry is None or self.find(*weight) is None or entry.options != options:
            storages = tuple(StorageWeakRef(t.untyped_storage()) for t in (packed, scales, zeros) if t is not None)
            gemm = self._pack(*weight, *options)
            places = packed.data_ptr(), scales.data_ptr()
            entry = Entry(gemm, options, _versions(packed, scales, zeros), storages, ref(packed), ref(scales), places)
            self.entries[key] = entry
        self.owners[packed] = entry
        return entry

    def find(
        self, packed: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, in_features: int
    ) -> Any:
        """The kernel layout of a registered weight, made again if the weight was changed in place; else None."""
        entry = self.entries.get(_key(packed, scales, zeros, bits, group_size, in_features))
        if entry is None:
            return None
        versions = _versions(packed, scales, zeros)
        if entry.versions != versions:
            self._before_repacking()
            entry.gemm = self._pack(packed, scales, zeros, bits, group_size, in_features, *entry.options)
            entry.versions = versions
        return entry.gemm


def _key(packed: Tensor, scales: Tensor, zeros: Tensor | None, *numbers: int) -> Hashable:
    return (_place(packed), _place(scales), None if zeros is None else _place(zeros), numbers)


def _place(tensor: Tensor) -> Hashable:
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride()


def _versions(packed: Tensor, scales: Tensor, zeros: Tensor | None) -> tuple[int, ...]:
    """Counters that grow when a tensor is written in place; inference tensors have none."""
    return tuple(0 if t is None or t.is_inference() else t._version for t in (packed, scales, zeros))
