"""Program folders that are not whole or not for this machine, inputs that do not fit: one error, nothing half-done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import tsld_fx.relax
from tests.models import ids
from tests.relax.reference_models import reference
from tsld_fx.errors import CheckpointError, ConfigError, DataError
from tsld_fx.relax import build_program, program_folder


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program for 2 x 5 tokens, without generation."""
    folder = tmp_path_factory.mktemp("static")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TSLD_CACHE_DIR", str(folder / "cache"))
        return tsld_fx.relax.compile(reference("llama"), folder / "program", generation=False, batch=2, tokens=5)


def changed(source: Path, folder: Path, **changes: Any) -> Path:
    """A copy of a program whose manifest says something else."""
    shutil.copytree(source, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))
    return folder


def test_static_program_refuses_other_shapes(static: Path) -> None:
    program = tsld_fx.relax.load(static)
    assert program(ids(2, 5)).shape == (2, 5, 97)
    for x in (ids(2, 6), ids(1, 5)):
        with pytest.raises(DataError, match=r"main was compiled for input_ids of shape \[2, 5\], got .*tokens=None"):
            program(x)
    with pytest.raises(DataError, match="built without generation"):
        program.generate(ids(2, 5), 3)
    with pytest.raises(DataError, match="must have one shape"):
        program(ids(2, 5), torch.ones(2, 4, dtype=torch.long))
    with pytest.raises(DataError, match="the model has 97 tokens"):
        program(ids(2, 5) + 97)


def test_other_format_version_cpu_or_tvm_is_refused(static: Path, tmp_path: Path) -> None:
    manifest = json.loads((static / "manifest.json").read_text())
    old = changed(static, tmp_path / "old", format_version=0)
    with pytest.raises(CheckpointError, match="format version 0, this loader reads 1"):
        tsld_fx.relax.load(old)
    target = {**manifest["target"], "flags": ["avx2048"]}
    with pytest.raises(CheckpointError, match=r"CPU without avx2048\. Compile it for this machine"):
        tsld_fx.relax.load(changed(static, tmp_path / "cpu", target=target))
    target = {**manifest["target"], "machine": "riscv64"}
    with pytest.raises(CheckpointError, match="built for riscv64 CPUs"):
        tsld_fx.relax.load(changed(static, tmp_path / "machine", target=target))
    versions = {**manifest["versions"], "apache-tvm": "0.30.1"}
    with pytest.raises(CheckpointError, match=r"compiled with apache-tvm 0\.30\.1, here is 0\.27"):
        tsld_fx.relax.load(changed(static, tmp_path / "tvm", versions=versions))


def test_damaged_or_missing_files_are_found(static: Path, tmp_path: Path) -> None:
    for name in ("model.so", "weights.bin"):
        folder = shutil.copytree(static, tmp_path / f"short-{name}")
        (folder / name).write_bytes((folder / name).read_bytes()[:-1])
        with pytest.raises(CheckpointError, match=rf"{name}.*damaged"):
            tsld_fx.relax.load(folder)
        data = bytearray((static / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(bytes(data))
        with pytest.raises(CheckpointError, match=rf"{name}.*damaged"):
            tsld_fx.relax.load(folder)
        (folder / name).unlink()
        with pytest.raises(CheckpointError, match=rf"{name}.*missing"):
            tsld_fx.relax.load(folder)
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        tsld_fx.relax.load(tmp_path / "nowhere")


def test_failure_leaves_the_old_program_and_nothing_else(
    static: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(static, tmp_path / "program")
    before = (folder / "manifest.json").read_bytes()

    def broken(path: Path) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(program_folder, "_entry", broken)
    monkeypatch.setattr(build_program, "look_up", lambda *_: (b"code", {"functions": {}, "cache": None}))
    with pytest.raises(KeyboardInterrupt):
        tsld_fx.relax.compile(reference("llama"), folder, generation=False, batch=2, tokens=5)
    assert (folder / "manifest.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["program"]


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(ConfigError, match="is no program folder"):
        tsld_fx.relax.compile(reference("llama"), tmp_path)
    with pytest.raises(ConfigError, match="expected a lowered model or a Relax IRModule, got dict"):
        tsld_fx.relax.compile({}, tmp_path / "new")
    assert not (tmp_path / "new").exists()
