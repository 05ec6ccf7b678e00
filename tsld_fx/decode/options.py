"""Which calls of transformers' `generate` a Decoder serves, and with which settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tsld_fx.decode.select import Selection

_OURS = {
    "max_new_tokens", "max_length", "do_sample", "temperature", "top_k", "top_p", "eos_token_id", "pad_token_id",
    "bos_token_id", "use_cache",
}  # fmt: skip
_IGNORED = {
    "transformers_version",
    "_from_model_config",
    "cache_implementation",
    "return_dict",
    "decoder_start_token_id",
}
_NEUTRAL: dict[str, Any] = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0}
_TENSORS = {"input_ids", "inputs", "attention_mask"}


@dataclass(frozen=True)
class Options:
    """Settings of one call: tokens to add at most, how to draw them, what ends and what fills a sequence."""

    new_tokens: int
    selection: Selection
    temperature: float
    top_p: float
    eos: tuple[int, ...]
    pad: int


def options_of(model: Any, prompt: int, kwargs: dict[str, Any]) -> Options | None:
    """The settings of `model.generate(**kwargs)` on a prompt of so many tokens; None where a Decoder lacks one."""
    config = kwargs.get("generation_config") or model.generation_config
    settings = {k: v for k, v in kwargs.items() if k not in _TENSORS and k != "generation_config"}
    if any(k not in _OURS and v is not None for k, v in settings.items()):
        return None
    for name, value in config.to_diff_dict().items():
        if name in _OURS or name in _IGNORED or value is None or value is False:
            continue
        if value != _NEUTRAL.get(name, object()):
            return None

    def setting(name: str, default: Any) -> Any:
        value = settings.get(name)
        value = getattr(config, name, None) if value is None else value
        return default if value is None else value

    if not setting("use_cache", True):
        return None
    if settings.get("max_new_tokens") is None and settings.get("max_length") is not None:
        new = int(settings["max_length"]) - prompt
    elif setting("max_new_tokens", None) is not None:
        new = int(setting("max_new_tokens", 0))
    else:
        new = int(setting("max_length", 20)) - prompt
    eos = setting("eos_token_id", ())
    eos = tuple(int(e) for e in (eos.flatten().tolist() if isinstance(eos, Tensor) else _listed(eos)))
    pad = setting("pad_token_id", eos[0] if eos else 0)
    sample, top_p = bool(setting("do_sample", False)), float(setting("top_p", 1.0))
    selection = Selection(sample, int(setting("top_k", 50)) if sample else 0, sample and top_p < 1)
    temperature = float(setting("temperature", 1.0))
    if new < 1 or (sample and temperature <= 0):
        return None  # transformers says what is wrong
    return Options(new, selection, temperature, top_p, eos, int(pad))


def _listed(value: Any) -> list[int]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def prompt_of(inputs: Tensor | None, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """(input_ids, attention_mask) of a call of generate; None where they are not plain padded token numbers."""
    ids = inputs if inputs is not None else kwargs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.dtype not in (torch.int32, torch.int64) or not ids.numel():
        return None
    mask = kwargs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    if mask.shape != ids.shape or mask.device != ids.device:
        return None
    return ids.long(), mask.long()
