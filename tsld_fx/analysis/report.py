"""`tsld-fx analyze`: everything that explains a student's error, in one folder of plots and tables."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tsld_fx.analysis.activations import as_modules, attention_maps, decoder_layers
from tsld_fx.analysis.curves import LossCurves
from tsld_fx.analysis.errors_by_place import PlaceErrors, errors_by_place
from tsld_fx.analysis.figures import Figure, Lines, Maps, draw_png, has_plotly, write_html
from tsld_fx.analysis.tokens import TokenTable, rank_correlation, token_table
from tsld_fx.errors import AnalysisError, ConfigError, DataError
from tsld_fx.perplexity import check_stream
from tsld_fx.whole_files import whole_folder, write_json, write_whole

DOTS = 3000  # tokens drawn as dots; the table has all of them


@dataclass(frozen=True)
class Analysis:
    """What `analyze` found.

    Attributes:
        errors: by position and depth.
        tokens: one line per token.
        maps: layer -> (teacher's, student's) attention probabilities [heads, t, t] on the first sequence; empty where
            the architecture gives none out.
        curves: loss curves of the runs that were given.
    """

    errors: PlaceErrors
    tokens: TokenTable
    maps: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    curves: Sequence[LossCurves] = ()

    def summary(self) -> dict[str, Any]:
        """The figures of `summary.json`."""
        table, relative = self.tokens, self.errors.relative
        return {
            "tokens": int(table.target.numel()),
            "teacher_perplexity": float(table.teacher_loss.double().mean().exp()),
            "student_perplexity": float(table.student_loss.double().mean().exp()),
            "divergence": float(table.divergence.double().mean()),
            "agreement": float(table.agree.double().mean()),
            "relative_error_by_depth": {
                f"{tensor}.{mode}": [float(v) for v in values.mean(1)] for (tensor, mode), values in relative.items()
            },
            "growth_along_the_sequence": {
                f"{tensor}.{mode}": self.errors.growth(tensor, mode) for tensor, mode in relative
            },
            "attention_map_error_by_depth": {
                str(layer): float((s - t).square().sum() / t.square().sum()) for layer, (t, s) in self.maps.items()
            },
            "rank_correlation": {
                "confidence_and_scale": rank_correlation(table.confidence, table.scale),
                "confidence_and_divergence": rank_correlation(table.confidence, table.divergence),
                "scale_and_divergence": rank_correlation(table.scale, table.divergence),
            },
            "by_confidence": table.by_confidence(),
            "overfitting": {curve.name: curve.overfitting() for curve in self.curves},
        }


def analyze(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    tokens: Tensor,
    *,
    length: int = 256,
    windows: int = 16,
    batch_size: int = 4,
    temperature: float = 10.0,
    map_tokens: int = 48,
    curves: Sequence[LossCurves] = (),
) -> Analysis:
    """Compare a quantised student with its full-precision teacher on a text.

    Args:
        teacher, student: float, prepared or converted models of one architecture and vocabulary.
        tokens: int64 [N], cut into windows of `length` tokens, of which the first `windows` are used.
        temperature: tau of the token scales.
        map_tokens: tokens of the first window whose attention is kept.

    Raises:
        TsldError: models that differ in depth, width or vocabulary, or too little text.
    """
    count = min(tokens.numel() // max(length, 2), windows)
    if length < 8 or count < 1:
        raise DataError(
            f"analyze: the text has {tokens.numel()} tokens; give at least one window of length={length}, and windows "
            "of at least 8 tokens."
        )
    if batch_size < 1 or not 0 < temperature < float("inf"):
        raise ConfigError(
            f"analyze: batch_size={batch_size} must be at least 1, and temperature={temperature} a positive number."
        )
    for model in (teacher, student):
        check_stream(tokens, model)
    teacher, student = as_modules(teacher), as_modules(student)
    _check_pair(teacher, student)
    device = teacher.get_input_embeddings().weight.device
    student.to(device)
    batches = [b.to(device) for b in tokens[: count * length].view(count, length).split(batch_size)]
    maps = _maps(teacher, student, batches[0][:1, :map_tokens])
    places = errors_by_place(teacher, student, batches)
    return Analysis(places, token_table(teacher, student, batches, temperature), maps, tuple(curves))


def _check_pair(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    ours, theirs = student.config.get_text_config(), teacher.config.get_text_config()
    pairs = {
        "layers": (len(decoder_layers(student)), len(decoder_layers(teacher))),
        "hidden_size": (ours.hidden_size, theirs.hidden_size),
        "vocab_size": (ours.vocab_size, theirs.vocab_size),
    }
    for name, (mine, others) in pairs.items():
        if mine != others:
            raise AnalysisError(
                f"analyze: the student has {name} {mine}, the teacher {others}. Give the teacher that the student was "
                "quantised from."
            )


def _maps(teacher: PreTrainedModel, student: PreTrainedModel, ids: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    try:
        pairs = list(zip(attention_maps(teacher, ids), attention_maps(student, ids), strict=True))
    except AnalysisError:
        return {}
    layers = sorted({0, len(pairs) // 2, len(pairs) - 1})
    return {layer: pairs[layer] for layer in layers}


# ---------------------------------------------------------------- files
def write_report(analysis: Analysis, out: str | Path, title: str = "tsld_fx analysis") -> list[str]:
    """Write summary.json, CSV tables, PNG figures and, where plotly is installed, report.html.

    Args:
        out: replaced as a whole.

    Returns:
        The names of the files.
    """
    figures = make_figures(analysis)
    with whole_folder(out) as folder:
        write_json(folder / "summary.json", analysis.summary())
        _write_csv(folder / "errors.csv", analysis.errors.rows())
        _write_csv(folder / "tokens.csv", analysis.tokens.rows())
        _write_csv(folder / "curves.csv", [row for curve in analysis.curves for row in curve.rows()])
        _write_csv(folder / "attention.csv", _map_rows(analysis))
        for figure in figures:
            draw_png(figure, folder)
        if has_plotly():
            write_html(figures, folder / "report.html", title)
        return sorted(p.name for p in folder.iterdir())


def make_figures(analysis: Analysis) -> list[Figure]:
    """The figures of a report."""
    figures: list[Figure] = []
    for tensor, label in (("attention_output", "attention output"), ("hidden_state", "hidden state")):
        figures.append(_by_position(analysis.errors, tensor, label))
        figures.append(_heat(analysis.errors, tensor, label))
    depth = {
        f"{tensor.replace('_', ' ')}, {mode}": (list(range(len(values))), values.mean(1).tolist())
        for (tensor, mode), values in analysis.errors.relative.items()
        if tensor != "logits"
    }
    figures.append(Lines("error_by_depth", "Error by depth", "layer", "relative squared error", depth, log_y=True))
    figures.append(_logits(analysis))
    figures += [_confidence(analysis.tokens, column) for column in ("scale", "divergence")]
    if analysis.maps:
        figures.append(_attention(analysis.maps))
    if analysis.curves:
        figures.append(_curves(analysis.curves))
    return figures


def _by_position(errors: PlaceErrors, tensor: str, label: str) -> Lines:
    values = errors.relative[tensor, "accumulated"]
    wanted = sorted({round(i * (len(values) - 1) / 5) for i in range(6)})
    curves = {f"layer {layer}": _smooth(values[layer]) for layer in wanted}
    if (tensor, "local") in errors.relative:
        last = errors.relative[tensor, "local"][wanted[-1]]
        curves[f"layer {wanted[-1]}, local"] = _smooth(last)
    title = f"Error of the {label} by token position"
    return Lines(f"{tensor}_by_position", title, "token position", "relative squared error", curves, log_y=True)


def _smooth(values: Tensor, points: int = 48) -> tuple[list[float], list[float]]:
    """Means over at most `points` runs of neighbouring positions."""
    parts = values.tensor_split(min(points, values.numel()))
    ends = torch.tensor([p.numel() for p in parts]).cumsum(0)
    centres = [(float(e) - p.numel() / 2 - 0.5) for e, p in zip(ends, parts, strict=True)]
    return centres, [float(p.mean()) for p in parts]


def _heat(errors: PlaceErrors, tensor: str, label: str) -> Maps:
    modes = [m for (t, m) in errors.relative if t == tensor]
    row = [(f"{label}, {m}: log10 of the error", errors.relative[tensor, m].clamp_min(1e-12).log10()) for m in modes]
    return Maps(f"{tensor}_heat", f"Error of the {label}", "token position", "layer", [row])


def _logits(analysis: Analysis) -> Lines:
    table = analysis.tokens
    length = int(table.position.max()) + 1
    curves = {"relative squared error": _smooth(analysis.errors.relative["logits", "accumulated"][0])}
    for name, values in (("KL(teacher, student)", table.divergence), ("teacher's loss", table.teacher_loss)):
        means = torch.zeros(length, dtype=torch.float64).index_add_(0, table.position, values.double())
        curves[name] = _smooth(means / torch.bincount(table.position, minlength=length))
    return Lines("logits_by_position", "Logits by token position", "token position", "", curves)


def _confidence(table: TokenTable, column: str) -> Lines:
    bins = table.by_confidence()
    chosen = torch.linspace(0, table.target.numel() - 1, min(DOTS, table.target.numel())).long()
    dots = {"tokens": (table.confidence[chosen].tolist(), getattr(table, column)[chosen].tolist())}
    mean = {"mean": ([b["confidence"] for b in bins], [b[column] for b in bins])}
    label = {"scale": "token scale times tokens", "divergence": "KL(teacher, student), nats"}[column]
    title = f"Teacher's confidence against {'token scale' if column == 'scale' else 'divergence'}"
    return Lines(f"confidence_{column}", title, "teacher's highest probability", label, mean, dots)


def _attention(maps: Mapping[int, tuple[Tensor, Tensor]]) -> Maps:
    rows = []
    for layer, (teacher, student) in maps.items():
        theirs, ours = teacher.mean(0), student.mean(0)
        named = (("teacher", theirs), ("student", ours), ("difference", ours - theirs))
        rows.append([(f"layer {layer}: {name}", values) for name, values in named])
    return Maps("attention_maps", "Attention probabilities, mean over heads", "key", "query", rows)


def _curves(curves: Sequence[LossCurves]) -> Lines:
    drawn = {}
    for curve in curves:
        for kind, points in (("training", curve.training), ("validation", curve.validation)):
            if points:
                xs, ys = zip(*points, strict=True)
                drawn[f"{curve.name}, {kind}"] = (list(xs), list(ys))
    title = "Cross-entropy with the ground truth over epochs"
    return Lines("loss_curves", title, "epoch", "nats per token", drawn)


def _map_rows(analysis: Analysis) -> list[dict[str, Any]]:
    return [
        {"layer": layer, "query": q, "key": k, "teacher": float(t[q, k]), "student": float(s[q, k])}
        for layer, (t, s) in ((n, (a.mean(0), b.mean(0))) for n, (a, b) in analysis.maps.items())
        for q in range(t.shape[0])
        for k in range(q + 1)
    ]


def _write_csv(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    if not rows:
        return
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    write_whole(file, stream.getvalue())
