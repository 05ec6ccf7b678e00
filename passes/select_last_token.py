"""SelectLastToken: compute the output embedding of one token of each sequence instead of all."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from tsld_fx.errors import PassError
from tsld_fx.passes.graph_tools import aten

NAME = "last"


@dataclass(frozen=True)
class SelectLastToken(PassBase):
    """A prefill needs the logits of the last token only; the others cost tokens x vocabulary products.

    before: {"logits": head(hidden)}                            [B, T, V]
    after:  {"logits": head(hidden[arange(B), last, None])}     [B, 1, V], `last` int64 [B] a new input
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        if any(node.name == NAME for node in inputs):
            return PassResult(graph_module, False)
        head = _head(graph)
        hidden = head.args[0]
        if hidden.meta["val"].ndim != 3:
            raise PassError(f"SelectLastToken: the head's input (node {hidden.name}) is not [batch, tokens, features].")
        with graph.inserting_after(inputs[-1]):
            last = graph.placeholder(NAME)
        with graph.inserting_before(head):
            row = graph.call_function(aten.view.default, (last, [-1, 1, 1]))
            index = graph.call_function(aten.expand.default, (row, [-1, -1, int(hidden.meta["val"].shape[-1])]))
            one = graph.call_function(aten.gather.default, (hidden, 1, index))
        one.meta = {**hidden.meta, "val": hidden.meta["val"][:, :1]}
        head.update_arg(0, one)
        head.meta["val"] = head.meta["val"][:, :1]
        return PassResult(graph_module, True)


def _head(graph: fx.Graph) -> fx.Node:
    """The linear whose result, or an element-wise function of it, the logits are."""
    output = next(node for node in graph.nodes if node.op == "output")
    node = output.args[0]["logits"] if isinstance(output.args[0], dict) else output.args[0][0]
    linears = ("aten.linear.default", "tsld.lowbit_linear.default", "tsld.kernel_linear.default")
    while isinstance(node, fx.Node) and node.op == "call_function":
        if str(node.target) in linears:
            return node
        node = next((a for a in node.args if isinstance(a, fx.Node)), None)
    raise PassError("SelectLastToken: no linear behind the output 'logits'. The graph is not one of a language model.")
