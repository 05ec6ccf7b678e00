"""Files and folders that are written whole or not at all, and whether a file is still what it was."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tsld_fx.errors import CheckpointError

_YOUNG = 60.0  # seconds


def write_whole(file: str | Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the new one, never a part."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(file: str | Path, data: Any) -> None:
    """Write data as indented JSON, whole or not at all."""
    write_whole(file, json.dumps(data, indent=2) + "\n")


def file_sha256(file: str | Path) -> str:
    """SHA-256 of a file's content in hexadecimal, however large it is."""
    digest = hashlib.sha256()
    with Path(file).open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_file(file: str | Path) -> None:
    """Refuse a file to write whose place is taken by a folder or cannot be written to, before the work for it is done.

    Raises:
        CheckpointError: it says what is in the way.
    """
    file = Path(file)
    nearest = next(parent for parent in file.absolute().parents if parent.exists())
    if file.is_dir() or not nearest.is_dir() or not os.access(nearest, os.W_OK):
        what = "a folder is in its place" if file.is_dir() else f"{nearest} is no folder that can be written to"
        raise CheckpointError(f"{file}: cannot be written: {what}. Choose another file.")


def check_folder(folder: str | Path) -> None:
    """Refuse a folder to write whose place is taken by a file.

    Raises:
        CheckpointError: a file is in the way.
    """
    if Path(folder).exists() and not Path(folder).is_dir():
        raise CheckpointError(f"{folder}: a file is in the way of the output folder. Choose another folder.")


@contextlib.contextmanager
def whole_folder(target: str | Path) -> Iterator[Path]:
    """A folder to fill; it takes the place of `target` when the block ends well and vanishes when it does not.

    What a killed process left of an earlier attempt is removed.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    handle = os.open(temporary, os.O_RDONLY)
    try:
        _lock(handle)
        yield temporary
        os.chmod(temporary, 0o755)
        old = None
        if target.exists():
            old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old.")) / "folder"
            os.replace(target, old)
        os.replace(temporary, target)
        if old is not None:
            shutil.rmtree(old.parent, ignore_errors=True)
    finally:
        os.close(handle)
        shutil.rmtree(temporary, ignore_errors=True)


def _lock(handle: int) -> bool:
    """Whether this open folder is now ours; a lock ends with its process. False where the file system has none."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_leftovers(target: Path) -> None:
    """Delete temporary folders of `target` that no living process fills."""
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.????????"):
        with contextlib.suppress(OSError):  # no folder, or removed by another process meanwhile
            handle = os.open(leftover, os.O_RDONLY | os.O_DIRECTORY)
            try:
                old = time.time() - leftover.stat().st_mtime > _YOUNG  # a young one may not be locked yet
                if old and _lock(handle):
                    shutil.rmtree(leftover)
            finally:
                os.close(handle)
