"""What TVM 0.27's importer of exported programs gets wrong for decoders, one function each.

A fix is a converter (node, importer) -> relax.Var that takes the place of TVM's own. Its test in
tests/relax/test_importer_fixes.py fails without it: when TVM mends a fault, drop the function and its test.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

Converter = Callable[[fx.Node, Any], Any]


def cumsum_of_bool(node: fx.Node, importer: Any) -> Any:
    """aten.cumsum promotes bool and small integers to int64; TVM sums in the input's type, which LLVM refuses.

    The axis is made non-negative too: a negative one fails on dynamic shapes.
    """
    from tvm import relax

    x, result = importer.env[node.args[0]], node.meta["val"]
    dtype = str(result.dtype).removeprefix("torch.")
    if str(x.ty.dtype) != dtype:
        x = importer.block_builder.emit(relax.op.astype(x, dtype))
    return importer.block_builder.emit(relax.op.cumsum(x, node.args[1] % result.ndim, dtype))


def slice_in_bounds(node: fx.Node, importer: Any) -> Any:
    """aten.slice with symbolic ends; TVM clamps them to min(end, size), which no later shape equals.

    torch.export has proved that the slice lies within bounds, or made the result's size a symbol that says so.
    """
    from tvm import ir, relax

    given: list[Any] = list(node.args)
    defaults: list[Any] = [None, 0, None, None, 1]
    x, dim, start, end, step = given + defaults[len(given) :]
    if end is None or not any(isinstance(value, fx.Node) for value in (start, end, step)):
        return importer._slice(node)
    start, end, step = (importer.env[v] if isinstance(v, fx.Node) else v for v in (start, end, step))
    source = importer.env[x]
    axis = dim % len(source.ty.shape)
    start = 0 if start is None else start
    whole = isinstance(start, int) and start == 0 and isinstance(step, int) and step == 1
    if whole and ir.prim.expr_deep_equal(end, source.ty.shape[axis]):
        return source
    sliced = relax.op.strided_slice(source, [axis], [start], [end], [step], assume_inbound=True)
    return importer.block_builder.emit(sliced)


def cat_without_empty(node: fx.Node, importer: Any) -> Any:
    """aten.cat leaves out 1-d tensors of size 0, with which transformers' caches start; TVM wants equal ranks."""
    from tvm import relax

    values = [n.meta["val"] for n in node.args[0]]
    kept = [n for n, value in zip(node.args[0], values, strict=True) if not (value.ndim == 1 and value.shape[0] == 0)]
    axis = (node.args[1] if len(node.args) > 1 else 0) % node.meta["val"].ndim
    if len(kept) == 1:
        return importer.env[kept[0]]
    return importer.block_builder.emit(relax.op.concat([importer.env[n] for n in kept], axis=axis))


FIXES: dict[str, Converter] = {
    "cumsum.default": cumsum_of_bool,
    "cat.default": cat_without_empty,
    "slice.Tensor": slice_in_bounds,
}
