"""What the block-wise dialects share: the block of a layer, tensors in blocks, activations as two int8 limbs.

onnxruntime has fast kernels for 2-bit and 8-bit weights with int8 activations only (blocks of 32, 64 or 128); in full
precision it unpacks the whole weight at every call, 150 times slower. Two limbs keep the precision at the fast kernel's
price: x = hi + lo, where hi are the multiples of max|x| / 127 of each block, which the kernel quantises without error,
and lo is what remains, at most half a step, quantised 254 times finer. What is lost is at most max|x| / 64516 of a
block. Both limbs go through one MatMulNBits as rows of one matrix, so the weight is read once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from tsld_fx.onnx.graph import PackedLayer
from tsld_fx.packing import pack

FAST = (128, 64, 32)  # blocks with a fast kernel; the largest has the fewest scales and is the fastest


@dataclass(frozen=True)
class Blocks:
    """A row cut into `count` blocks of `size` inputs; `width` = size * count >= in_features."""

    size: int
    count: int

    @property
    def width(self) -> int:
        """Inputs of a row with the padding of the last block."""
        return self.size * self.count


def blocks_of(layer: PackedLayer) -> Blocks | None:
    """The blocks of a layer; None when its groups are too small or odd."""
    return blocks_for(layer.in_features, layer.groups)


def blocks_for(in_features: int, groups: int) -> Blocks | None:
    """The largest fast block within one group of the scales; None when only smaller ones fit."""
    for size in FAST:
        if (in_features // groups) % size == 0:
            return Blocks(size, in_features // size)
    if groups == 1:  # one scale for all: the tail may be padded
        return Blocks(FAST[-1], -(-in_features // FAST[-1]))
    return None


def block_codes(layer: PackedLayer, blocks: Blocks) -> Tensor:
    """uint8 [rows, blocks, bytes]: the packed codes; a view unless the last block had to be padded with zero bits."""
    width, packed = blocks.width * layer.bits // 8, layer.packed
    if packed.shape[1] < width:
        packed = torch.nn.functional.pad(packed, (0, width - packed.shape[1]))
    return packed.reshape(layer.rows, blocks.count, -1)


def block_scales(layer: PackedLayer, blocks: Blocks) -> Tensor:
    """float32 [rows, blocks]: the scale of each block."""
    scales = layer.scales.expand(layer.rows, layer.groups)
    return scales.repeat_interleave(blocks.count // layer.groups, dim=1)


def block_zeros(layer: PackedLayer, blocks: Blocks) -> Tensor | None:
    """uint8 [rows, ceil(blocks * bits / 8)]: the zero point of each block, packed as codes are; None: 2^(bits-1)."""
    if layer.zeros is None:
        return None
    zeros = layer.zeros.expand(layer.rows, layer.groups).repeat_interleave(blocks.count // layer.groups, dim=1)
    return pack(zeros, layer.bits)


class Nodes:
    """Nodes in order, each made by a call with its operator and inputs; returns the value that it computes."""

    def __init__(self) -> None:
        self.made: list[ir.Node] = []

    def __call__(
        self, operator: str, *inputs: ir.Value | None, outputs: int = 1, domain: str = "", **attributes: Any
    ) -> Any:
        node = ir.node(operator, list(inputs), attributes=attributes, domain=domain, num_outputs=outputs)
        self.made.append(node)
        return node.outputs[0] if outputs == 1 else node.outputs

    def constant(self, value: Any, dtype: type = np.int64) -> ir.Value:
        """A constant; by default int64."""
        return self("Constant", value=ir.tensor(np.asarray(value, dtype=dtype)))  # type: ignore[no-any-return]


def pad_inputs(nodes: Nodes, x: ir.Value, in_features: int, blocks: Blocks) -> ir.Value:
    """x with zeros behind its last dimension up to a whole number of blocks."""
    missing = blocks.width - in_features
    if not missing:
        return x
    padding = nodes.constant([0, missing])
    axes = nodes.constant([-1])
    return nodes("Pad", x, padding, None, axes)  # type: ignore[no-any-return]


def split_limbs(nodes: Nodes, x: ir.Value, blocks: Blocks) -> ir.Value:
    """[..., width] -> [2 * rows, width]: the high limbs of all rows, then the low ones."""
    cut = nodes("Reshape", x, nodes.constant([-1, blocks.count, blocks.size]))
    top = nodes("ReduceMax", nodes("Abs", cut), nodes.constant([-1]), keepdims=1)
    top = nodes("Max", top, nodes.constant(1e-30, np.float32))  # a block of zeros must not divide by zero
    step = nodes("Mul", top, nodes.constant(1 / 127, np.float32))
    high = nodes("Mul", nodes("Round", nodes("Div", cut, step)), step)
    low = nodes("Sub", cut, high)
    both = nodes("Concat", high, low, axis=0)
    return nodes("Reshape", both, nodes.constant([-1, blocks.width]))  # type: ignore[no-any-return]


def join_limbs(nodes: Nodes, y: ir.Value, x: ir.Value, rows: int, bias: ir.Value | None) -> ir.Value:
    """[2 * rows of x, rows] -> [..., rows]: the sum of the two halves, with the bias, in the shape of x."""
    high, low = nodes("Split", y, axis=0, outputs=2, num_outputs=2)
    total = nodes("Add", high, low)
    if bias is not None:
        total = nodes("Add", total, bias)
    leading = nodes("Shape", x, start=0, end=-1)
    shape = nodes("Concat", leading, nodes.constant([rows]), axis=0)
    return nodes("Reshape", total, shape)  # type: ignore[no-any-return]


def matmul_nbits(
    nodes: Nodes,
    x: ir.Value,
    weight: tuple[ir.Value, ir.Value, ir.Value | None],
    bias: ir.Value | None,
    layer: PackedLayer,
    blocks: Blocks,
    activations: str,
    limbs: ir.Value | None = None,
) -> ir.Value:
    """y = x W^T + b by one com.microsoft::MatMulNBits over (codes, scales, zero points) in blocks.

    Args:
        limbs: the two limbs of x where another layer has made them already.
    """
    sizes = {"K": blocks.width, "N": layer.rows, "bits": layer.bits, "block_size": blocks.size, "accuracy_level": 4}
    if activations == "int8":
        given = [pad_inputs(nodes, x, layer.in_features, blocks), *weight, *(() if bias is None else (None, bias))]
        while given[-1] is None:
            given.pop()
        return nodes("MatMulNBits", *given, domain="com.microsoft", **sizes)  # type: ignore[no-any-return]
    if limbs is None:
        limbs = split_limbs(nodes, pad_inputs(nodes, x, layer.in_features, blocks), blocks)
    given = [limbs, *weight]
    while given[-1] is None:
        given.pop()
    y = nodes("MatMulNBits", *given, domain="com.microsoft", **sizes)
    return join_limbs(nodes, y, x, layer.rows, bias)
