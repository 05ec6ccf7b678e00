"""The perplexity table: fine-tune a teacher on WikiText-2 to its best epoch, then ternary QAT with each method.

    python benchmarks/wikitext2_table.py --model MODEL_FOLDER --text WIKITEXT_FOLDER --out runs/wikitext2 --jobs 4

MODEL_FOLDER is any causal LM that `from_pretrained` loads; WIKITEXT_FOLDER holds train.txt, valid.txt and test.txt.
Every step resumes. The table goes to benchmarks/results/wikitext2_<model>.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from machine import ROOT, describe

from tsld_fx.comparison import compare
from tsld_fx.recipes import finetune
from tsld_fx.settings import RunSettings, read_yaml


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--out", default=Path("runs/wikitext2"), type=Path)
    parser.add_argument("--config", default=ROOT / "benchmarks/configs/wikitext2.yaml", type=Path)
    parser.add_argument("--epochs", default=3.0, type=float, help="most epochs of the teacher's fine-tuning")
    parser.add_argument("--teacher-rate", default=2e-4, type=float)
    parser.add_argument("--steps", type=int, help="QAT steps (default: the configuration's)")
    parser.add_argument("--methods", help="comma-separated subset of the configuration's runs")
    parser.add_argument("--jobs", default=1, type=int)
    parser.add_argument("--results", default=ROOT / "benchmarks/results", type=Path)
    args = parser.parse_args()
    names = {"train": "train.txt", "validation": "valid.txt", "test": "test.txt"}
    text = {split: [str(args.text / file)] for split, file in names.items()}
    config = read_yaml(args.config)
    shared = config["shared"]
    shared["data"] |= text
    fast = {"tf32": True} if torch.cuda.is_available() else {}
    shared["training"] |= fast
    teacher = finetune(
        RunSettings.from_dict(
            {
                "model": args.model,
                "data": shared["data"],
                "training": {
                    "num_train_epochs": args.epochs,
                    "learning_rate": args.teacher_rate,
                    "per_device_train_batch_size": shared["training"]["per_device_train_batch_size"],
                    "per_device_eval_batch_size": 16,
                    "logging_steps": 100,
                    **fast,
                    **({"max_steps": args.steps} if args.steps and args.steps < 100 else {}),
                },
            }
        ),
        args.out / "teacher",
    )
    print("teacher", json.dumps(teacher), flush=True)
    shared["model"] = str(args.out / "teacher" / "model")
    if args.steps:
        shared["training"] |= {"max_steps": args.steps, "eval_steps": min(args.steps, shared["training"]["eval_steps"])}
    if args.methods:
        config["runs"] = {name: config["runs"][name] for name in args.methods.split(",")}
    table = compare(config, args.out / "qat", jobs=args.jobs)
    for name, values in table["perplexity"].items():
        print(f"{name:12s} valid {values['validation']:8.2f}  test {values['test']:8.2f}")
    args.results.mkdir(parents=True, exist_ok=True)
    model = Path(args.model).name
    record = {"machine": describe(), "model": model, "teacher": teacher, **table}
    (args.results / f"wikitext2_{model}.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
