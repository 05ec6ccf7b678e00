"""Bring data sets that come in another layout into the one that `tsld-fx evaluate --data` reads.

    python examples/evaluation_data.py SOURCE OUT
    tsld-fx evaluate MODEL --data OUT --tasks piqa,openbookqa,arc_easy,arc_challenge,gsm8k,sst2,cola,rte

SOURCE holds what many fine-tuning repositories ship: `commonsense/{piqa,openbookqa,ARC-Easy,ARC-Challenge}/*.json` with
records of instruction and answer, `gsm8k/*.jsonl`, and `glue/{SST-2,CoLA,RTE}/*.tsv`. OUT receives them as the hub has
them: <owner>/<name>/<configuration>/<split>.jsonl with the columns that lm_eval's tasks expect. Without arguments the
script does this with a few records of its own, in a temporary folder.
"""

from __future__ import annotations

import csv
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]
SPLITS = {"train": "train", "val": "validation", "dev": "validation", "validation": "validation", "test": "test"}


def choices(record: dict[str, str]) -> tuple[str, list[str], int]:
    """Question, choices and the number of the right one, of an instruction with `Answer1: ... Answer2: ...`."""
    text = record["instruction"].partition(": ")[2]
    body = text.rpartition("\n\nAnswer format:")[0]
    question, *parts = re.split(r"\s*(?:Answer|Solution|Option)\d+:\s*", body)
    return question.strip(), [part.strip() for part in parts], int(re.sub(r"\D", "", record["answer"])) - 1


def piqa(record: dict[str, str]) -> dict[str, Any]:
    question, (first, second), label = choices(record)
    return {"goal": question, "sol1": first, "sol2": second, "label": label}


def lettered(column: str) -> Callable[[dict[str, str]], dict[str, Any]]:
    """OpenBookQA and ARC: choices with letters; they differ in the name of the question's column."""

    def convert(record: dict[str, str]) -> dict[str, Any]:
        question, texts, label = choices(record)
        letters = [chr(ord("A") + index) for index in range(len(texts))]
        return {column: question, "choices": {"text": texts, "label": letters}, "answerKey": letters[label]}

    return convert


def pair(record: dict[str, str]) -> dict[str, Any]:
    labels = {"entailment": 0, "not_entailment": 1}
    return {"sentence1": record["sentence1"], "sentence2": record["sentence2"], "label": labels[record["label"]]}


def sentence(record: dict[str, str]) -> dict[str, Any]:
    return {"sentence": record["sentence"].strip(), "label": int(record["label"])}


LAYOUTS: dict[str, tuple[str, Callable[[dict[str, str]], dict[str, Any]]]] = {  # source folder -> hub folder, converter
    "commonsense/piqa": ("baber/piqa", piqa),
    "commonsense/openbookqa": ("allenai/openbookqa/main", lettered("question_stem")),
    "commonsense/ARC-Easy": ("allenai/ai2_arc/ARC-Easy", lettered("question")),
    "commonsense/ARC-Challenge": ("allenai/ai2_arc/ARC-Challenge", lettered("question")),
    "gsm8k": ("openai/gsm8k/main", dict),
    "glue/SST-2": ("nyu-mll/glue/sst2", sentence),
    "glue/CoLA": ("nyu-mll/glue/cola", sentence),
    "glue/RTE": ("nyu-mll/glue/rte", pair),
}


def records(file: Path) -> Iterator[dict[str, str]]:
    """The records of a .json, .jsonl or .tsv file; CoLA's has no header."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".json":
        yield from json.loads(text)
    elif file.suffix == ".jsonl":
        yield from map(json.loads, text.splitlines())
    else:
        lines = list(csv.reader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))
        header = ["source", "label", "mark", "sentence"] if len(lines[0]) == 4 and "label" not in lines[0] else None
        names = header or lines.pop(0)
        yield from (dict(zip(names, line, strict=True)) for line in lines)


def convert(source: Path, out: Path) -> dict[str, int]:
    """Write every data set of `source` that is there; returns file -> number of records."""
    written = {}
    for folder, (target, convert_one) in LAYOUTS.items():
        splits: dict[str, Rows] = {}
        for file in sorted((source / folder).glob("*.*")):
            if file.stem in SPLITS and SPLITS[file.stem] not in splits:
                splits[SPLITS[file.stem]] = [convert_one(record) for record in records(file)]
        if not splits:
            continue
        if target == "baber/piqa" and "validation" not in splits:
            splits["validation"] = splits.pop("test")  # the public part of PIQA that is scored is its validation split
        splits.setdefault("train", next(iter(splits.values()))[:5])  # lm_eval wants one, even for no examples
        for split, rows in splits.items():
            file = out / target / f"{split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            written[f"{target}/{split}.jsonl"] = len(rows)
    return written


def synthetic(source: Path) -> None:
    """Two records of PIQA's and RTE's kind in the layout that `convert` reads."""
    record = {
        "instruction": "Please choose the correct solution to the question: How to boil water?\n\nSolution1: Heat it."
        "\n\nSolution2: Freeze it.\n\nAnswer format: solution1/solution2",
        "answer": "solution1",
    }
    for folder in ("commonsense/piqa", "glue/RTE"):
        (source / folder).mkdir(parents=True)
    (source / "commonsense/piqa/test.json").write_text(json.dumps([record]), encoding="utf-8")
    line = "index\tsentence1\tsentence2\tlabel\n0\tWater boils.\tIt is hot.\tentailment\n"
    (source / "glue/RTE/dev.tsv").write_text(line, encoding="utf-8")


def main() -> None:
    if len(sys.argv) == 3:
        for name, count in convert(Path(sys.argv[1]), Path(sys.argv[2])).items():
            print(f"{name}: {count}")
        return
    with tempfile.TemporaryDirectory() as temporary:
        source, out = Path(temporary) / "source", Path(temporary) / "out"
        synthetic(source)
        print(convert(source, out))
        print((out / "baber/piqa/validation.jsonl").read_text(encoding="utf-8").strip())


if __name__ == "__main__":
    main()
