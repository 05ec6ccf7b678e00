"""`tsld-fx compare`: several methods on one model, side by side, as one resumable run."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from tsld_fx.errors import CheckpointError, ConfigError, TrainingError
from tsld_fx.plots import plot_comparison
from tsld_fx.post_training_runs import BaselineSettings, evaluate_baseline
from tsld_fx.recipes import train
from tsld_fx.runs import read_metrics
from tsld_fx.settings import RunSettings, check_keys
from tsld_fx.whole_files import check_folder, write_json, write_whole

_TAKEN = ("teacher", "no training", "table.json", "perplexity.png")  # other rows, other files


def read_runs(config: Mapping[str, Any]) -> dict[str, RunSettings]:
    """The runs of a comparison: what they share, overlaid with what each changes, once per seed.

    Args:
        config: `shared` (fields of RunSettings), `runs` (name -> fields that differ, nested mappings merged), and
            optionally `seeds` (a list for all runs, or name -> list) and `baselines` (see `read_baselines`).

    Returns:
        Folder name -> settings; a run with seeds is called `<name>-seed<number>`.

    Raises:
        ConfigError: unknown keys, no runs, or a run whose settings do not hold together.
    """
    check_keys("compare", config, ["shared", "runs", "seeds", "baselines"])
    runs = config.get("runs") or {}
    if not isinstance(runs, Mapping) or not runs:
        raise ConfigError(
            "compare: 'runs' is empty. Give at least one, such as 'runs: {tsld: {distill: {method: tsld}}}'."
        )
    shared, runs = config.get("shared") or {}, {str(name): run for name, run in runs.items()}
    for where, part in {"shared": shared, **{f"runs.{name}": run or {} for name, run in runs.items()}}.items():
        check_keys(where, part, [f.name for f in fields(RunSettings)])
    found = {}
    for name, folders in seed_folders(config).items():
        for seed, folder in folders.items():
            values = _merged(shared, runs[name] or {})
            if seed is not None:
                values = _merged(values, {"training": {"seed": seed}})
            found[folder] = RunSettings.from_dict(values, f"runs.{name}")
    return found


def seed_folders(config: Mapping[str, Any]) -> dict[str, dict[int | None, str]]:
    """Run name -> seed -> folder name; the seed is None where none is given.

    Raises:
        ConfigError: seeds that are no whole numbers, or of a run that does not exist.
    """
    seeds, names = config.get("seeds"), [str(name) for name in config.get("runs") or {}]
    by_name = {str(n): s for n, s in seeds.items()} if isinstance(seeds, Mapping) else dict.fromkeys(names, seeds)
    for name, numbers in by_name.items():
        if name not in names:
            raise ConfigError(f"seeds: there is no run {name!r}. The runs are {', '.join(names)}.")
        good = isinstance(numbers, list) and numbers and all(type(n) is int and n >= 0 for n in numbers)
        if numbers is not None and (not good or len(set(numbers)) < len(numbers)):
            raise ConfigError(f"seeds: expected a list of different whole numbers, got {numbers!r}.")
    found = {name: {s: f"{name}-seed{s}" for s in by_name.get(name) or ()} or {None: name} for name in names}
    folders = [folder for by_seed in found.values() for folder in by_seed.values()]
    for folder in folders:
        if folder in _TAKEN or folder.startswith(".") or set("/\\\0") & set(folder) or not folder:
            raise ConfigError(f"runs: {folder!r} cannot be the name of a run and its folder. Choose another.")
        if folders.count(folder) > 1:
            raise ConfigError(f"runs: two of them would have the folder {folder!r}. Choose another name.")
    return found


def read_baselines(config: Mapping[str, Any]) -> dict[str, BaselineSettings]:
    """The rows without training: name -> method and form, over `shared`'s model, data and quant.

    Raises:
        ConfigError: unknown keys, or a name that a run has too.
    """
    baselines = config.get("baselines") or {}
    if not isinstance(baselines, Mapping):
        raise ConfigError(f"baselines: expected a mapping of names to methods, got {baselines!r}.")
    folders = {folder for by_seed in seed_folders(config).values() for folder in by_seed.values()}
    for name in baselines:
        if name in folders or name in _TAKEN:
            raise ConfigError(f"baselines.{name}: another row has this name. Choose another.")
    shared = config.get("shared") or {}
    return {str(n): BaselineSettings.from_dict(b or {}, shared, f"baselines.{n}") for n, b in baselines.items()}


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings are merged, but one of another `kind` (ternary, affine) replaces the old one."""
    both = dict(base)
    for key, value in over.items():
        old = both.get(key)
        if (
            isinstance(old, Mapping)
            and isinstance(value, Mapping)
            and value.get("kind", old.get("kind")) == old.get("kind")
        ):
            both[key] = _merged(old, value)
        else:
            both[key] = value
    return both


def compare(config: Mapping[str, Any], out: str | Path, *, jobs: int = 1, quiet: bool = False) -> dict[str, Any]:
    """Run every method of a comparison and gather the table.

    Args:
        config: see `read_runs` and `read_baselines`.
        out: one folder; each run has a run folder of its name in it, so that the same call resumes.
        jobs: runs side by side, each in a process of its own (one GPU holds several small models).

    Returns:
        What is written to `out`/table.json: perplexities of the teacher, before training, of each baseline and of
        each run (the mean over its seeds); `spread`: their sample standard deviation over the seeds.

    Raises:
        TsldError: a configuration or a folder that cannot be used, or a run that failed; it names the run.
    """
    runs, baselines, out = read_runs(config), read_baselines(config), Path(out)
    if jobs < 1:
        raise ConfigError(f"compare: jobs={jobs} must be at least 1.")
    _check_folder(out, [*runs, *baselines])
    plain = {name: evaluate_baseline(settings, out / name, quiet=quiet) for name, settings in baselines.items()}
    if jobs == 1:
        results = {name: train(settings, out / name, quiet=quiet) for name, settings in runs.items()}
    else:
        results = _side_by_side(runs, out, jobs)
    table = gather(config, results, plain)
    curves = {name: read_metrics(out / name / "metrics.jsonl") for name in runs}
    levels = {k: v["validation"] for k, v in table["perplexity"].items() if k == "teacher" and "validation" in v}
    plot_comparison(curves, out / "perplexity.png", levels)
    write_json(out / "table.json", table)
    return table


def gather(
    config: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]], baselines: Mapping[str, Any]
) -> dict[str, Any]:
    """The table of a comparison from the results of its runs."""
    first = next(iter(results.values()))
    rows, spread = {"teacher": first["teacher"], "no training": first["ptq"]}, {}
    rows |= {name: result["scores"] for name, result in baselines.items()}
    for name, folders in seed_folders(config).items():
        scores = [results[folder]["student"] for folder in folders.values()]
        rows[name] = {key: statistics.fmean(s[key] for s in scores) for key in scores[0]}
        if len(scores) > 1:
            spread[name] = {key: statistics.stdev(s[key] for s in scores) for key in scores[0]}
    steps = {name: {k: r[k] for k in ("steps", "best_step", "seconds")} for name, r in results.items()}
    seeded = {name: dict(result["student"]) for name, result in results.items()} if spread else {}
    table = {"perplexity": rows, "runs": steps, "config": dict(config)}
    return table | ({"spread": spread, "each": seeded} if spread else {})


def _check_folder(out: Path, runs: Sequence[str]) -> None:
    """Refuse a folder that holds something else than a comparison's runs."""
    check_folder(out)
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
                words = ["train", "--config", str(file), "--out", str(out / name)]
                with (out / f"{name}.log").open("ab") as log:
                    running[name] = subprocess.Popen(
                        [sys.executable, "-m", "tsld_fx.cli", *words],
                        stdout=log,
                        stderr=log,
                        env={**os.environ, "OMP_NUM_THREADS": threads},
                    )
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
