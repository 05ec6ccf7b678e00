"""Prompt and answer files from the raw layouts of GSM8K, GLUE and the common-sense sets.

    python benchmarks/task_files.py DATA_FOLDER OUT_FOLDER --tasks arc_easy,openbookqa,gsm8k,sst2,rte

DATA_FOLDER holds gsm8k/{train,test}.jsonl (question, answer), commonsense/<set>/{train,test}.json (instruction, answer)
and glue/<TASK>/{train,dev}.tsv. Each task becomes OUT_FOLDER/<task>/{train,validation,test}.jsonl; validation is cut
from the training examples.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def common_sense(name: str) -> Callable[[Path, str], Iterator[Row]]:
    """Questions with numbered choices in the text: the answer is `answer<number>`."""

    def read(data: Path, split: str) -> Iterator[Row]:
        for row in json.loads((data / "commonsense" / name / f"{split}.json").read_text(encoding="utf-8")):
            question = row["instruction"].split(": ", 1)[-1].rsplit("\n\nAnswer format", 1)[0]
            choices = [f" {c}" for c in row["instruction"].rsplit("Answer format: ", 1)[-1].strip().split("/")]
            yield {"prompt": f"{question}\nThe correct answer is", "answer": f" {row['answer']}", "choices": choices}

    return read


def gsm8k(data: Path, split: str) -> Iterator[Row]:
    """Word problems: the answer is the worked solution, which ends in `#### number`."""
    for line in (data / "gsm8k" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        worked = re.sub(r"<<.*?>>", "", row["answer"])  # the calculator's annotations
        yield {"prompt": f"Question: {row['question']}\nAnswer:", "answer": f" {worked}"}


def glue(task: str, verbalise: Callable[[Row], Row]) -> Callable[[Path, str], Iterator[Row]]:
    """A GLUE task written out; its public development set serves as the test set."""

    def read(data: Path, split: str) -> Iterator[Row]:
        file = data / "glue" / task / ("train.tsv" if split == "train" else "dev.tsv")
        with file.open(encoding="utf-8", newline="") as stream:
            for row in csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE):
                yield verbalise(row)

    return read


def sentiment(row: Row) -> Row:
    """SST-2."""
    answer = {"0": " negative", "1": " positive"}[row["label"]]
    return {"prompt": f"Review: {row['sentence'].strip()}\nSentiment:", "answer": answer,
            "choices": [" negative", " positive"]}  # fmt: skip


def entailment(row: Row) -> Row:
    """RTE."""
    answer = {"entailment": " yes", "not_entailment": " no"}[row["label"]]
    prompt = f"{row['sentence1'].strip()}\nQuestion: {row['sentence2'].strip()} Yes or no?\nAnswer:"
    return {"prompt": prompt, "answer": answer, "choices": [" no", " yes"]}


TASKS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    "arc_easy": common_sense("ARC-Easy"),
    "arc_challenge": common_sense("ARC-Challenge"),
    "openbookqa": common_sense("openbookqa"),
    "gsm8k": gsm8k,
    "sst2": glue("SST-2", sentiment),
    "rte": glue("RTE", entailment),
}


def write_task(task: str, data: Path, out: Path, most: dict[str, int] | None = None) -> dict[str, int]:
    """Write the three files of a task; returns how many examples each has.

    Args:
        most: split -> examples to keep, drawn with a fixed seed.
    """
    chance, most = random.Random(0), most or {}
    train, test = list(TASKS[task](data, "train")), list(TASKS[task](data, "test"))
    chance.shuffle(train)
    chance.shuffle(test)
    held_out = max(1, min(len(train) // 10, 500))
    splits = {"train": train[held_out:], "validation": train[:held_out], "test": test}
    folder = out / task
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        splits[split] = rows[: most.get(split, len(rows))]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in splits[split])
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return {split: len(rows) for split, rows in splits.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", default=",".join(TASKS))
    for split in ("train", "validation", "test"):
        parser.add_argument(f"--{split}", type=int, help=f"most {split} examples per task (default: all)")
    args = parser.parse_args()
    most = {s: n for s in ("train", "validation", "test") if (n := getattr(args, s)) is not None}
    for task in args.tasks.split(","):
        print(task, write_task(task, args.data, args.out, most))


if __name__ == "__main__":
    main()
