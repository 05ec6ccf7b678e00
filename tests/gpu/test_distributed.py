"""NCCL on two GPUs: FSDP2 and pipelines train as one process on one GPU does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.launch import run_ranks
from tests.distributed.test_ranks import CASES, pipeline, same

pytestmark = pytest.mark.gpu
NAMES = ("1f1b", "interleaved_1f1b", "zero_bubble", "zbv", "fsdp_recompute", "tied_1f1b", "tied_fsdp")


def on_gpu(case: dict[str, Any]) -> dict[str, Any]:
    """The case in full float32 on the GPU."""
    return {**case, "training": {**case["training"], "use_cpu": False, "tf32": False}}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_as_one(tmp_path: Path) -> None:
    single = {
        "llama": {"training": {"gradient_accumulation_steps": 4}},
        "gpt2": {"family": "gpt2", "training": CASES["tied_1f1b"][1]["training"]},
    }
    run_ranks(1, [{"folder": str(tmp_path / f"single_{n}"), **on_gpu(case)} for n, case in single.items()])
    cases = {name: on_gpu(CASES[name][1]) for name in NAMES}
    cases["bf16"] = on_gpu(pipeline("1f1b", bf16=True))
    run_ranks(2, [{"folder": str(tmp_path / name), **case} for name, case in cases.items()])
    for name in NAMES:
        same(tmp_path / name, tmp_path / f"single_{CASES[name][0]}", tolerance=1e-5)
    same_loss = [torch.load(tmp_path / n / "weights.pt")["lm_head.weight"] for n in ("bf16", "single_llama")]
    assert 0 < (same_loss[0] - same_loss[1]).abs().max() < 0.05
