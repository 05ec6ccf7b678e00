"""What a decoding step reads and changes besides the cache: tokens, positions, and which sequences have ended."""

from __future__ import annotations

import torch
from torch import Tensor

from tsld_fx.decode.options import Options

MOST_EOS = 8  # token numbers that may end a sequence


class StepState:
    """State of `batch` sequences of up to `length` tokens, in tensors that keep their place.

    tokens, positions: int64 [batch, 1], inputs of the next step. history: int64 [batch, length], the tokens made so
    far; counts: int64 [batch], how many. finished: bool [batch]. eos: int64 [MOST_EOS], -1 for none. pad: one token.
    """

    def __init__(self, batch: int, length: int, device: torch.device) -> None:
        def whole(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.long, device=device)

        self.tokens, self.positions, self.counts = whole(batch, 1), whole(batch, 1), whole(batch)
        self.history, self.pad, self.eos = whole(batch, length), whole(), whole(MOST_EOS).fill_(-1)
        self.finished = torch.zeros(batch, dtype=torch.bool, device=device)

    def begin(self, options: Options, batch: int) -> None:
        """Settings of a call; rows beyond `batch` count as finished."""
        self.eos.fill_(-1)
        if options.eos:
            self.eos[: len(options.eos)] = torch.tensor(options.eos, device=self.eos.device)
        self.pad.fill_(options.pad)
        self.finished.zero_()
        self.finished[batch:] = True
        self.counts.zero_()
        self.positions.zero_()

    def take(self, chosen: Tensor) -> None:
        """The next token of each sequence, int64 [batch]; `pad` for those that have ended."""
        last = self.history.shape[1] - 1
        chosen = torch.where(self.finished, self.pad, chosen)
        self.finished.logical_or_((chosen[:, None] == self.eos).any(1))
        self.tokens.copy_(chosen[:, None])
        self.history.scatter_(1, self.counts[:, None], chosen[:, None])
        self.counts.add_(1).clamp_(max=last)
        self.positions.add_(1).clamp_(max=last)

    def length(self, made: Tensor) -> int:
        """Tokens until the last sequence has ended, the token that ends it included."""
        ends = torch.isin(made, self.eos)
        none = ~ends.any(1)
        return int(torch.where(none, made.shape[1], ends.int().argmax(1) + 1).max())
