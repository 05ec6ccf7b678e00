"""FuseNormLinear: RMSNorm, with the residual addition before it, becomes part of the low-bit product that reads it."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from tsld_fx import decode_linear_ops  # noqa: F401  (registers the operators)
from tsld_fx.passes.graph_tools import calls, copy_origin, erase_dead

tsld = torch.ops.tsld


@dataclass(frozen=True)
class FuseNormLinear(PassBase):
    """The product's kernel normalises its input on the way, so that no kernel stands between two products.

    before: h, s = add_rms_norm(a, b, w, eps); y = lowbit_linear(h, W, ...)
    after:  y, s = add_norm_linear(a, b, w, eps, W, ..., gated=False)

    Likewise rms_norm -> norm_linear, and gated_linear with gated=True. Fused where nothing but one product reads h.
    The output embedding stays: SelectLastToken looks for it.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph, modified = graph_module.graph, False
        for norm in calls(graph, tsld.rms_norm.default, tsld.add_rms_norm.default):
            normed, total = _results(norm)
            linear = _only_product(normed)
            if linear is not None and not any(user.op == "output" for user in linear.users):
                _replace(graph, norm, total, linear)
                modified = True
        return PassResult(graph_module, modified)


def _results(norm: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """The nodes of h and of s; s is None for a norm without an addition."""
    if norm.target is tsld.rms_norm.default:
        return norm, None
    found: dict[int, fx.Node] = {int(user.args[1]): user for user in norm.users if user.target is operator.getitem}
    return found.get(0), found.get(1)


def _only_product(normed: fx.Node | None) -> fx.Node | None:
    """The low-bit product that alone reads a norm's result, with a weight that lies in the graph module."""
    if normed is None or len(normed.users) != 1:
        return None
    user = next(iter(normed.users))
    if user.op != "call_function" or user.target not in (tsld.lowbit_linear.default, tsld.gated_linear.default):
        return None
    fits = user.args[0] is normed and all(a is None or a.op == "get_attr" for a in user.args[1:5])
    return user if fits else None


def _replace(graph: fx.Graph, norm: fx.Node, total: fx.Node | None, linear: fx.Node) -> None:
    gated = linear.target is tsld.gated_linear.default
    added = norm.target is tsld.add_rms_norm.default
    with graph.inserting_before(norm):  # not at the product: s may be used before it
        weight: list[Any] = [_read_here(graph, a) for a in linear.args[1:5]]
        target = tsld.add_norm_linear.default if added else tsld.norm_linear.default
        fused = graph.call_function(target, (*norm.args, *weight, *linear.args[5:], gated))
        copy_origin(fused, linear)
        y = fused
        if added:
            y, new_total = (graph.call_function(operator.getitem, (fused, index)) for index in range(2))
            new_total.meta = dict(norm.meta) if total is None else dict(total.meta)
            fused.meta["val"] = (linear.meta["val"], norm.meta["val"][1])
            new_total.meta["val"] = norm.meta["val"][1]
            if total is not None:
                total.replace_all_uses_with(new_total)
    y.meta = dict(linear.meta)
    linear.replace_all_uses_with(y)
    erase_dead(graph, linear, *([total] if total is not None else []))


def _read_here(graph: fx.Graph, node: fx.Node | None) -> fx.Node | None:
    """The same attribute, read at the insertion point."""
    if node is None:
        return None
    made = graph.get_attr(str(node.target))
    made.meta = dict(node.meta)
    return made
