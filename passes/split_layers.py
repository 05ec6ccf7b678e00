"""Split a flat decoder graph into layers, and the layers into pipeline stages, so that only the hidden state crosses.

Nothing here reads or moves parameters: these are functions from graphs to graphs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from tsld_fx.errors import PassError
from tsld_fx.passes.graph_tools import aten
from tsld_fx.passes.insert_distillation_hooks import layer_outputs

LAYER = "layer_{}"  # the submodule of the root graph that runs layer i


@dataclass(frozen=True)
class LayeredGraph:
    """A decoder as a short root graph that calls one graph per layer.

    Attributes:
        root: embedding, masks, positions and head as plain operators; layer i is a call of the module `layer_<i>`,
            whose first argument is the hidden state [B, T, H] and whose others are masks and positions.
        layers: the graph of each layer; a layer with one result returns it bare, else a tuple.
    """

    root: fx.Graph
    layers: tuple[fx.Graph, ...]


def split_layers(graph: fx.Graph) -> LayeredGraph:
    """Cut a flat graph at the output of each decoder layer.

    before: h1 = add(h0, linear(h0, W_0)); h2 = add(h1, linear(h1, W_1))
    after:  h1 = layer_0(h0); h2 = layer_1(h1)

    What does not depend on the hidden state (masks, RoPE) is computed once in the root graph and passed to the layers.
    Fake quantisation of a layer's own weights goes into the layer.

    Raises:
        PassError: the graph has no list of layers, or a layer reads inner values of an earlier one.
    """
    outputs = layer_outputs(graph)
    if not outputs:
        raise PassError(
            "split_layers: found no decoder layers in this graph. It needs nn_module_stack metadata with a list of "
            "layers; run it as one flat graph (no gradient checkpointing, --parallel ddp)."
        )
    sources = [_entry(outputs), *outputs[:-1]]
    bodies = [_body(source, target) for source, target in zip(sources, outputs, strict=True)]
    taken: dict[fx.Node, int] = {}
    for index, body in enumerate(bodies):
        for node in body:
            if node in taken:
                raise PassError(f"split_layers: node {node.name} belongs to layers {taken[node]} and {index}.")
            taken[node] = index
    order = {node: place for place, node in enumerate(graph.nodes)}
    root, env, layers = fx.Graph(), dict[fx.Node, fx.Node](), []
    last = [max(body, key=order.__getitem__) for body in bodies]
    for node in graph.nodes:
        if node not in taken:
            env[node] = root.node_copy(node, lambda n: env[n])
            continue
        index = taken[node]
        if node is not last[index]:
            continue
        layer, inputs, results = _layer_graph(graph, bodies[index], sources[index], outputs[index])
        call = root.call_module(LAYER.format(index), tuple(env[n] for n in inputs))
        call.meta = {k: v for k, v in outputs[index].meta.items() if k == "val"}
        layers.append(layer)
        if len(results) == 1:
            env[results[0]] = call
        else:
            for place, result in enumerate(results):
                env[result] = root.call_function(_item, (call, place))
                env[result].meta = dict(result.meta)
    _drop_dead(root)
    root.lint()
    return LayeredGraph(root, tuple(layers))


def _item(values: Sequence[Any], index: int) -> Any:
    """One result of a layer that has several."""
    return values[index]


def layer_path(node: fx.Node) -> str | None:
    """Name of the outermost numbered module that a node was traced from, such as `model.layers.3`."""
    stack = node.meta.get("nn_module_stack") or {}
    return next((path for path, _ in stack.values() if re.search(r"(^|\.)\d+$", path)), None)


def _entry(outputs: list[fx.Node]) -> fx.Node:
    """The hidden state that enters the first layer: the last floating value from outside that all of it hangs on."""
    name = layer_path(outputs[0])
    inside, pending = set(), [outputs[0]]
    entries: list[fx.Node] = []
    while pending:
        node = pending.pop()
        if node in inside:
            continue
        inside.add(node)
        for source in node.all_input_nodes:
            if layer_path(source) == name or _is_parameter_of(source, name):
                pending.append(source)
            elif _is_hidden(source, outputs[0]) and source not in entries:
                entries.append(source)
    if len(entries) != 1:
        raise PassError(
            f"split_layers: the first layer '{name}' has {len(entries)} hidden inputs instead of one "
            f"({', '.join(n.name for n in entries)}). Run this model as one flat graph."
        )
    return entries[0]


def _is_hidden(node: fx.Node, like: fx.Node) -> bool:
    """Whether a node is a floating [B, T, H] value of the hidden state's width."""
    ours, theirs = node.meta.get("val"), like.meta.get("val")
    return (
        getattr(ours, "ndim", 0) == 3
        and node.op == "call_function"
        and ours.shape[-1] == theirs.shape[-1]
        and ours.is_floating_point()
    )


def _is_parameter_of(node: fx.Node, layer: str | None) -> bool:
    return node.op == "get_attr" and layer is not None and str(node.target).startswith(f"{layer}.")


def _body(source: fx.Node, target: fx.Node) -> set[fx.Node]:
    """What a layer computes: everything between its input and output, and the chains over its own parameters."""
    needed, pending = set(), [target]
    while pending:
        node = pending.pop()
        if node not in needed and node is not source:
            needed.add(node)
            pending.extend(node.all_input_nodes)
    hangs, path = {source}, layer_path(target)
    for node in _between(source, target):
        if any(n in hangs for n in node.all_input_nodes):
            hangs.add(node)
    body = needed & hangs
    own = [n for n in target.graph.nodes if n in needed and n not in hangs]
    for node in own:  # in graph order: parameters first, then what is made of them alone
        inputs = node.all_input_nodes
        if _is_parameter_of(node, path) or (inputs and all(n in body and n not in hangs for n in inputs)):
            body.add(node)
    for node in reversed(own):  # a buffer that is first cut to the length of the batch stays outside
        if not all(user in body for user in node.users):
            body.discard(node)
    inside = set(body)  # beside the way to the output: taps of the layer
    for node in _between(source, target.graph.output_node()):
        inputs = [n for n in node.all_input_nodes if n in hangs]
        if (
            node not in body
            and layer_path(node) == path
            and inputs
            and all(n in inside for n in inputs if n is not source)
        ):
            inside.add(node)
    return inside


def _between(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    found, node = [], first.next
    while node is not last.next and node.op != "root":
        found.append(node)
        node = node.next
    return [n for n in found if n.op not in ("placeholder", "output")]


def _layer_graph(
    graph: fx.Graph, body: set[fx.Node], source: fx.Node, target: fx.Node
) -> tuple[fx.Graph, list[fx.Node], list[fx.Node]]:
    """The graph of one layer, the nodes that it takes (hidden state first) and those that it gives (likewise)."""
    inputs, results = [source], [target]
    ordered = [n for n in graph.nodes if n in body]
    for node in ordered:
        inputs += [n for n in node.all_input_nodes if n not in body and n not in inputs]
        if node is not target and any(user not in body for user in node.users):
            results.append(node)
    layer, env = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in inputs:
        env[node] = layer.placeholder("hidden" if node is source else node.name)
        env[node].meta = dict(node.meta)
    for node in ordered:
        env[node] = layer.node_copy(node, lambda n: env[n])
    values = tuple(env[n] for n in results)
    layer.output(values[0] if len(values) == 1 else values)
    layer.lint()
    return layer, inputs, results


def layer_calls(root: fx.Graph) -> list[fx.Node]:
    """The calls of the layers in a root graph, in order."""
    return [n for n in root.nodes if n.op == "call_module" and re.fullmatch(r"layer_\d+", str(n.target))]


def stage_graph(root: fx.Graph, first: int, last: int) -> fx.Graph:
    """The part of a root graph that runs layers first .. last - 1, as one pipeline stage.

    The stage takes the graph's own inputs by name and, unless it starts with the embedding, `hidden` before them. It
    returns the hidden state, or the graph's dict of outputs where it ends with the head. Masks and positions are
    computed anew from the inputs.

    Raises:
        PassError: the stage needs something else of an earlier one.
    """
    layers = layer_calls(root)
    source = None if first == 0 else layers[first - 1]
    output = next(n for n in reversed(root.nodes) if n.op == "output")
    targets = list(output.all_input_nodes) if last == len(layers) else [layers[last - 1]]
    needed, pending = set(), list(targets)
    while pending:
        node = pending.pop()
        if node not in needed and node is not source:
            needed.add(node)
            pending.extend(node.all_input_nodes)
    several = {n for n in layers if any(user.target is _item for user in n.users)}  # taps beside the hidden state
    for node in [n for n in layers if n in several or (n in needed and n in layers[:first])]:
        raise PassError(
            f"stage_graph: layers {first} to {last - 1} read values of {node.target} besides its hidden state, "
            "so they cannot be a pipeline stage. Use --parallel fsdp, or a method without taps."
        )
    stage, env = fx.Graph(), dict[fx.Node, fx.Node]()
    if source is not None:
        env[source] = stage.placeholder("hidden")
        env[source].meta = dict(source.meta)
    for node in root.nodes:
        if node.op == "placeholder":
            env[node] = stage.placeholder(str(node.target), default_value=None)
            env[node].meta = dict(node.meta)
        elif node in needed:
            env[node] = stage.node_copy(node, lambda n: env[n])
    if last == len(layers):
        stage.output(fx.map_arg(output.args[0], lambda n: env[n]))
    else:  # a copy: zero-bubble schedules detach a stage's result in place, which a view forbids
        stage.output(stage.call_function(aten.clone.default, (env[targets[0]],)))
    stage.lint()
    return stage


def _drop_dead(graph: fx.Graph) -> None:
    for node in reversed(graph.nodes):
        if node.op not in ("placeholder", "output") and not node.users:
            graph.erase_node(node)
