"""The commands of `tsld-fx`. Heavy imports stay inside them, so that --help is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tsld_fx.cli.main import app

console = Console()
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write; the same command on it resumes.")]
Model = Annotated[str, typer.Argument(help="Folder or hub name of a model; 'demo' is the embedded one.")]
Sources = Annotated[
    list[str] | None,
    typer.Option(help="Text: a file, 'demo', or a datasets name[:configuration]. Repeatable."),
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML with the fields of run.yaml; options win.")]


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder; default runs/demo or demo-full.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Train 1,000 steps.")] = False,
    minutes: Annotated[float, typer.Option(help="Training time to aim at without --full.")] = 2.5,
) -> None:
    """Take the embedded decoder all the way: evaluate, ternary, TSLD training, convert, check, generate, report."""
    from tsld_fx.demo.run import run_demo

    out = out or Path("runs/demo-full" if full else "runs/demo")
    say = lambda text: console.print(f"[bold]>[/] {text}")  # noqa: E731
    report = run_demo(out, full=full, minutes=minutes, say=say)
    table = Table("model", "validation perplexity", title="Embedded decoder, Python documentation")
    for name, value in report["perplexity"].items():
        table.add_row(name, f"{value:.2f}")
    console.print(table)
    sizes = report["bytes"]
    console.print(f"TSLD closed [bold]{report['gap_closed']:.0%}[/] of the gap in {report['steps']} steps.")
    console.print(
        f"Packed linear layers: {sizes['packed'] / 1e6:.2f} MB instead of {sizes['float32'] / 1e6:.2f} MB "
        f"({sizes['float32'] / sizes['packed']:.1f}x smaller), {report['zeros']:.0%} of the weights are zero; "
        "every packed weight equals the trained one bit for bit."
    )
    for text in report["samples"].values():
        console.print(f"[dim]generated:[/] {text!r}", highlight=False)
    console.print(f"{report['seconds']:.0f} s in all; plots, report.json and the packed model are in {out}")


@app.command()
def finetune(
    model: Annotated[str | None, typer.Argument(help="Float model to fine-tune.")] = None,
    out: Out = Path("runs/finetune"),
    train: Sources = None,
    validation: Sources = None,
    test: Sources = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens per sample.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Most epochs to train.")] = None,
    steps: Annotated[int | None, typer.Option(help="Most steps to train.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences per device and step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    patience: Annotated[int, typer.Option(help="Epochs without improvement before it stops.")] = 2,
    config: ConfigFile = None,
) -> None:
    """Fine-tune a full-precision teacher and keep its best validation epoch."""
    from tsld_fx import recipes

    data = {"train": train, "validation": validation, "test": test, "block_size": block_size}
    settings = _settings(config, model, data, _training(epochs, steps, batch_size, learning_rate))
    if result := recipes.finetune(settings, out, patience=patience):  # under torchrun one process has it
        _show_result(result, out)


@app.command()
def train(
    model: Annotated[str | None, typer.Argument(help="Float model to start from.")] = None,
    out: Out = Path("runs/train"),
    teacher: Annotated[str | None, typer.Option(help="Full-precision teacher (default: the model itself).")] = None,
    train: Sources = None,
    validation: Sources = None,
    test: Sources = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens per sample.")] = None,
    method: Annotated[str | None, typer.Option(help="gt | logit | logit_gt | l2l | tsld")] = None,
    bits: Annotated[int | None, typer.Option(help="2 (ternary), 4 or 8.")] = None,
    scale: Annotated[str | None, typer.Option(help="twn | absmean | pact | lsq | seq; 4 and 8 bits: minmax.")] = None,
    granularity: Annotated[str | None, typer.Option(help="tensor | channel | group")] = None,
    group_size: Annotated[int | None, typer.Option(help="Input features per scale, with group.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Epochs to train.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps to train.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences per device and step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    teacher_cache: Annotated[
        str | None, typer.Option(help="Keep on disk for later epochs: token_scores | hidden_states | top_logits.")
    ] = None,
    cuda_graph: Annotated[bool, typer.Option("--cuda-graph", help="Replay each step as one CUDA graph.")] = False,
    parallel: Annotated[str | None, typer.Option(help="Under torchrun: ddp | fsdp | pipeline.")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="Of a pipeline: gpipe | 1f1b | interleaved_1f1b | zero_bubble | zbv.")
    ] = None,
    config: ConfigFile = None,
) -> None:
    """Quantisation-aware training of a low-bit student against its full-precision teacher."""
    from tsld_fx import recipes
    from tsld_fx.errors import ConfigError

    data = {"train": train, "validation": validation, "test": test, "block_size": block_size}
    changes: dict[str, Any] = {"teacher": teacher}
    distill: dict[str, Any] = {} if method is None else {"method": method, "losses": None}
    if teacher_cache is not None:
        distill["teacher_cache"] = teacher_cache
    if cuda_graph:
        distill["cuda_graph"] = True
    if distill:
        changes["distill"] = distill
    weight = _weight(bits, scale, granularity, group_size)
    if weight is not None:
        changes["quant"] = {"weight": weight}
    spread = {k: v for k, v in (("mode", parallel), ("schedule", schedule)) if v is not None}
    if spread:
        changes["parallel"] = spread
    settings = _settings(config, model, data, _training(epochs, steps, batch_size, learning_rate), changes)
    if schedule is not None and settings.parallel.mode != "pipeline":
        raise ConfigError(f"--schedule {schedule} belongs to pipelines. Add --parallel pipeline, or leave it out.")
    if result := recipes.train(settings, out):  # under torchrun one process has it
        _show_result(result, out)


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="Output folder of train, or the 'model' folder in it.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the packed model.")],
    backend: Annotated[str, typer.Option(help="auto | reference | cpu | cuda (its kernels must run here)")] = "auto",
    activations: Annotated[str, typer.Option(help="a16 | int8 | fp8 (GPUs) | add (CPUs)")] = "a16",
    head_bits: Annotated[int | None, typer.Option(help="8: also pack the head of a float model (no training).")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is in the output folder.")] = False,
) -> None:
    """Pack a trained model (or, without training, a float one) into low-bit weights."""
    from tsld_fx.inspection import layer_table, weights_equal
    from tsld_fx.model_folders import convert_folder

    prepared, lowered = convert_folder(
        model, out, backend=backend, activations=activations, head_bits=head_bits, force=force
    )
    _show_layers(layer_table(lowered), out)
    same = "every packed weight equals the trained one bit for bit" if weights_equal(prepared, lowered) else "DIFFERS"
    console.print(f"{same}; the model is in {out}")


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add.")] = 64,
    temperature: Annotated[float, typer.Option(help="0: greedy; above: sampling.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus of the sampling.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32 | float16 | bfloat16 (default: the model's).")] = None,
) -> None:
    """Continue a prompt, printing text as it comes."""
    from tsld_fx.generation import stream_text

    stream_text(model, prompt, max_new_tokens, temperature, top_p, seed, device, dtype)


@app.command()
def inspect(
    model: Model,
    graph: Annotated[str | None, typer.Option(help="Print the graph's code after this pass.")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="YAML whose 'quant' says how to prepare.")] = None,
) -> None:
    """What each pass does to a model's graph, and a table of its layers."""
    from tsld_fx.config import QuantConfig
    from tsld_fx.errors import ConfigError
    from tsld_fx.inspection import code_after, layer_table, trace_passes
    from tsld_fx.lowered import LoweredModel
    from tsld_fx.model_folders import load_any
    from tsld_fx.prepared import PreparedModel
    from tsld_fx.settings import read_yaml

    loaded = load_any(model)
    if config is not None and isinstance(loaded, PreparedModel | LoweredModel):
        raise ConfigError(f"{model}: this model carries its own quantisation. Leave --config out.")
    quant = QuantConfig.from_dict(read_yaml(config).get("quant") or {}) if config else None
    records, inspected = ([], loaded) if isinstance(loaded, LoweredModel) else trace_passes(loaded, quant)
    table = Table("pass", "changed", "seconds", "operators that came and went", title="Passes")
    for record in records:
        changes = ", ".join(f"{n:+d} {name}" for name, n in record.changes.items())
        table.add_row(record.name, "yes" if record.modified else "no", f"{record.seconds:.2f}", changes)
    if records:
        console.print(table)
    if graph is not None:
        console.print(code_after(records, graph), highlight=False, markup=False, soft_wrap=True)
    _show_layers(layer_table(inspected))


@app.command()
def compare(
    config: Annotated[Path, typer.Argument(help="YAML with 'shared' settings and 'runs'.")],
    out: Out = Path("runs/compare"),
    jobs: Annotated[int, typer.Option(help="Runs side by side.")] = 1,
) -> None:
    """Train several methods on one model and put them in one table."""
    from tsld_fx.comparison import compare as run
    from tsld_fx.settings import read_yaml

    table = run(read_yaml(config), out, jobs=jobs)
    splits = list(table["perplexity"]["teacher"])
    shown = Table("method", *map(_column, splits), title=str(config))
    for name, values in table["perplexity"].items():
        spread = table.get("spread", {}).get(name, {})
        cells = (_cell(s, values[s]) + (f" ± {_cell(s, spread[s])}" if spread else "") for s in splits)
        shown.add_row(name, *cells)
    console.print(shown)
    console.print(f"table.json, plots and the runs are in {out}")


# ---------------------------------------------------------------- options to settings, results to tables
def _training(
    epochs: float | None, steps: int | None, batch_size: int | None, learning_rate: float | None
) -> dict[str, Any]:
    values = {
        "num_train_epochs": epochs,
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        "learning_rate": learning_rate,
    }
    return {k: v for k, v in values.items() if v is not None}


def _weight(
    bits: int | None, scale: str | None, granularity: str | None, group_size: int | None
) -> dict[str, Any] | None:
    values = {"bits": bits, "scale": scale, "granularity": granularity, "group_size": group_size}
    values = {k: v for k, v in values.items() if v is not None}
    return values or None


def _settings(
    config: Path | None,
    model: str | None,
    data: dict[str, Any],
    training: dict[str, Any],
    changes: dict[str, Any] | None = None,
) -> Any:
    """Settings from a YAML file with the options laid over it."""
    from tsld_fx.settings import RunSettings, read_yaml

    values = read_yaml(config) if config is not None else {}
    over = {"model": model, "data": {k: v for k, v in data.items() if v not in (None, [])}, "training": training}
    for key, value in {**over, **(changes or {})}.items():
        old = values.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            values[key] = {**old, **value}
        elif value not in (None, {}):
            values[key] = value
    return RunSettings.from_dict(values, str(config) if config else "options")


def _column(score: str) -> str:
    return score.replace("_", " ") if score.endswith("_accuracy") else f"{score} perplexity"


def _cell(score: str, value: float) -> str:
    return f"{value:.1%}" if score.endswith("_accuracy") else f"{value:.2f}"


def _show_result(result: dict[str, Any], out: Path) -> None:
    splits = list(next(v for v in result.values() if isinstance(v, dict)))
    table = Table("model", *map(_column, splits))
    for name, values in result.items():
        if isinstance(values, dict):
            table.add_row(name, *(_cell(s, values[s]) for s in splits))
    if splits:
        console.print(table)
    console.print(f"{result['steps']} steps in {result['seconds']:.0f} s; the model, metrics and plots are in {out}")


def _show_layers(rows: list[Any], title: Path | None = None) -> None:
    from tsld_fx.inspection import float32_bytes, packed_bytes

    # Without lines between columns, names of layers and the rest fit into 80 characters.
    table = Table(title=None if title is None else str(title), box=None, pad_edge=False)
    table.add_column("layer", overflow="fold", min_width=31)
    for column in ("shape", "bits", "scale", "per", "zeros", "kB"):
        table.add_column(column, overflow="fold")
    for row in rows:
        shape = f"{row.shape[0]} x {row.shape[1]}"
        cells = (str(row.bits), row.scale, row.granularity, f"{row.zeros:.0%}", f"{row.bytes / 1e3:.1f}")
        table.add_row(row.name, shape, *cells)
    console.print(table)
    if packed_bytes(rows):
        ratio = float32_bytes(rows) / packed_bytes(rows)
        console.print(f"packed layers: {packed_bytes(rows) / 1e6:.2f} MB, {ratio:.1f}x smaller than float32")
