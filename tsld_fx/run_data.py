"""The text of a run by content: files that changed under a run are found when the run goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tsld_fx.errors import CheckpointError
from tsld_fx.whole_files import file_sha256


def digests(settings: Mapping[str, Any]) -> dict[str, str]:
    """Path -> SHA-256 of every file that `data` of a run's settings names; data sets have none."""
    data = settings.get("data")
    splits = data if isinstance(data, Mapping) else {}
    names = [name for split in ("train", "validation", "test") for name in splits.get(split) or ()]
    return {name: file_sha256(name) for name in dict.fromkeys(names) if Path(name).is_file()}


def check_same_text(record: Path, settings: Mapping[str, Any]) -> None:
    """Refuse files that are not those that a run began with; ones that are gone are left to their reader.

    Args:
        record: what the run wrote of `digests` when it began; without it there is nothing to compare.

    Raises:
        CheckpointError: it names the file.
    """
    if not record.is_file():
        return
    try:
        before = json.loads(record.read_text(encoding="utf-8"))
        changed = [name for name, digest in digests(settings).items() if before.get(name, digest) != digest]
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{record}: damaged ({error}). Delete the run's folder and start again.") from None
    if changed:
        raise CheckpointError(
            f"{record.parent}: the folder belongs to a run on other text: {changed[0]} has changed since. Choose "
            "another output folder, or put the old text back to resume that run."
        )
