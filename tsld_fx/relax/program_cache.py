"""Compiled libraries on disk, keyed by content: the module, the target, TVM's version and the passes that are run."""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsld_fx.codegen.cache import KernelCache
from tsld_fx.codegen.compiler import KernelBuildError
from tsld_fx.errors import BackendError
from tsld_fx.relax.cpu_target import CpuTarget
from tsld_fx.relax.tvm_import import check_tvm, load_tvm


@dataclass(frozen=True)
class TvmCompiler:
    """TVM as a compiler for `KernelCache`: the source is a module's script, the result a shared library.

    make: gives the module; called when the cache has not got it.
    """

    make: Callable[[], Any]
    where: CpuTarget

    @property
    def version(self) -> str:
        """TVM's, and a digest of the passes' own source."""
        passes = Path(__file__).with_name("cpu_pipeline.py").read_bytes()
        return f"tvm {check_tvm('compile')} {hashlib.sha256(passes).hexdigest()[:16]}"

    def flags(self, target: str) -> list[str]:
        """The target says it all."""
        return []

    def compile(self, source: str, target: str) -> tuple[bytes, str]:
        """-> (shared library, "").

        Raises:
            BackendError: TVM refuses the module, or there is no linker.
        """
        load_tvm()
        import tvm

        from tsld_fx.relax.cpu_pipeline import cpu_pipeline

        where = self.where.tvm()
        try:
            built = tvm.compile(self.make(), target=where, relax_pipeline=cpu_pipeline(where))
        except Exception as error:
            raise BackendError(f"compile: TVM does not compile the module for {target}: {_last_line(error)}") from error
        with tempfile.TemporaryDirectory(prefix="tsld-tvm-") as folder:
            library = Path(folder, "model.so")
            try:
                built.export_library(str(library))
            except (RuntimeError, OSError, ValueError, subprocess.SubprocessError) as error:
                raise BackendError(
                    f"compile: linking the shared library failed: {_last_line(error)} Install a C++ compiler (g++)."
                ) from error
            return library.read_bytes(), ""


def build_library(module: Any, where: CpuTarget) -> bytes:
    """The shared library of a module, from the cache or built now.

    Raises:
        BackendError: as `TvmCompiler.compile`, or the cache folder cannot be written.
    """
    source, target = describe(module), f"llvm {where.mcpu} {where.machine}"
    try:
        return KernelCache.default().get_or_build(source, target, TvmCompiler(lambda: module, where))[0]
    except KernelBuildError as error:
        raise BackendError(str(error)) from error


def describe(module: Any) -> str:
    """Everything that determines a module's code: its script, and digests of its constants (which scripts leave out).

    TVM's own JSON of a module would say it too, but writing it crashes on imported constants (0.27).
    """
    from tvm import relax
    from tvm.ir import GenericConst
    from tvm.runtime import Tensor

    digests: list[str] = []

    def visit(node: Any) -> None:
        if isinstance(node, GenericConst) and isinstance(node.value, Tensor):
            value = node.value.numpy()
            digests.append(f"{value.dtype}{value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}")

    for variable in sorted(module.functions, key=lambda v: v.name_hint):
        function = module.functions[variable]
        if isinstance(function, relax.Function):
            digests.append(variable.name_hint)
            relax.analysis.post_order_visit(function.body, visit)
    return "\n".join([module.script(show_meta=False), *digests])


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:400].rstrip(".") + "."
