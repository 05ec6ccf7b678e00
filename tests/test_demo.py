"""The demo on the embedded model, with less text and shorter blocks than a user gets."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_runs import read_json, run_cli
from tsld_fx.demo import run as demo
from tsld_fx.demo import text as demo_text
from tsld_fx.demo.run import Pace, settings_for

pytestmark = pytest.mark.xdist_group("demo")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = demo_text.load_splits()
    few = {"train": splits["train"][:40], "validation": splits["validation"][:3]}
    monkeypatch.setattr(demo_text, "load_splits", lambda: few)
    monkeypatch.setattr(demo, "BLOCK", 48)
    monkeypatch.setattr(demo, "BATCH", 4)


def test_demo_reports_what_training_regained_and_resumes(small: None, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    outcome = run_cli("demo", "--minutes", 0.01, "--out", out)
    assert outcome.code == 0, outcome.err
    report = read_json(out / "report.json")
    teacher, ternary, trained = (
        report["perplexity"][k] for k in ("full precision", "ternary, no training", "ternary, TSLD")
    )
    assert teacher < trained < ternary
    assert report["gap_closed"] == pytest.approx((ternary - trained) / (ternary - teacher))
    assert report["packed_equals_trained"] is True
    assert report["slice"]["packed"] == pytest.approx(report["slice"]["trained"], rel=1e-4)
    assert report["bytes"]["float32"] > 12 * report["bytes"]["packed"]
    assert report["steps"] == read_json(out / "train" / "result.json")["steps"] >= 30
    assert all(text.startswith(prompt) and len(text) > len(prompt) for prompt, text in report["samples"].items())
    assert (out / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    for shown in (f"{trained:.2f}", f"{report['gap_closed']:.0%}", "bit for bit"):
        assert shown in outcome.out
    packed = run_cli("eval", out / "packed", "--text", "demo", "--split", "validation", "--length", 48)
    assert packed.code == 0, packed.err
    assert float(packed.out.split()[1]) == pytest.approx(trained, rel=1e-3)

    start = time.perf_counter()
    again = run_cli("demo", "--minutes", 5, "--out", out)
    assert again.code == 0, again.err
    assert "resuming the demo" in again.out
    assert read_json(out / "report.json")["perplexity"] == report["perplexity"]
    assert time.perf_counter() - start < report["seconds"]
    full = run_cli("demo", "--full", "--out", out)
    assert full.code == 2 and "Choose another output folder" in full.err


@pytest.mark.parametrize(
    ("pace", "minutes", "full", "steps", "bf16"),
    [
        (Pace(0.5, 0.9), 3.0, False, 300, False),
        (Pace(0.5, 0.25), 3.0, False, 600, True),
        (Pace(60.0, 60.0), 1.0, False, 30, False),
        (Pace(1e-6, 1.0), 3.0, False, demo.FULL_STEPS, False),
        (Pace(60.0, 60.0), 1.0, True, demo.FULL_STEPS, False),
    ],
)
def test_steps_fit_the_minutes_and_the_faster_precision_is_taken(
    pace: Pace, minutes: float, full: bool, steps: int, bf16: bool
) -> None:
    training: dict[str, Any] = dict(settings_for(pace, minutes, full).training)
    assert (training["max_steps"], training["bf16"]) == (steps, bf16)
    assert training["warmup_steps"] < steps
    assert training["eval_steps"] <= steps
