"""Tiny random decoders of every family that must work, and the inputs to run them on."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tsld_fx import LoweredModel, PreparedModel, QuantConfig, convert, prepare

UNQUANTISED = QuantConfig(weight=None)
VOCABULARY = 97
POSITIONS = 40
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_ROPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.15,
    **_TOKENS,
}
_OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "ffn_dim": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "init_std": 0.15,
    "dropout": 0.1,
    **_TOKENS,
}


def _gpt2(**changes: Any) -> PreTrainedModel:
    values = {
        "vocab_size": VOCABULARY, "n_positions": POSITIONS, "n_embd": 32, "n_layer": 2, "n_head": 4,
        "initializer_range": 0.15, **_TOKENS,
    }  # fmt: skip
    return GPT2LMHeadModel(GPT2Config(**{**values, **changes}))


def _gpt_neo(**changes: Any) -> PreTrainedModel:
    values = {
        "vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS, "hidden_size": 32, "num_layers": 2,
        "num_heads": 4, "intermediate_size": 44, "attention_types": [[["global", "local"], 1]], "window_size": 5,
        "initializer_range": 0.15, "attention_dropout": 0.1, "resid_dropout": 0.1, "embed_dropout": 0.1, **_TOKENS,
    }  # fmt: skip
    return GPTNeoForCausalLM(GPTNeoConfig(**{**values, **changes}))


def _gemma2(**changes: Any) -> PreTrainedModel:
    values = {**_ROPE, "sliding_window": 5, "query_pre_attn_scalar": 8, "layer_types": _LAYERS}
    return Gemma2ForCausalLM(Gemma2Config(**{**values, **changes}))


def _gemma3(**changes: Any) -> PreTrainedModel:
    values = {**_ROPE, "sliding_window": 5, "query_pre_attn_scalar": 8, "layer_types": _LAYERS}
    return Gemma3ForCausalLM(Gemma3TextConfig(**{**values, **changes}))


_LAYERS = ["sliding_attention", "full_attention"]
_BUILDERS: dict[str, Callable[..., PreTrainedModel]] = {
    "gpt2": _gpt2,
    "opt": lambda **c: OPTForCausalLM(OPTConfig(**{**_OPT, **c})),
    "opt_projected": lambda **c: OPTForCausalLM(
        OPTConfig(**{**_OPT, "word_embed_proj_dim": 20, "do_layer_norm_before": False, **c})
    ),
    "gpt_neo": _gpt_neo,
    "llama": lambda **c: LlamaForCausalLM(LlamaConfig(**{**_ROPE, **c})),
    "qwen3": lambda **c: Qwen3ForCausalLM(Qwen3Config(**{**_ROPE, "tie_word_embeddings": True, **c})),
    "mistral": lambda **c: MistralForCausalLM(MistralConfig(**{**_ROPE, "sliding_window": 5, **c})),
    "gemma2": _gemma2,
    "gemma3": _gemma3,
}
FAMILIES = tuple(_BUILDERS)
WITH_DROPOUT = ("gpt2", "opt", "gpt_neo")
TIED = ("gpt2", "opt", "opt_projected", "gpt_neo", "qwen3", "gemma2", "gemma3")


def build(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of a family in eval mode; `changes` go to its configuration."""
    torch.manual_seed(seed)
    model = _BUILDERS[family](**changes).eval()
    with torch.no_grad():  # biases and norms start as constants, which would hide a wrong one
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                offset = 0.0 if name.endswith("bias") or family.startswith("gemma") else 1.0
                parameter.copy_(offset + 0.1 * torch.randn_like(parameter))
    return model


def ids(batch: int = 2, tokens: int = 9, seed: int = 0, vocabulary: int = VOCABULARY) -> Tensor:
    """Random token numbers without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (batch, tokens), generator=generator)


def left_padded(lengths: tuple[int, ...] = (9, 5, 1), seed: int = 0) -> tuple[Tensor, Tensor]:
    """Token numbers and the attention mask of a batch padded on the left."""
    width = max(lengths)
    tokens, mask = ids(len(lengths), width, seed), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = 1
    return tokens * mask, mask


@cache
def unquantised(family: str) -> tuple[PreTrainedModel, PreparedModel]:
    """A model and its graph without quantisation, for tests that change neither."""
    model = build(family)
    return model, prepare(model, UNQUANTISED)


@cache
def ternary(family: str) -> tuple[PreparedModel, LoweredModel]:
    """A prepared and a lowered model with the default configuration, for tests that change neither."""
    prepared = prepare(build(family))
    return prepared, convert(prepared)
