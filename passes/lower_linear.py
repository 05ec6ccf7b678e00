"""LowerLinear: replace a linear over a packed weight by the low-bit operator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from tsld_fx.passes.graph_tools import argument, aten, calls, erase_dead


@dataclass(frozen=True)
class LowerLinear(PassBase):
    """One operator that a backend implements, instead of unpacking and multiplying.

    before: linear(x, dequantize_weight(packed, scales, zeros, bits, group_size, in_features), bias)
    after:  lowbit_linear(x, packed, scales, zeros, bias, bits, group_size, in_features)
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph, modified = graph_module.graph, False
        for node in calls(graph, aten.linear.default):
            weight = node.args[1]
            if not isinstance(weight, fx.Node) or weight.target is not torch.ops.tsld.dequantize_weight.default:
                continue
            packed, scales, zeros, *shape = weight.args
            with graph.inserting_before(node):
                lowered = graph.call_function(
                    torch.ops.tsld.lowbit_linear.default,
                    (node.args[0], packed, scales, zeros, argument(node, 2, "bias"), *shape),
                )
            lowered.meta = dict(node.meta)
            node.replace_all_uses_with(lowered)
            erase_dead(graph, node)
            modified = True
        return PassResult(graph_module, modified)
