"""The passes that turn a Relax module into what TVM's virtual machine runs on a CPU, in order."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax
from tvm.s_tir import Schedule
from tvm.tirx import PrimFunc


def cpu_pipeline(target: Any) -> Any:
    """Passes for `tvm.compile(module, target, relax_pipeline=...)`.

    Constants are folded and chains of operators fused before anything is lowered; matrix products that are no PrimFunc
    of ours (the two of attention) get a schedule.
    """
    passes = (
        relax.backend.DispatchSampling(),
        relax.backend.DispatchSortScan(),
        relax.transform.LegalizeOps(),  # operators -> unscheduled PrimFuncs
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FoldConstant(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.DeadCodeElimination(),
        schedule_products,
        relax.transform.RewriteDataflowReshape(),
        relax.transform.ToNonDataflow(),
        relax.transform.RemovePurityChecking(),
        relax.transform.CallTIRRewrite(),
        relax.transform.StaticPlanBlockMemory(),
        relax.transform.LowerAllocTensor(),
        relax.transform.KillAfterLastUse(),
        relax.transform.LowerRuntimeBuiltin(),
        relax.transform.ComputePrimValue(),
        relax.transform.VMShapeLower(),
        relax.transform.AttachGlobalSymbol(),
    )

    @tvm.transform.module_pass(opt_level=0)
    def pipeline(module: Any, _: Any) -> Any:
        with target:
            return tvm.transform.Sequential(list(passes))(module)

    return pipeline


@tvm.transform.module_pass(opt_level=0)
def schedule_products(module: Any, _: Any) -> Any:
    """C[.., i, j] += A[.., i, k] * B[.., k, j] with k innermost -> j innermost (contiguous), parallel over the rest."""
    functions = {
        name: _scheduled(function) if _is_open(function) else function for name, function in module.functions.items()
    }
    return tvm.IRModule(functions, attrs=module.attrs)


def _is_open(function: Any) -> bool:
    """Whether a function is of blocks under a root block (TVM's own cumsum is not) and nobody scheduled it."""
    if not isinstance(function, PrimFunc) or "tirx.is_scheduled" in (function.attrs or {}):
        return False
    return getattr(getattr(function.body, "block", None), "name_hint", None) == "root"


def _scheduled(function: Any) -> Any:
    schedule = Schedule(function)
    products = [
        block for block in schedule.get_child_blocks(schedule.get_sblock("root")) if _is_product(schedule, block)
    ]
    for block in products:
        *outer, j, k = schedule.get_loops(block)
        schedule.reorder(k, j)
        schedule.parallel(schedule.fuse(*outer))
        schedule.decompose_reduction(block, k)
    return schedule.mod["main"].with_attrs(function.attrs) if products else function


def _is_product(schedule: Any, block: Any) -> bool:
    """Whether a block is a matrix product over loops (batch.., i, j, k) with two axes at least before j."""
    kinds = [int(axis.iter_type) for axis in schedule.get(block).iter_vars]
    loops = schedule.get_loops(block)
    return (
        len(loops) == len(kinds) >= 4
        and kinds == [0] * (len(kinds) - 1) + [2]
        and "matmul" in schedule.get(block).name_hint
    )
