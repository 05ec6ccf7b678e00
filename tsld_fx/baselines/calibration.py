"""Walk a decoder layer by layer on calibration text: what each linear layer receives, and what comes out after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tsld_fx.analysis.activations import decoder_layers, first_tensor
from tsld_fx.errors import ConfigError


@dataclass
class InputStatistics:
    """What a linear layer has received.

    Attributes:
        gram: float64 [in, in], sum of x x^T.
        total_abs: float64 [in], sum of |x|.
        count: number of x.
    """

    gram: Tensor
    total_abs: Tensor
    count: int = 0

    def add(self, inputs: Tensor) -> None:
        """Count inputs [..., in]."""
        x = inputs.detach().reshape(-1, inputs.shape[-1]).double()  # TF32 would lose what the inverse needs
        self.gram += x.T @ x
        self.total_abs += x.abs().sum(0)
        self.count += x.shape[0]

    @property
    def mean_abs(self) -> Tensor:
        """Mean of |x| per feature."""
        return self.total_abs / max(self.count, 1)


def linear_weight(module: nn.Module) -> Tensor:
    """The [out, in] weight of a linear layer (GPT-2's Conv1D stores it transposed); a view."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight if isinstance(module, nn.Linear) else weight.T


def is_linear(module: nn.Module) -> bool:
    """nn.Linear or GPT-2's Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


@torch.no_grad()
def walk(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    chosen: Mapping[str, Any],
    quantise: Callable[[str, nn.Module, InputStatistics], None],
) -> None:
    """Quantise the linear layers of each decoder layer in turn, each on what the quantised layers before it give.

    Args:
        model: a float decoder in eval mode.
        batches: token numbers [B, T] on the model's device.
        chosen: names of the linear layers to quantise.
        quantise: called with name, module and statistics; changes the module's weight in place.

    Raises:
        ConfigError: a chosen layer lies outside the decoder layers.
    """
    layers = decoder_layers(model)
    names = {id(module): name for name, module in model.named_modules()}
    inside = {names[id(m)] for layer in layers for m in layer.modules() if is_linear(m)}
    outside = [name for name in chosen if name not in inside]
    if outside:
        raise ConfigError(f"calibration: {outside[0]!r} lies outside the decoder layers; leave it in full precision.")
    calls = _calls(model, layers, batches)
    hidden = [call[0][0][0] if call[0][0] else call[0][1]["hidden_states"] for call in calls]
    for index, layer in enumerate(layers):
        targets = {names[id(m)]: m for m in layer.modules() if is_linear(m) and names[id(m)] in chosen}
        statistics = {name: _empty(module) for name, module in targets.items()}
        handles = [m.register_forward_pre_hook(_counter(statistics[name])) for name, m in targets.items()]
        for x, call in zip(hidden, calls, strict=True):
            _call(layer, x, *call[index])
        for handle in handles:
            handle.remove()
        for name, module in targets.items():
            quantise(name, module, statistics[name])
        hidden = [_call(layer, x, *call[index]) for x, call in zip(hidden, calls, strict=True)]


def _calls(
    model: PreTrainedModel, layers: nn.ModuleList, batches: Sequence[Tensor]
) -> list[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Per batch and layer the arguments of the call; all hidden states but the first layer's are dropped."""
    calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if calls[-1]:
            args = (None, *args[1:]) if args else args
            kwargs = {**kwargs, "hidden_states": None} if "hidden_states" in kwargs else kwargs
        calls[-1].append((args, kwargs))

    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
    try:
        for ids in batches:
            calls.append([])
            model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _call(layer: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    if args:
        return first_tensor(layer(hidden, *args[1:], **kwargs))
    return first_tensor(layer(**{**kwargs, "hidden_states": hidden}))


def _empty(module: nn.Module) -> InputStatistics:
    weight = linear_weight(module)
    size, device = weight.shape[1], weight.device
    zeros = torch.zeros(size, size, dtype=torch.float64, device=device)
    return InputStatistics(zeros, torch.zeros(size, dtype=torch.float64, device=device))


def _counter(statistics: InputStatistics) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        statistics.add(args[0])

    return hook
