"""Text from a model, as the command line prints it."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, TextStreamer

from tsld_fx.capture import max_positions
from tsld_fx.errors import DataError
from tsld_fx.model_folders import load_any, load_tokenizer


def stream_text(
    name: str,
    prompt: str,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    device: str = "cpu",
    dtype: str | None = None,
) -> str:
    """Continue a prompt, printing the text as it comes; returns all of it.

    Raises:
        DataError: an empty prompt, or one that leaves no room in the model's positions.
    """
    if temperature < 0 or not 0 < top_p <= 1 or max_new_tokens < 1:
        raise DataError(
            f"temperature={temperature}, top_p={top_p}, max_new_tokens={max_new_tokens}: give a temperature of at "
            "least 0, a top_p in (0, 1] and at least one token."
        )
    model, tokenizer = load_any(name, device, dtype), load_tokenizer(name)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    check_prompt(model, inputs["input_ids"].shape[1], max_new_tokens)
    torch.manual_seed(seed)
    options = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    made = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **options,
    )
    return str(tokenizer.decode(made[0], skip_special_tokens=True))


def check_prompt(model: PreTrainedModel, tokens: int, new_tokens: int) -> None:
    """Refuse a prompt that is empty or does not fit the model's positions.

    Raises:
        DataError: it gives the lengths.
    """
    if tokens == 0:
        raise DataError("the prompt is empty. Give at least one word.")
    limit = max_positions(model)
    if limit is not None and tokens + new_tokens > limit:
        raise DataError(
            f"the prompt has {tokens} tokens and {new_tokens} more are asked for, but the model has {limit} "
            "positions. Shorten the prompt or lower --max-new-tokens."
        )
