"""`tsld-fx analyze` on folders: files whole, tables readable, mistakes named."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from tests.tiny_runs import float_folder, read_json, run_cli, settings, text_file, write_yaml
from tsld_fx.cli import analyze as command

pytestmark = pytest.mark.xdist_group("analysis_cli")
TABLES = {"attention.csv", "curves.csv", "errors.csv", "tokens.csv"}
FIGURES = {
    "attention_maps", "attention_output_by_position", "attention_output_heat", "confidence_divergence",
    "confidence_scale", "error_by_depth", "hidden_state_by_position", "hidden_state_heat", "logits_by_position",
    "loss_curves",
}  # fmt: skip


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.console, "width", 200)


def test_a_run_against_its_teacher(tmp_path: Path) -> None:
    run = tmp_path / "tsld"
    file = write_yaml(tmp_path / "run.yaml", settings(training={"max_steps": 4, "eval_steps": 2}))
    assert run_cli("train", "--config", file, "--out", run).code == 0
    out = tmp_path / "analysis"
    out.mkdir()
    (out / "summary.json").write_text("{}")  # an older analysis may be replaced
    outcome = run_cli("analyze", float_folder(), run, "--text", text_file("test"), "--length", 16, "--out", out)
    assert outcome.code == 0, outcome.err
    assert "late / early" in outcome.out and "rank correlation" in outcome.out
    assert {p.name for p in out.iterdir()} == TABLES | {f"{n}.png" for n in FIGURES} | {"report.html", "summary.json"}
    for name in FIGURES:
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text()
    assert page.count("Plotly.newPlot(") >= len(FIGURES) and 'src="http' not in page
    rows = list(csv.DictReader((out / "errors.csv").open()))
    assert {(r["tensor"], r["mode"]) for r in rows} >= {("logits", "accumulated"), ("attention_output", "local")}
    assert {int(r["position"]) for r in rows} == set(range(16)) and {int(r["layer"]) for r in rows} == {0, 1}
    curves = list(csv.DictReader((out / "curves.csv").open()))
    assert {r["run"] for r in curves} == {"tsld"} and {r["curve"] for r in curves} >= {"training", "validation"}
    summary = read_json(out / "summary.json")
    assert summary["tokens"] == len(list(csv.DictReader((out / "tokens.csv").open())))
    assert summary["student_perplexity"] != summary["teacher_perplexity"]


def test_mistakes(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    model, text = float_folder(), text_file("test")
    for words, message in (
        ((model, "--out", tmp_path / "new"), "analyze: no text"),
        ((model, "--text", text, "--out", tmp_path / "taken"), "holds something else than an analysis"),
        ((model, "--text", text, "--out", tmp_path / "file"), "a file is in the way"),
        ((model, "--text", text, "--run", tmp_path / "taken", "--out", tmp_path / "new"), "no metrics.jsonl"),
        ((model, "--text", text, "--length", 2000, "--out", tmp_path / "new"), "more than the model's"),
        ((tmp_path / "absent", "--text", text, "--out", tmp_path / "new"), "absent"),
    ):
        outcome = run_cli("analyze", *words)
        assert outcome.code == 2 and message in outcome.err, outcome.err
    assert not (tmp_path / "new").exists() and (tmp_path / "taken" / "thesis.txt").read_text() == "mine"
