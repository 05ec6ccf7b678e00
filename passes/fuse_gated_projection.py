"""FuseGatedProjection: the low-bit projections of a gated activation and the activation itself become one operator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from tsld_fx.decode_linear_ops import taking_turns
from tsld_fx.passes.fuse_projections import kind, layer_arguments, rows_of, stacked, weights_are_attributes
from tsld_fx.passes.graph_tools import calls, erase_dead


@dataclass(frozen=True)
class FuseGatedProjection(PassBase):
    """One kernel reads both weights and stores half as many features.

    before: silu_mul(lowbit_linear(x, Wg, ...), lowbit_linear(x, Wu, ...))
    after:  gated_linear(x, [8 rows of Wg; the same 8 of Wu; ...], ...)

    Every feature is computed from the same codes, scales and zero points as before. Fused where both projections have
    the same format and nothing else uses them, and where their rows are a multiple of 8. The new weights lie in
    `fused_projections` of the graph module; the old ones stay where they are.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph, modified = graph_module.graph, False
        for product in calls(graph, torch.ops.tsld.silu_mul.default):
            gate, up = product.args
            if not _fits(graph_module, gate, up):
                continue
            layer = stacked(graph_module, [gate, up], _take_turns)
            with graph.inserting_before(product):
                arguments = layer_arguments(graph_module, layer, product)
                fused = graph.call_function(torch.ops.tsld.gated_linear.default, (gate.args[0], *arguments))
            fused.meta = dict(product.meta)
            product.replace_all_uses_with(fused)
            erase_dead(graph, product)
            modified = True
        return PassResult(graph_module, modified)


def _take_turns(pair: list[Tensor]) -> Tensor:
    return taking_turns(*pair)


def _fits(graph_module: fx.GraphModule, gate: fx.Node, up: fx.Node) -> bool:
    linear = torch.ops.tsld.lowbit_linear.default
    for node in (gate, up):
        if node.op != "call_function" or node.target is not linear or len(node.users) != 1:
            return False
        if not weights_are_attributes(node):
            return False
    rows = rows_of(graph_module, gate)
    same = gate is not up and gate.args[0] is up.args[0] and kind(gate) == kind(up)
    return same and rows == rows_of(graph_module, up) and rows % 8 == 0
