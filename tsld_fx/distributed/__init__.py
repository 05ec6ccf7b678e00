"""Training over several processes: FSDP2 and pipelines, with the settings, files and results of a single process."""

from __future__ import annotations

from tsld_fx.distributed.config import ParallelConfig
from tsld_fx.distributed.trainer import DistributedTrainer

__all__ = ["DistributedTrainer", "ParallelConfig"]
