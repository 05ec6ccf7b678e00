"""A Python that has numpy and tvm_ffi and none of the other packages here."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path


def bare_environment(folder: Path) -> dict[str, str]:
    """An environment whose Python sees numpy and tvm_ffi and nothing else of this one's packages."""
    packages = folder / "packages"
    packages.mkdir()
    for name in ("numpy", "tvm_ffi"):
        spec = find_spec(name)
        assert spec is not None and spec.origin is not None
        home = Path(spec.origin).parent
        for found in (home, home.parent / f"{name}.libs", *home.parent.glob(f"*{name.replace('_', '?')}-*.dist-info")):
            if found.exists():
                (packages / found.name).symlink_to(found)
    (packages / "typing_extensions.py").symlink_to(find_spec("typing_extensions").origin)  # type: ignore[union-attr]
    return {"PYTHONPATH": str(packages), "PATH": os.environ["PATH"], "TVM_NUM_THREADS": "1"}


def bare(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
    """Run the interpreter behind the virtual environment, which has no packages of ours."""
    python = Path(sys.base_prefix, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}")
    command = [str(python), "-S", *arguments]
    elsewhere = environment["PYTHONPATH"]
    return subprocess.run(
        command, env=environment, cwd=elsewhere, capture_output=True, text=True, timeout=120, check=False
    )
