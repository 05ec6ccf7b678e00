"""What a prepared or lowered model refuses to take."""

from __future__ import annotations

from typing import Any

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


def check_inputs(model: PreTrainedModel, input_ids: Tensor | None, kwargs: dict[str, Any]) -> None:
    if input_ids is None or input_ids.ndim != 2:
        shape = None if input_ids is None else list(input_ids.shape)
        raise DataError(f"a prepared model takes input_ids [batch, tokens], got {shape}. inputs_embeds has no graph.")
    for name, value in kwargs.items():
        if name == "past_key_values":
            if value is not None and value.get_seq_length():
                raise DataError("a prepared model has no KV cache. Call with use_cache=False, or convert it first.")
        elif name not in _HARMLESS and value is not None and value is not False:
            raise DataError(f"a prepared model does not take {name}=. It takes input_ids, attention_mask, "
                            "position_ids and labels.")  # fmt: skip
    check_length(model, input_ids.shape[1])


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
