"""FuseRMSNorm: one operator for an RMSNorm, and for the residual addition before it."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from tsld_fx import decode_ops  # noqa: F401  (registers the operator)
from tsld_fx.passes.graph_tools import aten, calls, copy_origin, erase_dead


@dataclass(frozen=True)
class FuseRMSNorm(PassBase):
    """Fewer kernels between the products of LLaMA-like decoders.

    before: s = a + b; y = weight * (s * rsqrt(mean(s ** 2) + eps))       (normalised in float32)
    after:  y, s = add_rms_norm(a, b, weight, eps)

    Without an addition before it: y = rms_norm(s, weight, eps). Norms of another form (Gemma's 1 + weight) stay.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph, modified = graph_module.graph, False
        for rsqrt in calls(graph, aten.rsqrt.default):
            found = _match(rsqrt)
            if found is not None:
                _replace(graph, *found)
                modified = True
        return PassResult(graph_module, modified)


def _is(node: Any, *targets: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def _uncast(node: Any) -> Any:
    """What a cast to another float type was given."""
    while _is(node, aten.to.dtype, aten._to_copy.default):
        node = node.args[0]
    return node


def _only_user(node: fx.Node, *targets: Any) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and _is(users[0], *targets) else None


def _match(rsqrt: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, float] | None:
    """-> (x, weight, the node that y is, eps)."""
    plus = rsqrt.args[0]
    if not _is(plus, aten.add.Tensor) or not isinstance(plus.args[1], float):
        return None
    mean = plus.args[0]
    if not _is(mean, aten.mean.dim) or list(mean.args[1]) != [-1] or not mean.args[2]:
        return None
    square = mean.args[0]
    if not _is(square, aten.pow.Tensor_Scalar) or square.args[1] != 2:
        return None
    wide = square.args[0]
    product = _only_user(rsqrt, aten.mul.Tensor)
    if product is None or wide not in product.args:
        return None
    narrow = _only_user(product, aten.to.dtype, aten._to_copy.default) or product
    result = _only_user(narrow, aten.mul.Tensor)
    if result is None:
        return None
    weight = result.args[0] if result.args[1] is narrow else result.args[1]
    x = _uncast(wide)
    if not isinstance(weight, fx.Node) or weight.op != "get_attr" or result.meta["val"].dtype != x.meta["val"].dtype:
        return None
    return x, weight, result, plus.args[1]


def _replace(graph: fx.Graph, x: fx.Node, weight: fx.Node, result: fx.Node, eps: float) -> None:
    if not _is(x, aten.add.Tensor) or not _same_shapes(x):
        with graph.inserting_before(result):
            y = graph.call_function(torch.ops.tsld.rms_norm.default, (x, weight, eps))
        y.meta = dict(result.meta)
    else:
        with graph.inserting_before(x):
            both = graph.call_function(torch.ops.tsld.add_rms_norm.default, (*x.args, weight, eps))
            y, total = (graph.call_function(operator.getitem, (both, index)) for index in range(2))
        copy_origin(both, result)
        y.meta, total.meta = dict(result.meta), dict(x.meta)
        both.meta["val"] = (result.meta["val"], x.meta["val"])
        x.replace_all_uses_with(total)
    result.replace_all_uses_with(y)
    erase_dead(graph, result, x)


def _same_shapes(add: fx.Node) -> bool:
    """An addition of two tensors of one shape and type, unscaled."""
    if len(add.args) != 2 or add.kwargs or not all(isinstance(a, fx.Node) for a in add.args):
        return False
    first, second = (a.meta["val"] for a in add.args)
    return isinstance(second, torch.Tensor) and first.shape == second.shape and first.dtype == second.dtype
