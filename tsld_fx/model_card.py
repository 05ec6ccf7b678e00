"""The model card (README.md) of a packed checkpoint: what it is, how it was trained, what was measured."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from tsld_fx.errors import CheckpointError
from tsld_fx.whole_files import write_whole

CARD = "README.md"
_MARKER = "<!-- Written by tsld_fx; take this line out to keep your own text when the model is saved again. -->"
_SCORES = ("<!-- scores: tsld-fx evaluate --card -->", "<!-- end of scores -->")
_NONE = "No scores of tasks are recorded: `tsld-fx evaluate FOLDER --tasks ... --card` adds them."
_NAMES = {"teacher": "full-precision teacher", "ptq": "without training", "student": "this model", "start": "before"}
_WIDTHS = {2: "ternary (2-bit)", 4: "4-bit", 8: "8-bit"}


def write_card(config: Any, folder: Path, run: Path | None = None) -> Path | None:
    """Write README.md into a checkpoint's folder, unless there is one that tsld_fx did not write.

    Args:
        config: the packed model's configuration, with its TsldQuantizationConfig.
        run: the training run's folder (run.yaml, result.json); None where nothing is known of the training.

    Returns:
        The file, or None where somebody else's was left.
    """
    file = folder / CARD
    if file.exists() and _MARKER not in file.read_text(encoding="utf-8", errors="replace"):
        return None
    layers = config.quantization_config.layers
    rows = _rows(layers.values())
    packed, floats = (sum(row[key] for row in rows) for key in ("bytes", "float_bytes"))
    settings, result = ({}, {}) if run is None else (_yaml(run / "run.yaml"), _json(run / "result.json"))
    perplexity = {_NAMES.get(k, k): v for k, v in result.items() if isinstance(v, dict) and v}
    template = Environment(
        loader=PackageLoader("tsld_fx", "."), undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False
    ).get_template("model_card.md.j2")
    architecture = (getattr(config, "architectures", None) or [type(config).__name__])[0]
    text = template.render(
        marker=_MARKER,
        title=f"{architecture}, {' and '.join(_WIDTHS[b] for b in sorted({row['bits'] for row in rows}))}",
        architecture=architecture,
        ternary=any(row["bits"] == 2 for row in rows),
        widths=" and ".join(_WIDTHS[bits] for bits in sorted({row["bits"] for row in rows})) + " weights",
        packed_megabytes=_megabytes(packed),
        float_megabytes=_megabytes(floats),
        rows=[{**row, "megabytes": _megabytes(row["bytes"])} for row in rows],
        scheme=_scheme(config.quantization_config.quant),
        run=_training(settings, result),
        perplexity=perplexity,
        splits=list(next(iter(perplexity.values()), {})),
        block_size=settings.get("data", {}).get("block_size"),
        scores=_scores_of(file) or f"{_SCORES[0]}\n{_NONE}\n{_SCORES[1]}",
    )
    write_whole(file, text)
    return file


def check_card(model: str) -> Path:
    """The model card of a folder, to which scores can be added.

    Raises:
        CheckpointError: there is none.
    """
    file = Path(model) / CARD
    if not file.is_file():
        raise CheckpointError(
            f"{file}: no model card to write the scores into. save_pretrained and `tsld-fx convert` write one for "
            "packed models; leave --card out for others."
        )
    return file


def add_scores(model: str, report: Mapping[str, Any]) -> Path:
    """Put the scores of `tsld-fx evaluate` into a model card, in the place of those that were there."""
    file = check_card(model)
    text = file.read_text(encoding="utf-8")
    lines = [
        _SCORES[0],
        f"Scores of lm_eval {report['lm_eval']}" + (f", first {report['limit']} samples:" if report["limit"] else ":"),
        "",
        "| task | metric | score | chance | samples | shots |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["scores"]:
        metric = row["metric"] if row["filter"] is None else f"{row['metric']} ({row['filter']})"
        error = "" if row["stderr"] is None else f" ± {row['stderr']:.4f}"
        chance = "" if row["chance"] is None else f"{row['chance']:.4f}"
        lines.append(
            f"| {row['task']} | {metric} | {row['value']:.4f}{error} | {chance} | {row['samples'] or ''} | "
            f"{'' if row['shots'] is None else row['shots']} |"
        )
    block = "\n".join([*lines, _SCORES[1]])
    old = _scores_of(file)
    write_whole(file, text.replace(old, block) if old else f"{text.rstrip()}\n\n{block}\n")
    return file


def _scores_of(file: Path) -> str | None:
    """The block of scores in a card, marks included."""
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    found = re.search(f"{re.escape(_SCORES[0])}.*?{re.escape(_SCORES[1])}", text, re.DOTALL)
    return found[0] if found else None


def _rows(layers: Any) -> list[dict[str, Any]]:
    """Layers, weights and bytes of each format."""
    totals: dict[tuple[int, str], Counter[str]] = {}
    for layer in layers:
        rows, columns, bits, size = (layer[k] for k in ("out_features", "in_features", "bits", "group_size"))
        per = {0: "output channel", -1: "tensor"}.get(size, f"group of {size}")
        scales = 1 if size == -1 else rows * (columns // size if size else 1)
        total = totals.setdefault((bits, per), Counter())
        total["layers"] += 1
        total["weights"] += rows * columns
        total["bytes"] += rows * -(-columns * bits // 8) + scales * (5 if layer["zero"] else 4)
        total["float_bytes"] += rows * columns * 4
    return [{"bits": bits, "per": per, **total} for (bits, per), total in sorted(totals.items())]


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.2f}"


def _scheme(quant: Mapping[str, Any]) -> str:
    weight = quant.get("weight") or {}
    return f"Scales: `{weight['scale']}`." if weight.get("scale") else ""


def _training(settings: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """The lines of the table on training; files by their names, without the folders of somebody's machine."""
    if not settings:
        return {}
    data, training = settings.get("data") or {}, settings.get("training") or {}
    distill = settings.get("distill") or {}
    known = {
        "started from": _public(settings.get("model")),
        "method": distill.get("method"),
        "temperature": distill.get("temperature"),
        "training text": ", ".join(_public(source) for source in _listed(data.get("train"))),
        "tokens per sample": data.get("block_size"),
        "samples per device and step": training.get("per_device_train_batch_size"),
        "learning rate": training.get("learning_rate"),
        "steps": result.get("steps"),
    }
    return {name: value for name, value in known.items() if value not in (None, "")}


def _public(source: Any) -> str:
    return Path(str(source)).name if Path(str(source)).exists() or str(source).startswith("/") else str(source)


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _yaml(file: Path) -> dict[str, Any]:
    import yaml

    found = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found if isinstance(found, dict) else {}


def _json(file: Path) -> dict[str, Any]:
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found if isinstance(found, dict) else {}
