"""Table B: tasks written out as prompts and answers, for a teacher fine-tuned on each and its ternary students.

    python benchmarks/task_files.py DATA_FOLDER runs/tasks
    python benchmarks/task_table.py --model MODEL_FOLDER --tasks runs/tasks

For each task: fine-tune the full-precision model to its best epoch, quantise without training, train with logit
distillation and with TSLD (loss on the answers' tokens, best epoch kept), and score the test file. The score is the
accuracy among the choices; of GSM8K, whose answers are free text, the share of problems whose generated answer ends in
the right number. Chance is beside it. Training goes through `graphed_runs.py`, examples padded to one length; results
accumulate in benchmarks/results/tasks_<model>.json, task by task.
"""

from __future__ import annotations

import argparse
import copy
import logging
import re
import time
from pathlib import Path
from typing import Any

import torch
from graphed_runs import Plan, run_together
from graphed_step import Models, Ways
from machine import ROOT, describe, updating
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tsld_fx import DistillConfig, QuantConfig
from tsld_fx.losses import IGNORE, token_cross_entropy
from tsld_fx.model_folders import load_float, load_tokenizer
from tsld_fx.perplexity import Perplexity
from tsld_fx.settings import read_yaml
from tsld_fx.task_data import AnswerSamples, Example, encode_all, read_examples
from tsld_fx.task_score import score_task


def last_number(text: str) -> str | None:
    """The number behind `####`, or the last number of a text."""
    found = re.findall(r"-?\d[\d,]*\.?\d*", text.rpartition("####")[2] or text)
    return found[-1].replace(",", "").rstrip(".") if found else None


@torch.no_grad()
def exact_match(model: Any, examples: list[Example], tokenizer: Any, new_tokens: int = 160) -> float:
    """Share of the examples whose greedy continuation ends in the answer's number; all of them grow together."""
    prompts = [tokenizer(e.prompt, add_special_tokens=False)["input_ids"] for e in examples]
    rows = torch.arange(len(prompts), device=model.device)
    ends = torch.tensor([len(p) for p in prompts], device=model.device)
    ids = torch.zeros(len(prompts), max(map(len, prompts)) + new_tokens, dtype=torch.long, device=model.device)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    for step in range(new_tokens):  # what is to the right of a row's end is not read by causal attention
        logits = model(input_ids=ids[:, : max(map(len, prompts)) + step]).logits
        ids[rows, ends + step] = logits[rows, ends + step - 1].argmax(-1)
    right = 0
    for example, prompt, row in zip(examples, prompts, ids.tolist(), strict=True):
        made = row[len(prompt) : len(prompt) + new_tokens]
        stop = made.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in made else len(made)
        right += last_number(tokenizer.decode(made[:stop])) == last_number(example.answer)
    return right / len(examples)


def score(model: Any, examples: list[Example], tokenizer: Any, block: int, most: int) -> dict[str, float]:
    """Accuracy (or exact match), and the perplexity of the right answers."""
    found = score_task(model, examples, tokenizer, block_size=block, batch_size=64)
    if found.accuracy is None or found.chance is None:
        fitting = [e for e in examples if len(tokenizer(e.prompt)["input_ids"]) + 160 <= block][:most]
        match = exact_match(model, fitting, tokenizer)
        return {"score": match, "chance": 0.0, "perplexity": found.perplexity, "examples": len(fitting)}
    return {"score": found.accuracy, "chance": found.chance, "perplexity": found.perplexity, "examples": found.examples}


class Samples:
    """A split's examples as ids and labels [N, T] of one length (a multiple of 32), -100 outside the answers."""

    def __init__(self, file: Path, tokenizer: Any, block: int, device: torch.device) -> None:
        samples = AnswerSamples(encode_all(read_examples(str(file)), tokenizer, block, file.stem), block)
        items = [samples[i] for i in range(len(samples))]
        pads = {"input_ids": 0, "labels": IGNORE}
        ids, labels = (pad_sequence([i[k] for i in items], True, v) for k, v in pads.items())
        more = -ids.shape[1] % 32
        self.ids = nn.functional.pad(ids, (0, more)).to(device)
        self.labels = nn.functional.pad(labels, (0, more), value=IGNORE).to(device)

    @torch.no_grad()
    def loss(self, model: nn.Module) -> Perplexity:
        """Perplexity of the answers, in the precision of training."""
        total, count = torch.zeros((), device=self.ids.device), int((self.labels[:, 1:] != IGNORE).sum())
        for ids, labels in zip(self.ids.split(64), self.labels.split(64), strict=True):
            with torch.autocast(self.ids.device.type, torch.bfloat16):
                logits = model(input_ids=ids).logits
            total += token_cross_entropy(logits[:, :-1], labels[:, 1:]).sum()
        loss = float(total) / count
        return Perplexity(float(torch.tensor(loss).exp()), loss, count)


def run_task(task: str, args: argparse.Namespace, config: dict[str, Any]) -> dict[str, Any]:
    """All rows of one task."""
    begun, device = time.perf_counter(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = config["tasks"].get(task) or {}
    block = settings.get("block_size", config["block_size"])
    training = {**config["training"], **settings.get("training", {})}
    quant = QuantConfig.from_dict(config["quant"])
    tokenizer, full = load_tokenizer(args.model), load_float(args.model)
    train, held_out = (Samples(args.tasks / task / f"{s}.jsonl", tokenizer, block, device)
                       for s in ("train", "validation"))  # fmt: skip
    batch, epochs = training["per_device_train_batch_size"], training["num_train_epochs"]
    steps = args.steps or epochs * (len(train.ids) // batch)

    def say(text: str) -> None:
        print(f"{task} [{time.perf_counter() - begun:6.1f}] {text}", flush=True)

    def plan(name: str, bits: QuantConfig, method: Any, rate: float) -> Plan:
        return Plan(name, bits, DistillConfig(method), 0, steps, batch, rate, epochs)

    def models(weights: list[Tensor] | None) -> Models:
        if weights is not None:
            with torch.no_grad():
                torch._foreach_copy_(list(full.parameters()), [w.to("cpu") for w in weights])
        return Models(lambda: copy.deepcopy(full), train.ids, Ways(), train.labels)

    unquantised = QuantConfig(weight=None)
    teacher = plan("teacher", unquantised, "gt", config["teacher_rate"])
    tuned = run_together([teacher], models(None), held_out.loss, say)[0]
    made = models(tuned.weights)
    plans = [plan(method, quant, method, training["learning_rate"]) for method in config["methods"]]
    results = run_together(plans, made, held_out.loss, say)
    examples = read_examples(str(args.tasks / task / "test.jsonl"))[: args.most]
    rows = {"FP": (unquantised, tuned.weights), "PTQ": (quant, tuned.weights)}
    rows |= {result.plan.name: (quant, result.weights) for result in results}
    scores = {
        name: score(made.with_weights(bits, weights), examples, tokenizer, block, args.generated)
        for name, (bits, weights) in rows.items()
    }
    say(f"{scores}")
    best = {r.plan.name: r.best_step for r in (tuned, *results)}
    return {"rows": scores, "steps": steps, "best_step": best, "training_examples": len(train.ids)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tasks", required=True, type=Path, help="folder that task_files.py wrote")
    parser.add_argument("--only", help="comma-separated tasks (default: the configuration's)")
    parser.add_argument("--config", default=ROOT / "benchmarks/configs/table_b.yaml", type=Path)
    parser.add_argument("--steps", type=int, help="steps of every run (default: the configuration's epochs)")
    parser.add_argument("--most", type=int, default=100_000, help="test examples")
    parser.add_argument("--generated", type=int, default=200, help="test examples with generated answers")
    parser.add_argument("--results", default=ROOT / "benchmarks/results", type=Path)
    args = parser.parse_args()
    logging.getLogger("tsld_fx").setLevel(logging.ERROR)
    torch.backends.cuda.matmul.allow_tf32 = True
    config = read_yaml(args.config)
    name = Path(args.model).name
    for task in args.only.split(",") if args.only else config["tasks"]:
        entry = run_task(task, args, config) | {"config": config, "machine": describe()}
        with updating(args.results / f"tasks_{name}.json") as record:
            record["model"] = name
            record.setdefault("tasks", {})[task] = entry
    shown = Table("task", "examples", "chance", *next(iter(record["tasks"].values()))["rows"], title=record["model"])
    for task, entry in record["tasks"].items():
        first = next(iter(entry["rows"].values()))
        cells = (f"{row['score']:.1%}" for row in entry["rows"].values())
        shown.add_row(task, str(first["examples"]), f"{first['chance']:.1%}", *cells)
    Console().print(shown)


if __name__ == "__main__":
    main()
