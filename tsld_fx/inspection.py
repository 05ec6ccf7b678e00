"""What a prepared or converted model is made of: one line per linear layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tsld_fx.config import QuantConfig
from tsld_fx.errors import ConfigError
from tsld_fx.lowbit_linear import LowBitLinear
from tsld_fx.lowered import convert
from tsld_fx.packing import unpack
from tsld_fx.passes.runner import PassTrace
from tsld_fx.preparation import prepare
from tsld_fx.prepared import PreparedModel


@dataclass(frozen=True)
class LayerInfo:
    """One linear layer.

    Attributes:
        bits: 2, 4 or 8 when packed, 32 or 16 in full precision.
        scale: how the scale is found, `-` in full precision.
        granularity: `channel`, `tensor` or `group N`.
        zeros: share of the weights that are exactly zero.
        bytes: size of weight, scales and zero points.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    scale: str
    granularity: str
    zeros: float
    bytes: int


def layer_table(model: PreTrainedModel) -> list[LayerInfo]:
    """Every linear layer of a float, prepared or converted model, in the model's order."""
    packed = convert(model) if isinstance(model, PreparedModel) else model
    recorded = getattr(packed.config, "quantization_config", None)
    rows = []
    for name, module in packed.named_modules():
        if isinstance(module, LowBitLinear):
            rows.append(_packed(name, module, _scale_rule(recorded, name)))
        elif isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            rows.append(_dense(name, module))
    return rows


def _scale_rule(recorded: Any, name: str) -> str:
    if recorded is None:
        return "-"
    spec = QuantConfig.from_dict(recorded.quant).spec_for(name)
    return "-" if spec is None else spec.scheme


def _packed(name: str, module: LowBitLinear, scale: str) -> LayerInfo:
    codes = unpack(module.weight_packed, module.bits, module.in_features)
    tensors = [t for t in (module.weight_packed, module.weight_scale, module.weight_zero) if t is not None]
    granularity = {0: "channel", -1: "tensor"}.get(module.group_size, f"group {module.group_size}")
    shape = (module.out_features, module.in_features)
    return LayerInfo(name, shape, module.bits, scale, granularity, _share_of_zero(codes, module), _bytes(tensors))


def _share_of_zero(codes: Tensor, module: LowBitLinear) -> float:
    if module.weight_zero is not None:
        zero = module.weight_zero.reshape(-1, 1)
        return float((codes.reshape(zero.shape[0], -1) == zero).double().mean())
    return float((codes == (1 if module.bits == 2 else 2 ** (module.bits - 1))).double().mean())


def _dense(name: str, module: nn.Module) -> LayerInfo:
    weight: Tensor = module.weight  # type: ignore[assignment]
    zeros = float((weight == 0).double().mean())
    rows, columns = weight.shape if isinstance(module, nn.Linear) else (weight.shape[1], weight.shape[0])
    return LayerInfo(name, (rows, columns), weight.element_size() * 8, "-", "-", zeros, _bytes([weight]))


def _bytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def float32_bytes(rows: list[LayerInfo]) -> int:
    """What the packed layers of a table would take in float32."""
    return sum(4 * r.shape[0] * r.shape[1] for r in rows if r.bits <= 8)


def packed_bytes(rows: list[LayerInfo]) -> int:
    """What the packed layers of a table take."""
    return sum(r.bytes for r in rows if r.bits <= 8)


def weights_equal(prepared: PreparedModel, lowered: PreTrainedModel) -> bool:
    """Whether each packed weight, dequantised, has the bits of the fake-quantised weight it came from."""
    layers = {n: m for n, m in lowered.named_modules() if isinstance(m, LowBitLinear)}
    graph_module = prepared.graph_module
    seen = set()
    interpreter = torch.fx.Interpreter(graph_module)
    for node in graph_module.graph.nodes:
        if node.target is not torch.ops.tsld.fake_quant.default:
            continue
        trained = _value(interpreter, node)
        packed = layers[node.meta["tsld_module"]].dequantize().to(trained.device)
        if not torch.equal(trained.view(torch.int32), packed.view(torch.int32)):
            return False
        seen.add(node.meta["tsld_module"])
    return seen <= set(layers) and bool(seen)


def _value(interpreter: torch.fx.Interpreter, node: torch.fx.Node) -> Tensor:
    """Run the part of the graph that a weight node depends on: parameters only, no inputs."""
    for needed in node.all_input_nodes:
        if needed not in interpreter.env:
            _value(interpreter, needed)
    with torch.no_grad():
        interpreter.env[node] = interpreter.run_node(node)
    return interpreter.env[node]


@dataclass(frozen=True)
class PassRecord:
    """What one pass did, and the graph's code after it."""

    name: str
    modified: bool
    seconds: float
    changes: dict[str, int]
    code: str


def trace_passes(model: PreTrainedModel, config: QuantConfig | None = None) -> tuple[list[PassRecord], PreTrainedModel]:
    """Prepare and convert a float model, recording every pass.

    Returns:
        The records in order, and the converted model.
    """
    records: list[PassRecord] = []

    def listen(trace: PassTrace) -> None:
        code = trace.graph_module.code
        records.append(PassRecord(trace.name, trace.modified, trace.seconds, trace.changes(), code))

    prepared = model if isinstance(model, PreparedModel) else prepare(model, config, listener=listen)
    return records, convert(prepared.eval(), listener=listen)


def code_after(records: list[PassRecord], name: str) -> str:
    """The graph's code after the last pass of that name.

    Raises:
        ConfigError: no such pass ran.
    """
    for record in reversed(records):
        if record.name == name:
            return record.code
    raise ConfigError(f"no pass {name!r} ran. Those that did: {', '.join(dict.fromkeys(r.name for r in records))}.")
