"""`tsld-fx eval` (perplexity) and `tsld-fx evaluate` (lm_eval's tasks)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from tsld_fx.cli import commands
from tsld_fx.cli.commands import Model
from tsld_fx.cli.main import app

Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Dtype = Annotated[str | None, typer.Option(help="float32 | float16 | bfloat16 (default: the model's).")]


@app.command(name="eval")
def perplexity(
    model: Model,
    text: Annotated[list[str], typer.Option(help="Text to score: files, 'demo' or a datasets name. Repeatable.")],
    split: Annotated[str, typer.Option(help="Split of a data set or of the demo.")] = "test",
    length: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    stride: Annotated[int | None, typer.Option(help="Move windows by this many tokens (default: no overlap).")] = None,
    batch_size: Annotated[int, typer.Option(help="Windows per forward pass.")] = 8,
    device: Device = "cpu",
    dtype: Dtype = None,
) -> None:
    """Perplexity of a float, prepared or converted model."""
    from tsld_fx import perplexity as scoring
    from tsld_fx.cli.task_tables import show_tasks
    from tsld_fx.model_folders import check_window, load_any, load_tokenizer
    from tsld_fx.task_data import holds_tasks
    from tsld_fx.text_data import read_documents, tokenize

    if holds_tasks(text):
        show_tasks(commands.console, model, text, length, batch_size, device, dtype)
        return
    documents = read_documents(text, split)
    loaded, tokenizer = load_any(model, device, dtype), load_tokenizer(model)
    check_window(length, loaded)
    result = scoring.perplexity(
        loaded,
        tokenize(documents, tokenizer),
        length,
        stride=stride,
        batch_size=batch_size,
        progress="perplexity",
    )
    windows = "without overlap" if stride is None else f"moved by {stride}"
    commands.console.print(
        f"perplexity {result.perplexity:.4f}   loss {result.loss:.5f} nats   {result.tokens} tokens scored, "
        f"windows of {length} {windows}"
    )


@app.command()
def evaluate(
    model: Model,
    tasks: Annotated[str, typer.Option(help="lm_eval's tasks, groups or tags, separated by commas.")],
    data: Annotated[
        Path | None, typer.Option(help="Folder with the data sets, as on the hub: DATA/<owner>/<name>.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Score only the first samples of each task.")] = None,
    shots: Annotated[int | None, typer.Option(help="Examples in the prompt (default: each task's own).")] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts per forward pass.")] = 8,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens to generate (default: each task's own).")] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="JSON file to write the scores to.")] = None,
    card: Annotated[bool, typer.Option("--card", help="Write the scores into the model card of the folder.")] = False,
) -> None:
    """Score a float, prepared or converted model on lm_eval's tasks (piqa, openbookqa, arc_easy, gsm8k, sst2, ...)."""
    from tsld_fx.evaluation.harness import check_options, run_tasks
    from tsld_fx.evaluation.tasks import check_lm_eval, load_tasks
    from tsld_fx.model_card import add_scores, check_card
    from tsld_fx.model_folders import check_device, load_any, load_tokenizer
    from tsld_fx.whole_files import check_file, write_json

    check_lm_eval()
    check_options(limit, shots, batch_size, max_new_tokens)
    check_device(device, dtype)
    if out is not None:
        check_file(out)
    if card:
        check_card(model)
    tokenizer = load_tokenizer(model)
    loaded_tasks = load_tasks([name.strip() for name in tasks.split(",") if name.strip()], data)
    loaded = load_any(model, device, dtype)
    result = run_tasks(
        loaded, tokenizer, loaded_tasks, limit=limit, shots=shots, batch_size=batch_size, max_new_tokens=max_new_tokens
    )
    report = {"model": Path(model).name, "data": "local" if data else "hub", "limit": limit, **result}
    table = Table("task", "metric", "score", "chance", "samples", "shots", title=model)
    for row in result["scores"]:
        metric = row["metric"] if row["filter"] is None else f"{row['metric']} ({row['filter']})"
        error = "" if row["stderr"] is None else f" ± {row['stderr']:.4f}"
        chance = "" if row["chance"] is None else f"{row['chance']:.4f}"
        numbers = ("" if row[key] is None else str(row[key]) for key in ("samples", "shots"))
        table.add_row(row["task"], metric, f"{row['value']:.4f}{error}", chance, *numbers)
    commands.console.print(table)
    if result["truncated"]:
        commands.console.print(f"{result['truncated']} prompts were cut on the left to fit the model's positions.")
    if out is not None:
        write_json(out, report)
        commands.console.print(f"scores written to {out}")
    if card:
        commands.console.print(f"scores written into {add_scores(model, report)}")
