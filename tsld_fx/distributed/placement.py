"""Which layers make a pipeline stage, and which process runs it."""

from __future__ import annotations

from dataclasses import dataclass

from tsld_fx.distributed.config import SCHEDULES
from tsld_fx.errors import ConfigError


@dataclass(frozen=True)
class Placement:
    """The stages of a pipeline.

    Attributes:
        bounds: stage s runs layers bounds[s] .. bounds[s + 1] - 1.
        rank_of: the process of each stage.
    """

    bounds: tuple[int, ...]
    rank_of: tuple[int, ...]

    @property
    def stages(self) -> int:
        return len(self.rank_of)

    def mine(self, rank: int) -> list[int]:
        """The stages of one process."""
        return [stage for stage, owner in enumerate(self.rank_of) if owner == rank]


def place(layers: int, world_size: int, schedule: str) -> Placement:
    """Spread layers evenly over the stages of a schedule, in a loop over the processes or in a V.

    Raises:
        ConfigError: more stages than layers.
    """
    _, per_rank, fold = SCHEDULES[schedule]
    stages = world_size * per_rank
    if stages > layers:
        most = max(layers // per_rank, 1)
        raise ConfigError(
            f"pipeline: {layers} layers cannot be staged over {world_size} processes with schedule {schedule!r}, which "
            f"needs {stages} stages of at least one layer. Start at most {most} process{'es' if most > 1 else ''}"
            + ("." if per_rank == 1 else ", or use 1f1b, with one stage per process.")
        )
    bounds = tuple(round(stage * layers / stages) for stage in range(stages + 1))
    turn = lambda s: 2 * world_size - 1 - s if fold and s >= world_size else s % world_size  # noqa: E731
    return Placement(bounds, tuple(turn(stage) for stage in range(stages)))


def check_micro_batches(count: int, world_size: int, schedule: str) -> None:
    """Refuse a number of micro-batches that the schedule cannot run.

    Raises:
        ConfigError: it names the setting.
    """
    where = f"pipeline: gradient_accumulation_steps={count} is the number of micro-batches of a step; "
    if schedule == "1f1b" and count < world_size:
        raise ConfigError(f"{where}1f1b needs at least one per process ({world_size}).")
    if schedule in ("interleaved_1f1b", "zero_bubble") and count % world_size:
        raise ConfigError(f"{where}{schedule} needs a multiple of the number of processes ({world_size}).")
    if schedule == "zbv" and count < 2 * world_size:
        raise ConfigError(f"{where}zbv needs at least two per process ({2 * world_size}).")
