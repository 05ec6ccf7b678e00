"""What is installed: one import name, one version, and no folder of the repository importable by accident."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import tsld_fx

ROOT = Path(__file__).parent.parent


def run_elsewhere(code: str, folder: Path) -> str:
    """Run Python in a folder outside the repository, as users do."""
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_passes_are_importable_under_the_package_only(tmp_path: Path) -> None:
    code = """
import importlib.util, sys
import tsld_fx, tsld_fx.passes
print([name for name in ("passes", "codegen", "cuda_templates", "tests") if name in sys.modules])
print([name for name in ("passes", "codegen", "cuda_templates") if importlib.util.find_spec(name)])
print(tsld_fx.passes.InsertFakeQuant.__module__, tsld_fx.__version__)
"""
    assert run_elsewhere(code, tmp_path).splitlines() == [
        "[]",
        "[]",
        f"tsld_fx.passes.insert_fake_quant {tsld_fx.__version__}",
    ]


def test_heavy_modules_are_imported_on_demand(tmp_path: Path) -> None:
    heavy = ("transformers.trainer", "datasets", "onnx", "tvm")
    code = f"import sys, tsld_fx; print([m for m in {heavy} if m in sys.modules])"
    assert run_elsewhere(code, tmp_path) == "[]"


def test_version_is_the_projects() -> None:
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared is not None
    assert tsld_fx.__version__ == declared[1]


def packages() -> dict[str, Path]:
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^packages = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)
    assert listed is not None
    names = re.findall(r'"([\w.]+)"', listed[1])
    return {name: ROOT / name.replace(".", "/") for name in names}


@pytest.mark.parametrize("top", ["tsld_fx", "passes", "codegen"])
def test_every_folder_with_modules_is_listed_as_a_package(top: str) -> None:
    listed = packages()
    folders = {file.parent.resolve() for file in (ROOT / top).rglob("*.py")}
    assert folders <= {folder.resolve() for folder in listed.values()}


@pytest.mark.parametrize("name", ["passes", "codegen", "cuda_templates"])
def test_links_into_the_package_are_relative_and_whole(name: str) -> None:
    link = ROOT / "tsld_fx" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert link.is_dir()


def test_package_says_that_it_is_typed() -> None:
    assert (ROOT / "tsld_fx" / "py.typed").is_file()
