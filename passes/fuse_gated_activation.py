"""FuseGatedActivation: one operator for silu(gate) * up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from tsld_fx import decode_ops  # noqa: F401  (registers the operator)
from tsld_fx.passes.graph_tools import aten, calls, erase_dead


@dataclass(frozen=True)
class FuseGatedActivation(PassBase):
    """Fewer kernels between the products of LLaMA-like decoders.

    before: silu(gate) * up
    after:  silu_mul(gate, up)
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph, modified = graph_module.graph, False
        for silu in calls(graph, aten.silu.default):
            product = next(iter(silu.users), None)
            if len(silu.users) != 1 or product is None or product.target is not aten.mul.Tensor:
                continue
            up = product.args[1] if product.args[0] is silu else product.args[0]
            gate = silu.args[0]
            if not isinstance(up, fx.Node) or up is silu or gate.meta["val"].shape != up.meta["val"].shape:
                continue
            with graph.inserting_before(product):
                fused = graph.call_function(torch.ops.tsld.silu_mul.default, (gate, up))
            fused.meta = dict(product.meta)
            product.replace_all_uses_with(fused)
            erase_dead(graph, product)
            modified = True
        return PassResult(graph_module, modified)
