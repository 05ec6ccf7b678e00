"""FoldTransposedLinear: write every product with a weight as a linear, whatever layout the weight has."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from tsld_fx.passes.graph_tools import aten, calls, copy_origin, erase_dead, set_val, weight_source


@dataclass(frozen=True)
class FoldTransposedLinear(PassBase):
    """GPT-2's Conv1D keeps its weight as [in, out]; after this pass a linear reads it through a transposed view.

    before: addmm(bias, x, W)            W [in, out]
    after:  linear(x, transpose(W, 0, 1), bias)

    Also mm(x, W), and both with W already transposed (the decomposed form of linear). The parameter itself, its
    name and its shape stay.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph, modified = graph_module.graph, False
        for node in calls(graph, aten.addmm.default, aten.mm.default):
            bias, x, weight = node.args if node.target is aten.addmm.default else (None, *node.args)
            source = weight_source(weight)
            if source is None or node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1:
                continue
            get_attr, transposed = source
            with graph.inserting_before(node):
                row_major = get_attr
                if not transposed:
                    row_major = graph.call_function(aten.transpose.int, (get_attr, 0, 1))
                    copy_origin(row_major, node)
                    set_val(row_major)
                linear = graph.call_function(aten.linear.default, (x, row_major, bias))
            linear.meta = dict(node.meta)
            node.replace_all_uses_with(linear)
            erase_dead(graph, node)
            modified = True
        return PassResult(graph_module, modified)
