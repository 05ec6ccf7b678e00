"""Training over several processes: FSDP2 and pipelines, with the settings, files and results of a single process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tsld_fx.distributed.config import ParallelConfig

if TYPE_CHECKING:
    from tsld_fx.distributed.trainer import DistributedTrainer

__all__ = ["DistributedTrainer", "ParallelConfig"]


def __getattr__(name: str) -> Any:
    """Import the trainer on first use: settings need only the configuration."""
    if name == "DistributedTrainer":
        from tsld_fx.distributed.trainer import DistributedTrainer

        return DistributedTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
