"""What a prepared or lowered model refuses to take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tsld_fx.capture import max_positions
from tsld_fx.errors import DataError

_HARMLESS = {
    "use_cache",
    "return_dict",
    "cache_position",
    "segment_ids",
    "logits_to_keep",
    "num_items_in_batch",
}


def check_inputs(
    model: PreTrainedModel, input_ids: Tensor | None, kwargs: dict[str, Any], attention_mask: Tensor | None = None
) -> None:
    """Refuse what the graph of a prepared model cannot take.

    Raises:
        DataError: it says which input, and what the graph takes.
    """
    check_ids(input_ids, "a prepared model", "inputs_embeds has no graph.")
    assert input_ids is not None
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise DataError(
            f"attention_mask {list(attention_mask.shape)} must have the shape of input_ids {list(input_ids.shape)}: "
            "1 for tokens, 0 for padding."
        )
    for name, value in kwargs.items():
        if name == "past_key_values":
            if value is not None and value.get_seq_length():
                raise DataError("a prepared model has no KV cache. Call with use_cache=False, or convert it first.")
        elif name not in _HARMLESS and value is not None and value is not False:
            raise DataError(f"a prepared model does not take {name}=. It takes input_ids, attention_mask, "
                            "position_ids and labels.")  # fmt: skip
    check_length(model, input_ids.shape[1])
    if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():  # a GPU would have to be waited for
        check_tokens(input_ids, model)


def check_ids(input_ids: object, who: str, remedy: str) -> None:
    """Refuse what is no tensor [batch, tokens] of token numbers.

    Raises:
        DataError: it says what was given.
    """
    good = isinstance(input_ids, Tensor) and input_ids.ndim == 2 and not input_ids.is_floating_point()
    if not good or input_ids.shape[1] == 0:  # type: ignore[attr-defined]
        tensor = isinstance(input_ids, Tensor)
        got = f"{input_ids.dtype} {list(input_ids.shape)}" if tensor else type(input_ids).__name__  # type: ignore[attr-defined]
        raise DataError(f"{who} takes input_ids [batch, tokens] of token numbers, got {got}. {remedy}")


def check_tokens(tokens: Tensor, model: nn.Module) -> None:
    """Refuse token numbers that the model's embedding does not have.

    Args:
        tokens: of any shape.

    Raises:
        DataError: it gives the token and the vocabulary.
    """
    if tokens.is_floating_point():
        raise DataError(f"tokens are {tokens.dtype}; token numbers are int64. Call .long() on them.")
    embedding = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    known = getattr(embedding, "num_embeddings", None)
    if known is None or not tokens.numel():
        return
    low, high = (int(t) for t in tokens.aminmax())
    if low < 0 or high >= known:
        raise DataError(
            f"token {low if low < 0 else high} is outside the model's vocabulary of {known} tokens. "
            "Use the tokenizer that belongs to the model."
        )


def check_length(model: PreTrainedModel, tokens: int) -> None:
    """Refuse sequences longer than a model with learned positions has.

    Raises:
        DataError: it gives both lengths.
    """
    limit = max_positions(model)
    if limit is not None and isinstance(tokens, int) and tokens > limit and _learned_positions(model):
        raise DataError(f"{tokens} tokens are more than the {limit} positions of the model. Shorten the input.")


def _learned_positions(model: PreTrainedModel) -> bool:
    embedding = model.get_input_embeddings()
    return any(isinstance(m, nn.Embedding) and m is not embedding for m in model.modules())
