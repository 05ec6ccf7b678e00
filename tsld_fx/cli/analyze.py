"""`tsld-fx analyze`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tsld_fx.cli.main import app

console = Console()


@app.command()
def analyze(
    teacher: Annotated[str, typer.Argument(help="Full-precision model; 'demo' is the embedded one.")] = "demo",
    student: Annotated[
        str | None, typer.Argument(help="Float, trained or converted model; default: TEACHER as ternary, untrained.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for plots and tables; replaced.")] = Path(
        "runs/analysis"
    ),
    text: Annotated[
        list[str] | None, typer.Option(help="Text: files, 'demo' or a datasets name. Repeatable; default: demo.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a data set or of the demo.")] = "test",
    run: Annotated[list[Path] | None, typer.Option(help="Run folder whose loss curves are drawn. Repeatable.")] = None,
    length: Annotated[int, typer.Option(help="Tokens per window.")] = 256,
    windows: Annotated[int, typer.Option(help="Windows to look at.")] = 16,
    temperature: Annotated[float, typer.Option(help="tau of the token scales.")] = 10.0,
    force: Annotated[bool, typer.Option("--force", help="Replace a folder that is no analysis.")] = False,
) -> None:
    """Where a student's error comes from: by position, depth, confidence and epoch, as plots and tables."""
    from tsld_fx.analysis import analyze as compare_models
    from tsld_fx.analysis import read_curves, write_report
    from tsld_fx.analysis.figures import has_plotly
    from tsld_fx.errors import CheckpointError, ConfigError
    from tsld_fx.model_folders import check_window, load_any, load_tokenizer
    from tsld_fx.preparation import prepare
    from tsld_fx.text_data import DEMO, read_documents, tokenize
    from tsld_fx.whole_files import check_folder

    check_folder(out)
    if out.is_dir() and any(out.iterdir()) and not (out / "summary.json").is_file() and not force:
        raise CheckpointError(f"{out}: the folder holds something else than an analysis. Choose another, or --force.")
    if not text and teacher != DEMO:
        raise ConfigError("analyze: no text. Give --text FILE (or --text demo).")
    folders = list(run or [])
    if not run and student is not None and (Path(student) / "metrics.jsonl").is_file():
        folders = [Path(student)]
    curves = [read_curves(folder) for folder in folders]
    tokenizer = load_tokenizer(teacher)
    tokens = tokenize(read_documents(text or [DEMO], split), tokenizer)
    full = load_any(teacher)
    quantised = load_any(student) if student is not None else prepare(load_any(teacher))
    check_window(length, full)
    found = compare_models(
        full, quantised, tokens, length=length, windows=windows, temperature=temperature, curves=curves
    )
    name = student or f"{teacher} as ternary without training"
    files = write_report(found, out, f"{name} against {teacher}")
    _show(found.summary(), name)
    console.print(f"{', '.join(files)} are in {out}")
    if not has_plotly():
        console.print("report.html, with interactive figures, needs plotly: pip install 'tsld-fx\\[analysis]'")


def _show(summary: dict[str, Any], name: str) -> None:
    table = Table("layer", "attention output", "its own share", "late / early", "hidden state", title=name)
    depth, growth = summary["relative_error_by_depth"], summary["growth_along_the_sequence"]
    for layer, error in enumerate(depth["attention_output.accumulated"]):
        own, hidden = depth["attention_output.local"][layer], depth["hidden_state.accumulated"][layer]
        grown = growth["attention_output.accumulated"][layer]
        table.add_row(str(layer), f"{error:.4f}", f"{own:.4f}", f"{grown:.2f}", f"{hidden:.4f}")
    console.print(table)
    console.print(
        f"perplexity {summary['teacher_perplexity']:.2f} (teacher) and {summary['student_perplexity']:.2f} (student) "
        f"on {summary['tokens']} tokens; same most likely token: {summary['agreement']:.1%}; "
        f"KL {summary['divergence']:.4f} nats"
    )
    correlation = summary["rank_correlation"]
    console.print(
        f"rank correlation of the teacher's confidence with the token scale {correlation['confidence_and_scale']:+.2f}"
        f", with the divergence {correlation['confidence_and_divergence']:+.2f}"
    )
