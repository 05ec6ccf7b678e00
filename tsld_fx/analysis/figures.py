"""Figures as plain data, drawn by matplotlib (PNG) and by plotly (interactive HTML)."""

from __future__ import annotations

import html
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tsld_fx.plots import pyplot, save_figure
from tsld_fx.whole_files import write_whole

Points = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True)
class Lines:
    """Curves over one axis: name -> (x, y); `dots` are drawn as a cloud behind them."""

    name: str
    title: str
    x: str
    y: str
    curves: Mapping[str, Points]
    dots: Mapping[str, Points] = field(default_factory=dict)
    log_y: bool = False


@dataclass(frozen=True)
class Maps:
    """Matrices side by side: rows[i][j] is (title, [n, m]); titles that end with 'difference' are centred on 0."""

    name: str
    title: str
    x: str
    y: str
    rows: Sequence[Sequence[tuple[str, Tensor]]]


Figure = Lines | Maps


def has_plotly() -> bool:
    """Whether interactive figures can be made here."""
    return importlib.util.find_spec("plotly") is not None


# ---------------------------------------------------------------- PNG
def draw_png(figure: Figure, folder: Path) -> Path:
    """Write `folder`/<name>.png."""
    plt = pyplot()
    drawn = _png_lines(plt, figure) if isinstance(figure, Lines) else _png_maps(plt, figure)
    return save_figure(plt, drawn, folder / f"{figure.name}.png")


def _png_lines(plt: Any, figure: Lines) -> Any:
    drawn, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, (xs, ys) in figure.dots.items():
        axes.scatter(xs, ys, s=4, alpha=0.25, linewidths=0, color="grey", label=name)
    colours = plt.get_cmap("viridis")
    for index, (name, (xs, ys)) in enumerate(figure.curves.items()):
        many = len(figure.curves) > 6
        colour = colours(index / max(len(figure.curves) - 1, 1)) if many else f"C{index}"
        style = "--" if "local" in name or "training" in name else "-"
        axes.plot(xs, ys, style, label=name, color=colour, linewidth=1.3, marker="o" if len(xs) < 12 else None)
    axes.set(title=figure.title, xlabel=figure.x, ylabel=figure.y)
    if figure.log_y:
        axes.set_yscale("log")
    axes.legend(fontsize="x-small", ncols=2 if len(figure.curves) > 6 else 1)
    axes.grid(alpha=0.3)
    return drawn


def _png_maps(plt: Any, figure: Maps) -> Any:
    height, width = len(figure.rows), max(len(row) for row in figure.rows)
    drawn, grid = plt.subplots(height, width, figsize=(3.2 * width, 3 * height), layout="constrained", squeeze=False)
    for row, axes_row in zip(figure.rows, grid, strict=True):
        for (title, values), axes in zip(row, axes_row, strict=False):
            limit = float(values.abs().amax()) or 1.0
            colours = {"cmap": "RdBu", "vmin": -limit, "vmax": limit} if title.endswith("difference") else {}
            drawn.colorbar(axes.imshow(values.numpy(), aspect="auto", **colours), ax=axes, shrink=0.8)
            axes.set_title(title, fontsize="small")
            axes.tick_params(labelsize="x-small")
    drawn.supxlabel(figure.x, fontsize="small")
    drawn.supylabel(figure.y, fontsize="small")
    return drawn


# ---------------------------------------------------------------- HTML
def write_html(figures: Sequence[Figure], file: Path, title: str) -> Path:
    """One page with every figure, interactive and without anything to download: plotly's script is in it."""
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for index, figure in enumerate(figures):
        drawn = _html_lines(figure) if isinstance(figure, Lines) else _html_maps(figure)
        parts.append(drawn.to_html(full_html=False, include_plotlyjs="inline" if index == 0 else False))
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title>'
    style = "<style>body{font-family:sans-serif;max-width:1100px;margin:2em auto}</style>"
    write_whole(file, f"<!doctype html><html><head>{head}{style}</head><body>{''.join(parts)}</body></html>\n")
    return file


def _html_lines(figure: Lines) -> Any:
    from plotly import graph_objects as go

    drawn = go.Figure()
    for name, (xs, ys) in figure.dots.items():
        marker = {"size": 3, "opacity": 0.3, "color": "grey"}
        drawn.add_scattergl(x=list(xs), y=list(ys), mode="markers", name=name, marker=marker)
    for name, (xs, ys) in figure.curves.items():
        dash = "dash" if "local" in name or "training" in name else None
        drawn.add_scatter(x=list(xs), y=list(ys), mode="lines", name=name, line={"dash": dash})
    drawn.update_layout(title=figure.title, xaxis_title=figure.x, yaxis_title=figure.y, height=500)
    if figure.log_y:
        drawn.update_yaxes(type="log")
    return drawn


def _html_maps(figure: Maps) -> Any:
    from plotly.subplots import make_subplots

    height, width = len(figure.rows), max(len(row) for row in figure.rows)
    titles = [title for row in figure.rows for title, _ in row]
    drawn = make_subplots(height, width, subplot_titles=titles)
    for i, row in enumerate(figure.rows, 1):
        for j, (_, values) in enumerate(row, 1):
            limit = float(values.abs().amax()) or 1.0
            signed = {"colorscale": "RdBu", "zmin": -limit, "zmax": limit}
            style = signed if figure.rows[i - 1][j - 1][0].endswith("difference") else {"colorscale": "Viridis"}
            shown = [[float(f"{v:.4g}") for v in line] for line in values.tolist()]
            drawn.add_heatmap(z=shown, showscale=False, row=i, col=j, **style)
            drawn.update_yaxes(autorange="reversed", row=i, col=j)
    drawn.update_layout(title=f"{figure.title} ({figure.y} down, {figure.x} across)", height=100 + 320 * height)
    return drawn
