"""A tiny model with its tokenizer and text in folders, and the command line run inside the test's process."""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast, TrainerCallback, TrainingArguments

from tests.models import build, ids
from tsld_fx.cli import commands
from tsld_fx.cli.main import main

BLOCK = 16
VOCABULARY = 120
EOS = 0


@cache
def workspace() -> Path:
    """A folder that vanishes with the process."""
    folder = Path(tempfile.mkdtemp(prefix="tsld_fx_tests_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def sentences(count: int, seed: int) -> str:
    """Lines with a pattern that a tiny model can learn."""
    chance = random.Random(seed)
    who, does, what = ("the cat", "a dog", "my bird"), ("sees", "hunts", "eats"), ("the mouse", "a fish", "some corn")
    return "".join(f"{chance.choice(who)} {chance.choice(does)} {chance.choice(what)}.\n" for _ in range(count))


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE over the letters of `sentences`, with an end token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    letters = sorted({c for text, _ in core.pre_tokenizer.pre_tokenize_str(sentences(50, 0)) for c in text})
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<end>"], initial_alphabet=letters)
    core.train_from_iterator([sentences(200, 0)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


@cache
def float_folder(family: str = "llama", vocabulary: int = VOCABULARY) -> Path:
    """A saved float model with its tokenizer."""
    folder = workspace() / f"{family}-{vocabulary}"
    model = build(family, vocab_size=vocabulary, bos_token_id=None, eos_token_id=EOS, pad_token_id=None)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@cache
def text_file(name: str) -> Path:
    """train.txt, validation.txt or test.txt."""
    lines, seed = {"train": (150, 1), "validation": (20, 2), "test": (20, 3)}[name]
    file = workspace() / f"{name}.txt"
    file.write_text(sentences(lines, seed), encoding="utf-8")
    return file


def settings(**changes: Any) -> dict[str, Any]:
    """A complete run of a few steps as plain data; nested mappings are merged."""
    base: dict[str, Any] = {
        "model": str(float_folder()),
        "data": {
            "train": [str(text_file("train"))],
            "validation": [str(text_file("validation"))],
            "block_size": BLOCK,
        },
        "training": {
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 3.0e-3,
            "eval_strategy": "steps",
            "eval_steps": 3,
            "logging_steps": 2,
            "use_cpu": True,
        },
        "checkpoint_steps": 5,
    }
    for key, value in changes.items():
        base[key] = {**base[key], **value} if isinstance(base.get(key), dict) else value
    return base


def write_yaml(file: Path, data: Any) -> Path:
    file.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return file


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str


def run_cli(*words: object) -> Outcome:
    """`tsld-fx words...` in this process, with its exit code."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["tsld-fx", *map(str, words)]
    code: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _wide_terminal():
            main()
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = argv
    return Outcome(int(code or 0), out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _wide_terminal() -> Iterator[None]:
    """Tables are 200 columns wide, whatever terminal the tests run in."""
    before, commands.console.width = commands.console.width, 200
    try:
        yield
    finally:
        commands.console.width = before


def start_cli(*words: object) -> subprocess.Popen[str]:
    """`python -m tsld_fx.cli words...` as a process of its own, on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tsld_fx.cli", *map(str, words)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=_heed_ctrl_c,
    )


def _heed_ctrl_c() -> None:
    """Shells start jobs in the background with Ctrl-C ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def files_under(folder: Path) -> list[str]:
    """Every file below a folder, hidden ones too."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) if folder.exists() else []


def read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Samples for a trainer: one dict per row of the columns given."""

    def __init__(self, **columns: torch.Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


def random_rows(count: int = 16, tokens: int = 12, seed: int = 0) -> Rows:
    tokens_ = ids(count, tokens, seed)
    return Rows(input_ids=tokens_, labels=tokens_.clone())


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """Quiet TrainingArguments on the CPU that keep no checkpoint."""
    values = {
        "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "logging_steps": 1,
        "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 0,
        "max_grad_norm": 0.0, "lr_scheduler_type": "constant",
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **{**values, **changes})


class Recorder(TrainerCallback):
    """Keeps every log line."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.lines.append({"step": state.global_step, **logs})

    def values(self, name: str) -> Sequence[float]:
        return [line[name] for line in self.lines if name in line]
