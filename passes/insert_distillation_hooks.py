"""InsertDistillationHooks: give out the inner values that layer-to-layer distillation compares."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from tsld_fx.errors import PassError
from tsld_fx.passes.graph_tools import argument, aten, calls, copy_origin, erase_dead, set_val

TAPS = ("hidden_states", "attention_scores")


@dataclass(frozen=True)
class InsertDistillationHooks(PassBase):
    """Name the graph's outputs and add one per layer and tap; with no taps, take them out again.

    before: output({"logits": logits})
    after:  output({"logits": logits, "hidden_states.0": h0, ..., "attention_scores.0": s0, ...})

    `hidden_states.i` is what layer i gives to the next one, [B, T, H]. `attention_scores.i` is q k^T * scale before
    the softmax, [B, heads, T, T]: the softmax's own input in eager attention, recomputed beside a fused
    scaled_dot_product_attention (0 where its boolean mask forbids).

    Fields:
        taps: any of "hidden_states", "attention_scores".
    """

    taps: tuple[str, ...] = ()

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        for tap in self.taps:
            if tap not in TAPS:
                raise PassError(f"InsertDistillationHooks: unknown tap {tap!r}. Known taps: {', '.join(TAPS)}.")
        graph = graph_module.graph
        output = next(n for n in reversed(graph.nodes) if n.op == "output")
        before = output.args[0]
        outputs = {"logits": before["logits"] if isinstance(before, dict) else _first(before)}
        tapped = {k.rpartition(".")[0] for k in before if "." in k} if isinstance(before, dict) else None
        if tapped == set(self.taps):
            return PassResult(graph_module, False)
        if isinstance(before, dict):
            removed = [node for key, node in before.items() if "." in key]
            output.args = (outputs,)
            erase_dead(graph, *removed)
        if "hidden_states" in self.taps:
            outputs |= _named("hidden_states", layer_outputs(graph))
        if "attention_scores" in self.taps:
            outputs |= _named("attention_scores", attention_scores(graph))
        output.args = (outputs,)
        graph.set_codegen(fx.graph.CodeGen())  # the exported pytree knows nothing of new outputs
        return PassResult(graph_module, True)


def _first(value: object) -> fx.Node:
    while isinstance(value, tuple | list):
        value = value[0]
    if not isinstance(value, fx.Node):
        raise PassError("InsertDistillationHooks: the graph's first output is not a tensor. Give a graph of logits.")
    return value


def _named(tap: str, nodes: list[fx.Node]) -> dict[str, fx.Node]:
    if not nodes:
        raise PassError(
            f"InsertDistillationHooks: found no {tap.replace('_', ' ')} in this graph. "
            "It needs nn_module_stack metadata with a list of layers; use a method without taps, such as 'tsld'."
        )
    return {f"{tap}.{index}": node for index, node in enumerate(nodes)}


def layer_outputs(graph: fx.Graph) -> list[fx.Node]:
    """For each decoder layer the last [B, T, H] value that something outside the layer uses."""
    inside: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        for layer in _layers_of(node):
            inside.setdefault(layer, []).append(node)
    outermost = _outermost_list(list(inside))
    results = []
    for layer in sorted(outermost, key=lambda name: int(name.rpartition(".")[2])):
        members = set(inside[layer])
        leaving = [
            n for n in inside[layer]
            if any(user not in members for user in n.users) and getattr(n.meta.get("val"), "ndim", 0) == 3
        ]  # fmt: skip
        if leaving:
            results.append(leaving[-1])
    return results


def _layers_of(node: fx.Node) -> list[str]:
    if node.op != "call_function":
        return []
    stack = node.meta.get("nn_module_stack") or {}
    return [path for path, _ in stack.values() if re.search(r"(^|\.)\d+$", path)]


def _outermost_list(layers: list[str]) -> list[str]:
    """The members of the module list that lies least deep."""
    if not layers:
        return []
    depth = min(layer.count(".") for layer in layers)
    prefix = next(layer for layer in layers if layer.count(".") == depth).rpartition(".")[0]
    return [layer for layer in layers if layer.rpartition(".")[0] == prefix]


def attention_scores(graph: fx.Graph) -> list[fx.Node]:
    """The scores of each attention in graph order, whether it is fused or eager."""
    found = []
    for node in calls(graph, aten.scaled_dot_product_attention.default, aten.softmax.int, aten._softmax.default):
        if node.target is aten.scaled_dot_product_attention.default:
            found.append(_scores_beside(graph, node))
        elif getattr(node.meta.get("val"), "ndim", 0) == 4:
            found.append(node.args[0])
    return found


def _scores_beside(graph: fx.Graph, attention: fx.Node) -> fx.Node:
    """q k^T * scale, with the mask applied, recomputed in front of a fused attention."""
    query, key = attention.args[:2]
    mask = argument(attention, 3, "attn_mask")
    head_size = query.meta["val"].shape[-1]
    scale = attention.kwargs.get("scale")

    def call(target: object, *args: object) -> fx.Node:
        node = graph.call_function(target, args)
        copy_origin(node, attention)
        set_val(node)
        return node

    with graph.inserting_before(attention):
        if attention.kwargs.get("enable_gqa", False):
            repeats = query.meta["val"].shape[1] // key.meta["val"].shape[1]
            key = call(aten.repeat_interleave.self_int, key, repeats, 1)
        scores = call(aten.matmul.default, query, call(aten.transpose.int, key, -2, -1))
        scores = call(aten.mul.Tensor, scores, float(scale if scale is not None else head_size**-0.5))
        if mask is None:
            return scores
        if mask.meta["val"].dtype == torch.bool:
            return call(aten.where.ScalarOther, mask, scores, 0.0)
        return call(aten.add.Tensor, scores, mask)
