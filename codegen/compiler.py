"""CUDA source -> cubin or PTX with nvcc, or with NVRTC (package cuda-bindings) where there is no nvcc."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from tsld_fx.cuda_templates import TEMPLATE_DIR
from tsld_fx.errors import BackendError


class KernelBuildError(BackendError):
    """A kernel did not compile, or there is nothing to compile it with."""


@dataclass(frozen=True)
class ResourceUsage:
    """What ptxas reports of one kernel. Sizes in bytes."""

    kernel: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int


class Compiler(Protocol):
    """`version` and `flags(target)` are part of the cache key."""

    @property
    def version(self) -> str: ...

    def flags(self, target: str) -> list[str]: ...

    def compile(self, source: str, target: str) -> tuple[bytes, str]:
        """-> (cubin or PTX, log of the compiler). Raises KernelBuildError."""
        ...


@dataclass(frozen=True)
class Nvcc:
    """The toolkit's compiler at `path`, in a process of its own."""

    path: str
    version: str

    def flags(self, target: str) -> list[str]:
        number = target.split("_")[1]
        kind = ["-cubin"] if target.startswith("sm_") else ["-ptx"]
        verbose = ["-Xptxas", "-v"] if target.startswith("sm_") else []
        return ["-std=c++17", "-O3", f"-gencode=arch=compute_{number},code={target}", *kind, *verbose]

    def compile(self, source: str, target: str) -> tuple[bytes, str]:
        with tempfile.TemporaryDirectory(prefix="tsld-nvcc-") as folder:
            cu, out = Path(folder, "kernel.cu"), Path(folder, "kernel.out")
            cu.write_text(source)
            command = [self.path, *self.flags(target), f"-I{TEMPLATE_DIR}", "-o", str(out), str(cu)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            log = done.stdout + done.stderr
            if done.returncode != 0 or not out.exists():
                raise KernelBuildError(f"{self.path} ended with code {done.returncode} for {target}:\n{log.strip()}")
            return out.read_bytes(), log


@dataclass(frozen=True)
class Nvrtc:
    """CUDA's compiler as a library, in this process; for machines without a toolkit."""

    version: str

    def flags(self, target: str) -> list[str]:
        verbose = ["--ptxas-options=-v"] if target.startswith("sm_") else []
        return ["--std=c++17", f"--gpu-architecture={target}", *verbose]

    def compile(self, source: str, target: str) -> tuple[bytes, str]:
        from cuda.bindings import nvrtc

        def check(result: tuple, what: str) -> tuple:
            if int(result[0]) != 0:
                raise KernelBuildError(f"NVRTC: {what} failed: {result[0].name}")
            return result[1:]

        (program,) = check(nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], []), "creating the program")
        options = [flag.encode() for flag in [*self.flags(target), f"-I{TEMPLATE_DIR}"]]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        (size,) = check(nvrtc.nvrtcGetProgramLogSize(program), "reading the log")
        buffer = b" " * size
        check(nvrtc.nvrtcGetProgramLog(program, buffer), "reading the log")
        log = buffer.rstrip(b"\0 ").decode(errors="replace")
        if int(status) != 0:
            raise KernelBuildError(f"NVRTC ended with {status.name} for {target}:\n{log}")
        cubin = target.startswith("sm_")
        get_size, get = (
            (nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN) if cubin else (nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
        )
        (size,) = check(get_size(program), "reading the binary")
        binary = b" " * size
        check(get(program, binary), "reading the binary")
        nvrtc.nvrtcDestroyProgram(program)
        return binary, log


def _nvcc_candidates() -> list[str]:
    named = os.environ.get("TSLD_NVCC")
    if named:
        return [named]
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found = [shutil.which("nvcc"), *(f"{home}/bin/nvcc" for home in homes if home)]
    return [path for path in found if path and Path(path).exists()]


@lru_cache(maxsize=4)
def _nvcc(path: str) -> Nvcc:
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise KernelBuildError(
            f"{path} does not run ({error}). Point TSLD_NVCC or CUDA_HOME at a CUDA toolkit, version 12 or later."
        ) from error
    match = re.search(r"V(\d+\.\d+\.\d+)", text)
    return Nvcc(path, f"nvcc {match.group(1) if match else text.strip()}")


def find_compiler(prefer: str | None = None) -> Compiler:
    """nvcc if the machine has it, else NVRTC. `prefer` ("nvcc" or "nvrtc"; default TSLD_CUDA_COMPILER) forces one.

    Raises:
        KernelBuildError: neither is here, or not the one that was asked for.
    """
    prefer = prefer or os.environ.get("TSLD_CUDA_COMPILER") or None
    if prefer not in (None, "nvcc", "nvrtc"):
        raise KernelBuildError(f"TSLD_CUDA_COMPILER={prefer!r} is unknown. Use 'nvcc' or 'nvrtc', or leave it out.")
    candidates = _nvcc_candidates()
    if candidates and prefer != "nvrtc":
        return _nvcc(candidates[0])
    if prefer != "nvcc":
        try:
            from cuda.bindings import nvrtc

            status, major, minor = nvrtc.nvrtcVersion()
            if int(status) == 0:
                return Nvrtc(f"nvrtc {major}.{minor}")
        except (ImportError, RuntimeError):
            pass  # said below
    asked = f" (asked for {prefer})" if prefer else ""
    raise KernelBuildError(
        f"No CUDA compiler found{asked}. Install the CUDA toolkit and set CUDA_HOME or TSLD_NVCC, or "
        "`pip install cuda-bindings nvidia-cuda-nvrtc` for NVRTC, or load a module that was built ahead of time."
    )


_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


def parse_resources(log: str) -> list[ResourceUsage]:
    """The report of `ptxas -v`, one entry per kernel."""
    found: list[ResourceUsage] = []
    name, frame = "", (0, 0, 0)
    for line in log.splitlines():
        if match := _ENTRY.search(line):
            name = match.group(1)
        elif match := _SPILL.search(line):
            frame = (int(match.group(1)), int(match.group(2)), int(match.group(3)))
        elif (match := _REGISTERS.search(line)) and name:
            found.append(ResourceUsage(name, int(match.group(1)), *frame))
            name, frame = "", (0, 0, 0)
    return found
