"""`torch.compile(model, backend="tsld_fx")`: the convert pipeline inside somebody else's compile.

Dynamo hands a backend the graph that it traced, with parameters as inputs of the graph. Where gradients are off, each
fake-quantised weight in it is packed and its linears become tsld::lowbit_linear; the rest of the graph, and the whole
of it in training, goes to the backend inside (inductor) as it came.
"""

from __future__ import annotations

import logging
import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from tsld_fx import ops  # noqa: F401  (registers tsld::*)
from tsld_fx.errors import ConfigError
from tsld_fx.passes.freeze_scales import FreezeScales
from tsld_fx.passes.graph_tools import aten, calls, erase_dead
from tsld_fx.passes.lower_linear import LowerLinear
from tsld_fx.passes.pack_weights import PackWeights
from tsld_fx.passes.runner import run_passes

logger = logging.getLogger(__name__)
_FAKE_QUANT, _DEQUANTIZE = torch.ops.tsld.fake_quant, torch.ops.tsld.dequantize_weight
_SPELLED_OUT: dict[Any, Any] = {  # what Dynamo writes -> the operator that passes know
    _FAKE_QUANT: _FAKE_QUANT.default,
    torch.ops.tsld.learned_clip: torch.ops.tsld.learned_clip.default,
    torch.nn.functional.linear: aten.linear.default,
    "t": aten.t.default,
    "transpose": aten.transpose.int,
    "detach": aten.detach.default,
}
_OF_CONSTANTS = {  # operators between a parameter and its fake quantisation
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.detach.default,
    torch.ops.tsld.learned_clip.default,
    operator.getitem,
}


def tsld_fx(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend behind `torch.compile(model, backend="tsld_fx", options={"inner": "inductor"})`.

    A weight is packed when its graph is compiled. Each call compares the versions of the tensors that it was packed
    from, so that an optimiser step or `load_state_dict` between two calls packs it anew, without compiling again.
    Writing through `.data` leaves no trace to see: call `torch.compiler.reset()` after it.

    Args:
        graph_module, example_inputs: what Dynamo traced.
        mode: inductor's.
        options: `inner` names the backend that compiles the result (default `inductor`; `eager` and `aot_eager` for
            debugging) or is one; the other options go to it.

    Raises:
        ConfigError: `inner` is no backend, or is this one.
        PassError: a weight holds NaN or Inf.
    """
    compile_inner = _inner(mode, dict(options or {}))
    original, graph_module = graph_module, _copy(graph_module)  # Dynamo reads its own graph again when we are done
    _spell_out(graph_module.graph)
    weights = _weights(graph_module, example_inputs)
    read = [example_inputs[position] for weight in weights for position in weight.inputs.values()]
    if not weights or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in read)):
        return compile_inner(original, example_inputs)
    lowered = _lower(graph_module, weights, example_inputs)
    kept = _drop_unread(lowered, {position for weight in weights for position in weight.inputs.values()})
    run = compile_inner(lowered, [example_inputs[i] for i in kept])
    return _Packed(run, kept, weights, lowered, example_inputs)


def _inner(mode: str | None, options: dict[str, Any]) -> Callable[..., Any]:
    """The backend inside, with its options bound."""
    from torch._dynamo.backends.registry import lookup_backend
    from torch._dynamo.exc import InvalidBackend

    name = options.pop("inner", "inductor")
    if name is tsld_fx or name == "tsld_fx":
        raise ConfigError("backend 'tsld_fx': options['inner'] is this backend itself. Name another, as 'inductor'.")
    if name == "inductor":
        import torch._inductor as inductor
        from torch._inductor.compile_fx import compile_fx

        patches = {**(inductor.list_mode_options(mode) if mode else {}), **options}
        return lambda graph, inputs: compile_fx(graph, inputs, config_patches=patches or None)
    try:
        found = lookup_backend(name)
    except InvalidBackend:
        raise ConfigError(
            f"backend 'tsld_fx': options['inner']={name!r} is no backend. torch.compiler.list_backends() lists them."
        ) from None
    extra = {**({"mode": mode} if mode else {}), **({"options": options} if options else {})}
    return lambda graph, inputs: found(graph, inputs, **extra)


def _copy(graph_module: fx.GraphModule) -> fx.GraphModule:
    """The same attributes under a graph of its own."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    twin = fx.GraphModule(graph_module, graph)
    twin.meta = dict(graph_module.meta)
    return twin


def _spell_out(graph: fx.Graph) -> None:
    """Write torch functions and overload packets as the operators they are, with positional arguments."""
    for node in graph.nodes:
        target = _SPELLED_OUT.get(node.target) if node.op in ("call_function", "call_method") else None
        if target is not None:
            node.op, node.target = "call_function", target
        if isinstance(node.target, torch._ops.OpOverload) and node.target in (*_SPELLED_OUT.values(),) and node.kwargs:
            names = [argument.name for argument in node.target._schema.arguments][len(node.args) :]
            node.args = (*node.args, *(node.kwargs.get(name) for name in names))
            node.kwargs = {}


# ---------------------------------------------------------------- what is packed
@dataclass(frozen=True)
class _Weight:
    """One fake-quantised weight: its node, and the small graph that makes it from inputs of the large one."""

    name: str
    node: fx.Node
    graph: fx.Graph
    inputs: dict[str, int]  # attribute that `graph` reads -> position among the large graph's inputs

    def pack(self, arguments: Sequence[Any]) -> fx.GraphModule:
        """The small graph after FreezeScales and PackWeights: buffers, and a tsld::dequantize_weight of them."""
        root = nn.Module()
        for attribute, position in self.inputs.items():
            root.register_buffer(attribute, arguments[position].detach())
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph, {}))
        for ours in calls(graph, _FAKE_QUANT.default):
            ours.meta["tsld_module"] = self.name
        with torch.inference_mode(False), torch.no_grad():
            return run_passes(fx.GraphModule(root, graph), (FreezeScales(), PackWeights()))


def _weights(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> list[_Weight]:
    """The fake-quantised float32 weights that are made of the graph's inputs alone."""
    positions = {node: i for i, node in enumerate(graph_module.graph.find_nodes(op="placeholder"))}
    found: list[_Weight] = []
    for node in calls(graph_module.graph, _FAKE_QUANT.default):
        inputs: dict[str, int] = {}
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        if not _copy_constant(node, graph, copies, positions, inputs):
            logger.debug("backend tsld_fx: %s is not made of parameters alone and stays as it is", node)
            continue
        graph.output(copies[node])
        if all(_is_plain(example_inputs[position]) for position in inputs.values()) and inputs:
            found.append(_Weight(f"tsld_weight_{len(found)}", node, graph, inputs))
    return found


def _copy_constant(
    node: fx.Node,
    graph: fx.Graph,
    copies: dict[fx.Node, fx.Node],
    positions: Mapping[fx.Node, int],
    inputs: dict[str, int],
) -> bool:
    """Copy a node and all it is made of; False where that includes anything but inputs and simple operators."""
    if node in copies:
        return True
    if node in positions:
        attribute = f"input_{positions[node]}"
        inputs[attribute] = positions[node]
        copies[node] = graph.get_attr(attribute)
        return True
    if node.target not in _OF_CONSTANTS and node.target is not _FAKE_QUANT.default:
        return False
    if not all(_copy_constant(one, graph, copies, positions, inputs) for one in node.all_input_nodes):
        return False
    copies[node] = graph.node_copy(node, lambda one: copies[one])
    copies[node].meta = {}
    return True


def _is_plain(example: Any) -> bool:
    """A real tensor whose values can be read now; packing needs weights in float32."""
    return type(example) in (Tensor, nn.Parameter) and example.dtype in (torch.float32, torch.uint8)


# ---------------------------------------------------------------- the graph over packed weights
def _lower(graph_module: fx.GraphModule, weights: Sequence[_Weight], example_inputs: Sequence[Any]) -> fx.GraphModule:
    graph = graph_module.graph
    for weight in weights:
        packed = weight.pack(example_inputs)
        graph_module.add_module(weight.name, packed.get_submodule(weight.name))
        copies: dict[fx.Node, fx.Node] = {}
        with graph.inserting_before(weight.node):
            made = graph.graph_copy(packed.graph, copies)
        assert isinstance(made, fx.Node)
        made.meta = dict(weight.node.meta)
        weight.node.replace_all_uses_with(made)
        erase_dead(graph, weight.node)
    lowered = run_passes(graph_module, (LowerLinear(),))
    for node in calls(graph, torch.ops.tsld.lowbit_linear.default):
        _keep_dtype(node)
    lowered.recompile()
    return lowered


def _keep_dtype(node: fx.Node) -> None:
    """Autocast made the linear's result of another dtype than its input; lowbit_linear computes in its input's."""
    ours, theirs = node.meta.get("example_value"), node.args[0].meta.get("example_value")
    if ours is not None and theirs is not None and ours.dtype != theirs.dtype:
        with node.graph.inserting_before(node):
            node.update_arg(0, node.graph.call_method("to", (node.args[0], ours.dtype)))


def _drop_unread(lowered: fx.GraphModule, packed: set[int]) -> list[int]:
    """Take the float weights that nothing reads any more out of the inputs; returns the positions that stay."""
    kept = []
    for position, node in enumerate(lowered.graph.find_nodes(op="placeholder")):
        if position in packed and not node.users:
            lowered.graph.erase_node(node)
        else:
            kept.append(position)
    lowered.recompile()
    return kept


class _Packed:
    """The compiled graph, called with what Dynamo's code passes: the original inputs, float weights included."""

    def __init__(
        self,
        run: Callable[..., Any],
        kept: Sequence[int],
        weights: Sequence[_Weight],
        lowered: fx.GraphModule,
        arguments: Sequence[Any],
    ) -> None:
        self.run, self.kept, self.weights = run, tuple(kept), tuple(weights)
        self.buffers = [dict(lowered.get_submodule(weight.name).named_buffers()) for weight in weights]
        self.packed_from = [_state(weight, arguments) for weight in weights]

    def __call__(self, *arguments: Any) -> Any:
        for index, weight in enumerate(self.weights):
            state = self.packed_from[index]
            if any(
                arguments[position] is not tensor() or _version(arguments[position]) != version
                for position, (tensor, version) in zip(weight.inputs.values(), state, strict=True)
            ):
                self._pack_again(index, arguments)
        return self.run(*(arguments[i] for i in self.kept))

    def _pack_again(self, index: int, arguments: Sequence[Any]) -> None:
        fresh = self.weights[index].pack(arguments).get_submodule(self.weights[index].name)
        with torch.no_grad():
            for name, buffer in self.buffers[index].items():
                buffer.copy_(fresh.get_buffer(name))
        self.packed_from[index] = _state(self.weights[index], arguments)


def _state(weight: _Weight, arguments: Sequence[Any]) -> list[tuple[Any, int]]:
    read = [arguments[position] for position in weight.inputs.values()]
    return [(weakref.ref(tensor), _version(tensor)) for tensor in read]


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
