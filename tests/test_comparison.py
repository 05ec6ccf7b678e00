"""`tsld-fx compare`: two methods on one model, in one process and side by side."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_runs import read_json, run_cli, settings, write_yaml
from tsld_fx.comparison import compare
from tsld_fx.errors import ConfigError, TrainingError

pytestmark = pytest.mark.xdist_group("comparison")


def config(**changes: object) -> dict[str, object]:
    shared = settings(training={"max_steps": 4, "eval_steps": 2}, **changes)
    return {"shared": shared, "runs": {"truth": {"distill": {"method": "gt"}}, "tsld": {"keep": "best"}}}


def test_table_plots_and_runs_in_one_process_and_side_by_side(tmp_path: Path) -> None:
    file = write_yaml(tmp_path / "compare.yaml", config())
    outs = {jobs: tmp_path / str(jobs) for jobs in (1, 2)}
    for jobs, out in outs.items():
        outcome = run_cli("compare", file, "--out", out, "--jobs", jobs)
        assert outcome.code == 0, outcome.err
        for name in ("teacher", "no training", "truth", "tsld"):
            assert f"│ {name} " in outcome.out
        assert (out / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    one, two = (read_json(out / "table.json") for out in outs.values())
    assert list(one["perplexity"]) == ["teacher", "no training", "truth", "tsld"]
    assert one["perplexity"]["truth"] != one["perplexity"]["tsld"]
    assert two["config"] == one["config"] == config()
    for name, values in one["perplexity"].items():
        assert two["perplexity"][name] == pytest.approx(values, rel=1e-4), name
        if name in ("truth", "tsld"):
            assert read_json(outs[1] / name / "result.json")["student"] == values
    before = {p: p.stat().st_mtime_ns for p in outs[2].rglob("result.json")}
    again = run_cli("compare", file, "--out", outs[2], "--jobs", 1)
    assert again.code == 0
    assert {p: p.stat().st_mtime_ns for p in outs[2].rglob("result.json")} == before
    assert read_json(outs[2] / "table.json") == two


def test_failed_run_is_named_with_its_reason(tmp_path: Path) -> None:
    """The text is looked at by the run, not before it."""
    broken = config(data={"train": [str(tmp_path / "absent.txt")]}) | {"runs": {"tsld": {}}}
    with pytest.raises(TrainingError, match=r"the run 'tsld' failed, see .*\.log: .*absent\.txt: no such file"):
        compare(broken, tmp_path / "out", jobs=2)
    with pytest.raises(ConfigError, match="jobs=0 must be at least 1"):
        compare(config(), tmp_path / "none", jobs=0)
    assert not (tmp_path / "none").exists()
