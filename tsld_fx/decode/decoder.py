"""`Decoder`: generation over a static KV cache, one CUDA graph replay per token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tsld_fx.decode.graphs import DecodeGraphs, build_graphs, verify
from tsld_fx.decode.options import Options
from tsld_fx.decode.prefill import Prefill
from tsld_fx.decode.select import Selection, next_tokens
from tsld_fx.decode.state import MOST_EOS, StepState
from tsld_fx.errors import BackendError, ConfigError, DataError

if TYPE_CHECKING:
    from tsld_fx.passes.runner import Listener

_LOOK_EVERY = 16  # steps between two looks at whether all sequences have ended


class Decoder:
    """Prefill and decode graphs of one model for up to `max_batch_size` sequences of up to `max_length` tokens.

    On a CUDA device each step is one replay of a CUDA graph, captured at the first use of a batch size (rounded up to
    a power of two). Elsewhere the graphs run operator by operator. One call at a time; the cache is overwritten by
    each call. Weights are read where the model holds them: moving, casting or training the model needs a new Decoder.
    """

    def __init__(
        self,
        model: Any,
        max_batch_size: int = 1,
        max_length: int = 1024,
        *,
        fuse: bool = True,
        cuda_graphs: bool = True,
        check: bool = True,
        listener: Listener | None = None,
    ) -> None:
        if max_batch_size < 1 or max_length < 2:
            raise ConfigError(
                f"compile_decode: max_batch_size={max_batch_size}, max_length={max_length}; give at least 1 and 2."
            )
        self.device: torch.device = model.device
        self.max_batch_size, self.max_length = max_batch_size, max_length
        self._cuda_graphs = cuda_graphs and self.device.type == "cuda"
        self._steps: dict[tuple[int, Selection], _Step] = {}
        try:
            with torch.no_grad():
                self.graphs: DecodeGraphs = build_graphs(
                    model, max_batch_size, max_length, fuse=fuse, listener=listener
                )
                if check:
                    verify(self.graphs, model)
            self._prefill = Prefill(self.graphs, self._cuda_graphs)
        except torch.OutOfMemoryError as error:
            raise BackendError(
                f"compile_decode: out of memory on {self.device} for {max_batch_size} x {max_length} tokens. Choose "
                f"fewer. ({error})"
            ) from error

    def serves(self, input_ids: Tensor, attention_mask: Tensor, options: Options) -> bool:
        """Whether `generate` takes this call."""
        batch, tokens = input_ids.shape
        fits = batch <= self.max_batch_size and tokens + options.new_tokens <= self.max_length
        return fits and len(options.eos) <= MOST_EOS and bool(attention_mask.any(1).all())

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, options: Options) -> Tensor:
        """input_ids int64 [B, T], mask 1 for tokens -> [B, T + new], `options.pad` after the end of a sequence.

        Raises:
            DataError: too many sequences or tokens for this decoder, or an empty prompt.
        """
        batch = input_ids.shape[0]
        lengths = attention_mask.sum(1)
        longest = int(lengths.max())
        self._check(batch, longest, int(lengths.min()), options)
        step = self._step(self._bucket(batch), options.selection)
        step.begin(options, batch)
        ids, last = _left_aligned(input_ids.to(self.device), attention_mask.to(self.device), longest)
        step.first(self._prefill(ids, last), last + 1, batch)
        done = 1
        while done < options.new_tokens:
            count = min(_LOOK_EVERY, options.new_tokens - done)
            if options.eos and step.all_finished():
                break
            for _ in range(count):
                step.run()
            done += count
        made = step.state.history[:batch, :done]
        if options.eos:
            made = made[:, : step.state.length(made)]
        return torch.cat([input_ids.to(self.device), made], dim=1)

    def _check(self, batch: int, longest: int, shortest: int, options: Options) -> None:
        if batch > self.max_batch_size or longest + options.new_tokens > self.max_length:
            raise DataError(
                f"{batch} sequences of {longest} + {options.new_tokens} tokens do not fit this decoder "
                f"(max_batch_size={self.max_batch_size}, max_length={self.max_length}). Compile a larger one."
            )
        if shortest < 1:
            raise DataError("a prompt without a token. Give each sequence at least one.")
        if len(options.eos) > MOST_EOS:
            raise DataError(f"{len(options.eos)} tokens that end a sequence; at most {MOST_EOS} are supported.")

    def _bucket(self, batch: int) -> int:
        """Batch size of the graph that serves so many sequences."""
        return min(self.max_batch_size, 1 << (batch - 1).bit_length())

    def _step(self, batch: int, how: Selection) -> _Step:
        key = (batch, how)
        if key not in self._steps:
            self._steps[key] = _Step(self.graphs, batch, how, self.device, self._cuda_graphs)
        return self._steps[key]


class _Step:
    """One decoding step at a fixed batch size: its state, and the CUDA graph over it."""

    def __init__(
        self, graphs: DecodeGraphs, batch: int, how: Selection, device: torch.device, cuda_graph: bool
    ) -> None:
        self._graphs, self._how = graphs, how
        self.state = StepState(batch, graphs.length, device)
        self._temperature, self._top_p = (torch.ones((), device=device) for _ in range(2))
        self._graph = self._captured() if cuda_graph else None

    def begin(self, options: Options, batch: int) -> None:
        """Settings of a call; rows beyond `batch` count as finished."""
        self._temperature.fill_(options.temperature)
        self._top_p.fill_(options.top_p)
        self.state.begin(options, batch)

    def first(self, logits: Tensor, lengths: Tensor, batch: int) -> None:
        """Take the token after the prompt from the prefill's logits [batch, V]; lengths [batch] of the prompts."""
        chosen = torch.zeros_like(self.state.finished, dtype=torch.long)
        chosen[:batch] = next_tokens(logits, self._how, self._temperature, self._top_p)
        self.state.positions[:batch, 0] = lengths - 1
        self.state.take(chosen)

    def run(self) -> None:
        """One more token of every sequence."""
        if self._graph is not None:
            self._graph.replay()
        else:
            self._compute()

    def all_finished(self) -> bool:
        """Whether every sequence has ended; waits for the device."""
        return bool(self.state.finished.all())

    def _compute(self) -> None:
        logits = self._graphs.decode(self.state.tokens, self.state.positions)["logits"][:, -1]
        if not logits.is_cuda:
            self.state.take(next_tokens(logits, self._how, self._temperature, self._top_p))
            return
        from tsld_fx.codegen.decode_step import likeliest_supported, take_token

        if not self._how.sample and likeliest_supported(logits):
            take_token(self.state, logits, None)
        else:
            take_token(self.state, None, next_tokens(logits, self._how, self._temperature, self._top_p))

    def _captured(self) -> Any:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # builds kernels, grows workspaces
                self._compute()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._compute()
        return graph


def _left_aligned(ids: Tensor, mask: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Tokens moved to the left of each row, padding (any token) to the right; and the last token's place, [B]."""
    order = torch.sort(1 - mask, dim=1, stable=True).indices
    return ids.gather(1, order)[:, :longest], mask.sum(1) - 1
