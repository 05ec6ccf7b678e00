"""Which CPUs a program is built for: the levels of the x86-64 psABI, or the baseline of another architecture.

A level, not the very processor, so that a program built on one machine runs on every later one; and few enough that
the machine that loads it can be asked whether it qualifies (`run.py` has the same table, without TVM).
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Any

from tsld_fx.errors import BackendError
from tsld_fx.relax.run import CPU_FLAGS, cpu_flags


@dataclass(frozen=True)
class CpuTarget:
    """An LLVM target.

    mcpu: x86-64-v2, x86-64-v3 (AVX2, FMA) or x86-64-v4 (AVX-512); generic elsewhere.
    machine: platform.machine() of the CPUs that run it.
    lanes: float32 values per vector; table: whether AVX-512's permutations may be used.
    """

    mcpu: str
    machine: str
    lanes: int
    table: bool

    def tvm(self) -> Any:
        """The tvm.target.Target."""
        import tvm

        return tvm.target.Target({"kind": "llvm", "mcpu": self.mcpu})

    @property
    def flags(self) -> list[str]:
        """What /proc/cpuinfo of a machine that runs it must show."""
        return list(CPU_FLAGS.get(self.mcpu, ()))


def cpu_target(name: str = "llvm") -> CpuTarget:
    """The target named `llvm` (the highest level that this machine has) or `llvm:<level>`, e.g. `llvm:x86-64-v3`.

    Raises:
        BackendError: no such target.
    """
    machine = platform.machine()
    kind, _, level = name.partition(":")
    levels = [*CPU_FLAGS, "generic"] if machine in ("x86_64", "AMD64") else ["generic"]
    if kind != "llvm" or (level and level not in levels):
        raise BackendError(
            f"target={name!r} is not known. Use 'llvm' (this machine's CPU) or "
            + ", ".join(f"'llvm:{one}'" for one in levels)
            + "."
        )
    if not level:
        have = cpu_flags()
        level = next((one for one in levels if set(CPU_FLAGS.get(one, ())) <= have), "generic")
    lanes = {"x86-64-v4": 16, "x86-64-v3": 8}.get(level, 4)
    mcpu = "x86-64" if level == "generic" and machine in ("x86_64", "AMD64") else level
    return CpuTarget(mcpu, machine, lanes, level == "x86-64-v4")
