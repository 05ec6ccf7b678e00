"""DropMetadataAsserts: remove the dtype and device assertions that torch.export records."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from tsld_fx.passes.graph_tools import aten, calls


@dataclass(frozen=True)
class DropMetadataAsserts(PassBase):
    """Remove assertions that pin a graph to the dtype and device it was captured in (autocast would trip them).

    before: _assert_tensor_metadata(x, dtype=float32, device=cpu)
    after:  nothing
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        nodes = calls(graph_module.graph, aten._assert_tensor_metadata.default)
        for node in nodes:
            graph_module.graph.erase_node(node)
        return PassResult(graph_module, bool(nodes))
