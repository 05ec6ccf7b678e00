"""Reading text, cutting it into blocks, and every kind of text that cannot be used."""

from __future__ import annotations

import lzma
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import POSITIONS
from tests.tiny_runs import (
    BLOCK,
    EOS,
    Outcome,
    files_under,
    float_folder,
    run_cli,
    settings,
    text_file,
    tokenizer,
    write_yaml,
)
from tsld_fx.errors import DataError
from tsld_fx.text_data import TokenBlocks, read_documents, tokenize


def refused_by_train_and_eval(source: str, folder: Path, *parts: str) -> None:
    """Both commands refuse a text with exit code 2 and one line, and write nothing."""
    data: dict[str, Any] = {"train": [source]}
    file = write_yaml(folder / "run.yaml", settings(data=data))
    outcomes = [
        run_cli("train", "--config", file, "--out", folder / "out"),
        run_cli("eval", float_folder(), "--text", source, "--length", BLOCK),
    ]
    for outcome in outcomes:
        check(outcome, *parts)
    assert not (folder / "out").exists(), files_under(folder / "out")


def check(outcome: Outcome, *parts: str) -> None:
    assert outcome.code == 2, outcome.err
    assert len(outcome.err.strip().splitlines()) == 1, outcome.err
    assert outcome.err.startswith("error: ")
    for part in parts:
        assert part in outcome.err


def test_text_that_cannot_be_used(tmp_path: Path) -> None:
    contents: dict[str, tuple[bytes, str]] = {
        "empty.txt": (b"", "the file is empty"),
        "blank.txt": (b" \n\t\n", "the file is empty"),
        "latin.txt": ("für".encode("latin-1"), "not UTF-8 text"),
        "broken.txt.xz": (b"no xz at all", "not UTF-8 text"),
        "short.txt.xz": (lzma.compress(b"the cat sees a fish.\n" * 500)[:60], "not UTF-8 text"),
    }
    for name, (content, message) in contents.items():
        file = tmp_path / name
        file.write_bytes(content)
        refused_by_train_and_eval(str(file), tmp_path, str(file), message, "Give")
    absent = str(tmp_path / "absent.txt")
    refused_by_train_and_eval(absent, tmp_path, absent, "no such file", "Give")


def test_name_that_is_neither_file_nor_data_set(tmp_path: Path) -> None:
    refused_by_train_and_eval("no/such-data", tmp_path, "no/such-data", "neither a file nor a data set", "Give")


def test_unknown_split_of_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tsld_fx.demo.text.load_splits", lambda: {"train": (), "validation": ()})
    with pytest.raises(DataError, match=r"demo: no split 'dev'\. It has train, validation"):
        read_documents("demo", "dev")


def test_text_shorter_than_a_block_and_blocks_longer_than_the_positions(tmp_path: Path) -> None:
    file = tmp_path / "few.txt"
    file.write_text("the cat")
    for part in ("train", "validation"):
        run = write_yaml(tmp_path / "run.yaml", settings(data={part: [str(file)]}))
        outcome = run_cli("train", "--config", run, "--out", tmp_path / "out")
        check(outcome, "less than one block of 16", "Give more text or a smaller block size")
    run = write_yaml(tmp_path / "run.yaml", settings(data={"block_size": POSITIONS + 1}))
    for command in ("train", "finetune"):
        outcome = run_cli(command, "--config", run, "--out", tmp_path / "out")
        check(outcome, f"windows of {POSITIONS + 1} tokens are more than the model's {POSITIONS} positions")
    check(
        run_cli("eval", float_folder(), "--text", text_file("test"), "--length", POSITIONS + 1),
        f"{POSITIONS} positions",
    )
    assert not (tmp_path / "out").exists()


def test_files_are_one_document_each_and_may_be_compressed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat\n", encoding="utf-8")
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress("a fish – größer\n".encode()))
    names = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt.xz")]
    assert read_documents(names) == ["the cat\n", "a fish – größer\n"]


def test_local_data_set_is_read_by_split(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "the cat"}\n{"text": "a dog\\n"}\n')
    (tmp_path / "test.jsonl").write_text('{"text": "some corn"}\n')
    assert read_documents(str(tmp_path), "train") == ["the cat\na dog\n"]
    assert read_documents(str(tmp_path), "test") == ["some corn\n"]
    with pytest.raises(DataError, match="neither a file nor a data set"):
        read_documents(str(tmp_path), "validation")


def test_data_set_without_a_text_column_names_its_columns(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"body": "the cat", "title": "x"}\n')
    with pytest.raises(DataError, match="no column 'text'; it has body, title"):
        read_documents(str(tmp_path), "train")


def test_tokens_round_trip_and_documents_end_with_the_end_token() -> None:
    texts = ["the cat sees a fish.\n", "my bird\n"]
    parts = [tokenizer()(text)["input_ids"] for text in texts]
    assert tokenize(texts, tokenizer()).tolist() == [*parts[0], EOS, *parts[1], EOS]
    assert tokenize(texts[:1], tokenizer()).tolist() == parts[0]


def test_blocks_hold_the_stream_in_order_and_drop_the_tail() -> None:
    stream = torch.arange(1, 24)
    blocks = TokenBlocks(stream, 5)
    assert len(blocks) == 4
    assert torch.cat([blocks[i]["input_ids"] for i in range(4)]).tolist() == list(range(1, 21))
    assert all(torch.equal(blocks[i]["input_ids"], blocks[i]["labels"]) for i in range(4))
    assert set(blocks[0]) == {"input_ids", "labels"}
    with pytest.raises(DataError, match="23 tokens, less than one block of 24"):
        TokenBlocks(stream, 24)


def test_segments_count_documents_within_a_block() -> None:
    stream = torch.tensor([5, 6, EOS, 7, EOS, EOS, 8, 9])
    assert TokenBlocks(stream, 8, EOS)[0]["segment_ids"].tolist() == [0, 0, 0, 1, 1, 2, 3, 3]
