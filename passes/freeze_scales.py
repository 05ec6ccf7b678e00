"""FreezeScales: turn every learned or data-dependent scale into a constant of the layer."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from tsld_fx.errors import PassError
from tsld_fx.passes.graph_tools import (
    attribute,
    calls,
    copy_origin,
    erase_dead,
    fake_of,
    holder,
    module_path,
    weight_source,
)
from tsld_fx.quantizers import all_finite, as_lines, clipped_scale, dynamic_scale, scale_shape

FROZEN = "tsld_frozen"  # meta key of a fake_quant node whose scale is a constant


@dataclass(frozen=True)
class FreezeScales(PassBase):
    """Compute each layer's scale (and zero point) once and store it as the buffers `weight_scale`, `weight_zero`.

    before: fake_quant(W, None, None, "twn", 2, 0)
    after:  fake_quant(W, weight_scale, None, "twn", 2, 0)

    A dead_zone_bias(W, ...) becomes the layer's `bias`. The results of the nodes do not change by a bit for a float32
    weight.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        nodes = [n for n in calls(graph_module.graph, torch.ops.tsld.fake_quant.default) if FROZEN not in n.meta]
        for node in nodes:
            self._freeze(graph_module, node)
        for node in calls(graph_module.graph, torch.ops.tsld.dead_zone_bias.default):
            _fold_bias(graph_module, node)
        return PassResult(graph_module, bool(nodes))

    def _freeze(self, graph_module: fx.GraphModule, node: fx.Node) -> None:
        weight = row_major_weight(graph_module, node)
        name = layer_of(node)
        _require_finite(name, "weight", weight)
        scale, zero = _constants(graph_module, node, weight)
        _require_finite(name, "scale", scale)
        module, graph, old = holder(graph_module, name), graph_module.graph, node.args[1:3]
        for leaf in ("weight_scale", "weight_zero", "weight_clip"):
            module._parameters.pop(leaf, None)
            module._buffers.pop(leaf, None)
        arguments: list[fx.Node | None] = []
        with graph.inserting_before(node):
            for leaf, value in (("weight_scale", scale), ("weight_zero", zero)):
                if value is None:
                    arguments.append(None)
                    continue
                module.register_buffer(leaf, value)
                arguments.append(graph.get_attr(f"{name}.{leaf}"))
                copy_origin(arguments[-1], node)
                fake_of(graph_module, arguments[-1], value)
        node.args = (node.args[0], *arguments, *node.args[3:])
        node.meta[FROZEN] = True
        erase_dead(graph, *old)


def _fold_bias(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """Replace a dead_zone_bias by its value, as the parameter `bias` of its layer."""
    name, graph = layer_of(node), graph_module.graph
    weight, module, old = row_major_weight(graph_module, node), holder(graph_module, name), node.args[2]
    _, _, _, *how = node.args
    before = None if old is None else attribute(graph_module, str(old.target)).detach()  # type: ignore[union-attr]
    value = torch.ops.tsld.dead_zone_bias(weight, module._buffers["weight_scale"], before, *how)
    module.register_parameter("bias", torch.nn.Parameter(value, requires_grad=False))
    with graph.inserting_before(node):
        bias = graph.get_attr(f"{name}.bias")
        copy_origin(bias, node)
        fake_of(graph_module, bias, value)
    node.replace_all_uses_with(bias)
    erase_dead(graph, node)


def _require_finite(name: str, what: str, value: Tensor) -> None:
    if not value.is_meta and not all_finite(value):
        raise PassError(
            f"FreezeScales: the {what} of '{name}' holds NaN or Inf; training went astray. Convert an older checkpoint."
        )


def layer_of(node: fx.Node) -> str:
    """Name of the layer whose weight a fake_quant or dequantize_weight node makes.

    Raises:
        PassError: the node does not say, and its weight is not a parameter.
    """
    name = node.meta.get("tsld_module") or module_path(node)
    if name is not None:
        return str(name)
    found = weight_source(node.args[0])
    if found is None:
        raise PassError(f"node {node.name}: cannot tell which layer it belongs to; its weight is not a parameter.")
    return str(found[0].target).rpartition(".")[0]


def row_major_weight(graph_module: fx.GraphModule, node: fx.Node) -> Tensor:
    """The [out, in] float weight that a fake_quant node reads.

    Raises:
        PassError: the node reads something else than a parameter.
    """
    found = weight_source(node.args[0])
    if found is None:
        raise PassError(f"node {node.name}: the quantised value is not a parameter of the model and cannot be packed.")
    weight: Tensor = attribute(graph_module, str(found[0].target)).detach()
    return weight.t() if found[1] else weight


def _constants(graph_module: fx.GraphModule, node: fx.Node, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    _, scale, zero, scheme, bits, group_size = node.args
    if scale is None:
        found, point = dynamic_scale(as_lines(weight, group_size), scheme, bits)
        shape = scale_shape(weight.shape[0], weight.shape[1], group_size)
        return found.float().reshape(shape), None if point is None else point.to(torch.uint8).reshape(shape)
    if scale.op == "get_attr":
        point = None if zero is None else attribute(graph_module, zero.target).clone()
        return attribute(graph_module, scale.target).detach().float().clone(), point
    clip: Any = scale.args[0]
    if scale.target is not operator.getitem or clip.target is not torch.ops.tsld.learned_clip.default:
        raise PassError(f"FreezeScales: node {node.name} takes its scale from {scale.format_node()}, not understood.")
    gamma = attribute(graph_module, clip.args[1].target).detach()
    found, point, _ = clipped_scale(weight, gamma, *clip.args[2:])
    return found.float(), None if zero is None else point
