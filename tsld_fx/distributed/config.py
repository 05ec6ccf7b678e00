"""How a run is spread over processes: `ParallelConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from tsld_fx.errors import ConfigError

MODES = ("ddp", "fsdp", "pipeline")
# Name -> class in torch.distributed.pipelining, stages per process, and whether stages fold back (a V).
SCHEDULES: dict[str, tuple[str, int, bool]] = {
    "gpipe": ("GPipe", 1, False),
    "1f1b": ("1F1B", 1, False),
    "interleaved_1f1b": ("Interleaved1F1B", 2, False),
    "zero_bubble": ("InterleavedZeroBubble", 2, False),
    "zbv": ("ZBVZeroBubble", 2, True),
}


@dataclass(frozen=True)
class ParallelConfig:
    """How training is spread over the processes that torchrun started.

    Attributes:
        mode: `ddp` (a whole model per process, through transformers' Trainer), `fsdp` (fully_shard per layer) or
            `pipeline` (consecutive layers per process).
        schedule: of a pipeline: gpipe, 1f1b, interleaved_1f1b, zero_bubble or zbv.
        param_dtype: of fsdp with training.bf16: `float32` gathers the master weights, so that what is quantised is
            exactly what `convert` packs; `bfloat16` gathers rounded ones, half the traffic. Masters stay float32.
    """

    mode: str = "ddp"
    schedule: str = "1f1b"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"parallel.mode={self.mode!r} is not one of {', '.join(MODES)}.")
        if self.param_dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"parallel.param_dtype={self.param_dtype!r} is not 'float32' or 'bfloat16'.")
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"parallel.schedule={self.schedule!r} is not one of {', '.join(SCHEDULES)}.")
        if self.mode == "pipeline":
            schedule_class(self.schedule)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for run.yaml."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ParallelConfig:
        """Read what `to_dict` wrote, or the same shape from YAML.

        Raises:
            ConfigError: an unknown key or value.
        """
        known = [f.name for f in fields(cls)]
        if not isinstance(data, Mapping):
            raise ConfigError(f"parallel: expected a mapping of {', '.join(known)}; got {data!r}.")
        for key in data:
            if key not in known:
                raise ConfigError(f"parallel: unknown key {key!r}. Known keys: {', '.join(known)}.")
        return cls(**data)


def schedule_class(name: str) -> Any:
    """The schedule's class in torch.distributed.pipelining.

    Raises:
        ConfigError: this torch does not have it.
    """
    from torch.distributed.pipelining.schedules import get_schedule_class

    try:
        return get_schedule_class(SCHEDULES[name][0])
    except ValueError:
        raise ConfigError(
            f"parallel.schedule={name!r}: this torch has no schedule {SCHEDULES[name][0]}. "
            "Choose another one or a newer torch."
        ) from None
