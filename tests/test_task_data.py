"""Prompts and answers: reading, masking, packing, padding, scoring, and whole runs on them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import build
from tests.tiny_runs import float_folder, read_json, run_cli, settings, text_file, tokenizer, write_yaml
from tsld_fx import prepare
from tsld_fx.errors import ConfigError, DataError
from tsld_fx.losses import IGNORE
from tsld_fx.task_data import AnswerSamples, Encoded, Example, collate, encode, encode_all, read_examples
from tsld_fx.task_score import score_task

pytestmark = pytest.mark.xdist_group("task_data")


def write(file: Path, *rows: Any) -> Path:
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def questions(file: Path, count: int, seed: int) -> Path:
    """Which animal comes first? The answer repeats it: a tiny model can learn that."""
    chance, animals = random.Random(seed), [" cat", " dog", " bird"]
    rows = []
    for _ in range(count):
        order = chance.sample(animals, 2)
        rows.append({"prompt": f"the{order[0]} sees a{order[1]}.\n", "answer": order[0], "choices": animals})
    return write(file, *rows)


def test_examples_are_read_with_their_place(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.jsonl", {"prompt": "p", "answer": " a"}, "", {"prompt": "", "answer": "b", "choices": ["b", "c"]}
    )
    assert read_examples(str(file)) == [
        Example("p", " a", (), f"{file}:1"),
        Example("", "b", ("b", "c"), f"{file}:3"),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": ', r"a\.jsonl:2: not valid JSON"),
        ('["p", "a"]', "a JSON list, not an object"),
        ({"prompt": "p", "target": "a"}, r"'answer' is missing or no text \(the fields are 'prompt', 'target'\)"),
        ({"prompt": 3, "answer": "a"}, "'prompt' is missing or no text"),
        ({"prompt": "p", "answer": "  "}, "the answer is empty"),
        ({"prompt": "p", "answer": "a", "choices": ["b", "c"]}, "must hold the answer 'a'"),
        ({"prompt": "p", "answer": "a", "choices": ["a", "a"]}, "and another one, each once"),
        ({"prompt": "p", "answer": "a", "choices": "ab"}, "'choices' is no list of texts"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "must be a list of {role, content}"),
        ({"messages": [{"role": "user", "content": "p"}, {"role": "user", "content": "a"}]}, "ends with the assistant"),
        ({"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]}, "a chat template"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, row: Any, message: str) -> None:
    file = write(tmp_path / "a.jsonl", {"prompt": "p", "answer": "a"}, row)
    with pytest.raises(DataError, match=message):
        read_examples(str(file), tokenizer())


def test_absent_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"b\.jsonl: No such file"):
        read_examples(str(tmp_path / "b.jsonl"))
    with pytest.raises(DataError, match="Give a JSON Lines file"):
        read_examples(str(tmp_path))
    with pytest.raises(DataError, match="no examples"):
        read_examples(str(write(tmp_path / "c.jsonl", "", "  ")))


def test_a_chat_template_writes_conversations_out(tmp_path: Path) -> None:
    chat = type("Chat", (), {"chat_template": "x"})()
    chat.apply_chat_template = lambda m, tokenize, add_generation_prompt: "|".join(
        f"{x['role']}:{x['content']}" for x in m
    )
    rows = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    (found,) = read_examples(str(write(tmp_path / "a.jsonl", {"messages": rows})), chat)
    assert (found.prompt, found.answer) == ("system:s|user:u", "a")


def test_samples_learn_the_answer_and_the_end_only() -> None:
    one = encode("the cat sees", " a dog", tokenizer())
    sample = AnswerSamples([one], 99)[0]
    text = tokenizer().decode(sample["input_ids"])
    assert text.replace("<end>", "") == "the cat sees a dog"
    learnt = sample["labels"][sample["labels"] != IGNORE]
    assert tokenizer().decode(learnt) == " a dog<end>" and "position_ids" not in sample
    assert torch.equal(sample["labels"][-len(learnt) :], sample["input_ids"][-len(learnt) :])
    empty = AnswerSamples([encode("", "dog", tokenizer())], 99)[0]
    assert int(empty["labels"][0]) == IGNORE  # nothing predicts the first token


@pytest.mark.parametrize("seed", range(3))
def test_packing_keeps_every_example_whole_and_in_order(seed: int) -> None:
    chance, block = random.Random(seed), 17
    encoded = []
    for index in range(40):
        length = chance.randint(2, block)
        encoded.append(Encoded(torch.full((length,), index), chance.randint(0, length - 1)))
    samples = AnswerSamples(encoded, block, packing=True)
    assert len(samples) < 40 and all(samples[i]["input_ids"].numel() <= block for i in range(len(samples)))
    batch = collate([samples[i] for i in range(len(samples))])
    seen = []
    for row, mask in enumerate(batch["attention_mask"].bool()):
        assert set(batch["labels"][row][~mask].tolist()) <= {IGNORE}
        assert set(batch["segment_ids"][row][~mask].tolist()) <= {-1}
        for number in batch["segment_ids"][row][mask].unique():
            here = batch["segment_ids"][row] == number
            ids = batch["input_ids"][row][here]
            one = encoded[int(ids[0])]
            seen.append(int(ids[0]))
            assert torch.equal(ids, one.ids)
            assert batch["position_ids"][row][here].tolist() == list(range(len(ids)))
            assert (batch["labels"][row][here] == IGNORE).tolist() == [k < max(one.prompt, 1) for k in range(len(ids))]
    assert seen == list(range(40))


def test_long_examples_are_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    examples = [Example("the cat", " sees", (), "a:1"), Example("the cat" * 20, " sees", (), "a:2")]
    with caplog.at_level("WARNING", "tsld_fx"):
        assert len(encode_all(examples, tokenizer(), 12, "train")) == 1
    assert "1 of 2 examples are longer than block_size=12 tokens and are left out (first a:2)" in caplog.text
    with pytest.raises(DataError, match=r"every example is longer than block_size=12 tokens \(first a:2\)"):
        encode_all(examples[1:], tokenizer(), 12, "train")


@pytest.mark.parametrize("seed", [0])
def test_scores_equal_one_example_at_a_time(seed: int, tmp_path: Path) -> None:
    model = build("llama", vocab_size=120, seed=seed)
    examples = read_examples(str(questions(tmp_path / "q.jsonl", 9, seed)))
    examples.append(Example("my bird", " eats corn"))
    found = score_task(model, examples, tokenizer(), block_size=30, batch_size=4)
    with pytest.raises(DataError, match="batch_size=0"):
        score_task(model, examples, tokenizer(), batch_size=0)
    total, tokens, right = 0.0, 0, 0
    for example in examples:
        scores = {}
        for choice in example.choices or (example.answer,):
            one = encode(example.prompt, choice, tokenizer())
            with torch.no_grad():
                logs = model(input_ids=one.ids[None]).logits[0].double().log_softmax(-1)
            scores[choice] = sum(float(logs[k - 1, one.ids[k]]) for k in range(one.prompt, one.ids.numel()))
            count = one.ids.numel() - one.prompt if choice == example.answer else 0
            tokens += count
        total -= scores[example.answer]
        right += bool(example.choices) and max(scores, key=scores.__getitem__) == example.answer
    assert found.tokens == tokens and found.examples == 10
    assert found.loss == pytest.approx(total / tokens, rel=1e-5)
    assert found.accuracy == right / 9 and found.chance == pytest.approx(1 / 3)
    graph = score_task(prepare(build("llama", vocab_size=120, seed=seed)).eval(), examples[:2], tokenizer())
    assert graph.loss > 0


@pytest.mark.parametrize("packing", [False, True])
def test_finetune_then_train_learns_the_task(tmp_path: Path, packing: bool) -> None:
    files = {
        split: [str(questions(tmp_path / f"{split}.jsonl", n, n))] for split, n in (("train", 64), ("validation", 24))
    }
    data = {**files, "block_size": 38, "packing": packing}
    training = {"max_steps": 40 if not packing else 4, "learning_rate": 1e-2, "per_device_train_batch_size": 8}
    training |= {"eval_strategy": "epoch", "num_train_epochs": 5.0}
    base = settings(data=data, training=training)
    del base["training"]["eval_steps"]
    teacher = tmp_path / "teacher"
    outcome = run_cli("finetune", "--config", write_yaml(tmp_path / "t.yaml", base), "--out", teacher)
    assert outcome.code == 0 and "validation accuracy" in outcome.out, outcome.err
    result = read_json(teacher / "result.json")
    if not packing:
        assert result["model"]["validation"] < result["start"]["validation"] / 3
        assert result["model"]["validation_accuracy"] > 0.6
    base["model"] = str(teacher / "model")
    base["training"] |= {"max_steps": 4}
    base["distill"] = {"method": "tsld", "separate_documents": packing}
    student = tmp_path / "student"
    outcome = run_cli("train", "--config", write_yaml(tmp_path / "s.yaml", base), "--out", student)
    assert outcome.code == 0, outcome.err
    result = read_json(student / "result.json")
    assert result["teacher"] == pytest.approx(read_json(teacher / "result.json")["model"], rel=1e-3)
    assert result["student"] != result["ptq"]
    if packing:
        return
    outcome = run_cli("eval", student, "--text", files["validation"][0], "--length", 38)
    assert outcome.code == 0 and "33.3%" in outcome.out, outcome.err


def test_task_files_and_text_do_not_mix(tmp_path: Path) -> None:
    task = str(questions(tmp_path / "q.jsonl", 4, 0))
    mixed = settings(data={"train": [task, str(text_file("train"))]})
    both = settings(data={"train": [task], "validation": [str(text_file("validation"))], "block_size": 38})
    for config, message in ((mixed, "mix task files"), (both, "data.validation: text; data.train: task files")):
        outcome = run_cli("train", "--config", write_yaml(tmp_path / "c.yaml", config), "--out", tmp_path / "out")
        assert outcome.code == 2 and message in outcome.err, outcome.err
    assert not (tmp_path / "out").exists()
    outcome = run_cli("eval", float_folder(), "--text", task, "--text", text_file("test"))
    assert outcome.code == 2 and "mix task files" in outcome.err
    with pytest.raises(ConfigError, match="packing must be true or false"):
        from tsld_fx.settings import DataSettings

        DataSettings(packing="yes")  # type: ignore[arg-type]
