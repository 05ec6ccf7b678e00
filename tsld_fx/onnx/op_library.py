"""The operator library for onnxruntime: our CPU kernels behind its C API, built on the machine that uses it."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tsld_fx.errors import ExportError

logger = logging.getLogger(__name__)
SOURCE = Path(__file__).resolve().parent / "native" / "lowbit_linear_op.cc"
HEADER = "onnxruntime_cxx_api.h"
OLDEST_API = 17
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-shared", "-fvisibility=hidden")


def build_op_library(out: str | Path = "libtsld_ort.so", ort_include: str | Path | None = None) -> Path:
    """Compile the library; the file is replaced whole or not at all.

    It holds code for every instruction set (portable, AVX2, AVX512-VNNI, AMX), chosen when it runs, and loads into
    onnxruntime 1.17 and later whatever the version of the headers: `SessionOptions.register_custom_ops_library(out)`.

    Args:
        out: the library to write, or a folder for libtsld_ort.so.
        ort_include: folder with onnxruntime_cxx_api.h; default: where packages put it.

    Raises:
        ExportError: no headers, headers that are too old, no C++ compiler, or the compiler's own complaint.
    """
    include = find_headers(ort_include)
    compiler = _compiler()
    target = Path(out)
    target = target / "libtsld_ort.so" if target.is_dir() else target
    from tsld_fx.codegen.cpu import KERNEL_DIR

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".build-", dir=target.parent) as folder:
            made = Path(folder) / target.name
            command = [compiler, *FLAGS, "-I", str(include), "-I", str(KERNEL_DIR), str(SOURCE), "-o", str(made)]
            logger.debug("%s", " ".join(command))
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
                raise ExportError(
                    f"build-ort-op: {compiler} failed: {errors[0] if errors else 'without a message'}. It has to be "
                    "g++ 9 or clang++ 10 or later; set CXX to another compiler."
                )
            os.replace(made, target)
    except OSError as error:
        raise ExportError(f"build-ort-op: cannot write {target}: {error}. Choose another --out.") from error
    return target


def find_headers(ort_include: str | Path | None = None) -> Path:
    """The folder with onnxruntime's C and C++ API headers.

    Raises:
        ExportError: there is none, or its API is older than 17.
    """
    places = [Path(ort_include)] if ort_include is not None else _usual_places()
    for place in places:
        for folder in (
            place,
            place / "onnxruntime",
            place / "onnxruntime" / "core" / "session",
            place / "core" / "session",
        ):
            if (folder / HEADER).is_file():
                _check_version(folder)
                return folder
    if ort_include is not None:
        raise ExportError(
            f"build-ort-op: there is no {HEADER} in {ort_include}. Give the 'include' folder of an onnxruntime release."
        )
    raise ExportError(
        f"build-ort-op: onnxruntime's C++ header {HEADER} is not on this machine (wheels do not carry it). Install "
        "libonnxruntime-dev (Debian 13 and later), or unpack an onnxruntime release and pass --ort-include "
        "RELEASE/include."
    )


def _usual_places() -> list[Path]:
    prefixes = [sys.prefix, os.environ.get("CONDA_PREFIX"), "/usr/local", "/usr", "/opt/onnxruntime"]
    return [Path(prefix) / "include" for prefix in prefixes if prefix]


def _check_version(folder: Path) -> None:
    text = (folder / "onnxruntime_c_api.h").read_text(encoding="utf-8", errors="replace")
    found = re.search(r"^#define ORT_API_VERSION (\d+)", text, re.MULTILINE)
    if found is None or int(found[1]) < OLDEST_API:
        version = "unknown" if found is None else f"1.{found[1]}"
        raise ExportError(
            f"build-ort-op: the headers in {folder} are of onnxruntime {version}; 1.{OLDEST_API} or later is needed. "
            "Give newer ones with --ort-include."
        )


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and shutil.which(name):
            return name
    raise ExportError("build-ort-op: there is no C++ compiler. Install g++ (9 or later) or clang++, or set CXX.")
