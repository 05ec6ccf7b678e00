"""The passes for CPUs: attention's products get a schedule, everything else is left as it is."""

from __future__ import annotations

import re
from typing import Any

from tsld_fx.relax.tvm_import import load_tvm


def fused_module() -> Any:
    """Products of attention's shapes, a softmax and a cumulative sum, fused as the pipeline does."""
    load_tvm()
    import tvm
    from tvm import relax

    builder, n = relax.BlockBuilder(), tvm.tirx.Var("n", "int64")
    q = relax.Var("q", relax.TensorType([4, n, 8], "float32"))
    k = relax.Var("k", relax.TensorType([4, 8, n], "float32"))
    with builder.function("main", [q, k]):
        with builder.dataflow():
            scores = builder.emit(relax.op.multiply(builder.emit(relax.op.matmul(q, k)), relax.const(0.5, "float32")))
            total = builder.emit_output(relax.op.cumsum(builder.emit(relax.op.nn.softmax(scores, -1)), 2))
        builder.emit_func_output(total)
    module = builder.get()
    passes = relax.transform
    for step in (passes.LegalizeOps(), passes.AnnotateTIROpPattern(), passes.FuseOps(), passes.FuseTIR()):
        module = step(module)
    return module


def test_products_run_contiguously_and_in_parallel() -> None:
    module = fused_module()
    from tsld_fx.relax.cpu_pipeline import schedule_products

    scheduled = schedule_products(module)
    before, after = ({v.name_hint: f for v, f in m.functions.items()} for m in (module, scheduled))
    changed = [name for name in before if before[name].script() != after[name].script()]
    assert changed == [name for name in before if "matmul" in name] and len(changed) == 1
    text = after[changed[0]].script()
    assert "T.parallel(n * T.int64(4))" in text
    loops = re.search(r"for (\w+), (\w+) in T.grid\(T.int64\(8\), n\)", text)
    assert loops is not None and f'T.axis.remap("SR", [{loops[2]}, {loops[1]}])' in text  # j innermost: neighbours
