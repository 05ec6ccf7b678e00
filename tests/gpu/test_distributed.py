"""NCCL on two GPUs: FSDP2 and pipelines train as one process on one GPU does; every failure is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.launch import run_ranks
from tests.distributed.test_ranks import CASES, KEEP, NAN, fsdp, pipeline, same
from tests.distributed.test_runs import told_once
from tests.tiny_runs import read_json
from tsld_fx.runs import last_whole_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]
TOGETHER = (
    ("1f1b", "interleaved_1f1b", "fsdp_recompute"),
    ("zero_bubble", "zbv"),
    ("tied_1f1b", "tied_fsdp"),
)


def on_gpu(case: dict[str, Any]) -> dict[str, Any]:
    """The case in full float32 on the GPU."""
    return {**case, "training": {**case["training"], "use_cpu": False, "tf32": False}}


SINGLE = {
    "llama": {"training": {"gradient_accumulation_steps": 4}},
    "gpt2": {"family": "gpt2", "training": CASES["tied_1f1b"][1]["training"]},
}


@pytest.mark.parametrize("names", TOGETHER, ids=lambda names: names[0])
def test_two_gpus_train_as_one(tmp_path: Path, names: tuple[str, ...]) -> None:
    (family,) = {CASES[name][0] for name in names}
    run_ranks(1, [{"folder": str(tmp_path / "single"), **on_gpu(SINGLE[family])}])
    run_ranks(2, [{"folder": str(tmp_path / name), **on_gpu(CASES[name][1])} for name in names])
    for name in names:
        same(tmp_path / name, tmp_path / "single", tolerance=1e-5)


def test_bfloat16_stays_near_float32(tmp_path: Path) -> None:
    cases = {"bf16": pipeline("1f1b", bf16=True), "float32": pipeline("1f1b")}
    run_ranks(2, [{"folder": str(tmp_path / name), **on_gpu(case)} for name, case in cases.items()])
    one, other = [torch.load(tmp_path / name / "weights.pt")["lm_head.weight"] for name in cases]
    assert 0 < (one - other).abs().max() < 0.05


@pytest.mark.parametrize("how", ["raise", "nan"])
@pytest.mark.parametrize("mode", ["fsdp", "1f1b"])
def test_failure_of_one_process_reaches_the_other(tmp_path: Path, mode: str, how: str) -> None:
    case = fsdp(2, **KEEP) if mode == "fsdp" else pipeline(mode, **KEEP)
    broken = on_gpu({**case, "breaks": {**NAN["breaks"], "how": how}})
    run_ranks(2, [{"folder": str(tmp_path), **broken}], timeout=80)
    told = [read_json(tmp_path / f"error_{rank}.json") for rank in (0, 1)]
    cause = "process 1: RuntimeError: out of coffee" if how == "raise" else "the loss of process 1 is nan"
    assert all(cause in t["text"] for t in told)
    assert sorted(t["kind"] for t in told) == ["PeerError", "TrainingError"]
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


@pytest.mark.parametrize(
    ("breaks", "cause"),
    [("nan", "training stopped at step 3: the loss of process 1 is nan"), ("raise", "process 1: RuntimeError: out of")],
)
def test_failure_of_one_data_parallel_process_is_told_once(tmp_path: Path, breaks: str, cause: str) -> None:
    told_once(tmp_path, breaks, cause, use_cpu=False)
