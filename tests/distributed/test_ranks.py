"""Two and four gloo processes on the CPU: the losses, gradients and weights of one process; every failure is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.launch import run_ranks
from tests.distributed.rank import run
from tests.tiny_runs import read_json
from tsld_fx.runs import last_whole_checkpoint

pytestmark = pytest.mark.xdist_group("distributed")
Folder = Callable[[str], Path]
ADAMW = {"optim": "adamw_torch", "learning_rate": 1e-3, "weight_decay": 0.1, "max_grad_norm": 1.0}
CLIPPED = {"max_grad_norm": 1.0}


def pipeline(schedule: str, **training: Any) -> dict[str, Any]:
    """Four micro-batches of two sequences a step."""
    return {
        "parallel": {"mode": "pipeline", "schedule": schedule},
        "training": {"gradient_accumulation_steps": 4, **training},
    }


def fsdp(world_size: int, **training: Any) -> dict[str, Any]:
    """As many micro-batches a step as `pipeline`, over all processes."""
    return {"parallel": {"mode": "fsdp"}, "training": {"gradient_accumulation_steps": 4 // world_size, **training}}


CASES: dict[str, tuple[str, dict[str, Any]]] = {  # name -> (single process to equal, case)
    "gpipe": ("llama", pipeline("gpipe")),
    "1f1b": ("llama", pipeline("1f1b", gradient_checkpointing=True)),
    "interleaved_1f1b": ("llama", pipeline("interleaved_1f1b")),
    "zero_bubble": ("llama", pipeline("zero_bubble", gradient_checkpointing=True)),
    "zbv": ("llama", pipeline("zbv")),
    "fsdp": ("llama", fsdp(2)),
    "fsdp_recompute": ("llama", fsdp(2, gradient_checkpointing=True)),
    "tied_1f1b": ("gpt2", {"family": "gpt2", **pipeline("1f1b", **CLIPPED)}),
    "tied_zbv": ("gpt2", {"family": "gpt2", **pipeline("zbv", **CLIPPED)}),
    "tied_fsdp": ("gpt2", {"family": "gpt2", **fsdp(2, **CLIPPED)}),
    "whole_logits_zero_bubble": ("llama", {"distill": {"fused": False}, **pipeline("zero_bubble")}),
    "whole_logits_tied_fsdp": ("gpt2", {"family": "gpt2", "distill": {"fused": False}, **fsdp(2, **CLIPPED)}),
    "l2l_fsdp": ("l2l", {"method": "l2l", **fsdp(2)}),
}
SINGLE: dict[str, dict[str, Any]] = {
    "llama": {"training": {"gradient_accumulation_steps": 4}},
    "gpt2": {"family": "gpt2", "training": {"gradient_accumulation_steps": 4, **CLIPPED}},
    "l2l": {"method": "l2l", "training": {"gradient_accumulation_steps": 4}},
}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {  # name -> (part of the message, case)
    "few_layers": ("2 layers cannot be staged over 2 processes", {"layers": 2, **pipeline("interleaved_1f1b")}),
    "micro_batches": (
        "1f1b needs at least one per process",
        {**pipeline("1f1b"), "training": {"gradient_accumulation_steps": 1}},
    ),
    "taps": ("--parallel fsdp", {"method": "l2l", **pipeline("1f1b")}),
    "optimiser": ("adamw_torch_fused", fsdp(2, optim="adafactor")),
    "cache": ("teacher_cache", {"distill": {"teacher_cache": "token_scores"}, **fsdp(2)}),
    "half": ("training.fp16", fsdp(2, fp16=True, use_cpu=True)),
}
ON_GLOO = {name: case for name, case in CASES.items() if "zbv" not in name or torch.__version__ >= (2, 13)}
REFUSED |= {name: ("over gloo hang", case) for name, (_, case) in CASES.items() if name not in ON_GLOO}
NAN = {"breaks": {"step": 2, "how": "nan"}}
RAISE = {"breaks": {"step": 2, "how": "raise"}}
KEEP = {"save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Folder of a case; all cases of two processes run in one start of them."""
    root = tmp_path_factory.mktemp("ranks")
    for name, case in SINGLE.items():
        (root / f"single_{name}").mkdir()
        run({"folder": str(root / f"single_{name}"), **case})
    two = [{"folder": str(root / name), **case} for name, (_, case) in ON_GLOO.items()]
    two += [{"folder": str(root / name), **case} for name, (_, case) in REFUSED.items()]
    two += [
        {"folder": str(root / "nan_fsdp"), **fsdp(2, **KEEP), **NAN},
        {"folder": str(root / "nan_pipeline"), **pipeline("1f1b", **KEEP), **NAN},
        {"folder": str(root / "adamw"), **fsdp(2, **ADAMW)},
        {"folder": str(root / "moved"), **fsdp(2, **ADAMW, max_steps=2, **KEEP)},
        {"folder": str(root / "moved_stages"), **pipeline("interleaved_1f1b", **ADAMW, max_steps=2, **KEEP)},
        {"folder": str(root / "raise_fsdp"), **fsdp(2, **KEEP), **RAISE},
    ]
    run_ranks(2, two)
    run_ranks(2, [{"folder": str(root / "raise_pipeline"), **pipeline("1f1b", **KEEP), **RAISE}])
    four = [
        {"folder": str(root / "moved_stages"), "resume": True, **pipeline("1f1b", **ADAMW)},
        {"folder": str(root / "moved"), "resume": True, **fsdp(4, **ADAMW)},
    ]
    run_ranks(4, four)
    return lambda name: root / name


def same(found: Path, expected: Path, tolerance: float = 2e-6) -> None:
    """Losses, gradient norms, rates and weights are equal."""
    ours, theirs = read_json(found / "lines.json"), read_json(expected / "lines.json")
    theirs = [line for line in theirs if line["step"] >= ours[0]["step"]]
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for our, their in zip(ours, theirs, strict=True):
        for key in their:
            assert our[key] == pytest.approx(their[key], rel=1e-5), (key, our, their)
    one, other = torch.load(found / "weights.pt"), torch.load(expected / "weights.pt")
    assert one.keys() == other.keys()
    for name, value in other.items():
        torch.testing.assert_close(one[name], value, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("name", ON_GLOO)
def test_two_processes_train_as_one(folder: Folder, name: str) -> None:
    same(folder(name), folder(f"single_{CASES[name][0]}"))


@pytest.mark.parametrize("name", ["moved", "moved_stages"])
def test_resumed_on_four_processes_trains_as_on_two(folder: Folder, name: str) -> None:
    same(folder(name), folder("adamw"), tolerance=1e-4)  # AdamW turns rounding of tiny gradients into steps
    assert [line["step"] for line in read_json(folder(name) / "lines.json")] == [3]


def test_resumed_in_one_process_without_torchrun(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    case = {"folder": str(folder("adamw")), "resume": True, **fsdp(1, **ADAMW, max_steps=4)}
    run(case)
    assert [line["step"] for line in read_json(folder("adamw") / "lines.json")] == [4]
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", REFUSED)
def test_refused_on_every_process_before_anything_is_moved(folder: Folder, name: str) -> None:
    first, second = (read_json(folder(name) / f"error_{rank}.json") for rank in (0, 1))
    assert REFUSED[name][0] in first["text"]
    assert (first["kind"], second["kind"]) == ("ConfigError", "PeerError")
    assert first["text"] == second["text"]


@pytest.mark.parametrize("name", ["nan_fsdp", "nan_pipeline"])
def test_nan_on_one_process_stops_all_and_names_it(folder: Folder, name: str) -> None:
    first, second = (read_json(folder(name) / f"error_{rank}.json") for rank in (0, 1))
    assert "training stopped at step 2: the loss of process 1 is nan" in first["text"]
    assert (first["kind"], second["kind"]) == ("TrainingError", "PeerError")
    assert last_whole_checkpoint(folder(name)) == folder(name) / "checkpoint-2"
    assert not (folder(name) / "weights.pt").exists()


@pytest.mark.parametrize("name", ["raise_fsdp", "raise_pipeline"])
def test_failure_of_one_process_inside_a_step_reaches_the_other(folder: Folder, name: str) -> None:
    first, second = (read_json(folder(name) / f"error_{rank}.json") for rank in (0, 1))
    assert "process 1: RuntimeError: out of coffee" in second["text"]
    assert first["text"].count("out of coffee") == 1
    assert (first["kind"], second["kind"]) == ("PeerError", "TrainingError")
    assert last_whole_checkpoint(folder(name)) == folder(name) / "checkpoint-2"


def test_checkpoints_are_by_the_models_names(folder: Folder) -> None:
    from tsld_fx.distributed.checkpoints import read_model, stored

    checkpoint = last_whole_checkpoint(folder("moved_stages"))
    assert checkpoint is not None
    weights = torch.load(folder("moved_stages") / "weights.pt")
    values = read_model(checkpoint)
    assert all(torch.equal(values[name], weights[name]) for name in values)
    assert "optimizer.lm_head.weight/exp_avg" in stored(checkpoint)
    assert json.loads((checkpoint / "parallel.json").read_text())["world_size"] == 4
