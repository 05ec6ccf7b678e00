"""TVM: lowered models as Relax modules, compiled programs, and a loader that needs neither torch nor a compiler.

translate.py        to_relax: lowered graph -> IRModule; importer_fixes.py, lowering.py: converters of single operators
kernels.py          matmul.py.j2: the matrix products as TVMScript
cpu_target.py       which CPUs; cpu_pipeline.py: the passes
build_program.py    compile; program_folder.py writes; program_request.py, program_cache.py keep compiled libraries
generation.py       prefill and decode with a KV cache
load_program.py     runs a program folder on torch tensors; run.py on numpy arrays, alone

Importing this imports no tvm.
"""

import importlib

__all__ = ["CompiledProgram", "compile", "load", "to_relax"]

_LAZY = {
    "CompiledProgram": "tsld_fx.relax.load_program",
    "compile": "tsld_fx.relax.build_program",
    "load": "tsld_fx.relax.load_program",
    "to_relax": "tsld_fx.relax.translate",
}


def __getattr__(name: str) -> object:
    """The names in _LAZY."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'tsld_fx.relax' has no attribute {name!r}")
