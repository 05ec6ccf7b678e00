"""`tsld-fx evaluate`: lm_eval's own tasks on every kind of model, with data sets from local folders."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_runs import Outcome, float_folder, read_json, run_cli, sentences, tokenizer
from tsld_fx import convert, load_prepared, prepare
from tsld_fx.errors import ConfigError, DataError
from tsld_fx.evaluation.harness import evaluate
from tsld_fx.evaluation.tasks import load_tasks, local_data_set
from tsld_fx.model_folders import load_float

pytest.importorskip("lm_eval", reason="the extra 'eval' is not installed")
SAMPLES = 6


def rows(kind: str) -> list[dict[str, Any]]:
    """A few records with the columns of a data set on the hub."""
    lines = sentences(3 * SAMPLES, seed=7).splitlines()
    made = []
    for index in range(SAMPLES):
        one, two, three = lines[3 * index : 3 * index + 3]
        letters = {"text": [one, two, three], "label": ["A", "B", "C"]}
        made.append(
            {
                "piqa": {"goal": one, "sol1": two, "sol2": three, "label": index % 2},
                "openbookqa": {"question_stem": one, "choices": letters, "answerKey": "B"},
                "arc": {"question": one, "choices": letters, "answerKey": "ABC"[index % 3]},
                "gsm8k": {"question": one, "answer": "It is so.\n#### 7"},
                "sst2": {"sentence": one, "label": index % 2},
                "cola": {"sentence": one, "label": index % 2},
                "rte": {"sentence1": one, "sentence2": two, "label": index % 2},
            }[kind]
        )
    return made


def write(folder: Path, kind: str, *splits: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split in splits:
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(kind)), encoding="utf-8")


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The Arrow files that `datasets` makes of the folders vanish with the tests."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets laid out as on the hub: with a card that lists configurations, with folders, and bare."""
    root = tmp_path_factory.mktemp("data")
    write(root / "baber/piqa", "piqa", "train", "validation")
    write(root / "openbookqa/main", "openbookqa", "train", "validation", "test")
    write(root / "openai/gsm8k/main", "gsm8k", "train", "test")
    for name in ("sst2", "cola", "rte"):
        write(root / f"nyu-mll/glue/{name}", name, "train", "validation")
    arc = root / "allenai/ai2_arc"
    write(arc / "easy", "arc", "train", "validation", "test")
    files = [{"split": split, "path": f"easy/{split}.jsonl"} for split in ("train", "validation", "test")]
    card = {"configs": [{"config_name": "ARC-Easy", "data_files": files}]}
    (arc / "README.md").write_text("---\nconfigs: " + json.dumps(card["configs"]) + "\n---\n# ARC\n", encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    convert(prepare(load_float(str(float_folder()))), backend="reference").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def run(model: Path, tasks: str, *words: object) -> Outcome:
    return run_cli("evaluate", model, "--tasks", tasks, *words)


def test_every_task_scores_a_packed_checkpoint_offline(data: Path, packed: Path, tmp_path: Path) -> None:
    names = "piqa,openbookqa,arc_easy,gsm8k,sst2,cola,rte"
    out = tmp_path / "scores.json"
    done = run(packed, names, "--data", data, "--max-new-tokens", 4, "--shots", 0, "--out", out, "--card")
    assert done.code == 0, done.err
    report = read_json(out)
    scores = {(row["task"], row["metric"]): row for row in report["scores"]}
    assert {task for task, _ in scores} == set(names.split(","))
    for (task, metric), row in scores.items():
        assert math.isfinite(row["value"]) and row["samples"] == SAMPLES and row["shots"] == 0
        chance = {"acc": 0.5, "acc_norm": 0.5, "mcc": 0.0, "exact_match": 0.0}[metric]
        assert row["chance"] == pytest.approx(1 / 3 if task in ("openbookqa", "arc_easy") else chance)
        assert f"{row['value']:.4f}" in done.out
    card = (packed / "README.md").read_text()
    assert f"| piqa | acc | {scores['piqa', 'acc']['value']:.4f} ±" in card
    again = run(packed, "piqa", "--data", data, "--limit", 2, "--card")
    assert again.code == 0, again.err
    card = (packed / "README.md").read_text()
    assert "| piqa | acc |" in card and "| rte |" not in card and "first 2 samples" in card


def test_scores_equal_the_model_s_own_likelihoods(data: Path) -> None:
    model, words = load_float(str(float_folder())).eval(), tokenizer()
    result = evaluate(model, words, ["sst2"], data=data, shots=0, batch_size=3)
    right = 0
    for row in rows("sst2"):
        context = f"{row['sentence']}\nQuestion: Is this sentence positive or negative?\nAnswer:"
        likelihoods = []
        for answer in (" negative", " positive"):
            whole, start = words(context + answer)["input_ids"], len(words(context)["input_ids"])
            whole = whole[-41:]  # the model has 40 positions
            count = len(words(context + answer)["input_ids"]) - start
            with torch.no_grad():
                logits = model(torch.tensor([whole[:-1]])).logits[0].double().log_softmax(-1)
            likelihoods.append(sum(logits[i, whole[i + 1]] for i in range(len(whole) - 1 - count, len(whole) - 1)))
        right += int(likelihoods[1] > likelihoods[0]) == row["label"]
    assert result["scores"][0]["value"] == pytest.approx(right / SAMPLES)
    assert result["truncated"] > 0  # the prompts are longer than 40 tokens, and the result says so


def test_prepared_and_packed_models_of_the_same_weights_score_the_same(
    data: Path, packed: Path, tmp_path: Path
) -> None:
    prepare(load_float(str(float_folder()))).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    files = []
    for folder in (tmp_path, packed):
        files.append(tmp_path / f"{len(files)}.json")
        done = run(folder, "piqa,gsm8k", "--data", data, "--shots", 0, "--max-new-tokens", 3, "--out", files[-1])
        assert done.code == 0, done.err
    ours, theirs = (read_json(file)["scores"] for file in files)
    assert ours == theirs
    assert load_prepared(tmp_path / "model").config.tsld_fx


def test_tag_stands_for_its_tasks_and_changes_nothing_for_later_runs(data: Path) -> None:
    write(data / "allenai/ai2_arc/challenge", "arc", "train", "validation", "test")
    tasks = load_tasks(["arc_easy"], data)
    assert list(tasks) == ["arc_easy"]
    with pytest.raises(DataError, match=r"arc_easy.*ai2_arc.*--data"):
        load_tasks(["arc_easy"])  # without --data again: from the hub, and tests are offline


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks", "piqq"], ["'piqq'", "piqa"]),
        (["--tasks", "zzzzzzzzzz"], ["zzzzzzzzzz", "lm_eval ls tasks"]),
        (["--tasks", ","], ["no task given"]),
        (["--tasks", "piqa,piqa"], ["named twice"]),
        (["--tasks", "piqa", "--limit", "0"], ["--limit 0"]),
        (["--tasks", "piqa", "--batch-size", "0"], ["--batch-size 0"]),
        (["--tasks", "piqa", "--device", "cuda:9"], ["cuda"]),
        (["--tasks", "piqa", "--device", "abacus"], ["abacus", "cpu"]),
        (["--tasks", "piqa", "--dtype", "int3"], ["int3", "bfloat16"]),
        (["--tasks", "piqa"], ["piqa", "baber/piqa", "--data"]),
    ],
)
def test_mistakes_are_refused_before_anything_runs(words: list[str], said: list[str]) -> None:
    done = run_cli("evaluate", float_folder(), *words)
    assert done.code == 2
    for part in said:
        assert part in done.err


def test_data_that_is_missing_or_does_not_fit_is_refused(tmp_path: Path) -> None:
    for folder, said in ((tmp_path / "nowhere", "no such folder"), (tmp_path, "baber/piqa")):
        done = run(float_folder(), "piqa", "--data", folder)
        assert done.code == 2 and said in done.err
    write(tmp_path / "baber/piqa", "rte", "train", "validation")
    done = run(float_folder(), "piqa", "--data", tmp_path)
    assert done.code == 2 and "piqa" in done.err and "columns" in done.err
    write(tmp_path / "baber/piqa2", "piqa", "validation")
    (tmp_path / "baber/piqa/train.jsonl").unlink()
    done = run(float_folder(), "piqa", "--data", tmp_path)
    assert done.code == 2 and "train" in done.err


def test_generation_that_leaves_no_room_for_the_prompt_is_refused(data: Path) -> None:
    done = run(float_folder(), "gsm8k", "--data", data, "--shots", 0)
    assert done.code == 2
    for part in ("gsm8k", "256", "40 positions", "--max-new-tokens"):
        assert part in done.err


def test_missing_lm_eval_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None)
    done = run_cli("evaluate", float_folder(), "--tasks", "piqa")
    assert done.code == 2 and "tsld-fx[eval]" in done.err


def test_card_of_a_folder_without_one_is_refused(data: Path, tmp_path: Path) -> None:
    done = run(float_folder(), "piqa", "--data", data, "--card")
    assert done.code == 2 and "no model card" in done.err
    done = run(float_folder(), "piqa", "--data", data, "--out", tmp_path)
    assert done.code == 2 and "folder is in its place" in done.err


def test_local_folders_are_found_by_owner_and_name_or_name(data: Path, tmp_path: Path) -> None:
    assert local_data_set(data, "baber/piqa", None) == (str(data / "baber/piqa"), None)
    assert local_data_set(data, "allenai/openbookqa", "main") == (str(data / "openbookqa/main"), None)
    assert local_data_set(data, "allenai/ai2_arc", "ARC-Easy") == (str(data / "allenai/ai2_arc"), "ARC-Easy")
    assert local_data_set(tmp_path, "baber/piqa", None) is None


def test_options_that_no_run_can_have_are_refused_in_python() -> None:
    with pytest.raises(ConfigError, match="--limit"):
        evaluate(load_float(str(float_folder())), tokenizer(), ["piqa"], data=Path("."), limit=0)
