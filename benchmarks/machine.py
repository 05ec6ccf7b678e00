"""What a benchmark records about where it ran."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def describe() -> dict[str, Any]:
    """Machine, versions, commit and command of this run."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": " ".join(["python", *(Path(a).name if a.startswith("/") else a for a in sys.argv)]),
        "commit": _commit(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "transformers", "triton", "onnxruntime", "humming-kernels")},
    }


@contextlib.contextmanager
def updating(file: Path) -> Iterator[dict[str, Any]]:
    """What a results file holds (nothing yet: an empty dict), to be changed; written whole, one process at a time."""
    from tsld_fx.whole_files import write_json

    lock = os.open(file.parent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        record = json.loads(file.read_text()) if file.is_file() else {}
        yield record
        write_json(file, record)
    finally:
        os.close(lock)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit, with '+' when files differ from it; .commit stands in where there is no git."""
    recorded = ROOT / ".commit"
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return recorded.read_text().strip() if recorded.is_file() else None
    if head.returncode:
        return recorded.read_text().strip() if recorded.is_file() else None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    flags = info.read_text().split("flags", 1)[-1].split("\n")[0]
    features = [f for f in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile") if f in flags]
    return f"{names[0] if names else platform.processor()}, {len(names)} cores, {' '.join(features)}"
