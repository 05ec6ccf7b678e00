"""Table B: tasks written out as prompts and answers, for a teacher fine-tuned on each and its ternary students.

    python benchmarks/task_files.py DATA_FOLDER runs/tasks
    python benchmarks/task_table.py --model MODEL_FOLDER --tasks runs/tasks --out runs/table_b

For each task: fine-tune the full-precision model to its best epoch, quantise without training, train with logit
distillation and with TSLD, and score the test file. The score is the accuracy among the choices; of GSM8K, whose
answers are free text, the share of problems whose generated answer ends in the right number. Chance is beside it.
Every step is a `tsld-fx` run and resumes; results accumulate in benchmarks/results/tasks_<model>.json.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
from machine import ROOT, describe
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from tsld_fx.model_folders import load_any, load_tokenizer
from tsld_fx.prepared import prepare
from tsld_fx.recipes import finetune, train
from tsld_fx.runs import write_json
from tsld_fx.settings import RunSettings, read_yaml
from tsld_fx.task_data import Example, encode_all, read_examples
from tsld_fx.task_score import score_task


def last_number(text: str) -> str | None:
    """The number behind `####`, or the last number of a text."""
    found = re.findall(r"-?\d[\d,]*\.?\d*", text.rpartition("####")[2] or text)
    return found[-1].replace(",", "").rstrip(".") if found else None


@torch.no_grad()
def exact_match(model: PreTrainedModel, examples: list[Example], tokenizer: Any, new_tokens: int = 160) -> float:
    """Share of the examples whose greedy continuation ends in the answer's number."""
    right = 0
    for example in examples:
        ids = tokenizer(example.prompt, return_tensors="pt")["input_ids"].to(model.device)
        made = model.generate(input_ids=ids, max_new_tokens=new_tokens, do_sample=False,
                              pad_token_id=tokenizer.eos_token_id)  # fmt: skip
        text = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        right += last_number(text) == last_number(example.answer)
    return right / len(examples)


def score(model: PreTrainedModel, examples: list[Example], tokenizer: Any, block: int, most: int) -> dict[str, float]:
    """Accuracy (or exact match), and the perplexity of the right answers."""
    found = score_task(model, examples, tokenizer, block_size=block, batch_size=32)
    if found.accuracy is None or found.chance is None:
        fitting = [e for e in examples if len(tokenizer(e.prompt)["input_ids"]) + 160 <= block][:most]
        match = exact_match(model, fitting, tokenizer)
        return {"score": match, "chance": 0.0, "perplexity": found.perplexity, "examples": len(fitting)}
    return {"score": found.accuracy, "chance": found.chance, "perplexity": found.perplexity, "examples": found.examples}


def run_task(task: str, args: argparse.Namespace, config: dict[str, Any]) -> dict[str, dict[str, float]]:
    """All rows of one task."""
    out, files = args.out / task, args.tasks / task
    data = {split: [str(files / f"{split}.jsonl")] for split in ("train", "validation")}
    settings = config["tasks"].get(task) or {}
    block = settings.get("block_size", config["block_size"])
    training = {**config["training"], **settings.get("training", {})}
    if args.steps:
        training["max_steps"] = args.steps
    shared = {"data": {**data, "block_size": block}, "training": training}
    tuned = {**training, "learning_rate": config["teacher_rate"]}
    finetune(RunSettings.from_dict({**shared, "model": args.model, "training": tuned}), out / "teacher")
    teacher = str(out / "teacher" / "model")
    for method in config["methods"]:
        run = {**shared, "model": teacher, "quant": config["quant"], "distill": {"method": method}, "keep": "best"}
        train(RunSettings.from_dict(run), out / method)
    tokenizer = load_tokenizer(teacher)
    examples = read_examples(str(files / "test.jsonl"))[: args.most]
    encode_all(examples, tokenizer, block, task)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = {"FP": load_any(teacher), "PTQ": prepare(load_any(teacher)).eval()}
    rows |= {method: load_any(str(out / method)) for method in config["methods"]}
    return {name: score(model.to(device), examples, tokenizer, block, args.generated) for name, model in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tasks", required=True, type=Path, help="folder that task_files.py wrote")
    parser.add_argument("--only", help="comma-separated tasks (default: the configuration's)")
    parser.add_argument("--out", default=Path("runs/table_b"), type=Path)
    parser.add_argument("--config", default=ROOT / "benchmarks/configs/table_b.yaml", type=Path)
    parser.add_argument("--steps", type=int, help="steps of every run (default: the configuration's epochs)")
    parser.add_argument("--most", type=int, default=100_000, help="test examples")
    parser.add_argument("--generated", type=int, default=200, help="test examples with generated answers")
    parser.add_argument("--results", default=ROOT / "benchmarks/results", type=Path)
    args = parser.parse_args()
    config = read_yaml(args.config)
    file = args.results / f"tasks_{Path(args.model).name}.json"
    record = json.loads(file.read_text()) if file.is_file() else {"tasks": {}}
    for task in args.only.split(",") if args.only else config["tasks"]:
        rows = run_task(task, args, config)
        how = {"steps": args.steps, "config": config, "machine": describe()}
        record["tasks"][task] = {"rows": rows, **how}
        record["model"] = Path(args.model).name
        write_json(file, record)
    shown = Table("task", "examples", "chance", *next(iter(record["tasks"].values()))["rows"], title=record["model"])
    for task, entry in record["tasks"].items():
        first = next(iter(entry["rows"].values()))
        cells = (f"{row['score']:.1%}" for row in entry["rows"].values())
        shown.add_row(task, str(first["examples"]), f"{first['chance']:.1%}", *cells)
    Console().print(shown)


if __name__ == "__main__":
    main()
