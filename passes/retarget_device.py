"""RetargetDevice: move the devices that a capture baked into a graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult


@dataclass(frozen=True)
class RetargetDevice(PassBase):
    """Replace every device argument in the graph.

    before: arange(n, device=cpu)
    after:  arange(n, device=cuda:0)

    Fields:
        device: where the graph will run.
    """

    device: torch.device

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        modified = False
        for node in graph_module.graph.nodes:
            if node.op != "call_function":
                continue
            args = tuple(self._moved(value) for value in node.args)
            kwargs = {key: self._moved(value) for key, value in node.kwargs.items()}
            if args != node.args or kwargs != node.kwargs:
                node.args, node.kwargs, modified = args, kwargs, True
        return PassResult(graph_module, modified)

    def _moved(self, value: object) -> object:
        return self.device if isinstance(value, torch.device) else value
