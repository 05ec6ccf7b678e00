"""Compiled programs that several tests share; every test's cache of compiled libraries is its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import tsld_fx.relax
from tests.relax.reference_models import reference


@pytest.fixture(scope="session")
def program_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family -> program folder with generation and TVM's runtime library, compiled once."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("TSLD_CACHE_DIR", str(folder / "cache"))
                lowered = reference(family)
                made[family] = tsld_fx.relax.compile(lowered, folder / "program", runtime=True)
        return made[family]

    return get


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSLD_CACHE_DIR", str(tmp_path / "cache"))
