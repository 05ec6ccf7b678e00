"""Capture a Hugging Face decoder as one flat FX graph. Every quirk of torch and transformers versions lives here."""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from transformers import PreTrainedModel

from tsld_fx.errors import CaptureError
from tsld_fx.passes.pipelines import capture_pipeline
from tsld_fx.passes.runner import Listener, run_passes

logger = logging.getLogger(__name__)
INPUTS = ("input_ids", "attention_mask", "position_ids")


def check_decoder(model: object) -> PreTrainedModel:
    """Refuse what is not a decoder-only causal language model.

    Raises:
        CaptureError: it says what the object is and what is needed.
    """
    if not isinstance(model, PreTrainedModel):
        raise CaptureError(
            f"prepare: expected a transformers causal language model, got {type(model).__name__}. "
            "Load one with AutoModelForCausalLM.from_pretrained(...), or use tsld_fx.passes on your own graph."
        )
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise CaptureError(
            f"prepare: {type(model).__name__} is an encoder-decoder model. tsld_fx handles decoder-only models; "
            "load one with AutoModelForCausalLM."
        )
    if model.get_output_embeddings() is None or "labels" not in inspect.signature(model.forward).parameters:
        raise CaptureError(
            f"prepare: {type(model).__name__} has no language-modelling head. "
            "Load the model with AutoModelForCausalLM.from_pretrained(...)."
        )
    causal = "CausalLM" in type(model).__name__ or "LMHead" in type(model).__name__
    bidirectional = getattr(config, "is_decoder", None) is False and _looks_bidirectional(model)
    if bidirectional or not (causal or model.can_generate()):
        raise CaptureError(
            f"prepare: {type(model).__name__} is not causal (its tokens see later tokens). tsld_fx trains next-token "
            "decoders; load one with AutoModelForCausalLM, or set config.is_decoder=True before loading."
        )
    return model


def _looks_bidirectional(model: PreTrainedModel) -> bool:
    """BERT-like models carry `is_decoder: false`; decoder families leave the flag unset or ignore it."""
    return any(part in type(model).__name__ for part in ("MaskedLM", "Bert", "Roberta", "Electra", "XLNet"))


def capture(
    model: PreTrainedModel,
    *,
    with_positions: bool = False,
    training: bool = True,
    listener: Listener | None = None,
) -> fx.GraphModule:
    """Export a decoder with dynamic batch and sequence and clean the graph up.

    Args:
        model: read only; the graph shares its parameters and sees later changes to them.
        with_positions: also take `position_ids` as an input.
        training: capture with dropout on (`SetDropout` switches it afterwards).
        listener: called after each pass of the clean-up.

    Returns:
        A GraphModule with inputs input_ids [B, T] and attention_mask [B, T] (and position_ids [B, T]), both int64,
        whose output is the dict {"logits": [B, T, V]}.

    Raises:
        CaptureError: torch.export refuses the model; the message names the construct and the module.
    """
    program = _export(model, with_positions, training)
    return run_passes(_unlift(program, model), capture_pipeline(), listener)


def _export(model: PreTrainedModel, with_positions: bool, training: bool) -> ExportedProgram:
    device = model.get_input_embeddings().weight.device
    tokens = min(16, (max_positions(model) or 32) // 2)
    ids = torch.zeros(2, tokens, dtype=torch.long, device=device)
    kwargs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if with_positions:
        kwargs["position_ids"] = torch.arange(tokens, device=device).expand(2, tokens).contiguous()
    dynamic: dict[str, Any] = {name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in kwargs}
    kwargs["use_cache"], dynamic["use_cache"] = False, None
    try:
        with _exportable(model, training):
            return torch.export.export(model, (), kwargs, dynamic_shapes=dynamic, strict=False)
    except Exception as error:
        raise CaptureError(_explain(model, error)) from error


@contextlib.contextmanager
def _exportable(model: PreTrainedModel, training: bool) -> Iterator[None]:
    """Set the mode for the export and put everything back: train flag of each module, grad mode, warnings."""
    modes = {module: module.training for module in model.modules()}
    with warnings.catch_warnings(), torch.set_grad_enabled(True):
        warnings.simplefilter("ignore")
        model.train(training)
        for module in model.modules():  # LayerDrop draws a random number per layer, which no graph can branch on
            if hasattr(module, "layerdrop"):
                module.training = False
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def _explain(model: PreTrainedModel, error: Exception) -> str:
    """One message with the construct that export refused and the innermost model code that it stands in."""
    where = type(model).__name__
    trace = error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            name = next((n for n, m in model.named_modules() if m is owner), None)
            if name is not None:
                file, line = trace.tb_frame.f_code.co_filename.rpartition("/")[2], trace.tb_lineno
                where = f"module '{name or '(root)'}' ({type(owner).__name__}, {file}:{line})"
        trace = trace.tb_next
    construct = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return (
        f"capture: torch.export cannot trace {where}: {type(error).__name__}: {construct[:300]} "
        "Rewrite that code without data-dependent Python control flow, or try attn_implementation='eager'."
    )


def _unlift(program: ExportedProgram, model: PreTrainedModel) -> fx.GraphModule:
    """Turn an exported program into a graph module that reads parameters by their names in the model."""
    source, graph, env = program.graph_module.graph, fx.Graph(), {}
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs if hasattr(spec.arg, "name")}
    first_name = {id(parameter): name for name, parameter in model.named_parameters()}  # of tied ones: the embedding's
    root = nn.Module()
    constants = 0
    for node in source.nodes:
        if node.op == "placeholder":
            spec = specs[node.name]
            if spec.kind == InputKind.USER_INPUT:
                if node.name in INPUTS:
                    env[node] = graph.placeholder(node.name)
                    env[node].meta = dict(node.meta)
                continue
            target = str(spec.target)
            if spec.kind == InputKind.PARAMETER:
                target = first_name[id(model.get_parameter(target))]
            elif spec.kind != InputKind.BUFFER:
                root.register_buffer(f"constant_{constants}", program.constants[target], persistent=False)
                target, constants = f"constant_{constants}", constants + 1
            if not node.users:  # the other name of a tied parameter
                continue
            env[node] = graph.get_attr(target)
            env[node].meta = dict(node.meta)
        elif node.op == "output":
            logits = _logits(program, node)
            graph.output({"logits": env[logits]}).meta = dict(node.meta)
        else:
            if node.op == "get_attr":  # the body of a higher-order operator
                setattr(root, str(node.target), getattr(program.graph_module, str(node.target)))
            env[node] = graph.node_copy(node, lambda n: env[n])
    _lead_with_inputs(graph)
    return attach(graph, model, root)


def _lead_with_inputs(graph: fx.Graph) -> None:
    """Placeholders come first: exported graphs list parameters before inputs."""
    first = next(iter(graph.nodes))
    for node in [n for n in graph.nodes if n.op == "placeholder"]:
        if node is not first:
            first.prepend(node)


def _logits(program: ExportedProgram, output: fx.Node) -> fx.Node:
    """The node of the logits: the [B, T, vocabulary] float result among the outputs."""
    flat = [n for n in output.args[0] if isinstance(n, fx.Node)]
    floats = [n for n in flat if isinstance(v := n.meta.get("val"), torch.Tensor) and v.ndim == 3]
    if not floats:
        raise CaptureError("capture: the model returns no [batch, tokens, vocabulary] logits.")
    return floats[0]


def attach(graph: fx.Graph, model: nn.Module, constants: nn.Module) -> fx.GraphModule:
    """A graph module that reads the live modules of `model`, so that `.to()`, loading and training are seen.

    Args:
        constants: holds what the graph reads besides the model: buffers `constant_*` and bodies of regions.
    """
    root = nn.Module()
    own = {name for name, _ in model.named_children()}
    for name, buffer in constants._buffers.items():
        if name.startswith("constant_"):
            root.register_buffer(name, buffer, persistent=False)
    for name, child in constants.named_children():
        if name not in own:
            root.add_module(name, child)
    for name, parameter in model.named_parameters(recurse=False):
        root.register_parameter(name, parameter)
    for name, buffer in model.named_buffers(recurse=False):
        root.register_buffer(name, buffer)
    for name, child in model.named_children():
        root.add_module(name, child)
    graph_module = fx.GraphModule(root, graph, class_name=f"{type(model).__name__}Graph")
    for (
        name,
        child,
    ) in model.named_children():  # GraphModule copies the containers: put the live ones in their place
        graph_module.add_module(name, child)
    return graph_module


def max_positions(model: PreTrainedModel) -> int | None:
    """Longest sequence that the model has positions for, None when its config does not say."""
    config = model.config.get_text_config()
    value = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return int(value) if value else None


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether the model's own forward (not a graph's) has a `position_ids` argument."""
    forwards = (vars(cls).get("forward") for cls in type(model).__mro__ if cls.__module__.startswith("transformers."))
    forward = next((f for f in forwards if f is not None), None)
    return forward is not None and "position_ids" in inspect.signature(forward).parameters
