"""A lowered model as two graphs over one static KV cache: prefill (the prompt) and decode (one token a sequence)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tsld_fx.capture import capture, max_positions
from tsld_fx.errors import CaptureError, PassError
from tsld_fx.passes.graph_tools import calls
from tsld_fx.passes.insert_kv_cache import HOLDER, set_fresh
from tsld_fx.passes.pipelines import decode_pipeline
from tsld_fx.passes.runner import Listener, run_passes
from tsld_fx.passes.select_last_token import SelectLastToken

_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1}  # of logits, relative; float32 and float64: 1e-3


@dataclass(frozen=True)
class DecodeGraphs:
    """prefill(input_ids [B, T], position_ids [B, T], last [B]) and decode(input_ids [B, 1], position_ids [B, 1]).

    Both return {"logits": [B, 1, V]} and share the cache `kv_cache` and all weights. Prefill tokens are at positions
    0 .. T - 1 of rows 0 .. B - 1; sequences shorter than T are filled up on the right with any token.
    """

    prefill: fx.GraphModule
    decode: fx.GraphModule
    batch: int
    length: int

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values."""
        buffers = self.decode.get_submodule(HOLDER)._buffers
        return sum(t.numel() * t.element_size() for name, t in buffers.items() if name != "scratch" and t is not None)


def build_graphs(
    model: Any, batch: int, length: int, *, fuse: bool = True, listener: Listener | None = None
) -> DecodeGraphs:
    """Capture a model (lowered, or any Hugging Face decoder) and rewrite it for a cache of `length` tokens a row.

    Raises:
        CaptureError: the model's attention cannot be reproduced over a static cache.
    """
    check_model(model, length)
    graph_module = capture(model, with_positions=True, training=False, listener=listener)
    scratch = _scratch(model, batch, length)
    try:
        graph_module = run_passes(graph_module, decode_pipeline(batch, length, scratch, fuse), listener)
    except PassError as error:
        raise CaptureError(f"compile_decode: {type(model).__name__}: {error}") from error
    if not calls(graph_module.graph, torch.ops.tsld.cached_attention.default):
        raise CaptureError(
            f"compile_decode: {type(model).__name__} has no fused attention in its graph (attention implementation "
            f"{getattr(model.config, '_attn_implementation', None)!r}). Load it with attn_implementation='sdpa', or "
            "use transformers' generate."
        )
    prefill = fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph), class_name="PrefillGraph")
    set_fresh(prefill, True)
    prefill = run_passes(prefill, (SelectLastToken(),), listener)
    for one in (prefill, graph_module):
        one.recompile()
    return DecodeGraphs(prefill, graph_module, batch, length)


def check_model(model: Any, length: int) -> None:
    """Refuse models whose configuration says that a causal static cache would not be right.

    Raises:
        CaptureError: a sliding window shorter than the cache, or more tokens than positions.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    windowed = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    if window and windowed and window < length:
        raise CaptureError(
            f"compile_decode: {type(model).__name__} attends to windows of {window} tokens, fewer than "
            f"max_length={length}. Choose max_length={window}, or use transformers' generate."
        )
    limit = max_positions(model)
    if limit is not None and length > limit:
        raise CaptureError(f"compile_decode: max_length={length} is more than the model's {limit} positions.")


def _scratch(model: Any, batch: int, length: int) -> int:
    device = model.device
    if device.type != "cuda":
        return 0
    from tsld_fx.codegen.attention_plan import scratch_floats
    from tsld_fx.codegen.decode_kernels import chip

    config = model.config.get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    index = torch.cuda.current_device() if device.index is None else device.index
    return scratch_floats(batch, heads, kv_heads, head_dim, length, *chip(index))


def verify(graphs: DecodeGraphs, model: Any) -> float:
    """Compare a prefill and three decoding steps with the model itself on random tokens; returns the relative error.

    Raises:
        CaptureError: they disagree: the model's attention is not the causal one over all earlier tokens.
    """
    rows, steps = min(2, graphs.batch), 3
    tokens = min(32, graphs.length)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (rows, tokens), generator=generator).to(model.device)
    positions = torch.arange(tokens, device=ids.device).expand(rows, -1)
    first = max(1, tokens - steps)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, first - 1 :]
        last = torch.full((rows,), first - 1, device=ids.device)
        got = [graphs.prefill(ids[:, :first], positions[:, :first], last)["logits"]]
        for t in range(first, tokens):
            got.append(graphs.decode(ids[:, t : t + 1], positions[:, t : t + 1])["logits"])
    ours, theirs = torch.cat(got, dim=1).double(), expected.double()
    error = float((ours - theirs).norm() / theirs.norm())
    if not error <= _TOLERANCE.get(model.dtype, 1e-3):  # NaN too
        raise CaptureError(
            f"compile_decode: logits over the static cache differ from {type(model).__name__}'s own by {error:.1e} "
            "(relative). Its attention is not the causal one over all earlier tokens; use transformers' generate."
        )
    return error
