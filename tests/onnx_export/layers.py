"""Models of one packed layer, made without torch.export, and the sessions that run them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor

from tsld_fx.onnx import custom, ort, qdq
from tsld_fx.onnx.graph import DOMAIN, OPERATOR, VERSION, packed_layers
from tsld_fx.onnx.replace import constant
from tsld_fx.onnx.requirements import requirements
from tsld_fx.packing import pack


@dataclass(frozen=True)
class Layer:
    """A random packed layer and what torch makes of an input."""

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None
    bits: int
    group_size: int
    in_features: int

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.tsld.lowbit_linear(
            x, self.packed, self.scales, self.zeros, self.bias, self.bits, self.group_size, self.in_features
        )


def random_layer(
    rows: int, inputs: int, bits: int = 2, group: int = 0, zeros: bool = False, bias: bool = True, seed: int = 0
) -> Layer:
    """group as in tsld::lowbit_linear: 0 per row, -1 per tensor, else inputs per scale."""
    random = np.random.default_rng(seed)
    codes = torch.from_numpy(random.integers(0, 3 if bits == 2 else 2**bits, (rows, inputs), dtype=np.uint8))
    shape = (1, 1) if group == -1 else (rows, 1) if group == 0 else (rows, inputs // group)
    scales = torch.from_numpy(random.uniform(0.5, 2, shape).astype(np.float32))
    points = torch.from_numpy(random.integers(0, 2**bits, shape, dtype=np.uint8)) if zeros else None
    added = torch.from_numpy(random.standard_normal(rows).astype(np.float32)) if bias else None
    return Layer(pack(codes, bits), scales, points, added, bits, group, inputs)


def model_of(layer: Layer, dialect: str, activations: str = "a16", rank: int = 3) -> ir.Model:
    """x [.., inputs] -> y [.., rows], lowered to a dialect."""
    needs = requirements(dialect, {layer.bits})
    leading = ["a", "b", "c"][: rank - 1]
    x = ir.Value(name="x", shape=ir.Shape([*leading, layer.in_features]), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": needs.opset, DOMAIN: VERSION}, name="layer")
    given = [x, constant(graph, "fc.weight_packed", layer.packed), constant(graph, "fc.weight_scale", layer.scales)]
    for name, tensor in (("fc.weight_zero", layer.zeros), ("fc.bias", layer.bias)):
        given.append(None if tensor is None else constant(graph, name, tensor))
    sizes = {"bits": layer.bits, "group_size": layer.group_size, "in_features": layer.in_features}
    node = ir.node(OPERATOR, given, sizes, domain=DOMAIN)
    y = node.outputs[0]
    y.name, y.type = "y", ir.TensorType(ir.DataType.FLOAT)
    y.shape = ir.Shape([*leading, len(layer.packed)])
    graph.append(node)
    graph.outputs.append(y)
    model = ir.Model(graph, ir_version=needs.ir)
    if dialect == "custom":
        custom.lower(model, activations)
    else:
        ort.check([(one.name, one.in_features, one.groups) for one in packed_layers(model)], dialect)
        (ort if dialect == "ort" else qdq).lower(model, activations)
    return model


def proto_of(model: ir.Model) -> onnx.ModelProto:
    """The model as protobuf, checked."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    return proto


def session_of(proto: onnx.ModelProto, library: Path | None = None, dump: Path | None = None) -> Any:
    """A session, with the operator library if given; the optimised model goes to `dump`."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 2
    if library is not None:
        options.register_custom_ops_library(str(library))
    if dump is not None:
        options.optimized_model_filepath = str(dump)
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def relative(got: Any, expected: Tensor) -> float:
    """Largest deviation over largest value."""
    return float((torch.as_tensor(got) - expected).abs().max() / expected.abs().max())
