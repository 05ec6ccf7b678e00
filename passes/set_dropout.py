"""SetDropout: turn dropout on (training) or off (evaluation) in a captured graph."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from tsld_fx.passes.graph_tools import aten, calls

_RATE = "tsld_dropout_p"  # meta key: the attention's dropout rate while it is off


@dataclass(frozen=True)
class SetDropout(PassBase):
    """Make dropout follow train or eval mode in a graph that was captured in train mode.

    before: dropout(x, 0.1, True);  scaled_dot_product_attention(q, k, v, mask, 0.1)
    after:  dropout(x, 0.1, False); scaled_dot_product_attention(q, k, v, mask, 0.0)     (training=False)

    Fields:
        training: True for the rates that the model was captured with, False for none.
    """

    training: bool

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        modified = False
        for node in calls(graph_module.graph, aten.dropout.default):
            modified |= node.args[2] != self.training
            node.update_arg(2, self.training)
        for node in calls(graph_module.graph, aten.scaled_dot_product_attention.default):
            positional = len(node.args) > 4
            now = node.args[4] if positional else node.kwargs.get("dropout_p", 0.0)
            if now:
                node.meta[_RATE] = now
            wanted = node.meta.get(_RATE, 0.0) if self.training else 0.0
            if now == wanted:
                continue
            if positional:
                node.update_arg(4, wanted)
            else:
                node.update_kwarg("dropout_p", wanted)
            modified = True
        return PassResult(graph_module, modified)
