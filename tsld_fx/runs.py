"""Run folders: the run's configuration, its metrics, and which checkpoints are whole."""

from __future__ import annotations

import contextlib
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tsld_fx.errors import CheckpointError
from tsld_fx.run_data import check_same_text, digests
from tsld_fx.whole_files import check_folder, write_json, write_whole

_WHOLE = "tsld_whole"  # written into a checkpoint after everything else
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def mark_whole(folder: str | Path, step: int) -> None:
    """Say that checkpoint-<step> is complete; without the mark a resume passes over it."""
    write_whole(Path(folder) / f"checkpoint-{step}" / _WHOLE, f"{step}\n")


def unmark_whole(folder: str | Path, step: int) -> None:
    """Say that checkpoint-<step> is about to be written again."""
    (Path(folder) / f"checkpoint-{step}" / _WHOLE).unlink(missing_ok=True)


def last_whole_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint with the highest step among those that were written to the end."""
    folder = Path(folder)
    found = [p for p in folder.glob("checkpoint-*") if _CHECKPOINT.fullmatch(p.name) and (p / _WHOLE).is_file()]
    return max(found, key=lambda p: int(p.name.rpartition("-")[2]), default=None)


def check_checkpoint(folder: str | Path) -> None:
    """Refuse a checkpoint with a file that is cut short or damaged.

    Raises:
        CheckpointError: it names the file.
    """
    for file in sorted(Path(folder).iterdir()):
        try:
            if file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
            elif file.suffix == ".safetensors":
                safe_open(file, framework="np")
            elif file.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(file):  # what torch.save writes
                raise ValueError("it does not end as it should")
        except (ValueError, SafetensorError) as error:
            raise CheckpointError(
                f"{file}: cut short or damaged ({error}). Delete {folder} to resume from the checkpoint before it."
            ) from None


class RunFolder:
    """The output folder of one command: `run.yaml`, `data.json`, `metrics.jsonl`, `checkpoints/`, results and plots.

    Nothing is written before `begin`, so that a refused run leaves no folder behind.

    Args:
        path: the folder; `begin` makes it.
        settings: the run's whole configuration as plain data.

    Raises:
        CheckpointError: the folder belongs to a run with other settings or other text, or holds other files.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        settings = json.loads(json.dumps(settings))
        record = self.path / "run.yaml"
        check_folder(self.path)
        if record.is_file():
            self._check_same(record, settings)
            check_same_text(self.data, settings)
        elif self.path.is_dir() and any(not p.name.startswith(f".{record.name}.") for p in self.path.iterdir()):
            raise CheckpointError(
                f"{self.path}: the output folder is not empty and not a run of tsld_fx. Choose another folder."
            )
        self.settings = settings

    def begin(self) -> None:
        """Make the folder and record the settings in it, once everything that can be refused has been checked."""
        record = self.path / "run.yaml"
        if not record.is_file():
            write_whole(record, yaml.safe_dump(self.settings, sort_keys=False))
        if not self.data.is_file():
            write_json(self.data, digests(self.settings))

    @staticmethod
    def _check_same(record: Path, settings: Mapping[str, Any]) -> None:
        try:
            recorded = yaml.safe_load(record.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{record}: not valid YAML ({error}). Delete the folder and start again.") from None
        if recorded == settings:
            return
        raise CheckpointError(
            f"{record.parent}: the folder belongs to another run: {first_difference(recorded, settings)}. Choose "
            "another output folder, or give the same settings to resume that run."
        )

    @property
    def data(self) -> Path:
        """What the run's text files held when it began."""
        return self.path / "data.json"

    @property
    def checkpoints(self) -> Path:
        """Where the trainer writes its checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """JSON lines: step, epoch and whatever was logged."""
        return self.path / "metrics.jsonl"

    def resume_point(self) -> str | None:
        """The checkpoint to resume from, None to start from the beginning."""
        found = last_whole_checkpoint(self.checkpoints)
        if found is not None:
            check_checkpoint(found)
        return None if found is None else str(found)

    def result(self) -> dict[str, Any] | None:
        """What a finished run wrote, None while it has not finished."""
        file = self.path / "result.json"
        try:
            return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        except ValueError as error:
            raise CheckpointError(f"{file}: damaged ({error}). Delete it; the run ends once more.") from None

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write the result, which marks the run as finished."""
        write_json(self.path / "result.json", dict(result))


def first_difference(there: Any, now: Any) -> str:
    """The first entry in which two nested mappings differ, in words."""
    before, after = _flat(there or {}), _flat(now or {})
    key = next(k for k in [*after, *before] if before.get(k) != after.get(k))
    return f"{key} was {before.get(key)!r} there and is {after.get(key)!r} now"


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(data, Mapping):
        return {prefix.rstrip("."): data}
    return {k: v for key, value in data.items() for k, v in _flat(value, f"{prefix}{key}.").items()}


class MetricsFile(TrainerCallback):
    """Append every log line to a JSON-lines file; a resumed run first drops the lines after its checkpoint.

    Each checkpoint gets a log line too: the mean loss since the last line is not part of a checkpoint, so that a
    resumed run would otherwise log other means than one that was never stopped.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Cut the file back to the step that training starts from."""
        kept = [line for line in read_metrics(self.file) if line["step"] <= state.global_step and state.global_step]
        write_whole(self.file, "".join(json.dumps(line) + "\n" for line in kept))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log where a checkpoint is written."""
        control.should_log |= control.should_save

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log where a checkpoint is written."""
        control.should_log |= control.should_save

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append one line."""
        if state.is_world_process_zero and logs:
            line = {
                "step": state.global_step,
                "epoch": state.epoch,
                **{k: v for k, v in logs.items() if k != "epoch"},
            }
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; what is no log line, such as a last one cut short by a kill, is left out."""
    if not file.is_file():
        return []
    lines = []
    for text in file.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict) and "step" in line]
