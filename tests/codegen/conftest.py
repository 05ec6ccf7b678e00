"""Options and random layers of the code-generation tests. None of them needs a GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor


@pytest.fixture
def golden():
    """golden(name, text): compare with goldens/<name>; TSLD_UPDATE_GOLDENS=1 rewrites the file instead."""
    folder = Path(__file__).parent / "goldens"

    def check(name: str, text: str) -> None:
        path = folder / name
        if os.environ.get("TSLD_UPDATE_GOLDENS") == "1":
            folder.mkdir(exist_ok=True)
            path.write_text(text)
        assert path.exists(), f"no golden {name}: run once with TSLD_UPDATE_GOLDENS=1 and review the file"
        assert text == path.read_text(), f"{name} differs: if it should, run with TSLD_UPDATE_GOLDENS=1"

    return check


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "kernels"
    monkeypatch.setenv("TSLD_CACHE_DIR", str(folder))
    return folder


def canonical(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [n, k] -> canonical packed uint8 [n, ceil(k*bits/8)], LSB first."""
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_byte)).view(codes.shape[0], -1, per_byte).int()
    return sum(padded[:, :, i] << (bits * i) for i in range(per_byte)).to(torch.uint8)


@pytest.fixture
def pack_canonical():
    return canonical
