"""Dialect `ort`: com.microsoft::MatMulNBits, onnxruntime's own operator for packed weights."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from tsld_fx.errors import ExportError
from tsld_fx.onnx.blocks import (
    Blocks,
    Nodes,
    block_codes,
    block_scales,
    block_zeros,
    blocks_for,
    blocks_of,
    matmul_nbits,
    pad_inputs,
    split_limbs,
)
from tsld_fx.onnx.graph import DOMAIN, PackedLayer, packed_layers
from tsld_fx.onnx.replace import constant, drop_unread, lazy_constant, numpy_of, replace


def check(layers: list[tuple[str, int, int]], dialect: str) -> None:
    """Refuse layers that onnxruntime has no fast kernel for.

    Args:
        layers: (name, in_features, scales per row) of each.

    Raises:
        ExportError: it names a layer, its group size and what would do.
    """
    for name, in_features, groups in layers:
        if blocks_for(in_features, groups) is None:
            raise ExportError(
                f"export: '{name}' has scales for groups of {in_features // groups} inputs. "
                f"onnxruntime computes low-bit weights in blocks of 32, 64 or 128 (smaller ones are unpacked at every "
                f"call), so dialect {dialect!r} needs groups that are a multiple of 32. Use dialect='custom', which "
                "runs any group with the operator library, or quantise with such a group size or per channel."
            )


def lower(model: ir.Model, activations: str) -> None:
    """opaque node -> MatMulNBits in blocks; with a16 between the two limbs of x and their sum."""
    limbs: dict[tuple[ir.Value, Blocks], ir.Value] = {}
    for layer in packed_layers(model):
        blocks = blocks_of(layer)
        assert blocks is not None, "check() comes first"
        nodes = Nodes()
        weight = (
            _codes(model.graph, layer, blocks),
            _scales(model.graph, layer, blocks),
            _zeros(model.graph, layer, blocks),
        )
        key = (layer.x, blocks)
        if activations == "a16" and key not in limbs:  # q, k and v read the same x
            limbs[key] = split_limbs(nodes, pad_inputs(nodes, layer.x, layer.in_features, blocks), blocks)
        y = matmul_nbits(nodes, layer.x, weight, layer.bias, layer, blocks, activations, limbs.get(key))
        replace(model.graph, layer, nodes.made, y)
    drop_unread(model.graph)
    model.opset_imports.pop(DOMAIN, None)
    model.opset_imports["com.microsoft"] = 1


def _codes(graph: ir.Graph, layer: PackedLayer, blocks: Blocks) -> ir.Value:
    """Ternary codes become 1, 2, 3: MatMulNBits' default zero point of 2 bits is 2, which saves the zero points."""
    name = f"{layer.name}.codes"
    if layer.bits != 2 or layer.zeros is not None:
        return constant(graph, name, block_codes(layer, blocks))
    shape = (layer.rows, blocks.count, blocks.size * layer.bits // 8)
    return lazy_constant(
        graph, name, shape, ir.DataType.UINT8, lambda: numpy_of(block_codes(layer, blocks)) + np.uint8(0b01010101)
    )


def _scales(graph: ir.Graph, layer: PackedLayer, blocks: Blocks) -> ir.Value:
    shape = (layer.rows, blocks.count)
    return lazy_constant(
        graph, f"{layer.name}.scales", shape, ir.DataType.FLOAT, lambda: numpy_of(block_scales(layer, blocks))
    )


def _zeros(graph: ir.Graph, layer: PackedLayer, blocks: Blocks) -> ir.Value | None:
    zeros: torch.Tensor | None = block_zeros(layer, blocks)
    return None if zeros is None else constant(graph, f"{layer.name}.zeros", zeros)
