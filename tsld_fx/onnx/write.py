"""Writing a model and the files beside it: whole or not at all, and without holding a second copy in memory."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from tsld_fx.errors import ExportError

INLINE_LIMIT = 1 << 30  # bytes of tensors up to which one file holds everything; protobuf's own limit is 2 GiB
EXTERNAL_FROM = 1024  # bytes from which a tensor goes to the data file


@dataclass(frozen=True)
class Target:
    """Where an export goes: `model` is the .onnx file, in `folder`."""

    model: Path

    @property
    def folder(self) -> Path:
        """The folder that the model lies in."""
        return self.model.parent

    @staticmethod
    def of(path: str | Path) -> Target:
        """`name.onnx` is a file; anything else is a folder, with model.onnx in it.

        Raises:
            ExportError: a folder called *.onnx, a file where a folder should be.
        """
        given = Path(path)
        if given.suffix != ".onnx":
            if given.exists() and not given.is_dir():
                raise ExportError(f"export: {given} is a file. Give a folder, or a file name that ends in .onnx.")
            return Target(given / "model.onnx")
        if given.is_dir():
            raise ExportError(f"export: {given} is a folder. Give a file name, or a folder not called *.onnx.")
        return Target(given)


@contextlib.contextmanager
def staged(target: Target) -> Iterator[Path]:
    """A folder to write into, beside the target; its files are moved into place at the end, the model last.

    An exception leaves the target as it was.

    Raises:
        ExportError: the target's folder cannot be written to.
    """
    fresh = not target.folder.exists()
    try:
        target.folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".export-", dir=target.folder))
    except OSError as error:
        raise ExportError(f"export: cannot write to {target.folder}: {error}. Choose another folder.") from error
    try:
        yield staging
        old = external_file(target.model)
        for file in sorted(staging.iterdir(), key=lambda f: f.name == target.model.name):
            os.replace(file, target.folder / file.name)
        if old is not None and old != external_file(target.model):
            old.unlink(missing_ok=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if fresh and not any(target.folder.iterdir()):
            target.folder.rmdir()


def save(model: ir.Model, staging: Path, target: Target) -> None:
    """Write the model as `staging`/<name>, tensors in a second file when they take more than INLINE_LIMIT.

    Raises:
        ExportError: the disk is full or the folder is gone; or the ONNX checker refuses the model.
    """
    import onnx

    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    file = staging / target.model.name
    try:
        if size > INLINE_LIMIT:
            name = _free_name(target)
            ir.save(model, file, external_data=name, size_threshold_bytes=EXTERNAL_FROM, max_workers=1)
        else:
            ir.save(model, file)
    except OSError as error:
        raise ExportError(f"export: cannot write {target.model}: {error}. It was left as it was.") from error
    try:
        onnx.checker.check_model(str(file))  # by path: a model in memory may have 2 GiB at most
    except onnx.checker.ValidationError as error:
        raise ExportError(
            f"export: the ONNX checker refuses the model: {str(error).splitlines()[0]}. This is an error of tsld_fx; "
            "please report it with the model's config.json."
        ) from error


def external_file(model: Path) -> Path | None:
    """The data file that a model reads its tensors from, if there is one and the model can be read."""
    import onnx

    if not model.is_file():
        return None
    try:
        loaded = onnx.load(model, load_external_data=False)
    except Exception:  # a damaged file is about to be replaced
        return None
    for tensor in loaded.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                return model.parent / entry.value
    return None


def _free_name(target: Target) -> str:
    """A name for the data file that no earlier export uses: its model must stay whole until it is replaced."""
    names = [f"{target.model.name}.data", *(f"{target.model.name}.{n}.data" for n in range(2, 100))]
    return next(name for name in names if not (target.folder / name).exists())
