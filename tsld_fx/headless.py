"""A causal language model cut in front of its head: hidden states instead of logits, and the head's weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class HeadlessModel:
    """A model without its head, over the model's own modules.

    Attributes:
        body: called as the model is; its `.logits` are the inputs of the head, [B, T, H].
        weight, bias: of the head, [V, H] and [V] or None.
    """

    body: Any
    head: nn.Linear

    @property
    def weight(self) -> Tensor:
        return self.head.weight.detach()

    @property
    def bias(self) -> Tensor | None:
        return None if self.head.bias is None else self.head.bias.detach()


def without_head(model: PreTrainedModel) -> HeadlessModel | None:
    """Cut a model in front of its linear head; nothing is copied and the model stays as it is.

    Two tokens run through both, to see that the logits are the head's plain result (no soft-capping, no scaling) and
    that the cut model gives exactly what the head reads.

    Returns:
        None when the logits are anything else than that.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or not head.weight.is_floating_point() or head.weight.is_meta:
        return None
    path = next(name for name, module in model.named_modules() if module is head)
    body = _replaced(model, path.split("."))
    tokens = torch.tensor([[1, 0]], device=head.weight.device)
    seen: list[tuple[Tensor, Tensor]] = []
    hook = head.register_forward_hook(lambda _, inputs, result: seen.append((inputs[0], result)))
    try:
        with torch.no_grad():
            whole = model(input_ids=tokens, use_cache=False).logits
            hidden = body(input_ids=tokens, use_cache=False).logits
    finally:
        hook.remove()
    plain = len(seen) == 1 and torch.equal(whole, seen[0][1]) and torch.equal(hidden, seen[0][0])
    return HeadlessModel(body, head) if plain else None


def _replaced(module: nn.Module, path: list[str]) -> nn.Module:
    """A second object over the same parameters whose submodule at `path` hands its input on."""
    twin: nn.Module = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__["_modules"] = dict(module._modules)
    child = module._modules[path[0]]
    assert child is not None
    twin._modules[path[0]] = nn.Identity() if len(path) == 1 else _replaced(child, path[1:])
    return twin
