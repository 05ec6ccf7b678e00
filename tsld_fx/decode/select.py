"""From logits to the next token: greedy, or sampling with temperature, top-k and top-p, as transformers orders them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Selection:
    """How a token is drawn. temperature and top_p lie in tensors, so that one CUDA graph serves all values.

    sample: False takes the likeliest token.
    top_k: draw among so many likeliest tokens; 0 for all.
    top_p: whether to draw among the likeliest tokens whose probabilities sum to top_p.
    """

    sample: bool = False
    top_k: int = 0
    top_p: bool = False


def next_tokens(logits: Tensor, how: Selection, temperature: Tensor, top_p: Tensor) -> Tensor:
    """logits [B, V] -> token numbers int64 [B], on the default random generator of the device.

    Sampling takes the largest of probability / Exp(1), which is distributed as a draw from the probabilities.
    """
    if not how.sample:
        return logits.argmax(-1)
    scores = logits.float() / temperature
    order: Tensor | None = None
    if how.top_k and how.top_k < scores.shape[-1]:
        scores, order = torch.topk(scores, how.top_k, dim=-1)
    elif how.top_p:
        scores, order = torch.sort(scores, dim=-1, descending=True)
    probabilities = scores.softmax(-1)
    if how.top_p:
        before = probabilities.cumsum(-1) - probabilities  # the likeliest token always stays
        probabilities = torch.where(before < top_p, probabilities, 0.0)
    drawn = (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1, keepdim=True)
    return (drawn if order is None else order.gather(-1, drawn)).squeeze(-1)
