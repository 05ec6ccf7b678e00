"""lm_eval's tasks: found by name, loaded from the hub or from local folders, with the score that guessing gets."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from tsld_fx.errors import ConfigError, DataError

_ACCURACIES = ("acc", "acc_norm", "acc_bytes")


def check_lm_eval() -> None:
    """Refuse where lm_eval is not installed.

    Raises:
        ConfigError: it names the extra to install.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("evaluate: lm_eval is not installed. Install it with: pip install 'tsld-fx[eval]'")


@cache
def task_manager() -> Any:
    """lm_eval's index of its tasks; it reads thousands of files, which takes some seconds."""
    check_lm_eval()
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it logs every task that it defines twice
    return TaskManager()


def check_names(names: Sequence[str]) -> None:
    """Refuse names that lm_eval has no task, group or tag for.

    Raises:
        ConfigError: it names the unknown one and those that look like it.
    """
    known = task_manager().all_tasks
    if not names:
        raise ConfigError("evaluate: no task given. Name some, as in --tasks piqa,arc_easy.")
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=4)
            hint = f"Did you mean {', '.join(near)}?" if near else "`lm_eval ls tasks` lists them."
            raise ConfigError(f"evaluate: lm_eval has no task {name!r}. {hint}")
    if len(set(names)) < len(names):
        raise ConfigError(f"evaluate: a task is named twice in {','.join(names)}. Name each once.")


def load_tasks(names: Sequence[str], data: Path | None = None) -> dict[str, Any]:
    """The tasks, groups and tags of the given names with their data sets, ready to run.

    Args:
        names: as `check_names` takes them.
        data: folder with local data sets, laid out as on the hub: DATA/<owner>/<name> or DATA/<name> for the data set
            <owner>/<name>. Nothing is then read from the hub. None: from the hub, or from its cache when offline.

    Returns:
        Name -> lm_eval Task or Group; a tag stands for its tasks.

    Raises:
        TsldError: an unknown name, or a data set that is missing or does not fit its task.
    """
    check_names(names)
    import datasets

    manager = task_manager()
    loaded: dict[str, Any] = {}
    datasets.disable_progress_bars()
    with _local_data(manager, names, data):
        for name in names:
            try:
                found = manager.load([name])
            except Exception as error:
                raise DataError(_explain(manager, name, data, error)) from error
            groups = found.get("groups") or {}
            loaded.update({name: groups[name]} if name in groups else found["tasks"])
    return loaded


def leaves(tasks: dict[str, Any]) -> dict[str, Any]:
    """Name -> Task of every task, those inside groups included."""
    found: dict[str, Any] = {}
    for name, task in tasks.items():
        inner = task.get_all_tasks() if hasattr(task, "get_all_tasks") else None
        found.update({name: task} if inner is None else {t.task_name: t for t in inner})
    return found


def chance_level(task: Any, metric: str, limit: int | None = None) -> float | None:
    """The score that guessing gets: one over the number of choices, averaged over the samples; 0 where nothing can be
    guessed (exact answers, correlations); None for metrics without such a level."""
    if metric in _ACCURACIES and task.OUTPUT_TYPE == "multiple_choice":
        samples = task.eval_docs
        count = len(samples) if limit is None else min(limit, len(samples))
        shares = [1 / len(task.doc_to_choice(samples[index])) for index in range(count)]
        return sum(shares) / len(shares)
    return 0.0 if metric in ("exact_match", "mcc") else None


# ---------------------------------------------------------------- data sets in local folders
def local_data_set(data: Path, path: str, name: str | None) -> tuple[str, str | None] | None:
    """What `datasets.load_dataset` takes (path, name) for a hub data set kept under `data`; None where it is not.

    A folder as downloaded from the hub has a README.md that lists its configurations. Without one, the configuration
    `name` is the folder of that name, and the splits are the files train.*, validation.* and test.* in it.
    """
    for place in (data / path, data / path.rpartition("/")[2]):
        if place.is_dir():
            if _has_configurations(place):
                return str(place), name
            inner = place / name if name else place
            return str(inner if inner.is_dir() else place), None
    return None


def _has_configurations(folder: Path) -> bool:
    card = folder / "README.md"
    return card.is_file() and "configs:" in card.read_text(encoding="utf-8", errors="replace").split("\n---")[0]


@contextlib.contextmanager
def _local_data(manager: Any, names: Sequence[str], data: Path | None) -> Iterator[None]:
    """Let the manager's entries of these tasks read their data sets from `data`."""
    if data is None:
        yield
        return
    if not data.is_dir():
        raise DataError(f"{data}: no such folder. Give --data the folder that holds the data sets.")
    index = manager.task_index
    before = {name: index[name] for name in _leaf_names(index, names)}
    with tempfile.TemporaryDirectory() as temporary:
        for name, entry in before.items():
            config = entry.cfg or {}
            if not config.get("dataset_path"):
                continue
            found = local_data_set(data, config["dataset_path"], config.get("dataset_name"))
            if found is None:
                raise DataError(_missing(data, name, config["dataset_path"], config.get("dataset_name")))
            file = Path(temporary) / f"{len(list(Path(temporary).iterdir()))}.yaml"
            text = {"include": str(entry.yaml_path), "task": name, "dataset_path": found[0], "dataset_name": found[1]}
            file.write_text(json.dumps(text), encoding="utf-8")  # JSON is YAML
            index[name] = replace(entry, yaml_path=file)
        try:
            yield
        finally:
            index.update(before)


def _leaf_names(index: Any, names: Sequence[str]) -> list[str]:
    """Names of the tasks behind groups and tags."""
    found: dict[str, None] = {}
    pending = list(names)
    while pending:
        entry = index.get(pending.pop())
        if entry is None:
            continue
        members = (entry.cfg or {}).get("task")
        if entry.kind.name == "TAG":
            pending.extend(entry.tags)
        elif entry.kind.name == "GROUP":
            for member in members if isinstance(members, list) else [members]:
                name = (member.get("task") or member.get("group")) if isinstance(member, dict) else member
                pending += [name] if isinstance(name, str) else []
        else:
            found[entry.name] = None
    return list(found)


def _missing(data: Path, task: str, path: str, name: str | None) -> str:
    files = "README.md and data files" if name is None else f"README.md and data files, or a folder {name}/ with them"
    return (
        f"{data}: the data set {path} of task {task!r} is not there. Put it into {data / path} as downloaded from the "
        f"hub ({files}: train.*, validation.*, test.* in parquet, json, jsonl or csv), or leave --data out."
    )


def _explain(manager: Any, name: str, data: Path | None, error: Exception) -> str:
    """Why a task cannot be loaded, with the remedy."""
    configs = [manager.task_index[leaf].cfg or {} for leaf in _leaf_names(manager.task_index, [name])]
    sets = sorted({str(config["dataset_path"]) for config in configs if config.get("dataset_path")})
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    remedy = (
        "Go online once, so that it is in the cache, or give --data DIR with the data set in DIR/<owner>/<name>."
        if data is None
        else f"Check the files under {data}: splits and columns must be those of the data set on the hub."
    )
    where = f"its data set {', '.join(sets)}" if sets else "its data set"
    return f"task {name!r}: {where} cannot be loaded ({type(error).__name__}: {first[:300]}). {remedy}"
