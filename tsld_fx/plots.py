"""PNG plots of training runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Metrics = Sequence[Mapping[str, Any]]


def plot_run(metrics: Metrics, folder: str | Path) -> list[Path]:
    """Training losses over steps and validation perplexity over epochs; returns the files written."""
    folder = Path(folder)
    names = sorted({k for line in metrics for k in line if k == "loss" or k.startswith("loss_")})
    losses = {name: [(m["step"], m[name]) for m in metrics if name in m] for name in names}
    files = [_lines(losses, folder / "loss.png", "optimiser step", "training loss")]
    evaluations = {"validation": _perplexities(metrics)}
    files.append(_lines(evaluations, folder / "perplexity.png", "epoch", "perplexity"))
    return [file for file in files if file is not None]


def plot_comparison(runs: Mapping[str, Metrics], file: str | Path, levels: Mapping[str, float]) -> Path | None:
    """Validation perplexity per epoch of several methods; `levels` are drawn as horizontal lines."""
    curves = {name: _perplexities(metrics) for name, metrics in runs.items()}
    return _lines(curves, Path(file), "epoch", "validation perplexity", levels)


def plot_bars(values: Mapping[str, float], file: str | Path, label: str) -> Path:
    """One bar per name."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    bars = axes.bar(list(values), list(values.values()), color=["#4c72b0", "#c44e52", "#55a868", "#8172b3"])
    axes.bar_label(bars, fmt="%.2f")
    axes.set_ylabel(label)
    return save_figure(plt, figure, Path(file))


def _perplexities(metrics: Metrics) -> list[tuple[float, float]]:
    return [(m["epoch"], m["eval_perplexity"]) for m in metrics if "eval_perplexity" in m]


def pyplot() -> Any:
    """matplotlib without a window."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _lines(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    file: Path,
    x_label: str,
    y_label: str,
    levels: Mapping[str, float] | None = None,
) -> Path | None:
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return None
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), label=name, marker="o" if len(points) < 30 else None, markersize=3)
    for index, (name, level) in enumerate((levels or {}).items()):
        axes.axhline(level, linestyle="--", linewidth=1, color=f"C{7 + index}", label=name)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    return save_figure(plt, figure, file)


def save_figure(plt: Any, figure: Any, file: Path) -> Path:
    """Write a figure as PNG, whole or not at all, and forget it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}")
    figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
    temporary.replace(file)
    return file
