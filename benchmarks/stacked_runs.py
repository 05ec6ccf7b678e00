"""One graph for several runs of one model: parameters [R, ...], activations of all runs in one batch [R * B, ...].

The matrix products of R small models become batched ones, which fill a GPU that one of them leaves half idle. Only
the operators that read a parameter change; the others see a larger batch.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from tsld_fx.passes.graph_tools import aten


def stacked_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [R * B, T, I], weight [R, O, I], bias [R, O] -> [R * B, T, O]."""
    runs, out, _ = weight.shape
    rows = x.reshape(runs, -1, x.shape[-1])
    if bias is None:
        made = torch.bmm(rows, weight.transpose(1, 2))
    else:
        made = torch.baddbmm(bias.unsqueeze(1), rows, weight.transpose(1, 2))
    return made.view(*x.shape[:-1], out)


def stacked_layer_norm(
    x: Tensor, shape: list[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *_: Any
) -> Tensor:
    """x [R * B, T, H], weight and bias [R, H]."""
    made = functional.layer_norm(x, shape, eps=eps)
    made = made if weight is None else stacked_scale(weight, made)
    return made if bias is None else (_by_run(made, bias) + bias[:, None, None]).view_as(made)


def stacked_scale(weight: Tensor, x: Tensor) -> Tensor:
    """weight [R, H] times x [R * B, T, H]."""
    return (_by_run(x, weight) * weight[:, None, None]).view_as(x)


def stacked_embedding(weight: Tensor, ids: Tensor, batch: int) -> Tensor:
    """weight [R, V, H], ids [R * B, T], or [1, T] for all -> [R * B, T, H]."""
    runs, size, _ = weight.shape
    ids = ids.expand(runs * batch, -1).reshape(runs, batch, -1)
    shift = torch.arange(runs, device=ids.device)[:, None, None] * size
    return functional.embedding((ids + shift).view(runs * batch, -1), weight.reshape(runs * size, -1))


def stacked_fake_quant(weight: Tensor, *rest: Any) -> Tensor:
    """weight [R, O, I]; scales are per output channel, so the rows of all runs are one matrix."""
    flat = torch.ops.tsld.fake_quant(weight.reshape(-1, weight.shape[-1]), *rest)
    return flat.view(weight.shape)


def _by_run(x: Tensor, parameter: Tensor) -> Tensor:
    return x.view(parameter.shape[0], -1, *x.shape[1:])


def stack(graph_module: fx.GraphModule, batch: int) -> fx.GraphModule:
    """A copy of a decoder's graph that reads stacked parameters, by `torch.func.functional_call`.

    Args:
        batch: B of one run.

    Raises:
        NotImplementedError: an operator that reads a parameter and is not known here.
    """
    made = copy.deepcopy(graph_module)
    names = {name for name, _ in made.named_parameters(remove_duplicate=False)}
    stacked: set[fx.Node] = set()
    for node in list(made.graph.nodes):
        if node.op == "get_attr" and node.target in names:
            stacked.add(node)
            continue
        read = [n for n in node.all_input_nodes if n in stacked]
        if node.op == "output" or not read:
            continue
        if len(read) > 1 and node.target not in (aten.linear.default, aten.layer_norm.default):
            raise NotImplementedError(f"{node.target} reads {len(read)} parameters: stacked runs do not know it")
        if node.target is aten.transpose.int and {node.args[1], node.args[2]} in ({0, 1}, {-1, -2}):
            node.args = (node.args[0], -1, -2)
            stacked.add(node)
        elif node.target is aten.t.default:
            node.target, node.args = aten.transpose.int, (node.args[0], -1, -2)
            stacked.add(node)
        elif node.target is torch.ops.tsld.fake_quant.default:
            node.target = stacked_fake_quant
            stacked.add(node)
        elif node.target is aten.linear.default:
            node.target = stacked_linear
        elif node.target is aten.layer_norm.default:
            node.target = stacked_layer_norm
        elif node.target is aten.embedding.default:
            node.target, node.args, node.kwargs = stacked_embedding, (*node.args[:2], batch), {}
        elif node.target is aten.mul.Tensor and len(read) == 1:
            weight, other = node.args if node.args[0] is read[0] else reversed(node.args)
            node.target, node.args = stacked_scale, (weight, other)
        else:
            raise NotImplementedError(f"{node.target} reads a parameter: stacked runs do not know it")
    made.graph.lint()
    made.recompile()
    return made
