"""`tsld-fx compare`: several methods on one model, side by side, as one resumable run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from tsld_fx.errors import CheckpointError, ConfigError, TrainingError
from tsld_fx.plots import plot_comparison
from tsld_fx.recipes import train
from tsld_fx.runs import read_metrics, write_json, write_whole
from tsld_fx.settings import RunSettings, check_keys


def read_runs(config: Mapping[str, Any]) -> dict[str, RunSettings]:
    """The runs of a comparison: what they share, overlaid with what each changes.

    Args:
        config: `shared` (fields of RunSettings) and `runs` (name -> fields that differ, nested mappings merged).

    Raises:
        ConfigError: unknown keys, no runs, or a run whose settings do not hold together.
    """
    check_keys("compare", config, ["shared", "runs"])
    runs = config.get("runs") or {}
    if not isinstance(runs, Mapping) or not runs:
        raise ConfigError(
            "compare: 'runs' is empty. Give at least one, such as 'runs: {tsld: {distill: {method: tsld}}}'."
        )
    shared = config.get("shared") or {}
    for where, part in {"shared": shared, **{f"runs.{name}": run or {} for name, run in runs.items()}}.items():
        check_keys(where, part, [f.name for f in fields(RunSettings)])
    return {str(n): RunSettings.from_dict(_merged(shared, r or {}), f"runs.{n}") for n, r in runs.items()}


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(base)
    for key, value in over.items():
        old = both.get(key)
        both[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return both


def compare(config: Mapping[str, Any], out: str | Path, *, jobs: int = 1, quiet: bool = False) -> dict[str, Any]:
    """Run every method of a comparison and gather the table.

    Args:
        config: see `read_runs`.
        out: one folder; each run has a run folder of its name in it, so that the same call resumes.
        jobs: runs side by side, each in a process of its own (one GPU holds several small models).

    Returns:
        What is written to `out`/table.json: perplexities of the teacher, before training and of each run.
    """
    runs, out = read_runs(config), Path(out)
    if jobs < 1:
        raise ConfigError(f"compare: jobs={jobs} must be at least 1.")
    _check_folder(out, runs)
    if jobs == 1:
        results = {name: train(settings, out / name, quiet=quiet) for name, settings in runs.items()}
    else:
        results = _side_by_side(runs, out, jobs)
    first = next(iter(results.values()))
    rows = {"teacher": first["teacher"], "no training": first["ptq"]}
    rows |= {name: result["student"] for name, result in results.items()}
    steps = {name: {k: r[k] for k in ("steps", "best_step", "seconds")} for name, r in results.items()}
    table = {"perplexity": rows, "runs": steps, "config": dict(config)}
    curves = {name: read_metrics(out / name / "metrics.jsonl") for name in runs}
    levels = {k: v["validation"] for k, v in rows.items() if k == "teacher" and "validation" in v}
    plot_comparison(curves, out / "perplexity.png", levels)
    write_json(out / "table.json", table)
    return table


def _check_folder(out: Path, runs: Mapping[str, RunSettings]) -> None:
    """Refuse a folder that holds something else than a comparison's runs."""
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out}: a file is in the way of the output folder. Choose another folder.")
    if (out / "run.yaml").is_file():
        raise CheckpointError(f"{out}: the folder belongs to a single run. Choose another folder for the comparison.")
    begun = any((out / name / "run.yaml").is_file() or (out / f"{name}.yaml").is_file() for name in runs)
    if out.is_dir() and any(out.iterdir()) and not begun and not (out / "table.json").is_file():
        raise CheckpointError(f"{out}: the output folder is not empty and no comparison. Choose another folder.")


def _side_by_side(runs: Mapping[str, RunSettings], out: Path, jobs: int) -> dict[str, dict[str, Any]]:
    waiting, running, results = list(runs), dict[str, subprocess.Popen[bytes]](), dict[str, dict[str, Any]]()
    out.mkdir(parents=True, exist_ok=True)
    threads = str(max(1, (os.cpu_count() or 2) // jobs))
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                file = out / f"{name}.yaml"
                write_whole(file, yaml.safe_dump(runs[name].to_dict(), sort_keys=False))
                command = [
                    sys.executable,
                    "-m",
                    "tsld_fx.cli",
                    "train",
                    "--config",
                    str(file),
                    "--out",
                    str(out / name),
                ]
                with (out / f"{name}.log").open("ab") as log:
                    environment = {**os.environ, "OMP_NUM_THREADS": threads}
                    running[name] = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            time.sleep(0.2)
            for name, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                if process.returncode:
                    tail = (out / f"{name}.log").read_text(errors="replace").strip().splitlines()[-3:]
                    raise TrainingError(f"compare: the run {name!r} failed, see {out / name}.log: {' '.join(tail)}")
                results[name] = train(runs[name], out / name)  # finished: reads result.json
    finally:
        for process in running.values():
            process.terminate()
    return {name: results[name] for name in runs}
