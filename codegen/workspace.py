"""Memory for split-K: partial sums (per call) and arrival counters (zero before and after every launch)."""

from __future__ import annotations

import threading
from collections.abc import Hashable

import torch
from torch import Tensor

from tsld_fx.errors import BackendError

COUNTERS_PER_LAUNCH = 2048  # output tiles of one split launch
_SLICES_PER_BLOCK = 256


class _Arena:
    """Zeroed counters of one device, handed out in slices. A slice is never shared by two users.

    Eager launches of one stream run one after another and share a slice. Launches that are captured into a CUDA
    graph get their own slice each, because graphs may be replayed on any stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._free: list[Tensor] = []
        self._by_stream: dict[Hashable, Tensor] = {}

    def grow(self) -> None:
        """Allocate more slices; outside of a capture, so that the zeroing is not part of a graph."""
        block = torch.zeros(_SLICES_PER_BLOCK, COUNTERS_PER_LAUNCH, dtype=torch.int32, device=self._device)
        torch.cuda.synchronize(self._device)
        self._free.extend(block.unbind(0))

    def take(self, stream: int, capturing: bool) -> Tensor:
        with self._lock:
            if not capturing:
                if stream not in self._by_stream:
                    if not self._free:
                        self.grow()
                    self._by_stream[stream] = self._free.pop()
                if len(self._free) < _SLICES_PER_BLOCK // 2:
                    self.grow()
                return self._by_stream[stream]
            if not self._free:  # a captured memset costs a node per replay, but is right
                return torch.zeros(COUNTERS_PER_LAUNCH, dtype=torch.int32, device=self._device)
            return self._free.pop()


_arenas: dict[int, _Arena] = {}
_arenas_lock = threading.Lock()


def prepare(device: torch.device) -> None:
    """Allocate the counters of a device; called when weights are packed, so that a later capture finds them."""
    index = device.index or 0
    with _arenas_lock:
        if index not in _arenas:
            try:
                arena = _Arena(torch.device("cuda", index))
                arena.grow()
            except torch.OutOfMemoryError as error:
                raise BackendError(f"Out of GPU memory while preparing {device}: free some memory. {error}") from error
            _arenas[index] = arena


def split_k_buffers(device: torch.device, floats: int, stream: int) -> tuple[Tensor, Tensor]:
    """-> (partial sums float32 [floats], counters int32 [COUNTERS_PER_LAUNCH]) for one launch on `stream`."""
    prepare(device)
    partial = torch.empty(floats, dtype=torch.float32, device=device)
    return partial, _arenas[device.index or 0].take(stream, torch.cuda.is_current_stream_capturing())
