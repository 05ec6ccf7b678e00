"""`prefill` and `decode`: a decoder's step with a KV cache as two Relax functions."""

from __future__ import annotations

from typing import Any

import numpy as np

from tsld_fx.cached_capture import capture_cached
from tsld_fx.lowered import LoweredModel
from tsld_fx.relax.cpu_target import CpuTarget
from tsld_fx.relax.translate import parameters_of, program_to_relax


def step_functions(lowered: LoweredModel, target: CpuTarget) -> tuple[Any, dict[str, np.ndarray], dict[str, Any]]:
    """-> (IRModule with `prefill` and `decode`, its weights, what the cache looks like).

    Both are (input_ids int64 [B, T], attention_mask int64 [B, P + T], position_ids int64 [B, T], keys and values
    [B, kv_heads, P, head_dim] of each layer, *weights) -> (logits [B, T, vocabulary], keys and values [.., P + T, ..]).
    `prefill` takes any T; in `decode` T is 1. The first call has P = 0.
    """
    from tvm import IRModule, relax

    from tsld_fx.relax.build_program import as_arrays

    captured = capture_cached(lowered)
    module = program_to_relax(captured.program, target, bind_params=False)
    step = module["main"]
    tokens = step.params[0].ty.shape[1]
    decode = relax.transform.BindSymbolicVars({tokens: 1}, "main")(module)["main"]
    functions = {v.name_hint: f for v, f in module.functions.items() if v.name_hint != "main"}
    pair = {"prefill": step, "decode": decode}
    renamed = {name: function.with_attr("global_symbol", name) for name, function in pair.items()}
    dtype = str(captured.dtype).removeprefix("torch.")
    cache = {"layers": captured.layers, "kv_heads": captured.kv_heads, "head_dim": captured.head_dim, "dtype": dtype}
    found = IRModule({**{v: f for v, f in module.functions.items() if v.name_hint in functions}, **renamed})
    return found, as_arrays(parameters_of(captured.program)), cache
