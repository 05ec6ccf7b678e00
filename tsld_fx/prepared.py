"""`prepare`: a Hugging Face decoder whose forward pass runs the captured, fake-quantised graph."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, fx, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from tsld_fx import losses
from tsld_fx.capture import attach, capture, check_decoder, max_positions, takes_positions
from tsld_fx.config import QuantConfig
from tsld_fx.distill import DistillConfig
from tsld_fx.errors import CheckpointError, ConfigError, DataError
from tsld_fx.fused_loss import HeadLoss
from tsld_fx.fused_loss_chunks import Objective
from tsld_fx.layered import LayeredView
from tsld_fx.passes import split_off_head
from tsld_fx.passes.fuse_head_loss import FuseHeadLoss
from tsld_fx.passes.insert_distillation_hooks import InsertDistillationHooks
from tsld_fx.passes.pipelines import prepare_pipeline
from tsld_fx.passes.retarget_device import RetargetDevice
from tsld_fx.passes.runner import Listener, run_passes
from tsld_fx.passes.set_dropout import SetDropout
from tsld_fx.passes.split_off_head import SplitOffHead

logger = logging.getLogger(__name__)
LEARNED_LEAVES = ("weight_scale", "weight_clip")
_HARMLESS = {
    "use_cache",
    "return_dict",
    "cache_position",
    "segment_ids",
    "logits_to_keep",
    "num_items_in_batch",
}


Ending = Objective | Literal["head_input"] | None  # how a graph ends: losses, the head's input, or logits
Key = tuple[bool, str]  # with positions; the name of the ending


@dataclass
class PreparedOutput(ModelOutput):
    """What a prepared model returns.

    Attributes:
        loss: cross-entropy with the next token when labels are given.
        logits: [B, T, V].
        hidden_states, attention_scores: one tensor per layer where the taps are on, else None.
        loss_terms, token_scores: with `head_loss`: value of each loss [terms], and the teacher's cross-entropy of each
            token [B, T - 1] when it was computed here.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attention_scores: tuple[Tensor, ...] | None = None
    loss_terms: Tensor | None = None
    token_scores: Tensor | None = None


class HeadInput(NamedTuple):
    """What the head of a model reads: hidden states [B, T, H], weight [V, H], bias [V] or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


@dataclass
class _State:
    """The graphs of one prepared model; all of them read the model's own parameters."""

    config: QuantConfig | None  # None: a full-precision model that only runs as a graph (a teacher with taps)
    taps: tuple[str, ...]
    device: torch.device
    listener: Listener | None = None
    graphs: dict[Key, fx.GraphModule] = field(default_factory=dict)
    layered: bool = False  # run by layers, not as the flat graph
    recompute: bool = False  # layers are computed again in the backward pass
    views: dict[bool, LayeredView] = field(default_factory=dict)  # by layers, without and with positions

    def graph_modules(self) -> list[fx.GraphModule]:
        return [*self.graphs.values(), *(part for view in self.views.values() for part in view.graph_modules())]


class PreparedModel(PreTrainedModel):
    """Mixed into the model's own class by `prepare`: same parameters and names, forward through the graph."""

    accepts_loss_kwargs = False  # a Trainer averages the loss over accumulation steps
    _tsld: _State

    @property
    def graph_module(self) -> fx.GraphModule:
        """The flat graph with tsld::fake_quant nodes, in the mode (train or eval) that the model is in."""
        return self._graph(False)

    @property
    def quant_config(self) -> QuantConfig:
        """What is quantised and how."""
        return self._tsld.config or QuantConfig(weight=None)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        head_loss: HeadLoss | None = None,
        **kwargs: Any,
    ) -> PreparedOutput:
        """Run the graph.

        Args:
            input_ids: [B, T] int64.
            attention_mask: [B, T], 1 for tokens and 0 for padding; None for no padding.
            position_ids: [B, T]; None lets the model count them as it does by itself.
            labels: [B, T] unshifted, -100 ignored; adds the loss.
            head_loss: run head and losses as one operator instead: the result has `loss` and no logits.

        Raises:
            DataError: inputs that do not fit the model.
        """
        _check_inputs(self, input_ids, kwargs)
        if head_loss is not None:
            values = self._run(head_loss.objective, input_ids, attention_mask, position_ids, head_loss.tensors())
            taps = {tap: _tapped(values, tap) for tap in ("hidden_states", "attention_scores")}
            return PreparedOutput(**{k: values[k] for k in ("loss", "loss_terms", "token_scores")}, **taps)
        values = self._run(None, input_ids, attention_mask, position_ids, {})
        loss = None if labels is None else losses.ground_truth(values["logits"], labels)
        return PreparedOutput(
            loss=loss,
            logits=values["logits"],
            hidden_states=_tapped(values, "hidden_states"),
            attention_scores=_tapped(values, "attention_scores"),
        )

    def head_input(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> HeadInput:
        """Run the graph up to its head, for a model whose `fuse_head_loss` is possible."""
        _check_inputs(self, input_ids, {})
        values = self._run("head_input", input_ids, attention_mask, None, {})
        return HeadInput(*(values[name] for name in split_off_head.RESULTS))

    def _run(
        self, ending: Ending, input_ids: Tensor | None, mask: Tensor | None, positions: Tensor | None, named: Any
    ) -> Any:
        """Call the graph with that ending, by layers where the model runs so."""
        assert input_ids is not None
        arguments = [input_ids, torch.ones_like(input_ids) if mask is None else mask]
        with_positions = positions is not None and takes_positions(self)
        if with_positions and positions is not None:
            arguments.append(positions.expand_as(input_ids))
        self._follow_device(input_ids.device)
        if not self._tsld.layered:
            return self._graph(with_positions, ending)(*arguments, **named)
        view = self.layer_view(with_positions, ending)
        return view.root(*arguments, **named, **({"ending": ending_name(ending)} if ending else {}))

    def train(self, mode: bool = True) -> PreparedModel:
        """Switch dropout in the modules and in the graphs."""
        if mode == self.training:  # a Trainer says so before every step
            super().train(mode)
            return self
        super().train(mode)
        for graph_module in self._tsld.graph_modules():
            run_passes(graph_module, [SetDropout(mode)])
        return self

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' generate without a KV cache: the training graph has none. `convert` gives a model that has."""
        kwargs["use_cache"] = False
        return super().generate(*args, **kwargs)

    def set_taps(self, taps: tuple[str, ...]) -> None:
        """Turn the outputs for layer-to-layer distillation on or off."""
        if taps == self._tsld.taps:
            return
        self._tsld.taps = taps
        self._tsld.views.clear()
        self._tsld.graphs = {key: graph for key, graph in self._tsld.graphs.items() if not key[1]}
        for graph_module in self._tsld.graphs.values():
            run_passes(graph_module, [InsertDistillationHooks(taps)])

    def learned_scales(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters of the learned scales and clips."""
        return [(n, p) for n, p in self.named_parameters() if n.rpartition(".")[2] in LEARNED_LEAVES]

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Keep only what enters each layer, and compute the layer again in the backward pass.

        The model then runs by layers; values and gradients are the same bits as without.

        Raises:
            ConfigError: options of transformers that this model does not have (reentrant checkpoints, offloading,
                every n-th layer).
        """
        options = {**(gradient_checkpointing_kwargs or {}), **kwargs}
        for name, harmless in (("use_reentrant", (None, False)), ("every_n_layers", (1,)), ("offload", (False, None))):
            if options.pop(name, harmless[0]) not in harmless:
                raise ConfigError(
                    f"gradient checkpointing of a prepared model has no {name}: every layer is recomputed, without "
                    f"reentrant autograd. Leave {name} out of gradient_checkpointing_kwargs."
                )
        if options:
            raise ConfigError(
                f"gradient_checkpointing_kwargs: {next(iter(options))!r} is not an option of a prepared model. "
                "Leave it out."
            )
        self._set_recompute(True)

    def gradient_checkpointing_disable(self) -> None:
        """Keep every activation again, and run the flat graph."""
        self._set_recompute(False)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether layers are computed again in the backward pass."""
        return self._tsld.recompute

    def forget_views(self) -> None:
        """Drop the views by layers, and run the flat graph (or a fresh view, when layers are recomputed)."""
        self._tsld.views.clear()
        self._tsld.layered = self._tsld.recompute

    def _set_recompute(self, mode: bool) -> None:
        self._tsld.layered = self._tsld.recompute = mode
        for view in self._tsld.views.values():
            view.recompute(mode)

    def layer_view(self, with_positions: bool = False, ending: Ending = None) -> LayeredView:
        """The graph cut into layers, which gradient checkpointing, FSDP and pipelines run; it has that ending too.

        Raises:
            PassError: the graph cannot be cut into layers.
        """
        views = self._tsld.views
        if with_positions not in views:
            views[with_positions] = LayeredView(self._graph(with_positions), self)
            views[with_positions].recompute(self._tsld.recompute)
        if ending is not None:
            views[with_positions].add_ending(ending_name(ending), self._graph(with_positions, ending))
        return views[with_positions]

    def fuse_head_loss(self, objective: Objective) -> bool:
        """Make the graph whose head and losses are one operator (see `FuseHeadLoss`), for `head_loss` in forward.

        Returns:
            Whether that is possible: False where the logits are not the plain result of a linear head.
        """
        return "loss" in self._graph(False, objective).graph.output_node().args[0]

    def _graph(self, with_positions: bool, ending: Ending = None) -> fx.GraphModule:
        key = (with_positions, ending_name(ending))
        if key not in self._tsld.graphs:
            self._tsld.graphs[key] = self._new_graph(with_positions, ending)
        return self._tsld.graphs[key]

    def _new_graph(self, with_positions: bool, ending: Ending) -> fx.GraphModule:
        state = self._tsld
        if ending is not None:
            base = self._graph(with_positions)
            twin = attach(copy.deepcopy(base.graph), self, base)
            if isinstance(ending, str):
                return run_passes(twin, [SplitOffHead()])
            return run_passes(twin, [FuseHeadLoss(ending.kinds, ending.weights, ending.temperatures)])
        graph_module = capture(self._captured(), with_positions=with_positions, listener=state.listener)
        passes = prepare_pipeline(state.config or QuantConfig(weight=None), state.taps, _output_name(self))
        graph_module = run_passes(graph_module, passes, state.listener)
        return run_passes(graph_module, [SetDropout(self.training)])

    def _captured(self) -> PreTrainedModel:
        """The same modules under the model's original class, whose forward torch.export can trace."""
        return _retyped(self, type(self).__mro__[2])

    def _follow_device(self, device: torch.device) -> None:
        if device != self._tsld.device:
            for graph_module in self._tsld.graph_modules():
                run_passes(graph_module, [RetargetDevice(device)])
                for name, buffer in graph_module.named_buffers(recurse=False):
                    graph_module.register_buffer(name, buffer.to(device), persistent=False)
            self._tsld.device = device

    def __deepcopy__(self, memo: dict[int, Any]) -> PreparedModel:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if k != "_tsld"})
        state = self._tsld
        graphs = {key: attach(copy.deepcopy(g.graph), twin, g) for key, g in state.graphs.items()}
        twin.__dict__["_tsld"] = _State(
            state.config, state.taps, state.device, None, graphs, state.layered, state.recompute
        )
        return twin


def prepare(
    model: PreTrainedModel,
    config: QuantConfig | None = None,
    *,
    distill: DistillConfig | None = None,
    listener: Listener | None = None,
) -> PreparedModel:
    """Capture a decoder and insert fake quantisation, ready to train or to convert at once.

    The result shares every parameter with `model`, under the same names; nothing is copied. A model in float16 or
    bfloat16 is first upcast in place to float32, because those are the master weights that training moves.

    Args:
        model: any decoder-only AutoModelForCausalLM.
        config: what to quantise (default: ternary TWN per output channel, all linear layers but the head).
        distill: adds the taps that this method needs; TSLDTrainer does it by itself.
        listener: called after each pass (`tsld-fx inspect` uses it).

    Returns:
        A model of the same transformers class, whose forward(input_ids, attention_mask, position_ids, labels) runs
        `prepared.graph_module`.

    Raises:
        TsldError: the model is no decoder, cannot be captured, or does not fit the configuration.
    """
    config = config or QuantConfig()
    if isinstance(model, PreparedModel):
        raise ConfigError("prepare: the model is prepared already. Load it again to prepare it in another way.")
    check_decoder(model)
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise ConfigError("prepare: the model's weights are quantised already. Start from the float checkpoint.")
    _upcast(model)
    prepared = graph_model(model, config, distill.taps if distill else (), listener)
    prepared.config.tsld_fx = config.to_dict()
    return prepared


def graph_model(
    model: PreTrainedModel,
    config: QuantConfig | None,
    taps: tuple[str, ...],
    listener: Listener | None = None,
) -> PreparedModel:
    """Wrap a model so that it runs as a graph; with config None nothing is quantised (a teacher that gives taps).

    A model that runs as a graph already only gets the taps.
    """
    if isinstance(model, PreparedModel):
        model.set_taps(taps)
        return model
    base: Any = type(model)
    wrapped: PreparedModel = _retyped(model, prepared_class(base))
    wrapped.config = copy.deepcopy(model.config)
    device = model.get_input_embeddings().weight.device
    wrapped.__dict__["_tsld"] = _State(config, taps, device, listener)
    wrapped._graph(False)
    return wrapped


def ending_name(ending: Ending) -> str:
    """The name of an ending in `Root.forward` and `LayeredView.stage`; "" for logits."""
    return (ending if isinstance(ending, str) else ending.key) if ending else ""


@cache
def prepared_class(base: type[PreTrainedModel]) -> type[PreparedModel]:
    """The model's own class with PreparedModel in front; it keeps the name, which checkpoints record."""
    return type(base.__name__, (PreparedModel, base), {"__doc__": base.__doc__, "__module__": __name__})


def _retyped(model: PreTrainedModel, cls: type) -> Any:
    """A second object over the same modules, parameters and buffers, of another class."""
    twin: Any = object.__new__(cls)
    twin.__dict__.update({k: v for k, v in model.__dict__.items() if k != "_tsld"})
    return twin


def _upcast(model: PreTrainedModel) -> None:
    low = {p.dtype for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16)}
    if not low:
        return
    names = ", ".join(sorted(str(d).removeprefix("torch.") for d in low))
    logger.warning(
        "prepare: upcasting the model's %s weights to float32 in place: they become the master weights.",
        names,
    )
    model.float()
    model.config.dtype = torch.float32


def _output_name(model: PreTrainedModel) -> str:
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), "lm_head")


def _tapped(values: dict[str, Tensor], tap: str) -> tuple[Tensor, ...] | None:
    return tuple(v for k, v in values.items() if k.startswith(f"{tap}.")) or None


def _check_inputs(model: PreparedModel, input_ids: Tensor | None, kwargs: dict[str, Any]) -> None:
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


def load_prepared(folder: str | Path, **kwargs: Any) -> PreparedModel:
    """Load what `prepared.save_pretrained(folder)` wrote, ready to train on or to convert.

    Args:
        kwargs: go to AutoModelForCausalLM.from_pretrained.

    Raises:
        CheckpointError: the folder holds no prepared model, or a damaged one.
    """
    from tsld_fx.checkpoint import from_pretrained, read_config, read_tensors

    recorded = read_config(Path(folder)).get("tsld_fx")
    if recorded is None:
        raise CheckpointError(
            f"{folder}: config.json has no 'tsld_fx' entry, so this is not a prepared model. "
            "Use tsld_fx.load for a converted one, or prepare(AutoModelForCausalLM.from_pretrained(...))."
        )
    model = from_pretrained(Path(folder), dtype=torch.float32, **kwargs)
    prepared = prepare(model, QuantConfig.from_dict(recorded))
    wanted = {n for n, _ in prepared.named_parameters()} | {n for n, _ in prepared.named_buffers()}
    quantiser = _is_quantiser_value
    stored = read_tensors(Path(folder), lambda name: name in wanted and quantiser(name))
    missing = [n for n, _ in prepared.learned_scales() if n not in stored]
    if missing:
        raise CheckpointError(f"{folder}: the learned scale {missing[0]!r} is missing. The checkpoint is incomplete.")
    with torch.no_grad():
        for name, value in stored.items():
            prepared.get_submodule(name.rpartition(".")[0]).__getattr__(name.rpartition(".")[2]).copy_(value)
    return prepared


def _is_quantiser_value(name: str) -> bool:
    return name.rpartition(".")[2] in (*LEARNED_LEAVES, "weight_zero")


__all__ = ["PreparedModel", "PreparedOutput", "load_prepared", "prepare"]
