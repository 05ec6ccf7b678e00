"""One training step's forward and backward pass as a CUDA graph: one launch instead of thousands."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)
WARM_UP = 3  # steps that run as usual first, on the stream that is captured later: libraries set themselves up


class StepGraph:
    """Runs a step as usual a few times, captures it, and from then on replays it.

    A batch of another shape, or a capture that fails, runs as usual. Gradients must be None before each call
    (`zero_grad`), because a replay writes them anew.

    Args:
        model: whose parameters get the gradients.
        step: forward and backward on a batch; returns the loss, and its other results by way of `extras`.
        extras: takes the tensors that a step left behind besides the loss.
    """

    def __init__(
        self,
        model: nn.Module,
        step: Callable[[dict[str, Any]], Tensor],
        extras: Callable[[], dict[str, list[Tensor]]],
    ) -> None:
        self._model, self._step, self._extras = model, step, extras
        self._stream = torch.cuda.Stream()
        self._steps, self._failed = 0, False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: dict[str, Any] = {}
        self._loss: Tensor | None = None
        self._left: dict[str, list[Tensor]] = {}
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []

    def __call__(self, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """The loss of a batch and what the step left behind; gradients are in the parameters."""
        if self._graph is None and not self._failed and self._steps >= WARM_UP:
            self._capture(inputs)
        self._steps += 1
        if self._graph is None or not self._fits(inputs):
            return self._as_usual(inputs), self._extras()
        for name, value in self._inputs.items():
            if isinstance(value, Tensor):
                value.copy_(inputs[name], non_blocking=True)
        self._graph.replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        assert self._loss is not None
        return self._loss.clone(), {name: [v.clone() for v in values] for name, values in self._left.items()}

    def _as_usual(self, inputs: dict[str, Any]) -> Tensor:
        if self._steps > WARM_UP:
            return self._step(inputs)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            loss = self._step(inputs)
        torch.cuda.current_stream().wait_stream(self._stream)
        return loss

    def _fits(self, inputs: dict[str, Any]) -> bool:
        return inputs.keys() == self._inputs.keys() and all(
            _signature(value) == _signature(self._inputs[name]) for name, value in inputs.items()
        )

    def _capture(self, inputs: dict[str, Any]) -> None:
        self._inputs = {name: v.clone() if isinstance(v, Tensor) else v for name, v in inputs.items()}
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._loss = self._step(self._inputs)
        except Exception as error:
            self._failed = True
            self._extras()
            for parameter in self._model.parameters():
                parameter.grad = None
            logger.warning("the step cannot be captured as a CUDA graph, it goes on as usual: %s", error)
            return
        self._left = self._extras()
        self._gradients = [(p, p.grad) for p in self._model.parameters() if p.grad is not None]
        self._graph = graph


def _signature(value: Any) -> Any:
    return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else value
