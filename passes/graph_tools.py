"""Small questions about FX graphs that several passes ask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten


def calls(graph: fx.Graph, *targets: Any) -> list[fx.Node]:
    """The call_function nodes of the given targets, in graph order."""
    return [node for node in graph.nodes if node.op == "call_function" and node.target in targets]


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of an operator call, wherever it stands."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def attribute(module: torch.nn.Module, target: str) -> Any:
    """The tensor or module that a get_attr node of `target` reads."""
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value


def owner(module: torch.nn.Module, target: str) -> tuple[torch.nn.Module, str]:
    """The submodule that holds `target`, and the last part of its name."""
    path, _, leaf = target.rpartition(".")
    return module.get_submodule(path), leaf


def holder(root: torch.nn.Module, name: str) -> torch.nn.Module:
    """The submodule `name`, made (with the modules on the way) where the graph module has none.

    A GraphModule keeps only what its graph reads: a head tied to the embedding is not among it.
    """
    module = root
    for part in name.split(".") if name else ():
        if part not in module._modules:
            module.add_module(part, torch.nn.Module())
        module = module._modules[part]
    return module


def weight_source(node: Any) -> tuple[fx.Node, bool] | None:
    """The get_attr node behind a linear's weight and whether it is transposed on the way; None for anything else."""
    transposed = False
    while isinstance(node, fx.Node) and node.op == "call_function":
        if node.target is aten.t.default or node.target is aten.transpose.int or node.target is aten.permute.default:
            transposed = not transposed
        elif node.target is not aten.detach.default:
            return None
        node = node.args[0]
    return (node, transposed) if isinstance(node, fx.Node) and node.op == "get_attr" else None


def module_path(node: fx.Node) -> str | None:
    """Name of the innermost module that the node was traced from, None when the graph does not say."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    path = list(stack.values())[-1][0]
    return path.removeprefix("L['self'].") if isinstance(path, str) else None


def module_of_linear(linear: fx.Node, weight: fx.Node) -> str:
    """Name of the module a linear came from: its trace if there is one, else the owner of its weight."""
    return module_path(linear) or str(weight.target).rpartition(".")[0]


def copy_origin(new: fx.Node, old: fx.Node) -> None:
    """Give a new node the place in the model that `old` was traced from."""
    for key in ("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn"):
        if key in old.meta:
            new.meta[key] = old.meta[key]


def fake_of(graph_module: fx.GraphModule, node: fx.Node, tensor: Tensor) -> None:
    """Set meta["val"] of a get_attr node: a fake tensor in the graph's own fake mode, or on meta without one."""
    mode = next(
        (n.meta["val"].fake_mode for n in graph_module.graph.nodes if hasattr(n.meta.get("val"), "fake_mode")),
        None,
    )
    node.meta["val"] = mode.from_tensor(tensor, static_shapes=True) if mode else tensor.to("meta")


def set_val(node: fx.Node) -> None:
    """Set meta["val"] of a call_function node by running its operator on the meta values of its arguments."""
    flat: list[fx.Node] = list(node.all_input_nodes)
    if not all("val" in n.meta for n in flat):
        return
    args = fx.map_arg(node.args, lambda n: n.meta["val"])
    kwargs = fx.map_arg(node.kwargs, lambda n: n.meta["val"])
    mode = next((n.meta["val"].fake_mode for n in flat if hasattr(n.meta["val"], "fake_mode")), None)
    with torch.no_grad():
        if mode is None:
            node.meta["val"] = node.target(*args, **kwargs)
        else:
            with mode:
                node.meta["val"] = node.target(*args, **kwargs)


def tensors_read(graph: fx.Graph) -> Iterator[str]:
    """Names of every tensor that the graph reads."""
    return (str(node.target) for node in graph.nodes if node.op == "get_attr")


def erase_dead(graph: fx.Graph, *nodes: Any) -> None:
    """Erase the given nodes, and what only they used, where nothing uses them any more."""
    pending = [node for node in nodes if isinstance(node, fx.Node)]
    while pending:
        node = pending.pop()
        if node.users or node.op in ("placeholder", "output") or node.graph is not graph or node._erased:
            continue
        inputs = list(node.all_input_nodes)
        graph.erase_node(node)
        pending.extend(inputs)
