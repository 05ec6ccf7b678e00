"""Views of a prepared model by layers: the same parameters, one module per layer, recomputed in backward or kept.

The flat graph stays the public one; these modules run the same operators in the same order, and give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from tsld_fx.passes.graph_tools import attribute
from tsld_fx.passes.split_layers import LayeredGraph, layer_calls, split_layers, stage_graph


class Layer(nn.Module):
    """One decoder layer as a graph.

    Attributes:
        body: the graph module; first argument the hidden state [B, T, H].
        recompute: keep only the layer's inputs in the forward pass and compute the rest again in the backward pass.
    """

    def __init__(self, body: fx.GraphModule) -> None:
        super().__init__()
        self.body, self.recompute = body, False

    def forward(self, *inputs: Any) -> Any:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.body, *inputs, use_reentrant=False)
        return self.body(*inputs)


class Root(nn.Module):
    """A whole decoder whose graph calls its layers; a plain module, because `fully_shard` changes its class.

    Attributes:
        body: the graph module, with the flat one's inputs and outputs.
        endings: the same decoder with another end, by name; they read the tensors of `body` and call its layers, so
            whoever shards or replaces those of `body` serves them too.
    """

    def __init__(self, body: fx.GraphModule) -> None:
        super().__init__()
        self.body = body
        self.endings: dict[str, fx.GraphModule] = {}

    def forward(self, *inputs: Any, ending: str = "", **named: Any) -> Any:
        return (self.endings[ending] if ending else self.body)(*inputs, **named)


class LayeredView:
    """A prepared model's graph cut into layers, over the model's live parameters.

    Args:
        graph_module: the flat graph module (`PreparedModel.graph_module`).
        model: the model whose parameters it reads.

    Attributes:
        root: runs the decoder, with the flat graph's inputs and outputs.
        layers: its layers, in order.

    Raises:
        PassError: the graph cannot be cut into layers.
    """

    def __init__(self, graph_module: fx.GraphModule, model: nn.Module) -> None:
        self._model = model
        self._parts: list[fx.GraphModule] = []
        self._ends: dict[str, tuple[fx.Graph, fx.GraphModule]] = {}  # root graph, and the flat one with its constants
        split: LayeredGraph = split_layers(graph_module.graph)
        self.layers = [Layer(self._module(graph, graph_module, {})) for graph in split.layers]
        self._ends[""] = split.root, graph_module
        self.root = Root(self._module(*self._ends[""], self._calls(split.root)))

    def add_ending(self, name: str, graph_module: fx.GraphModule) -> None:
        """Let the decoder end in another way as well: `root(..., ending=name)`.

        Args:
            graph_module: the flat graph with that end; its layers are those that are there.
        """
        if name and name not in self._ends:
            self._ends[name] = split_layers(graph_module.graph).root, graph_module
            self.root.endings[name] = self._module(*self._ends[name], self._calls(self._ends[name][0]))

    def graph_modules(self) -> list[fx.GraphModule]:
        """Every graph module made so far, stages too, for passes that change nodes in place."""
        return self._parts

    def recompute(self, mode: bool) -> None:
        """Turn activation checkpointing of every layer on or off."""
        for layer in self.layers:
            layer.recompute = mode

    def stage(self, first: int, last: int, ending: str = "") -> fx.GraphModule:
        """Layers first .. last - 1 as a pipeline stage (see `stage_graph`), of the decoder that ends in some way."""
        root, flat = self._ends[ending]
        graph = stage_graph(root, first, last)
        return self._module(graph, flat, self._calls(graph))

    def _calls(self, graph: fx.Graph) -> dict[str, Layer]:
        return {str(n.target): self.layers[int(str(n.target).rpartition("_")[2])] for n in layer_calls(graph)}

    def _module(self, graph: fx.Graph, flat: fx.GraphModule, calls: dict[str, Layer]) -> fx.GraphModule:
        """A graph module over windows onto the model: it holds what its graph reads and nothing else."""
        names = [str(n.target) for n in graph.nodes if n.op == "get_attr"]
        base = windows(self._model, [n for n in names if "." in n])
        for name in names:
            if "." not in name:  # a constant of the capture
                base.register_buffer(name, attribute(flat, name), persistent=False)
        for name, layer in calls.items():
            base.add_module(name, layer)
        module = fx.GraphModule(base, graph, class_name=f"{type(self._model).__name__}Part")
        for name, child in base.named_children():  # GraphModule copies containers: put the live ones in their place
            module.add_module(name, child)
        self._parts.append(module)
        return module


def windows(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """A module tree that reaches only the modules which own the given tensors.

    Each module of the tree shares the dictionaries of parameters and buffers with the model's module of the same
    name. Whoever replaces a parameter in one (FSDP, `.to()`, loading) replaces it in the other.

    Args:
        names: dotted names of parameters and buffers.
    """
    base = nn.Module()
    for name in names:
        module, live = base, model
        for part in name.split(".")[:-1]:
            live = live._modules[part]  # type: ignore[assignment]
            if part not in module._modules:
                module.add_module(part, _window(live))
            module = module._modules[part]  # type: ignore[assignment]
    return base


def _window(live: nn.Module) -> nn.Module:
    window = nn.Module()
    window.__dict__["_parameters"] = live._parameters
    window.__dict__["_buffers"] = live._buffers
    window.__dict__["_non_persistent_buffers_set"] = live._non_persistent_buffers_set
    return window
