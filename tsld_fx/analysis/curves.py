"""Training and validation loss over epochs, from run folders: which method overfits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsld_fx.errors import AnalysisError
from tsld_fx.runs import read_metrics


@dataclass(frozen=True)
class LossCurves:
    """One run.

    Attributes:
        name: the folder's name.
        training: (epoch, cross-entropy with the ground truth on training batches, nats); from `loss_gt`, or from
            `loss` where that is the only term. Empty for objectives without ground truth.
        objective: (epoch, the whole training loss).
        validation: (epoch, cross-entropy with the ground truth, nats).
    """

    name: str
    training: list[tuple[float, float]]
    objective: list[tuple[float, float]]
    validation: list[tuple[float, float]]

    def overfitting(self) -> float | None:
        """Last validation loss minus the lowest one; None without validation."""
        values = [loss for _, loss in self.validation]
        return values[-1] - min(values) if values else None

    def rows(self) -> list[dict[str, Any]]:
        """One mapping per logged value, as `curves.csv` has them."""
        curves = {"training": self.training, "objective": self.objective, "validation": self.validation}
        return [
            {"run": self.name, "curve": c, "epoch": e, "loss": v} for c, points in curves.items() for e, v in points
        ]


def read_curves(folder: str | Path, name: str | None = None) -> LossCurves:
    """The curves in a run folder's metrics.jsonl.

    Raises:
        AnalysisError: not a run folder, or nothing logged yet.
    """
    folder = Path(folder)
    lines = read_metrics(folder / "metrics.jsonl")
    if not lines:
        raise AnalysisError(
            f"{folder}: no metrics.jsonl with log lines in it. Give the folder of a finetune or train run."
        )
    terms = {key for line in lines for key in line if key.startswith("loss_")}
    truth = "loss_gt" if "loss_gt" in terms else ("loss" if not terms else None)
    return LossCurves(
        name or folder.resolve().name,
        [] if truth is None else [(m["epoch"], m[truth]) for m in lines if truth in m],
        [(m["epoch"], m["loss"]) for m in lines if "loss" in m],
        [(m["epoch"], m["eval_loss"]) for m in lines if "eval_loss" in m],
    )
