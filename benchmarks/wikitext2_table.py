"""Table A: a teacher fine-tuned on WikiText-2 to its best epoch, then every method of benchmarks/configs/table_a.yaml.

    python benchmarks/wikitext2_table.py --model MODEL_FOLDER --text WIKITEXT_FOLDER --out runs/wikitext2

MODEL_FOLDER is any causal LM that `from_pretrained` loads (with --tuned: fine-tuned already); WIKITEXT_FOLDER holds
train.txt, valid.txt and test.txt. On a GPU small models train several at a time, every step one CUDA graph
(`graphed_runs.py`); `--jobs N` uses `tsld-fx compare` instead, N processes side by side. The results accumulate in
benchmarks/results/wikitext2_<model>.json by method and seed, so that the table can be made in parts.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from graphed_runs import Plan, Result, run_together
from graphed_step import Models, Ways
from machine import ROOT, describe, updating
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from tsld_fx import DistillConfig, PreparedModel, QuantConfig, convert
from tsld_fx.analysis import analyze, read_curves
from tsld_fx.comparison import compare, read_baselines, read_runs, seed_folders
from tsld_fx.model_folders import load_float, load_tokenizer
from tsld_fx.perplexity import Perplexity, perplexity
from tsld_fx.post_training_runs import calibration_blocks, quantise
from tsld_fx.settings import RunSettings, read_yaml
from tsld_fx.text_data import TokenBlocks, read_documents, tokenize

SPLITS = {"train": "train.txt", "validation": "valid.txt", "test": "test.txt"}


class Bench:
    """The text, the teacher and the results file of one table."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.start = args, time.perf_counter()
        self.name = args.name or Path(args.model).name
        self.file = args.results / f"wikitext2_{self.name}.json"
        self.record: dict[str, Any] = {}
        self.teacher = 0.0  # validation perplexity
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        self.config = read_yaml(args.config)
        self.full = copy.deepcopy(self.config)  # what is recorded, whatever --only leaves of it
        self.config["shared"]["data"] |= {split: [str(args.text / file)] for split, file in SPLITS.items()}
        self.block = self.config["shared"]["data"]["block_size"]
        self.tokenizer = load_tokenizer(args.model)
        self.streams = {s: tokenize(read_documents(str(args.text / f), s), self.tokenizer) for s, f in SPLITS.items()}
        self.blocks = TokenBlocks(self.streams["train"], self.block)
        self.ways = Ways(bf16=not args.tf32, stacked=args.stacked, compiled=args.compiled)

    def say(self, text: str) -> None:
        """One line with the time since the start."""
        print(f"[{time.perf_counter() - self.start:6.1f}] {text}", flush=True)

    def models(self, folder: Path | str) -> Models:
        """What trains a model of a folder on the training blocks."""
        return Models(lambda: load_float(str(folder)), self.blocks.blocks.to(self.device), self.ways)

    def quick(self, model: PreparedModel) -> Perplexity:
        """Validation perplexity in the precision of training."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.ways.bf16):
            return perplexity(model, self.streams["validation"], self.block, batch_size=64)

    def score(self, model: Any) -> dict[str, float]:
        """Validation and test perplexity in windows of one block, in float32 (TF32 on a GPU)."""
        found = {s: perplexity(model, self.streams[s], self.block, batch_size=32) for s in ("validation", "test")}
        return {split: result.perplexity for split, result in found.items()}

    def save(self, **parts: Any) -> None:
        """Merge into the results file; `rows` merges row by row and seed by seed, `analysis` run by run."""
        with updating(self.file) as record:
            for row, seeds in parts.pop("rows", {}).items():
                record.setdefault("rows", {}).setdefault(row, {}).update(seeds)
            record.setdefault("analysis", {}).update(parts.pop("analysis", {}))
            record |= {"model": self.name, **parts}
            runs, machine = record.setdefault("machines", []), describe()
            runs.extend([machine] if machine not in runs else [])
            record["config"] = self.full
            record["table"] = _table(record)
        self.record = record

    def save_teacher(self, scores: dict[str, float]) -> None:
        """Add a teacher to its row unless it is there already; the rows that follow name it by its score."""
        record = json.loads(self.file.read_text()) if self.file.is_file() else {}
        known = record.get("rows", {}).get("teacher", {})
        same = [key for key, row in known.items() if abs(row["validation"] - scores["validation"]) < 1e-3]
        self.save(rows={"teacher": {same[0] if same else str(len(known)): scores}})
        self.teacher = scores["validation"]


def _table(record: Mapping[str, Any]) -> dict[str, Any]:
    """Mean, sample standard deviation and number of seeds per row."""
    made = {}
    for row, seeds in record.get("rows", {}).items():
        made[row] = {"seeds": len(seeds)}
        for split in ("validation", "test"):
            values = [s[split] for s in seeds.values()]
            made[row][split] = statistics.fmean(values)
            if len(values) > 1:
                made[row][f"{split}_spread"] = statistics.stdev(values)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--name", help="name in the results (default: the folder's)")
    parser.add_argument("--tuned", action="store_true", help="the model is the fine-tuned teacher already")
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--out", default=Path("runs/wikitext2"), type=Path)
    parser.add_argument("--config", default=ROOT / "benchmarks/configs/table_a.yaml", type=Path)
    parser.add_argument("--epochs", default=3.0, type=float, help="epochs of the teacher's fine-tuning")
    parser.add_argument("--teacher-rate", default=2e-4, type=float)
    parser.add_argument("--steps", type=int, help="QAT steps (default: the configuration's)")
    parser.add_argument("--only", help="comma-separated rows or folders (tsld, tsld-seed1, gptq-2bit); '' for none")
    parser.add_argument("--together", default=4, type=int, help="runs at a time")
    parser.add_argument("--tf32", action="store_true", help="matrix products of training in TF32 instead of bfloat16")
    parser.add_argument("--stacked", action="store_true", help="one CUDA graph for the runs that can share it")
    parser.add_argument("--compiled", action="store_true", help="steps through torch.compile")
    parser.add_argument("--seconds", default=1e9, type=float, help="start nothing that would end later than this")
    parser.add_argument("--pack", default="", help="comma-separated folders whose packed model is written to --out")
    parser.add_argument("--analyse", default="", help="comma-separated folders whose student is analysed")
    parser.add_argument("--jobs", type=int, help="use `tsld-fx compare` with this many processes")
    parser.add_argument("--results", default=ROOT / "benchmarks/results", type=Path)
    args = parser.parse_args()
    bench = Bench(args)
    teacher = teacher_folder(bench)
    bench.config["shared"]["model"] = str(teacher)
    if args.steps:
        bench.config["shared"]["training"] |= {"max_steps": args.steps, "eval_steps": max(args.steps // 6, 1)}
    choose(bench.config, args.only)
    if args.jobs:
        through_compare(bench)
    else:
        graphed(bench, teacher)
        baselines(bench, teacher)
    show(bench.record)


def choose(config: dict[str, Any], only: str | None) -> None:
    """Keep the rows, or the folders of single seeds, that were asked for."""
    if only is None:
        return
    wanted, folders = only.split(","), seed_folders(config)
    seeds = {
        row: [s for s, folder in by_seed.items() if s is not None and (row in wanted or folder in wanted)]
        for row, by_seed in folders.items()
    }
    config["runs"] = {row: v for row, v in config["runs"].items() if row in wanted or seeds[row]}
    config["seeds"] = {row: numbers for row, numbers in seeds.items() if numbers}
    config["baselines"] = {row: v for row, v in config.get("baselines", {}).items() if row in wanted}


def teacher_folder(bench: Bench) -> Path:
    """Fine-tune, keep the best epoch, and save it in fp16 (what is distilled from is what was saved)."""
    args, folder = bench.args, bench.args.out / "teacher"
    if args.tuned:
        folder = Path(args.model)
    elif not (folder / "config.json").is_file():
        begun, epochs = time.perf_counter(), int(args.epochs)
        steps = epochs * (len(bench.blocks) // 4) if not args.steps or args.steps >= 100 else args.steps
        plan = Plan("teacher", QuantConfig(weight=None), DistillConfig("gt"), 0, steps, 4, args.teacher_rate, epochs)
        result = run_together([plan], bench.models(args.model), bench.quick, bench.say)[0]
        model = _with_weights(load_float(args.model), result).half()
        model.save_pretrained(folder)
        bench.tokenizer.save_pretrained(folder)
        seconds = round(time.perf_counter() - begun, 1)
        bench.save(
            teacher_run={"steps": steps, "best_step": result.best_step, "seconds": seconds, "curve": result.metrics}
        )
    scores = bench.score(load_float(str(folder)).to(bench.device).eval())
    bench.save_teacher(scores)
    bench.say(f"teacher {scores}")
    return folder


def _with_weights(model: PreTrainedModel, result: Result) -> PreTrainedModel:
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), result.weights, strict=True):
            parameter.copy_(value)
    return model


def graphed(bench: Bench, teacher: Path) -> None:
    """Every run, several at a time."""
    if not bench.config["runs"]:
        return
    settings, places = read_runs(bench.config), {}
    for row, by_seed in seed_folders(bench.config).items():
        places |= {folder: (row, 0 if seed is None else seed) for seed, folder in by_seed.items()}
    plans = [_plan(folder, s, places[folder][1]) for folder, s in settings.items()]
    if bench.args.only is not None:  # in the order asked for
        wanted = bench.args.only.split(",")
        plans.sort(key=lambda p: min(wanted.index(n) for n in (p.name, places[p.name][0]) if n in wanted))
    models, pace = bench.models(teacher), 0.0
    while plans:
        wave, begun = plans[: bench.args.together], time.perf_counter()
        left = bench.args.seconds - (begun - bench.start)
        if pace * wave[0].steps > left:
            break
        results = run_together(wave, models, bench.quick, bench.say, left)
        for result in results:
            _keep(bench, models, result, *places[result.plan.name])
        plans = [p for p in plans if p not in [r.plan for r in results]]
        pace = (time.perf_counter() - begun) / len(results) / wave[0].steps
        torch.cuda.empty_cache()
    if plans:
        bench.say(f"no time for {', '.join(p.name for p in plans)}")


def _plan(folder: str, settings: RunSettings, seed: int) -> Plan:
    training = settings.training
    steps = training["max_steps"]
    return Plan(
        folder, settings.quant, settings.distill, seed, steps, training["per_device_train_batch_size"],
        training["learning_rate"], -(-steps // training["eval_steps"]),
    )  # fmt: skip


def _keep(bench: Bench, models: Models, result: Result, row: str, seed: int) -> None:
    evaluator = models.with_weights(result.plan.quant, result.weights)
    scores = bench.score(evaluator)
    how = {"teacher": bench.teacher, "best_step": result.best_step, "steps_per_second_of_all": result.steps_per_second}
    bench.save(rows={row: {str(seed): scores | how | {"curve": result.metrics}}})
    bench.say(f"{result.plan.name} {scores}")
    if result.plan.name in bench.args.analyse.split(","):
        bench.save(analysis={result.plan.name: _analysed(bench, evaluator, result)})
    if result.plan.name in bench.args.pack.split(","):
        lowered, folder = convert(evaluator, "reference"), bench.args.out / "packed" / result.plan.name
        for parameter in lowered.parameters():  # what is not packed: embeddings, norms, biases
            parameter.data = parameter.data.half()
        lowered.save_pretrained(folder)
        bench.tokenizer.save_pretrained(folder)


def _analysed(bench: Bench, student: PreparedModel, result: Result) -> dict[str, Any]:
    """Why this student errs: the summary of `tsld-fx analyze` on eight windows of the validation text."""
    folder = bench.args.out / "curves" / result.plan.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in result.metrics))
    teacher = load_float(bench.config["shared"]["model"]).to(bench.device).eval()
    found = analyze(
        teacher, copy.deepcopy(student), bench.streams["validation"], length=bench.block, windows=8,
        curves=[read_curves(folder)],
    )  # fmt: skip
    return found.summary()


def baselines(bench: Bench, teacher: Path) -> None:
    """The rows without training."""
    for row, settings in read_baselines(bench.config).items():
        if time.perf_counter() - bench.start > bench.args.seconds:
            bench.say(f"no time for {row}")
            return
        begun = time.perf_counter()
        calibration = calibration_blocks(bench.blocks, settings.samples, settings.seed)
        made = quantise(load_float(str(teacher)).to(bench.device), settings, calibration)
        seconds = round(time.perf_counter() - begun, 1)
        scores = bench.score(made.to(bench.device).eval())
        bench.save(rows={row: {"0": scores | {"teacher": bench.teacher, "seconds": seconds}}})
        bench.say(f"{row} {scores} in {seconds} s")


def through_compare(bench: Bench) -> None:
    """The same table by `tsld-fx compare`."""
    made = compare(bench.config, bench.args.out / "qat", jobs=bench.args.jobs)
    each = made.get("each", {})
    for row, by_seed in seed_folders(bench.config).items():
        for seed, folder in by_seed.items():
            scores = each.get(folder, made["perplexity"][row])
            bench.save(rows={row: {str(seed or 0): dict(scores) | {"best_step": made["runs"][folder]["best_step"]}}})
    bench.save(rows={row: {"0": made["perplexity"][row]} for row in bench.config.get("baselines", {})})


def show(record: Mapping[str, Any]) -> None:
    """The table so far."""
    shown = Table("method", "seeds", "validation", "test", title=f"WikiText-2, {record['model']}, perplexity per token")
    for row, values in record["table"].items():
        cells = [
            f"{values[s]:.2f}" + (f" ± {values[f'{s}_spread']:.2f}" if f"{s}_spread" in values else "")
            for s in ("validation", "test")
        ]
        shown.add_row(row, str(values["seeds"]), *cells)
    Console().print(shown)


if __name__ == "__main__":
    main()
