"""What happens inside a Hugging Face decoder: attention outputs and hidden states of each layer, by forward hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tsld_fx.errors import AnalysisError
from tsld_fx.lowered import convert
from tsld_fx.prepared import PreparedModel


@dataclass
class Activations:
    """One forward pass.

    Attributes:
        attention_outputs, hidden_states: per layer [B, T, H]: what its self-attention adds to the residual stream,
            and what it gives to the next layer.
        inputs: per layer [B, T, H], the hidden states that it received.
        logits: [B, T, V].
    """

    attention_outputs: list[Tensor] = field(default_factory=list)
    hidden_states: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


def as_modules(model: PreTrainedModel) -> PreTrainedModel:
    """A model whose modules are what runs: a prepared model runs as a graph, so its packed twin stands for it."""
    return convert(model.eval(), "reference") if isinstance(model, PreparedModel) else model.eval()


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder layers: the longest ModuleList that lies least deep.

    Raises:
        AnalysisError: the model has none.
    """
    found = [(name.count("."), -len(m), m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    if not found:
        raise AnalysisError(f"{type(model).__name__} has no list of layers (nn.ModuleList), so no depth to look at.")
    return min(found, key=lambda entry: entry[:2])[2]


def attention_of(layer: nn.Module) -> nn.Module:
    """The outermost self-attention module of a layer.

    Raises:
        AnalysisError: no child is called an attention.
    """
    for _, module in layer.named_modules():
        if module is not layer and "Attention" in type(module).__name__:
            return module
    raise AnalysisError(f"{type(layer).__name__} has no module whose class is called an attention.")


def first_tensor(value: Any) -> Tensor:
    """A module's result, or the first of several."""
    return value if isinstance(value, Tensor) else value[0]


@torch.no_grad()
def run(model: PreTrainedModel, input_ids: Tensor, feed: Sequence[Tensor] | None = None) -> Activations:
    """One forward pass with everything recorded.

    Args:
        model: a float or packed Hugging Face decoder in eval mode.
        input_ids: [B, T] int64 on the model's device.
        feed: one [B, T, H] per layer that replaces what the layer would receive. With the teacher's hidden states,
            each layer shows the error that it makes by itself.
    """
    found = Activations()
    with _hooks(model, found, feed):
        found.logits = model(input_ids=input_ids, use_cache=False).logits
    return found


@contextlib.contextmanager
def _hooks(model: PreTrainedModel, found: Activations, feed: Sequence[Tensor] | None) -> Iterator[None]:
    handles = []

    def before(index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if feed is not None:
                if args:
                    args = (feed[index], *args[1:])
                else:
                    kwargs = {**kwargs, "hidden_states": feed[index]}
            found.inputs.append(args[0] if args else kwargs["hidden_states"])
            return args, kwargs

        return hook

    def after(store: list[Tensor]) -> Any:
        def hook(_: nn.Module, __: Any, result: Any) -> None:
            store.append(first_tensor(result))

        return hook

    for index, layer in enumerate(decoder_layers(model)):
        handles.append(layer.register_forward_pre_hook(before(index), with_kwargs=True))
        handles.append(attention_of(layer).register_forward_hook(after(found.attention_outputs)))
        handles.append(layer.register_forward_hook(after(found.hidden_states)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def attention_maps(model: PreTrainedModel, input_ids: Tensor) -> list[Tensor]:
    """Attention probabilities of each layer, [heads, T, T] float32, for one sequence.

    Args:
        input_ids: [1, T] on the model's device.

    Raises:
        AnalysisError: the architecture does not give its attention out.
    """
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")
        maps = model(input_ids=input_ids, use_cache=False, output_attentions=True).attentions
    except (TypeError, ValueError, AttributeError) as error:
        raise AnalysisError(f"{type(model).__name__} gives no attention maps out ({error}).") from error
    finally:
        model.set_attn_implementation(before)
    if not maps or maps[0] is None:
        raise AnalysisError(f"{type(model).__name__} gives no attention maps out.")
    return [m[0].float().cpu() for m in maps]
