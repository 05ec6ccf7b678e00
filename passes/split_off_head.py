"""SplitOffHead: a decoder that ends in front of its head, and gives out what the head would read."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from tsld_fx.passes.fuse_head_loss import head_of
from tsld_fx.passes.graph_tools import argument

RESULTS = ("head_input", "head_weight", "head_bias")


@dataclass(frozen=True)
class SplitOffHead(PassBase):
    """Leave the linear head at the end of a graph to the caller.

    before: output({"logits": linear(h, W, b)})
    after:  output({"head_input": h, "head_weight": W, "head_bias": b})

    Other outputs (taps) stay. A graph whose logits are not the plain result of a linear is left alone.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        output = graph.output_node()
        head = head_of(output)
        if head is None:
            return PassResult(graph_module, False)
        others = {k: v for k, v in output.args[0].items() if k != "logits"} if isinstance(output.args[0], dict) else {}
        given = (head.args[0], head.args[1], argument(head, 2, "bias"))
        output.args = (dict(zip(RESULTS, given, strict=True)) | others,)
        graph.erase_node(head)
        graph.set_codegen(fx.graph.CodeGen())  # torch.export's knows the old outputs
        return PassResult(graph_module, True)
