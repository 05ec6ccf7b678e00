"""`tsld-fx`: assembles the commands, and turns every TsldError into one line and exit code 2."""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from tsld_fx.errors import TsldError
from tsld_fx.on_import import after_import

app = typer.Typer(
    name="tsld-fx",
    help="Ternary decoder language models: train them with TSLD, pack them, run them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
_options = {"traceback": False}
_PATIENCE = 2.0  # seconds: torchrun ends all processes when one goes, which must not be before the cause is told


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        print(f"tsld-fx {version('tsld-fx')}")
        raise typer.Exit


@app.callback()
def _global(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show the Python traceback of an error.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what the passes do.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    _options["traceback"] = traceback
    handler = RichHandler(console=Console(stderr=True), show_path=False, show_time=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    logging.getLogger("tsld_fx").setLevel(logging.DEBUG if verbose else logging.INFO)
    if not verbose:
        after_import("transformers.utils.logging", _quiet_transformers)


def _quiet_transformers() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()


def main() -> None:
    """Run the command line; the exit code is 0, 2 for a mistake in the input, 130 for Ctrl-C."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from tsld_fx.cli import analyze, commands, evaluate, export  # noqa: F401  (registers them)

    try:
        app()
    except (TsldError, PermissionError, IsADirectoryError, FileExistsError) as error:
        if _options["traceback"]:
            raise
        if getattr(error, "told_elsewhere", False):  # the process that failed prints it
            time.sleep(_PATIENCE)
            sys.exit(2)
        message = " ".join(str(error).split())
        Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except SystemExit as stop:  # typer turns Ctrl-C into exit code 130
        if stop.code == 130:
            Console(stderr=True).print("stopped; of a run, the same command resumes from the last checkpoint.")
        raise
