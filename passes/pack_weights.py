"""PackWeights: replace frozen fake-quantised weights by packed codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from tsld_fx.errors import PassError
from tsld_fx.packing import pack
from tsld_fx.passes.freeze_scales import FROZEN, layer_of, row_major_weight
from tsld_fx.passes.graph_tools import (
    attribute,
    calls,
    copy_origin,
    erase_dead,
    fake_of,
    holder,
    owner,
    tensors_read,
    weight_source,
)
from tsld_fx.quantizers import quantize


@dataclass(frozen=True)
class PackWeights(PassBase):
    """Store the codes of each layer as the uint8 buffer `weight_packed` and drop the float weight nobody reads.

    before: fake_quant(W, weight_scale, weight_zero, scheme, bits, group_size)
    after:  dequantize_weight(weight_packed, weight_scale, weight_zero, bits, group_size, in_features)

    Both give the same float32 weight, bit for bit.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        nodes = calls(graph_module.graph, torch.ops.tsld.fake_quant.default)
        for node in nodes:
            self._pack(graph_module, node)
        return PassResult(graph_module, bool(nodes))

    def _pack(self, graph_module: fx.GraphModule, node: fx.Node) -> None:
        name = layer_of(node)
        if FROZEN not in node.meta:
            raise PassError(
                f"PackWeights: the scale of '{name}' (node {node.name}) is not frozen. Run FreezeScales first."
            )
        weight = row_major_weight(graph_module, node)
        if weight.dtype != torch.float32:
            raise PassError(
                f"PackWeights: '{name}.weight' is {weight.dtype}. Pack float32 weights: call .float() first."
            )
        _, scale, zero, scheme, bits, group_size = node.args
        zeros = None if zero is None else attribute(graph_module, zero.target)
        codes = quantize(weight, attribute(graph_module, scale.target), zeros, scheme, bits, group_size).codes
        packed = pack(codes, bits)
        holder(graph_module, name).register_buffer("weight_packed", packed)
        graph, source = graph_module.graph, weight_source(node.args[0])
        with graph.inserting_before(node):
            codes_node = graph.get_attr(f"{name}.weight_packed")
            copy_origin(codes_node, node)
            fake_of(graph_module, codes_node, packed)
            made = graph.call_function(
                torch.ops.tsld.dequantize_weight.default,
                (codes_node, scale, zero, bits, group_size, weight.shape[1]),
            )
        made.meta = {k: v for k, v in node.meta.items() if k != FROZEN}
        node.replace_all_uses_with(made)
        erase_dead(graph, node)
        assert source is not None
        target = str(source[0].target)
        if target not in set(tensors_read(graph)):
            module, leaf = owner(graph_module, target)
            module._parameters.pop(leaf, None)
