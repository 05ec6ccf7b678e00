"""InlineHigherOrderOps: replace grad-mode and autocast wrappers by the nodes of their bodies."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from tsld_fx.errors import PassError
from tsld_fx.passes.graph_tools import aten, attribute, copy_origin, tensors_read


def _kind(node: fx.Node) -> str | None:
    name = str(node.target) if node.op == "call_function" else ""
    for kind in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
        if kind in name:
            return kind
    return None


def _body_and_inputs(node: fx.Node, kind: str) -> tuple[fx.Node, tuple]:
    position = 1 if kind == "wrap_with_set_grad_enabled" else 4
    return node.args[position], node.args[position + 1 :]


@dataclass(frozen=True)
class InlineHigherOrderOps(PassBase):
    """Flatten the regions that a model traced under `torch.no_grad()` or a fixed autocast mode (RoPE does both).

    before: wrap_with_set_grad_enabled(False, body, x)
    after:  the nodes of body, its results detached when gradients were off

    An outer product written as a matmul (inner size 1) becomes a multiplication, so that a region that asked for
    full precision keeps it under autocast.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        modified = False
        while node := next((n for n in graph_module.graph.nodes if _kind(n)), None):
            self._inline(graph_module, node)
            modified = True
        return PassResult(graph_module, modified)

    def _inline(self, graph_module: fx.GraphModule, node: fx.Node) -> None:
        kind = _kind(node)
        assert kind is not None
        body_node, inputs = _body_and_inputs(node, kind)
        body: fx.GraphModule = attribute(graph_module, body_node.target)
        without_grad = kind == "wrap_with_set_grad_enabled" and not node.args[0]
        graph, env, feed = graph_module.graph, {}, iter(inputs)
        results: tuple = ()
        with graph.inserting_before(node):
            for inner in body.graph.nodes:
                if inner.op == "placeholder":
                    env[inner] = next(feed)
                elif inner.op == "output":
                    returned = inner.args[0]
                    results = fx.map_arg(returned, lambda n: env[n])
                    results = results if isinstance(results, tuple | list) else (results,)
                elif inner.op == "get_attr":
                    env[inner] = self._hoist(graph_module, body, inner)
                else:
                    env[inner] = graph.node_copy(inner, lambda n: env[n])
                    _outer_product_to_mul(env[inner])
                    if not env[inner].meta.get("nn_module_stack"):
                        copy_origin(env[inner], node)
            if without_grad:
                results = tuple(self._detached(graph, value) for value in results)
        for user in list(node.users):
            if user.target is not operator.getitem:
                raise PassError(f"InlineHigherOrderOps: node {user.name} uses {node.name} other than by getitem.")
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)
        if not body_node.users:
            graph.erase_node(body_node)
            if body_node.target not in tensors_read(graph):
                graph_module.delete_submodule(str(body_node.target))

    @staticmethod
    def _hoist(graph_module: fx.GraphModule, body: fx.GraphModule, inner: fx.Node) -> fx.Node:
        """Read an attribute of the body (a nested region) from the outer graph module."""
        value, name = attribute(body, inner.target), f"inlined_{inner.target.replace('.', '_')}"
        while hasattr(graph_module, name):
            name += "_"
        setattr(graph_module, name, value)
        return graph_module.graph.get_attr(name)

    @staticmethod
    def _detached(graph: fx.Graph, value: fx.Node) -> fx.Node:
        fake = value.meta.get("val") if isinstance(value, fx.Node) else None
        if not isinstance(fake, torch.Tensor) or not fake.is_floating_point():
            return value
        detached = graph.call_function(aten.detach.default, (value,))
        detached.meta = dict(value.meta)
        return detached


def _outer_product_to_mul(node: fx.Node) -> None:
    if node.op != "call_function" or node.target is not aten.matmul.default:
        return
    left, right = (n.meta.get("val") for n in node.args)
    if left is not None and right is not None and left.ndim >= 2 and left.shape[-1] == 1 and right.ndim >= 2:
        node.target = aten.mul.Tensor
