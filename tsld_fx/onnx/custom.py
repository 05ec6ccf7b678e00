"""Dialect `custom`: ai.tsld::LowBitLinear nodes with model-local functions, so that no library is needed to run them.

One function per layer format, told apart by its overload name. A session without our operator library runs the body,
which is one MatMulNBits where the groups allow it; with the library registered the nodes run its kernels.
docs/onnx.md specifies the operator.
"""

from __future__ import annotations

import logging

import numpy as np
import onnx_ir as ir

from tsld_fx.onnx.blocks import Blocks, Nodes, block_codes, blocks_of, matmul_nbits
from tsld_fx.onnx.graph import DOMAIN, OPERATOR, VERSION, PackedLayer, packed_layers
from tsld_fx.onnx.replace import constant, drop_unread, replace

logger = logging.getLogger(__name__)
INPUTS = ("x", "packed", "scales", "zeros", "bias")


def lower(model: ir.Model, activations: str) -> set[str]:
    """Give every opaque node its final attributes and inputs, and the model the functions that it may run as.

    Returns the names of layers whose function can only unfold the weight (groups that are no multiple of 32).
    """
    opset, unfolded = model.opset_imports[""], set()
    for layer in packed_layers(model):
        blocks = blocks_of(layer)
        if blocks is None:
            unfolded.add(layer.name)
        codes = layer.packed if blocks is None else block_codes(layer, blocks)
        inputs = [
            layer.x,
            constant(model.graph, f"{layer.name}.packed", codes),
            constant(model.graph, f"{layer.name}.scales", layer.scales),
            None if layer.zeros is None else constant(model.graph, f"{layer.name}.zeros", layer.zeros),
            layer.bias,
        ]
        while inputs[-1] is None:
            inputs.pop()
        function = _function(layer, blocks, activations, opset)
        model.functions.setdefault(function.identifier(), function)
        attributes: dict[str, int | str] = {
            "bits": layer.bits,
            "group_size": layer.group_size,
            "in_features": layer.in_features,
            "activations": activations,
        }
        node = ir.node(OPERATOR, inputs, attributes, domain=DOMAIN, overload=function.overload, name=layer.name)
        replace(model.graph, layer, [node], node.outputs[0])
    drop_unread(model.graph)
    model.opset_imports[DOMAIN] = VERSION
    model.opset_imports["com.microsoft"] = 1
    if unfolded:
        logger.warning(
            "export: without the operator library onnxruntime unfolds the weights of %d layers to float32 (%s): their "
            "groups are no multiple of 32. Run tsld-fx build-ort-op, or train with such a group size.",
            len(unfolded), ", ".join(sorted(unfolded)[:3]),
        )  # fmt: skip
    return unfolded


def _function(layer: PackedLayer, blocks: Blocks | None, activations: str, opset: int) -> ir.Function:
    names = INPUTS[: 5 if layer.bias is not None else 4 if layer.zeros is not None else 3]
    values = {name: ir.Value(name=name) for name in names}
    bias = values.get("bias")
    nodes = Nodes()
    if blocks is None:
        y = _portable(nodes, values, layer)
    else:
        weight = (
            values["packed"],
            _scales(nodes, values["scales"], layer, blocks),
            _zeros(nodes, values, layer, blocks),
        )
        y = matmul_nbits(nodes, values["x"], weight, bias, layer, blocks, activations)
    imports = {"": opset} if blocks is None else {"": opset, "com.microsoft": 1}
    graph = ir.Graph(list(values.values()), [y], nodes=nodes.made, opset_imports=imports)
    return ir.Function(DOMAIN, OPERATOR, _overload(layer, blocks, activations), graph=graph, attributes=[])


def _overload(layer: PackedLayer, blocks: Blocks | None, activations: str) -> str:
    per = {0: "channel", -1: "tensor"}.get(layer.group_size, f"group{layer.group_size}")
    parts = [f"w{layer.bits}", activations, f"{layer.rows}x{layer.in_features}", per]
    parts += ["zeros"] if layer.zeros is not None else []
    parts += ["bias"] if layer.bias is not None else []
    return "_".join([*parts, "portable" if blocks is None else f"block{blocks.size}"])


def _scales(nodes: Nodes, scales: ir.Value, layer: PackedLayer, blocks: Blocks) -> ir.Value:
    """[rows or 1, groups] -> [rows, blocks]; onnxruntime computes it once, when the session is made."""
    return _spread(nodes, scales, layer, blocks.count)


def _spread(nodes: Nodes, values: ir.Value, layer: PackedLayer, count: int) -> ir.Value:
    if layer.groups in (1, count):
        return nodes("Expand", values, nodes.constant([layer.rows, count]))  # type: ignore[no-any-return]
    cut = nodes("Unsqueeze", values, nodes.constant([-1]))
    spread = nodes("Expand", cut, nodes.constant([layer.rows, layer.groups, count // layer.groups]))
    return nodes("Reshape", spread, nodes.constant([layer.rows, count]))  # type: ignore[no-any-return]


def _zeros(nodes: Nodes, values: dict[str, ir.Value], layer: PackedLayer, blocks: Blocks) -> ir.Value | None:
    """uint8 [rows, ceil(blocks * bits / 8)], packed as MatMulNBits reads them; None where its default is ours."""
    per_byte = 8 // layer.bits
    width = -(-blocks.count // per_byte)
    if layer.zeros is None:
        if layer.bits != 2:
            return None
        byte = nodes.constant([[0b01010101]], np.uint8)  # 1 for each of four blocks; MatMulNBits' default is 2
        return nodes("Expand", byte, nodes.constant([layer.rows, width]))  # type: ignore[no-any-return]
    zeros = _spread(nodes, nodes("Cast", values["zeros"], to=ir.DataType.INT32), layer, blocks.count)
    if per_byte > 1:
        zeros = nodes("Pad", zeros, nodes.constant([0, 0, 0, width * per_byte - blocks.count]))
        zeros = nodes("Reshape", zeros, nodes.constant([layer.rows, width, per_byte]))
        place = nodes.constant([1 << (layer.bits * i) for i in range(per_byte)], np.int32)
        zeros = nodes("ReduceSum", nodes("Mul", zeros, place), nodes.constant([-1]), keepdims=0)
    return nodes("Cast", zeros, to=ir.DataType.UINT8)  # type: ignore[no-any-return]


def _portable(nodes: Nodes, values: dict[str, ir.Value], layer: PackedLayer) -> ir.Value:
    """The linear in standard operators: codes to float32 weights [rows, inputs], then Gemm."""
    per_byte, width = 8 // layer.bits, layer.packed.shape[1]
    bytes_ = nodes("Unsqueeze", values["packed"], nodes.constant([-1]))
    shifts = nodes.constant([layer.bits * i for i in range(per_byte)], np.uint8)
    codes = nodes("BitShift", bytes_, shifts, direction="RIGHT")
    codes = nodes("BitwiseAnd", codes, nodes.constant((1 << layer.bits) - 1, np.uint8))
    codes = nodes("Reshape", codes, nodes.constant([layer.rows, width * per_byte]))
    if width * per_byte > layer.in_features:
        start, end, axis = (nodes.constant([v]) for v in (0, layer.in_features, 1))
        codes = nodes("Slice", codes, start, end, axis)
    lines = nodes("Cast", codes, to=ir.DataType.FLOAT)
    lines = nodes("Reshape", lines, nodes.constant([layer.rows, layer.groups, -1]))
    if layer.zeros is None:
        zero = nodes.constant(1 if layer.bits == 2 else 1 << (layer.bits - 1), np.float32)
    else:
        zero = nodes("Cast", values["zeros"], to=ir.DataType.FLOAT)
        zero = nodes("Unsqueeze", zero, nodes.constant([-1]))
    scale = nodes("Unsqueeze", values["scales"], nodes.constant([-1]))
    weight = nodes("Mul", nodes("Sub", lines, zero), scale)
    weight = nodes("Reshape", weight, nodes.constant([layer.rows, layer.in_features]))
    flat = nodes("Reshape", values["x"], nodes.constant([-1, layer.in_features]))
    bias = [values["bias"]] if "bias" in values else []
    y = nodes("Gemm", flat, weight, *bias, transB=1)
    leading = nodes("Shape", values["x"], start=0, end=-1)
    shape = nodes("Concat", leading, nodes.constant([layer.rows]), axis=0)
    return nodes("Reshape", y, shape)  # type: ignore[no-any-return]
