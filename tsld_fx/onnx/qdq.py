"""Dialect `qdq`: standard DequantizeLinear over sub-byte weights, then MatMul, for any runtime."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tsld_fx.onnx.blocks import Blocks, Nodes, block_scales, blocks_of, join_limbs, pad_inputs, split_limbs
from tsld_fx.onnx.graph import DOMAIN, PackedLayer, packed_layers
from tsld_fx.onnx.replace import drop_unread, lazy_constant, numpy_of, replace
from tsld_fx.packing import unpack

SIGNED = {2: ir.DataType.INT2, 4: ir.DataType.INT4, 8: ir.DataType.INT8}
UNSIGNED = {2: ir.DataType.UINT2, 4: ir.DataType.UINT4, 8: ir.DataType.UINT8}


def lower(model: ir.Model, activations: str) -> None:
    """opaque node -> MatMul(x, DequantizeLinear(weight [inputs, rows], scales [blocks, rows])).

    onnxruntime fuses the two into MatMulNBits with int8 activations whatever the file says; with a16 the matmul is over
    the two limbs of x, which keeps the precision there and changes nothing elsewhere. The weight stays [inputs, rows]:
    behind a Transpose and with zero points it crashes sessions.
    """
    limbs: dict[tuple[ir.Value, Blocks], ir.Value] = {}
    for layer in packed_layers(model):
        blocks = blocks_of(layer)
        assert blocks is not None, "ort.check() comes first"
        nodes, graph = Nodes(), model.graph
        given = [_weight(graph, layer, blocks), _scales(graph, layer, blocks)]
        if layer.zeros is not None:
            given.append(_zeros(graph, layer, blocks))
        weight = nodes("DequantizeLinear", *given, axis=0, block_size=blocks.size)
        key = (layer.x, blocks)
        if activations == "a16":
            if key not in limbs:
                limbs[key] = split_limbs(nodes, pad_inputs(nodes, layer.x, layer.in_features, blocks), blocks)
            y = join_limbs(nodes, nodes("MatMul", limbs[key], weight), layer.x, _columns(layer), None)
        else:
            y = nodes("MatMul", pad_inputs(nodes, layer.x, layer.in_features, blocks), weight)
        if _columns(layer) > layer.rows:
            y = nodes("Slice", y, *(nodes.constant([v]) for v in (0, layer.rows, -1)))
        y = y if layer.bias is None else nodes("Add", y, layer.bias)
        replace(graph, layer, nodes.made, y)
    drop_unread(model.graph)
    model.opset_imports.pop(DOMAIN, None)


def _columns(layer: PackedLayer) -> int:
    """Columns of the weight: onnxruntime's fusion of 2-bit weights is wrong when they are no multiple of four."""
    return -(-layer.rows // 4) * 4 if layer.bits == 2 else layer.rows


def _weight(graph: ir.Graph, layer: PackedLayer, blocks: Blocks) -> ir.Value:
    """[width, rows]: signed without zero points, unsigned with them."""
    signed = layer.zeros is None
    shift = (1 if layer.bits == 2 else 1 << (layer.bits - 1)) if signed else 0

    def make() -> np.ndarray:
        codes = numpy_of(unpack(layer.packed, layer.bits, layer.in_features)).astype(np.int16) - shift
        padded = np.pad(codes, ((0, _columns(layer) - layer.rows), (0, blocks.width - layer.in_features)))
        return _packed(padded.T, layer.bits, signed)

    dtype = (SIGNED if signed else UNSIGNED)[layer.bits]
    return lazy_constant(graph, f"{layer.name}.weight", (blocks.width, _columns(layer)), dtype, make)


def _scales(graph: ir.Graph, layer: PackedLayer, blocks: Blocks) -> ir.Value:
    def make() -> np.ndarray:
        return np.ascontiguousarray(_widened(numpy_of(block_scales(layer, blocks)), layer).T)

    return lazy_constant(graph, f"{layer.name}.scales", (blocks.count, _columns(layer)), ir.DataType.FLOAT, make)


def _zeros(graph: ir.Graph, layer: PackedLayer, blocks: Blocks) -> ir.Value:
    assert layer.zeros is not None
    zeros = layer.zeros

    def make() -> np.ndarray:
        spread = zeros.expand(layer.rows, layer.groups).repeat_interleave(blocks.count // layer.groups, dim=1)
        return _packed(_widened(numpy_of(spread), layer).T.astype(np.int16), layer.bits, signed=False)

    shape = (blocks.count, _columns(layer))
    return lazy_constant(graph, f"{layer.name}.zeros", shape, UNSIGNED[layer.bits], make)


def _widened(lines: np.ndarray, layer: PackedLayer) -> np.ndarray:
    """[rows, blocks] with rows of zeros for the columns that were added."""
    return np.pad(lines, ((0, _columns(layer) - layer.rows), (0, 0)))


def _packed(values: np.ndarray, bits: int, signed: bool) -> np.ndarray:
    """int16 of any shape -> the bytes of an ONNX tensor: 8 bits as they are, fewer packed, lowest bits first."""
    if bits == 8:
        return np.ascontiguousarray(values.astype(np.int8 if signed else np.uint8))
    per_byte = 8 // bits
    flat = values.reshape(-1) & ((1 << bits) - 1)
    flat = np.pad(flat, (0, -flat.size % per_byte)).reshape(-1, per_byte).astype(np.uint8)
    packed = np.zeros(len(flat), np.uint8)
    for index in range(per_byte):
        packed |= flat[:, index] << np.uint8(index * bits)
    return packed
