"""Putting new nodes and initializers in the place of an opaque node."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from torch import Tensor

from tsld_fx.onnx.graph import PackedLayer


def constant(graph: ir.Graph, name: str, tensor: Tensor) -> ir.Value:
    """An initializer that shares the tensor's memory; the one of that name where there is one already."""
    if tensor.is_contiguous():
        return _register(graph, name, tensor_adapters.TorchTensor(tensor, name=name))
    dtype = tensor_adapters.from_torch_dtype(tensor.dtype)  # packed from a transposed weight: GPT-2's
    return lazy_constant(graph, name, tuple(tensor.shape), dtype, lambda: numpy_of(tensor.contiguous()))


def lazy_constant(
    graph: ir.Graph, name: str, shape: tuple[int, ...], dtype: ir.DataType, make: Callable[[], np.ndarray]
) -> ir.Value:
    """An initializer whose bytes (little-endian, sub-byte types packed) are made when the file is written, not kept."""

    def tensor() -> ir.TensorProtocol:
        if dtype.itemsize >= 1:
            return ir.Tensor(make(), dtype=dtype, shape=ir.Shape(shape), name=name)
        return ir.PackedTensor(make(), dtype, shape=ir.Shape(shape), name=name)

    return _register(graph, name, ir.LazyTensor(tensor, dtype=dtype, shape=ir.Shape(shape), name=name))


def _register(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    if name in graph.initializers:
        return graph.initializers[name]
    shape = ir.Shape([int(size) for size in tensor.shape.numpy()])
    value = ir.Value(name=name, const_value=tensor, shape=shape, type=ir.TensorType(tensor.dtype))
    graph.register_initializer(value)
    return value


def replace(graph: ir.Graph, layer: PackedLayer, nodes: list[ir.Node], result: ir.Value) -> None:
    """Put `nodes`, whose `result` is the layer's output, in the place of the opaque node."""
    old = layer.node.outputs[0]
    result.type, result.shape = old.type, old.shape
    ir.convenience.replace_nodes_and_values(graph, layer.node, [layer.node], nodes, [old], [result])


def drop_unread(graph: ir.Graph) -> None:
    """Remove initializers that no node reads any more."""
    read = {id(value) for node in graph.all_nodes() for value in node.inputs}
    read |= {id(value) for value in graph.outputs}
    for name, value in list(graph.initializers.items()):
        if id(value) not in read:
            del graph.initializers[name]


def numpy_of(tensor: Tensor) -> np.ndarray:
    """The tensor as numpy sees it, without a copy."""
    return tensor.detach().to(torch.device("cpu")).numpy()
