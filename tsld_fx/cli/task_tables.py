"""`tsld-fx eval` on prompts and answers."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table


def show_tasks(
    console: Console,
    model: str,
    files: list[str],
    length: int,
    batch_size: int,
    device: str = "cpu",
    dtype: str | None = None,
) -> None:
    """Score a model on task files: one line per file."""
    from tsld_fx.model_folders import check_window, load_any, load_tokenizer
    from tsld_fx.task_data import read_examples
    from tsld_fx.task_score import score_task

    tokenizer = load_tokenizer(model)
    examples = {file: read_examples(file, tokenizer) for file in files}
    loaded = load_any(model, device, dtype)
    check_window(length, loaded)
    table = Table("task", "examples", "answer perplexity", "accuracy", "chance")
    for file, found in examples.items():
        score = score_task(loaded, found, tokenizer, block_size=length, batch_size=batch_size, progress="scoring")
        shares = ("-" if share is None else f"{share:.1%}" for share in (score.accuracy, score.chance))
        table.add_row(Path(file).stem, str(score.examples), f"{score.perplexity:.3f}", *shares)
    console.print(table)
