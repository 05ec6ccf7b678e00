"""FuseProjections: low-bit linears of one input become one, whose result is split."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from tsld_fx import cuda_linear
from tsld_fx.lowbit_linear import LowBitLinear
from tsld_fx.passes.graph_tools import aten, attribute, calls, copy_origin, erase_dead, fake_of, set_val

HOLDER = "fused_projections"


@dataclass(frozen=True)
class FuseProjections(PassBase):
    """q, k and v share one product, and so do gate and up: fewer and larger kernels.

    before: q = lowbit_linear(x, Wq, ...); k = lowbit_linear(x, Wk, ...); v = lowbit_linear(x, Wv, ...)
    after:  q, k, v = split(lowbit_linear(x, [Wq; Wk; Wv], ...), sizes, -1)

    Rows are concatenated, so every result is computed from the same codes, scales and zero points as before. Linears
    are fused where they read the same node with the same bits, inputs and group size (one scale per tensor counts as
    one per channel). The new weights lie in `fused_projections` of the graph module; the old ones stay where they are.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        together: dict[tuple, list[fx.Node]] = {}
        for node in calls(graph_module.graph, torch.ops.tsld.lowbit_linear.default):
            if weights_are_attributes(node):
                together.setdefault((node.args[0], *kind(node)), []).append(node)
        groups = [nodes for nodes in together.values() if len(nodes) > 1]
        for nodes in groups:
            self._fuse(graph_module, nodes)
        return PassResult(graph_module, bool(groups))

    def _fuse(self, graph_module: fx.GraphModule, nodes: list[fx.Node]) -> None:
        graph, first = graph_module.graph, nodes[0]
        layer = stacked(graph_module, nodes, torch.cat)
        with graph.inserting_before(first):
            fused = graph.call_function(first.target, (first.args[0], *layer_arguments(graph_module, layer, first)))
            sizes = [rows_of(graph_module, node) for node in nodes]
            split = graph.call_function(aten.split_with_sizes.default, (fused, sizes, -1))
            parts = [graph.call_function(operator.getitem, (split, index)) for index in range(len(nodes))]
        for new in (fused, split, *parts):
            copy_origin(new, first)
            set_val(new)
        for node, part in zip(nodes, parts, strict=True):
            part.meta = dict(node.meta)
            node.replace_all_uses_with(part)
            erase_dead(graph, node)


def layer_arguments(graph_module: fx.GraphModule, layer: LowBitLinear, origin: fx.Node) -> list[Any]:
    """Give the graph module a new layer; its arguments of tsld::lowbit_linear after x, at the insertion point."""
    target, arguments = _holder(graph_module), []
    graph_module.add_submodule(target, layer)
    for leaf in ("weight_packed", "weight_scale", "weight_zero", "bias"):
        value = getattr(layer, leaf)
        arguments.append(None if value is None else graph_module.graph.get_attr(f"{target}.{leaf}"))
        if value is not None:
            fake_of(graph_module, arguments[-1], value)
            copy_origin(arguments[-1], origin)
    return [*arguments, layer.bits, layer.group_size, layer.in_features]


def kind(linear: fx.Node) -> tuple:
    """What low-bit linears must share to be stacked: bits, group size (a scale per tensor is one per row), inputs."""
    *_, bits, group_size, in_features = linear.args
    return bits, max(group_size, 0), in_features


def weights_are_attributes(linear: fx.Node) -> bool:
    """Whether the weight lies in the graph module, and is not computed."""
    return all(a is None or a.op == "get_attr" for a in linear.args[1:5])


def _holder(graph_module: fx.GraphModule) -> str:
    """A free name in the graph module's own `fused_projections`."""
    if not hasattr(graph_module, HOLDER):
        graph_module.add_module(HOLDER, nn.Module())
    return f"{HOLDER}.layer_{len(getattr(graph_module, HOLDER)._modules)}"


def rows_of(graph_module: fx.GraphModule, node: fx.Node) -> int:
    """Output features of a low-bit linear."""
    return int(attribute(graph_module, str(node.args[1].target)).shape[0])


def stacked(graph_module: fx.GraphModule, nodes: list[fx.Node], join: Callable[[list[Tensor]], Tensor]) -> LowBitLinear:
    """One layer with the rows of all, ordered by `join`, on the kernels that the first is on."""

    def value(node: fx.Node, position: int) -> Tensor | None:
        source = node.args[position]
        return None if source is None else attribute(graph_module, str(source.target)).detach()

    *_, bits, group_size, in_features = nodes[0].args
    packed: list[Any] = [value(node, 1) for node in nodes]
    rows = [p.shape[0] for p in packed]
    group_size = max(group_size, 0)

    def per_row(tensor: Tensor, count: int) -> Tensor:
        return tensor.expand(count, -1)

    scales = [per_row(value(node, 2), count) for node, count in zip(nodes, rows, strict=True)]
    zeros = [value(node, 3) for node in nodes]
    biases = [value(node, 4) for node in nodes]
    layer = LowBitLinear(in_features, sum(rows), bits, group_size, device="meta")
    layer.weight_packed, layer.weight_scale = join(packed), join(scales)
    if any(zero is not None for zero in zeros):
        default = 1 if bits == 2 else 2 ** (bits - 1)
        filled = [torch.full_like(s, default, dtype=torch.uint8) for s in scales]
        zeros = [f if z is None else per_row(z, f.shape[0]) for z, f in zip(zeros, filled, strict=True)]
        layer.weight_zero = join(zeros)
    given = next((bias for bias in biases if bias is not None), None)
    if given is not None:
        filled = [given.new_zeros(n) if b is None else b for b, n in zip(biases, rows, strict=True)]
        layer.bias = nn.Parameter(join(filled), requires_grad=False)
    owner = graph_module.get_submodule(str(nodes[0].args[1].target).rpartition(".")[0])
    if getattr(owner, "kernels", None):
        layer.use_kernels(owner.kernels, owner.activations)
        _keep_kernel_layout_alone(layer, nodes[0])
    return layer.eval()


def _keep_kernel_layout_alone(layer: LowBitLinear, node: fx.Node) -> None:
    """Free the canonical weight where kernels compute everything, so that it does not lie in GPU memory twice more.

    Its tensor stays, without memory: the kernels find their layout by it.
    """
    packed = layer.weight_packed
    if layer.kernels != "cuda" or node.meta["val"].dtype not in cuda_linear.KERNEL_DTYPES or not packed.is_cuda:
        return
    weight = (packed, layer.weight_scale, layer.weight_zero, layer.bits, layer.group_size, layer.in_features)
    if cuda_linear.find(*weight) is not None:
        packed.untyped_storage().resize_(0)
