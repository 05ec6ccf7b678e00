"""`to_relax`: a lowered model as a TVM Relax IRModule."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import UserError
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx.traceback import preserve_node_meta

from tsld_fx.capture import max_positions
from tsld_fx.errors import BackendError, CaptureError, ConfigError
from tsld_fx.lowered import LoweredModel
from tsld_fx.passes.graph_tools import attribute, module_path
from tsld_fx.relax.cpu_target import CpuTarget, cpu_target
from tsld_fx.relax.importer_fixes import FIXES, Converter
from tsld_fx.relax.lowering import CpuMatmuls
from tsld_fx.relax.tvm_import import load_tvm

_IMPORTERS_OWN = ("params", "tir_var_lower_bound", "tir_var_upper_bound")  # export's bounds are too narrow
PARAMETER_NAMES = "tsld_parameters"  # attribute of a function: names of the model's tensors, in the order of its inputs


def to_relax(
    lowered: LoweredModel,
    *,
    bind_params: bool = True,
    batch: int | None = None,
    tokens: int | None = None,
    target: str = "llvm",
) -> Any:
    """The graph of a lowered model as a Relax IRModule with the function `main`.

    Every tsld::lowbit_linear is a call of a scheduled PrimFunc that reads the canonical packed weight; dense linears
    (the head) are scheduled PrimFuncs too. The rest are Relax operators: `tsld_fx.relax.compile` has a pipeline for
    them, and yours may be put in its place.

    main(input_ids int64 [B, T], attention_mask int64 [B, T], *weights) -> (logits [B, T, vocabulary],)

    Args:
        bind_params: weights are constants of the module; else inputs behind the first two, and the function's
            attribute `tsld_parameters` names them (`parameters_of` gives the tensors).
        batch, tokens: a fixed size, None for any from 1 up.
        target: `llvm` (this machine's CPU) or `llvm:x86-64-v3` and so on: which vectors the PrimFuncs use.

    Raises:
        BackendError: TVM is absent or of another version, or its importer does not know an operator of the graph; the
            message names the node and the module it comes from.
        CaptureError: torch.export does not take the graph.
        ConfigError: not a lowered model, or sizes that the model does not have.
    """
    if not isinstance(lowered, LoweredModel):
        raise ConfigError(
            f"to_relax: expected a lowered model, got {type(lowered).__name__}. Give the result of tsld_fx.convert or "
            "tsld_fx.load."
        )
    where = cpu_target(target)
    load_tvm("tsld_fx.to_relax")
    program = export_lowered(lowered, batch, tokens)
    return program_to_relax(program, where, bind_params=bind_params)


def export_lowered(lowered: LoweredModel, batch: int | None, tokens: int | None) -> ExportedProgram:
    """The lowered graph as an exported program over (input_ids, attention_mask), weights as its parameters.

    Raises:
        CaptureError, ConfigError: as `to_relax`.
    """
    limit = max_positions(lowered)
    for name, size, most in (("batch", batch, None), ("tokens", tokens, limit)):
        if size is not None and (not isinstance(size, int) or size < 1 or (most is not None and size > most)):
            raise ConfigError(f"to_relax: {name}={size!r} must lie in [1, {most or 'any'}].")
    graph_module = _on_parameters(lowered.graph_module)
    rows, columns = batch or 3, tokens or min(16, (limit or 32) // 2)
    ids = torch.zeros(rows, columns, dtype=torch.long, device=lowered.device)
    try:
        return _export(graph_module, ids, batch, tokens, None)
    except UserError as error:
        if tokens is not None or limit is None or "<= " not in str(error):
            raise _refusal(lowered, error) from error
    try:  # GPT-Neo slices a mask of `limit` columns: sizes below that are one rule, `limit` itself is another
        return _export(graph_module, ids, batch, tokens, limit - 1)
    except UserError as error:
        raise _refusal(lowered, error) from error


def _export(
    graph_module: fx.GraphModule, ids: Tensor, batch: int | None, tokens: int | None, most: int | None
) -> ExportedProgram:
    sizes = {
        axis: dim for axis, fixed, dim in ((0, batch, Dim("batch")), (1, tokens, Dim("tokens", max=most))) if not fixed
    }
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inputs = (ids, torch.ones_like(ids))
        shapes = (sizes, dict(sizes))
        return torch.export.export(_Interpreted(graph_module), inputs, dynamic_shapes=shapes, strict=False)


def _refusal(lowered: LoweredModel, error: Exception) -> CaptureError:
    return CaptureError(
        f"to_relax: torch.export does not take the lowered graph of {type(lowered).__name__}: "
        f"{next(iter(str(error).strip().splitlines()), '')[:300]} "
        "Fix batch= or tokens= to a number if the message is about dynamic sizes."
    )


class _Interpreted(nn.Module):
    """Runs a graph node by node, so that a new export keeps each node's place in the model."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__()
        self.graph_module = graph_module

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        with preserve_node_meta():
            return fx.Interpreter(self.graph_module).run(input_ids, attention_mask)["logits"]


def _on_parameters(graph_module: fx.GraphModule) -> fx.GraphModule:
    """The same graph over a module that holds every tensor of it as a parameter (sharing memory), constants apart."""
    root = nn.Module()
    for target in dict.fromkeys(str(n.target) for n in graph_module.graph.nodes if n.op == "get_attr"):
        tensor, holder = attribute(graph_module, target), root
        *path, leaf = target.split(".")
        for part in path:
            if part not in holder._modules:
                holder.add_module(part, nn.Module())
            holder = holder._modules[part]
        if target.startswith("constant_"):
            holder.register_buffer(leaf, tensor, persistent=False)
        else:
            holder.register_parameter(leaf, nn.Parameter(tensor.detach(), requires_grad=False))
    return fx.GraphModule(root, graph_module.graph)


def program_to_relax(
    program: ExportedProgram,
    target: CpuTarget | None,
    *,
    bind_params: bool,
    converters: dict[str, Converter] | None = None,
) -> Any:
    """An exported program with tsld operators as an IRModule; its parameters and persistent buffers are the weights.

    Raises:
        BackendError: an operator that the importer does not know.
    """
    load_tvm("tsld_fx.to_relax")
    chosen = converters
    if chosen is None:
        matmuls = CpuMatmuls(target.lanes, target.table) if target else CpuMatmuls(4, False)
        chosen = {"lowbit_linear.default": matmuls.lowbit_linear, "linear.default": matmuls.linear}
    with warnings.catch_warnings():  # of torch's internals, about torch's own classes
        warnings.simplefilter("ignore")
        program = _decomposed(program)
        check_operators(program, {**FIXES, **chosen})
        return _imported(program, {**FIXES, **chosen}, bind_params)


def _decomposed(program: ExportedProgram) -> ExportedProgram:
    """Core aten operators, linear kept whole; buffers that belong to the model's state count as parameters."""
    table = torch.export.default_decompositions()
    table.pop(torch.ops.aten.linear.default, None)
    program = program.run_decompositions(table)
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.BUFFER and spec.persistent:
            spec.kind = InputKind.PARAMETER
    return program


def check_operators(program: ExportedProgram, converters: dict[str, Converter]) -> None:
    """Refuse a graph with an operator that has no converter.

    Raises:
        BackendError: it names the operator, the node and the module that the node was traced from.
    """
    from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

    known = {*ExportedProgramImporter().convert_map, *converters}
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target.__name__ not in known:
            path = module_path(node)
            where = f"module '{path.removeprefix('graph_module.')}'" if path else "the model's own forward"
            raise BackendError(
                f"to_relax: TVM's importer does not know the operator {node.target} (node {node.name}, from {where}). "
                "Rewrite it with a pass before to_relax, or give tsld_fx.relax.importer_fixes a converter for it."
            )


def _imported(program: ExportedProgram, converters: dict[str, Converter], bind_params: bool) -> Any:
    from tvm import IRModule
    from tvm.relax.frontend.torch import from_exported_program

    module = from_exported_program(
        program, keep_params_as_input=not bind_params, custom_convert_map=converters, run_ep_decomposition=False
    )
    functions = {}
    for variable, function in module.functions.items():
        if variable.name_hint == "main":
            for attribute_name in _IMPORTERS_OWN:
                if attribute_name in (function.attrs or {}):
                    function = function.without_attr(attribute_name)
            function = function.with_attr(PARAMETER_NAMES, [] if bind_params else list(parameters_of(program)))
        functions[variable] = function
    return IRModule(functions, attrs=module.attrs)


def parameters_of(program: ExportedProgram) -> dict[str, Tensor]:
    """Model's name -> tensor of every weight that is an input of the program, in order."""
    found = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.PARAMETER or (spec.kind is InputKind.BUFFER and spec.persistent):
            name = str(spec.target)
            found[name.partition(".")[2]] = program.state_dict[name]  # without the module that was exported around it
    return found
