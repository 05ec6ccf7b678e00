"""InsertFakeQuant: quantise the weights of a decoder's linear layers in the graph, differentiably."""

from __future__ import annotations

import logging
import operator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from tsld_fx import ops  # noqa: F401  (registers tsld::*)
from tsld_fx.config import QuantConfig, TernaryWeight, WeightSpec, group_size_code
from tsld_fx.errors import ConfigError
from tsld_fx.passes.graph_tools import (
    argument,
    aten,
    attribute,
    calls,
    copy_origin,
    fake_of,
    holder,
    module_of_linear,
    owner,
    set_val,
    weight_source,
)
from tsld_fx.quantizers import (
    LEARNED,
    all_finite,
    clipped_scale,
    initial_scale,
    saturated_fraction,
    scale_shape,
)

logger = logging.getLogger(__name__)
SATURATION_LIMIT = 0.01


@dataclass(frozen=True)
class InsertFakeQuant(PassBase):
    """Put a tsld::fake_quant between each selected weight and its linear.

    before: linear(x, W)
    after:  linear(x, fake_quant(W, None, None, "twn", 2, 0))

    With `dead_zone_bias` the linear also gets the bias dead_zone_bias(W, b, ...), which holds b if there is one.

    A learned scale becomes a parameter of the layer (`weight_scale`; `weight_clip` for PACT, turned into a scale by
    tsld::learned_clip), a fixed zero point a buffer (`weight_zero`). A weight that several linears share gets one
    node. Weights that also feed an embedding are quantised for the linear only, and only when an override asks.

    Fields:
        config: what to quantise.
        output_embedding: module name that `lm_head` in `config.skip` stands for.
    """

    config: QuantConfig = field(default_factory=QuantConfig)
    output_embedding: str = "lm_head"

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        layers = [
            (node, *found) for node in calls(graph, aten.linear.default) if (found := weight_source(node.args[1]))
        ]
        names = [module_of_linear(linear, weight) for linear, weight, _ in layers]
        done = [node.meta.get("tsld_module", "") for node in calls(graph, torch.ops.tsld.fake_quant.default)]
        self.config.check_patterns(dict.fromkeys([*names, *done]))
        embedded = {node.args[0].target for node in calls(graph, aten.embedding.default)}
        made: dict[tuple, fx.Node] = {}
        for (linear, weight, transposed), name in zip(layers, names, strict=True):
            spec = self._spec(name, tied=weight.target in embedded)
            if spec is None:
                continue
            _check_weight(name, attribute(graph_module, weight.target), transposed, spec)
            key = (weight.target, transposed, spec)
            if key not in made:
                made[key] = self._insert(graph_module, linear, weight, name, spec)
            linear.update_arg(1, made[key])
            if isinstance(spec, TernaryWeight) and spec.dead_zone_bias:
                _add_dead_zone_bias(linear, made[key], spec.dead_zone_bias)
        return PassResult(graph_module, bool(made))

    def _spec(self, name: str, tied: bool) -> WeightSpec | None:
        """The layer's specification; a head tied to the embedding is skipped like `lm_head`."""
        alias = "lm_head" if (tied or name == self.output_embedding) and "lm_head" in self.config.skip else name
        override = QuantConfig(weight=None, overrides=self.config.overrides).spec_for(name)
        return override if override is not None else self.config.spec_for(alias)

    def _insert(
        self, graph_module: fx.GraphModule, linear: fx.Node, weight: fx.Node, name: str, spec: WeightSpec
    ) -> fx.Node:
        graph, group_size = graph_module.graph, group_size_code(spec)
        row_major = linear.args[1]
        assert isinstance(row_major, fx.Node)
        with graph.inserting_before(linear):
            scale, zero = self._scale_nodes(graph_module, linear, row_major, name, spec)
            node = graph.call_function(
                torch.ops.tsld.fake_quant.default,
                (row_major, scale, zero, spec.scheme, spec.bits, group_size),
            )
        copy_origin(node, linear)
        node.meta["tsld_module"], node.meta["tsld_weight"] = name, weight.target
        set_val(node)
        return node

    def _scale_nodes(
        self, graph_module: fx.GraphModule, linear: fx.Node, row_major: fx.Node, name: str, spec: WeightSpec
    ) -> tuple[fx.Node | None, fx.Node | None]:
        if spec.scale not in LEARNED:
            return None, None
        graph, group_size = graph_module.graph, group_size_code(spec)
        value = _row_major_value(graph_module, row_major)
        module = holder(graph_module, name)
        if spec.scale != "pact":
            first, point = initial_scale(value, spec.bits, spec.symmetric, group_size, spec.scale)
            scale = _read(graph_module, linear, _learned(module, name, "weight_scale", first))
            if point is None:
                return scale, None
            module.register_buffer("weight_zero", point)
            return scale, _read(graph_module, linear, f"{name}.weight_zero")
        shape = scale_shape(value.shape[0], value.shape[1], group_size)
        first = torch.full(shape, _first_gamma(spec), dtype=torch.float32, device=value.device)
        _warn_if_saturated(name, value, first, spec)
        gamma = _read(graph_module, linear, _learned(module, name, "weight_clip", first))
        clip = graph.call_function(
            torch.ops.tsld.learned_clip.default, (row_major, gamma, spec.bits, spec.symmetric, group_size)
        )
        nodes = [clip] + [graph.call_function(operator.getitem, (clip, index)) for index in (0, 1)]
        for node in nodes:
            copy_origin(node, linear)
            set_val(node)
        if spec.bits == 2 or spec.symmetric:
            graph.erase_node(nodes[2])
            return nodes[1], None
        return nodes[1], nodes[2]


def _add_dead_zone_bias(linear: fx.Node, quantised: fx.Node, factor: float) -> None:
    """Add what the weights at level 0 contribute to the linear's bias (Tequila, arXiv 2509.23809)."""
    weight, scale, _, scheme, _, group_size = quantised.args
    with linear.graph.inserting_before(linear):
        bias = linear.graph.call_function(
            torch.ops.tsld.dead_zone_bias.default,
            (weight, scale, argument(linear, 2, "bias"), scheme, group_size, factor),
        )
    copy_origin(bias, linear)
    bias.meta["tsld_module"] = quantised.meta["tsld_module"]
    set_val(bias)
    linear.args, linear.kwargs = (*linear.args[:2], bias), {}


def _row_major_value(graph_module: fx.GraphModule, node: fx.Node) -> Tensor:
    found = weight_source(node)
    assert found is not None
    value: Tensor = attribute(graph_module, found[0].target).detach()
    return value.t() if found[1] else value


def _learned(module: torch.nn.Module, name: str, leaf: str, first: Tensor) -> str:
    """Register a learned quantiser value on the layer; one that is there already (a loaded checkpoint) stays."""
    if leaf not in module._parameters:
        module.register_parameter(leaf, torch.nn.Parameter(first.float().clone()))
    return f"{name}.{leaf}"


def _read(graph_module: fx.GraphModule, linear: fx.Node, target: str) -> fx.Node:
    node = graph_module.graph.get_attr(target)
    copy_origin(node, linear)
    holder, leaf = owner(graph_module, target)
    fake_of(graph_module, node, getattr(holder, leaf).detach())
    return node


def _first_gamma(spec: WeightSpec) -> float:
    if spec.clip_init is not None:
        return spec.clip_init
    return 1.5 if isinstance(spec, TernaryWeight) else {4: 4.0, 8: 5.0}[spec.bits]


def _warn_if_saturated(name: str, weight: Tensor, gamma: Tensor, spec: WeightSpec) -> None:
    if spec.bits == 2:  # cutting off the tails is what a ternary clip does
        return
    scale, zero, _ = clipped_scale(weight, gamma, spec.bits, spec.symmetric, group_size_code(spec))
    share = saturated_fraction(weight, scale, zero, spec.bits, group_size_code(spec))
    if share > SATURATION_LIMIT:
        logger.warning(
            "InsertFakeQuant: the initial clip of %s (gamma %.2f) saturates %.1f %% of its weights, which hurts %d-bit "
            "training. Raise AffineWeight(clip_init=...) or use scale='minmax'.",
            name, float(gamma.flatten()[0]), 100 * share, spec.bits,
        )  # fmt: skip


def _check_weight(name: str, weight: Tensor, transposed: bool, spec: WeightSpec) -> None:
    rows, columns = (weight.shape[1], weight.shape[0]) if transposed else weight.shape
    try:
        scale_shape(rows, columns, group_size_code(spec))
    except ConfigError as error:
        raise ConfigError(f"InsertFakeQuant: cannot quantise '{name}': {error}") from None
    if not weight.is_floating_point():
        raise ConfigError(f"InsertFakeQuant: '{name}.weight' is {weight.dtype}, already quantised. Start from floats.")
    if not weight.is_meta and not all_finite(weight):
        raise ConfigError(
            f"InsertFakeQuant: '{name}.weight' holds NaN or Inf. Load a healthy checkpoint, or leave the layer out "
            f"with QuantConfig(overrides={{{name!r}: None}})."
        )
