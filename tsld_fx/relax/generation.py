"""`prefill` and `decode`: a decoder's step with a KV cache as two Relax functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.export import ExportedProgram

from tsld_fx.cached_capture import capture_cached
from tsld_fx.lowered import LoweredModel


def step_functions(
    lowered: LoweredModel, imported: Callable[[ExportedProgram], Any]
) -> tuple[Any, ExportedProgram, dict[str, Any]]:
    """-> (IRModule with `prefill` and `decode`, the program they come from, what the cache looks like).

    Both are (input_ids int64 [B, T], attention_mask int64 [B, P + T], position_ids int64 [B, T], keys and values
    [B, kv_heads, P, head_dim] of each layer, *weights) -> (logits [B, T, vocabulary], keys and values [.., P + T, ..]).
    `prefill` takes any T; in `decode` T is 1. The first call has P = 0.

    Args:
        imported: turns an exported program into an IRModule with `main`.
    """
    from tvm import IRModule, relax

    captured = capture_cached(lowered)
    module = imported(captured.program)
    step = module["main"]
    tokens = step.params[0].ty.shape[1]
    decode = relax.utils.copy_with_new_vars(relax.transform.BindSymbolicVars({tokens: 1}, "main")(module)["main"])
    kernels = {variable: function for variable, function in module.functions.items() if variable.name_hint != "main"}
    pair = {"prefill": step, "decode": decode}
    renamed = {name: function.with_attr("global_symbol", name) for name, function in pair.items()}
    dtype = str(captured.dtype).removeprefix("torch.")
    cache = {"layers": captured.layers, "kv_heads": captured.kv_heads, "head_dim": captured.head_dim, "dtype": dtype}
    return IRModule({**kernels, **renamed}), captured.program, cache
