"""A rich progress bar for transformers' Trainer, in place of its tqdm bars and printed dicts."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback


class RichProgress(TrainerCallback):
    """One line that moves: steps, loss and the last validation perplexity."""

    def __init__(self, label: str, quiet: bool = False) -> None:
        self.quiet = quiet
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[shown]}"),
            console=Console(stderr=True),
        )
        self._values: dict[str, float] = {}
        self._task = self._bar.add_task(label, total=None, shown="", visible=not quiet)

    def install(self, trainer: Trainer) -> RichProgress:
        """Take the place of the trainer's own bars."""
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(self)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the bar, at the step that a resumed run starts from."""
        if state.is_world_process_zero and not self.quiet:
            self._bar.start()
            self._bar.update(self._task, total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Show the newest loss and perplexity."""
        named = {"loss": "loss", "eval_perplexity": "validation perplexity"}
        self._values |= {named[k]: v for k, v in (logs or {}).items() if k in named}
        self._bar.update(self._task, shown="  ".join(f"{k} {v:.2f}" for k, v in self._values.items()))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the last state on the screen."""
        self._bar.stop()

    def stop(self) -> None:
        """Give the terminal back after an error."""
        self._bar.stop()
