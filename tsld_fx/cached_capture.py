"""Capture a lowered decoder with a growing KV cache: one graph for the prompt and for every step after it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils._sympy.value_ranges import ValueRanges
from transformers import DynamicCache, PreTrainedModel

from tsld_fx.capture import _explain, _exportable, max_positions
from tsld_fx.errors import CaptureError
from tsld_fx.lowered import LoweredModel, _plain
from tsld_fx.passes.pipelines import capture_pipeline
from tsld_fx.passes.runner import Listener, run_passes

BATCH, SEQUENCE, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"


@dataclass(frozen=True)
class CachedDecoder:
    """A decoder step as a graph, and what its inputs and outputs are called in the Hugging Face and ONNX world.

    Inputs, in order: input_ids [B, T], attention_mask [B, P + T] (1: attend), position_ids [B, T], all int64, then
    past_key_values.{i}.key and .value [B, kv_heads, P, head_dim] of each layer. Outputs: logits [B, T, vocabulary],
    then present.{i}.key and .value [B, kv_heads, P + T, head_dim]. B, T and P are dynamic; P = 0 is the first call.
    """

    program: ExportedProgram  # parameters are the live ones of the model, not copies
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def graph(self) -> fx.Graph:
        """The flat graph, parameters lifted to its first placeholders; linears are tsld::lowbit_linear nodes."""
        return self.program.graph

    def empty_cache(self, batch: int, device: torch.device | str | None = None) -> list[Tensor]:
        """The cache before the first call: two tensors [batch, kv_heads, 0, head_dim] per layer."""
        shape = (batch, self.kv_heads, 0, self.head_dim)
        return [torch.empty(shape, dtype=self.dtype, device=device) for _ in range(2 * self.layers)]


def cache_names(prefix: str, layers: int) -> list[str]:
    """`prefix.{i}.key`, `prefix.{i}.value` of every layer, in order."""
    return [f"{prefix}.{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]


def default_positions(attention_mask: Tensor, tokens: int) -> Tensor:
    """position_ids [B, tokens] of the last tokens, counted from the first attended one as `generate` does."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -tokens:]


def capture_cached(lowered: LoweredModel, *, listener: Listener | None = None) -> CachedDecoder:
    """Export a lowered (or any Hugging Face) decoder with past keys and values as inputs and outputs.

    Args:
        lowered: read only; the program shares its tensors.
        listener: called after each pass of the clean-up.

    Raises:
        CaptureError: torch.export refuses the model, or its cache is not one of keys and values alone.
    """
    model = _plain(lowered) if isinstance(lowered, LoweredModel) else lowered
    shapes = _cache_shapes(model)
    device, dtype = model.get_input_embeddings().weight.device, model.dtype
    tokens = min(8, (max_positions(model) or 16) // 4)
    batch, past = 3, tokens + 1  # all different, so that export cannot take two of them for the same size
    ids = torch.zeros(batch, tokens, dtype=torch.long, device=device)
    mask = torch.ones(batch, past + tokens, dtype=torch.long, device=device)
    positions = default_positions(mask, tokens).clone()  # a view would end up in the guards
    cache = [
        torch.zeros(batch, heads, past, size, dtype=dtype, device=device) for heads, size in shapes for _ in range(2)
    ]
    rows = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    dynamic = (rows, rows, rows, [{0: Dim.DYNAMIC, 2: Dim.DYNAMIC} for _ in cache])
    step = _Step(model)
    try:
        with _exportable(model, training=False), torch.no_grad():
            program = torch.export.export(step, (ids, mask, positions, cache), dynamic_shapes=dynamic, strict=False)
    except Exception as error:
        raise CaptureError(_explain(model, error)) from error
    run_passes(program.graph_module, capture_pipeline(), listener)
    _allow_small_sizes(program)
    heads, size = shapes[0]
    return CachedDecoder(
        program,
        ("input_ids", "attention_mask", "position_ids", *cache_names("past_key_values", len(shapes))),
        ("logits", *cache_names("present", len(shapes))),
        len(shapes), heads, size, dtype,
    )  # fmt: skip


def _allow_small_sizes(program: ExportedProgram) -> None:
    """Let the inputs' sizes go down to nothing: export assumes 2 or more, and for the mask the sum of such sizes."""
    for symbol, allowed in program.range_constraints.items():
        program.range_constraints[symbol] = ValueRanges(0, allowed.upper)


class _Step(nn.Module):
    """(input_ids, attention_mask, position_ids, keys and values) -> (logits, keys and values) of a decoder."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]) -> Any:
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        result = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        present = [tensor for layer in result.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return (result.logits, *present)


def _cache_shapes(model: PreTrainedModel) -> list[tuple[int, int]]:
    """(kv_heads, head_dim) of each layer's cache, found by running one token.

    Raises:
        CaptureError: the model keeps no keys and values, or not the same sizes in all layers, or takes no positions.
    """
    name = type(model).__name__
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise CaptureError(f"capture with KV cache: {name} takes no position_ids. Export it without a KV cache.")
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.get_input_embeddings().weight.device)
    with torch.no_grad():
        cache = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True).past_key_values
    layers = getattr(cache, "layers", [])
    shapes = [(k.shape[1], k.shape[3]) for layer in layers if (k := getattr(layer, "keys", None)) is not None]
    if not shapes or len(shapes) != len(layers) or len(set(shapes)) > 1:
        raise CaptureError(
            f"capture with KV cache: {name} keeps {type(cache).__name__} with {len(shapes)} layers of keys and values "
            f"in {len(set(shapes))} sizes; one size for all layers is supported. Export it without a KV cache."
        )
    return shapes
