"""A lowered model as an onnx_ir graph in which every packed layer is one opaque node that the dialects replace."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from tsld_fx.cached_capture import BATCH, PAST, SEQUENCE, TOTAL, capture_cached
from tsld_fx.capture import _explain, _exportable, max_positions
from tsld_fx.errors import CaptureError, ExportError
from tsld_fx.lowered import LoweredModel, _plain

DOMAIN, OPERATOR, VERSION = "ai.tsld", "LowBitLinear", 1


@dataclass(frozen=True)
class PackedLayer:
    """One opaque node and what it reads. Tensors are the model's own, not copies.

    packed uint8 [rows, bytes], scales float32 [rows or 1, groups], zeros uint8 like scales or None (ternary: 1, other
    bits: 2^(bits - 1)), bias a value of [rows] or None; `group_size` as in tsld::lowbit_linear.
    """

    node: ir.Node
    name: str
    x: ir.Value
    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: ir.Value | None
    bits: int
    group_size: int
    in_features: int

    @property
    def rows(self) -> int:
        """Output features."""
        return self.packed.shape[0]

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return self.scales.shape[1]


def trace(lowered: LoweredModel, kv_cache: bool, opset: int) -> ir.Model:
    """Export to ONNX; inputs and outputs get the names and the dynamic sizes that transformers' tools expect.

    Raises:
        CaptureError: torch.export refuses the model.
        ExportError: torch.onnx refuses its graph.
    """
    if kv_cache:
        decoder = capture_cached(lowered)
        program, inputs, outputs = decoder.program, decoder.inputs, decoder.outputs
    else:
        program, inputs, outputs = _capture(lowered), ("input_ids", "attention_mask"), ("logits",)
    try:
        with _quiet():
            exported = torch.onnx.export(
                program,
                dynamo=True,
                input_names=list(inputs),
                output_names=list(outputs),
                opset_version=opset,
                custom_translation_table={torch.ops.tsld.lowbit_linear.default: _translation()},
                verbose=False,
            )
    except Exception as error:
        cause = error.__cause__ or error
        reason = next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        raise ExportError(
            f"export: torch.onnx cannot write {type(lowered).__name__}: {type(cause).__name__}: {reason[:300]} "
            "Try attn_implementation='sdpa' when loading the model, or another opset."
        ) from error
    assert exported is not None
    model = exported.model
    _name_sizes(model)
    for name in list(model.graph.initializers):
        _rename(model.graph, name, name.removeprefix("model."))
    return model


def packed_layers(model: ir.Model) -> list[PackedLayer]:
    """The opaque nodes of a traced model."""
    return [_layer(n) for n in model.graph if n.domain == DOMAIN and n.op_type == OPERATOR]


def _layer(node: ir.Node) -> PackedLayer:
    x, packed, scales, zeros, bias = (*node.inputs, None, None)[:5]
    assert x is not None and packed is not None and scales is not None
    values = {name: attribute.as_int() for name, attribute in node.attributes.items()}
    return PackedLayer(
        node, str(packed.name).removesuffix(".weight_packed"), x, _torch(packed), _torch(scales),
        None if zeros is None else _torch(zeros), bias,
        values["bits"], values["group_size"], values["in_features"],
    )  # fmt: skip


def _torch(value: ir.Value) -> Tensor:
    assert value.const_value is not None
    raw = getattr(value.const_value, "raw", None)
    return raw.detach() if isinstance(raw, Tensor) else torch.from_numpy(value.const_value.numpy().copy())


class _Prompt(nn.Module):
    """(input_ids, attention_mask) -> logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def _capture(lowered: LoweredModel) -> ExportedProgram:
    model = _plain(lowered)
    tokens = min(16, (max_positions(model) or 32) // 2)
    ids = torch.zeros(2, tokens, dtype=torch.long)
    sizes = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    try:
        with _exportable(model, training=False), torch.no_grad():
            return torch.export.export(
                _Prompt(model), (ids, torch.ones_like(ids)), dynamic_shapes=(sizes, sizes), strict=False
            )
    except Exception as error:
        raise CaptureError(_explain(model, error)) from error


def _translation() -> Any:
    """The function by which torch.onnx turns tsld::lowbit_linear into one node."""
    from onnx.defs import OpSchema
    from onnxscript import values

    parameter, optional = OpSchema.FormalParameter, OpSchema.FormalParameterOption.Optional
    schema = OpSchema(
        OPERATOR, DOMAIN, VERSION,
        inputs=[
            parameter("x", "T"),
            parameter("packed", "tensor(uint8)"),
            parameter("scales", "T"),
            parameter("zeros", "tensor(uint8)", param_option=optional),
            parameter("bias", "T", param_option=optional),
        ],
        outputs=[parameter("y", "T")],
        type_constraints=[("T", ["tensor(float)"], "")],
        attributes=[OpSchema.Attribute(n, OpSchema.AttrType.INT, "") for n in ("bits", "group_size", "in_features")],
    )  # fmt: skip
    operator = values.Op(values.Opset(DOMAIN, VERSION), OPERATOR, schema)

    def lowbit_linear(x, packed, scales, zeros, bias, bits: int, group_size: int, in_features: int):  # type: ignore[no-untyped-def]
        return operator(x, packed, scales, zeros, bias, bits=bits, group_size=group_size, in_features=in_features)

    return lowbit_linear


def _name_sizes(model: ir.Model) -> None:
    """Call the dynamic sizes batch_size, sequence_length and so on, in the inputs, the outputs and between."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        name = str(value.name)
        if name.startswith("past_key_values."):
            names = {0: BATCH, 2: PAST}
        elif name.startswith("present."):
            names = {0: BATCH, 2: TOTAL}
        elif name == "attention_mask" and any(str(v.name).startswith("past") for v in model.graph.inputs):
            names = {0: BATCH, 1: TOTAL}
        else:
            names = {0: BATCH, 1: SEQUENCE}
        assert value.shape is not None
        value.shape = ir.Shape([names.get(i, size) for i, size in enumerate(value.shape)])
    ends = {id(v) for v in (*model.graph.inputs, *model.graph.outputs)}
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if id(value) not in ends:
                value.shape = None  # torch's own names for sizes, which readers would take for other ones


def _rename(graph: ir.Graph, old: str, new: str) -> None:
    if new != old and new not in graph.initializers:
        value = graph.initializers.pop(old)
        value.name = new
        if value.const_value is not None:
            value.const_value.name = new
        graph.initializers[new] = value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on its own work."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
