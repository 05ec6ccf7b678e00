"""`tsld-fx compare`: two methods on one model, in one process and side by side."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_runs import read_json, run_cli, settings, write_yaml
from tsld_fx import AffineWeight
from tsld_fx.comparison import compare, read_baselines, read_runs
from tsld_fx.errors import ConfigError, TrainingError
from tsld_fx.settings import RunSettings, read_yaml

ROOT = Path(__file__).parent.parent

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


def test_seeds_and_rows_without_training(tmp_path: Path) -> None:
    """Means and spreads are recomputed from the runs; a baseline's folder holds its model."""
    every = config(quant={"weight": {"kind": "affine", "bits": 4}})
    every["seeds"] = {"tsld": [0, 3]}
    every["runs"]["truth"]["quant"] = {"weight": {"kind": "ternary", "scale": "twn"}}  # replaces bits: 4
    every["baselines"] = {
        "rtn": {"method": "rtn"},
        "gptq": {"method": "gptq", "samples": 8},
        "awq-2": {"method": "awq", "float_bits": 2, "group_size": 4, "samples": 8},
    }
    file, out = write_yaml(tmp_path / "compare.yaml", every), tmp_path / "out"
    outcome = run_cli("compare", file, "--out", out)
    assert outcome.code == 0, outcome.err
    table = read_json(out / "table.json")
    assert list(table["perplexity"]) == ["teacher", "no training", *every["baselines"], "truth", "tsld"]
    seeds = [read_json(out / f"tsld-seed{seed}" / "result.json")["student"]["validation"] for seed in (0, 3)]
    assert seeds[0] != seeds[1]
    assert table["perplexity"]["tsld"]["validation"] == pytest.approx(sum(seeds) / 2)
    assert table["spread"] == {"tsld": {"validation": pytest.approx(abs(seeds[0] - seeds[1]) / 2**0.5)}}
    assert f"± {table['spread']['tsld']['validation']:.2f}" in outcome.out
    rows = table["perplexity"]
    assert rows["rtn"] == pytest.approx(read_json(out / "tsld-seed0" / "result.json")["ptq"])
    assert rows["gptq"] != rows["rtn"] != rows["awq-2"]
    scored = run_cli("eval", out / "gptq", "--text", settings()["data"]["validation"][0], "--length", 16)
    assert f"perplexity {rows['gptq']['validation']:.4f}" in scored.out
    assert run_cli("compare", file, "--out", out).code == 0 and read_json(out / "table.json") == table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": {"absent": [1]}}, "there is no run 'absent'"),
        ({"seeds": [1, 1]}, "different whole numbers"),
        ({"seeds": [True]}, "different whole numbers"),
        ({"baselines": {"tsld": {"method": "rtn"}}}, "baselines.tsld: another row has this name"),
        ({"baselines": {"a": {"method": "magic"}}}, "'magic' is not one of rtn, gptq, awq"),
        ({"baselines": {"a": {"method": "awq"}}}, "Set float_bits"),
        ({"baselines": {"a": {"method": "gptq", "float_bits": 3}}}, "float_bits=3 is not 2, 4 or 8"),
        ({"baselines": {"a": {"method": "gptq", "samples": 0}}}, "samples must be a whole number"),
        ({"baselines": {"a": {"bits": 2}}}, "unknown key 'bits'"),
        ({"baselines": [1]}, "expected a mapping"),
    ],
)
def test_bad_seeds_and_baselines(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compare(config() | change, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "benchmarks" / "configs").glob("*.yaml")))
def test_configurations_of_the_benchmarks_hold_together(name: str) -> None:
    found = read_yaml(ROOT / "benchmarks" / "configs" / name)
    if "runs" not in found:  # one run per task and method
        shared = {"model": "demo", "quant": found["quant"], "training": found["training"]}
        assert all(RunSettings.from_dict(shared | {"distill": {"method": m}}) for m in found["methods"])
        return
    found["shared"]["model"] = "demo"
    runs, rows = read_runs(found), read_baselines(found)
    assert len(runs) >= len(found["runs"]) and all(s.distill.terms() for s in runs.values())
    if name == "table_a.yaml":
        assert {f"tsld-seed{s}" for s in range(3)} < set(runs) and rows["gptq-2bit"].float_bits == 2
        assert runs["tsld-4bit"].quant.weight == AffineWeight(bits=4)
