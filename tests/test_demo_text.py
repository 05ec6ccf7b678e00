"""The embedded demo: its text splits as promised, and its model reads that text as well as its card says."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import tsld_fx.demo
from tsld_fx.demo import text
from tsld_fx.errors import TsldError

ASSETS = Path(tsld_fx.demo.__file__).parent / "assets"
HELD_OUT = ("validation", "test")

GOLDEN = {
    "module:argparse": "train",
    "module:json.decoder": "train",
    "topic:lambda": "train",
    "module:subprocess": "validation",
    "topic:typesseq": "validation",
    "module:codecs": "test",
    "module:logging.handlers": "test",
}

MEASURED = {"validation": 22.65, "test": 18.42}
"""Perplexity per token of the first 20,000 tokens in windows of 256; Python 3.11, others within 5 %."""


@pytest.fixture(scope="module")
def splits() -> dict[str, list[text.Document]]:
    return text.load_splits()


def words(paragraph: str) -> str:
    return " ".join(paragraph.split())


def test_splits_follow_from_the_names() -> None:
    assert {name: text.split_of(name) for name in GOLDEN} == GOLDEN


def test_shares_are_90_5_5() -> None:
    drawn = [text.split_of(f"module:name{i}") for i in range(20_000)]
    for split, share in (("train", 0.90), ("validation", 0.05), ("test", 0.05)):
        assert drawn.count(split) / len(drawn) == pytest.approx(share, abs=0.01)


def test_each_document_is_in_its_split_and_in_order(splits: dict[str, list[text.Document]]) -> None:
    for split, documents in splits.items():
        names = [document.name for document in documents]
        assert names == sorted(set(names))
        assert {text.split_of(name) for name in names} == {split}
    assert sum(map(len, splits.values())) == len(text.load_documents())


def test_text_is_big_enough(splits: dict[str, list[text.Document]]) -> None:
    characters = {split: sum(len(d.text) for d in documents) for split, documents in splits.items()}
    assert characters["train"] > 1_000_000
    assert all(characters[split] > 60_000 for split in HELD_OUT)


def test_no_held_out_paragraph_is_in_train(splits: dict[str, list[text.Document]]) -> None:
    train = words("\n\n".join(document.text for document in splits["train"]))
    held_out = [words(p) for split in HELD_OUT for document in splits[split] for p in document.text.split("\n\n")]
    leaks = [paragraph for paragraph in held_out if len(paragraph) > 200 and paragraph in train]
    assert leaks == []


def test_a_document_holds_docstrings_under_qualified_names(splits: dict[str, list[text.Document]]) -> None:
    documents = {document.name: document.text for part in splits.values() for document in part}
    assert "\njson.decoder.JSONDecoder.raw_decode\nDecode a JSON document" in documents["module:json.decoder"]
    assert not any(".test." in name or name.startswith("module:site") for name in documents if name != "module:site")


def test_too_little_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small.py").write_text('"""One docstring of eighty characters or more, which is far from enough."""\n')
    monkeypatch.setattr(text.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(text, "_topics", lambda: iter(()))
    with pytest.raises(TsldError, match=r"200,000 are needed.*install the full package"):
        text._load_documents.__wrapped__()


def test_topics_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pydoc_data.topics", None)
    assert list(text._topics()) == []


def test_loading_is_fast() -> None:
    start = time.process_time()
    assert text._load_documents.__wrapped__() == tuple(text.load_documents())  # the same at every call
    assert time.process_time() - start < 10  # about 2 s; room for slow machines


def test_assets_are_small() -> None:
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= {p.name for p in ASSETS.iterdir()}
    assert sum(path.stat().st_size for path in ASSETS.iterdir() if path.is_file()) <= 12 * 2**20


def test_tokenizer_returns_the_text(splits: dict[str, list[text.Document]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 0, 2048)
    samples = [document.text for document in splits["test"]] + [
        " naïve\r\n\t 日本語 🎉  ",
        "",
        "\n\n    x = 1\n",
    ]
    for sample in samples:
        assert tokenizer.decode(tokenizer(sample).input_ids) == sample


@pytest.mark.parametrize("split", HELD_OUT)
def test_model_reads_the_text_as_measured(
    split: str, splits: dict[str, list[text.Document]], perplexity: Callable[[list[text.Document]], float]
) -> None:
    assert perplexity(splits[split]) < 1.2 * MEASURED[split]  # other Python versions have other docstrings


@pytest.fixture(scope="module")
def perplexity() -> Callable[[list[text.Document]], float]:
    """Of the embedded model, per token, on the first 20,000 tokens of documents in windows of 256."""
    model = AutoModelForCausalLM.from_pretrained(ASSETS)
    assert model.dtype == torch.float16
    model = model.float().eval()
    tokenizer = Tokenizer.from_file(str(ASSETS / "tokenizer.json"))

    @torch.inference_mode()
    def measure(documents: list[text.Document]) -> float:
        ids = tokenizer.encode("<|endoftext|>" + "<|endoftext|>".join(d.text for d in documents)).ids
        count = min(20_000, len(ids) - 1) // 256 * 256
        inputs = torch.tensor(ids[:count]).view(-1, 256)
        labels = torch.tensor(ids[1 : count + 1]).view(-1, 256)
        losses = [
            torch.nn.functional.cross_entropy(model(input_ids=x, use_cache=False).logits.flatten(0, 1), y.flatten())
            * len(y)
            for x, y in zip(inputs.split(16), labels.split(16), strict=True)
        ]
        return math.exp(sum(losses) / len(labels))

    return measure
