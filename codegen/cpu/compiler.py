"""C++ source -> shared library with the system's compiler."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tsld_fx.codegen.compiler import KernelBuildError
from tsld_fx.codegen.cpu import KERNEL_DIR

REMEDY = (
    "Install a C++17 compiler (g++ 9 or clang 10, or later: `apt install g++`, `dnf install gcc-c++`, "
    "`xcode-select --install`), or name one in TSLD_CXX; backend='reference' works without."
)


def host_target() -> str:
    """The kind of machine that the library is for, as the cache names it."""
    return f"cpu-{platform.machine()}-{sys.platform}"


@dataclass(frozen=True)
class CxxCompiler:
    """A C++ compiler; `version` is the first line of `--version`."""

    path: str
    version: str

    def flags(self, target: str) -> list[str]:
        """No -m flags: each function carries its own target. Contraction off: every level gives the same bits."""
        return ["-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared"]

    def compile(self, source: str, target: str) -> tuple[bytes, str]:
        """-> (shared library, log of the compiler).

        Raises:
            KernelBuildError: with the compiler's own message.
        """
        with tempfile.TemporaryDirectory(prefix="tsld-cxx-") as folder:
            cpp, out = Path(folder, "kernel.cpp"), Path(folder, "kernel.so")
            cpp.write_text(source)
            command = [self.path, *self.flags(target), f"-I{KERNEL_DIR}", "-o", str(out), str(cpp)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            log = (done.stdout + done.stderr).strip()
            if done.returncode != 0:
                raise KernelBuildError(f"{self.path} ({self.version}) ended with code {done.returncode}:\n{log}")
            return out.read_bytes(), log


@lru_cache(maxsize=8)
def _compiler(path: str) -> CxxCompiler:
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise KernelBuildError(f"The C++ compiler {path} does not run ({error}). {REMEDY}") from error
    return CxxCompiler(path, done.stdout.splitlines()[0].strip() if done.stdout else "unknown")


def find_compiler() -> CxxCompiler:
    """TSLD_CXX, else CXX, else g++, clang++ or c++.

    Raises:
        KernelBuildError: there is none, or the named one does not run.
    """
    named = os.environ.get("TSLD_CXX")
    if named:
        return _compiler(shutil.which(named) or named)
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        path = shutil.which(name) if name else None
        if path:
            return _compiler(path)
    raise KernelBuildError(f"No C++ compiler found (g++, clang++, c++). {REMEDY}")
