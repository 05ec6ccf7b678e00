"""What `prepare` returns: a Hugging Face decoder whose forward pass runs the captured, fake-quantised graph."""

from __future__ import annotations

import copy
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers import PreTrainedModel

from tsld_fx import losses
from tsld_fx.capture import attach, capture, takes_positions
from tsld_fx.config import QuantConfig
from tsld_fx.errors import ConfigError
from tsld_fx.fused_loss import HeadLoss
from tsld_fx.fused_loss_chunks import Objective
from tsld_fx.layered import LayeredView
from tsld_fx.passes import split_off_head
from tsld_fx.passes.fuse_head_loss import FuseHeadLoss
from tsld_fx.passes.insert_distillation_hooks import InsertDistillationHooks
from tsld_fx.passes.pipelines import prepare_pipeline
from tsld_fx.passes.retarget_device import RetargetDevice
from tsld_fx.passes.runner import run_passes
from tsld_fx.passes.set_dropout import SetDropout
from tsld_fx.passes.split_off_head import SplitOffHead
from tsld_fx.prepared_inputs import check_inputs
from tsld_fx.prepared_state import Ending, GraphState, HeadInput, PreparedOutput, ending_name
from tsld_fx.whole_files import check_folder

LEARNED_LEAVES = ("weight_scale", "weight_clip")


class PreparedModel(PreTrainedModel):
    """Mixed into the model's own class by `prepare`: same parameters and names, forward through the graph."""

    accepts_loss_kwargs = False  # a Trainer averages the loss over accumulation steps
    _tsld: GraphState

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
        check_inputs(self, input_ids, kwargs, attention_mask)
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
        check_inputs(self, input_ids, {}, attention_mask)
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

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """transformers' save_pretrained: the float weights, and how they are quantised (`load_prepared` reads it).

        Raises:
            CheckpointError: a file is in the way of the folder.
        """
        check_folder(os.fspath(save_directory))
        super().save_pretrained(save_directory, *args, **kwargs)

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
        return retyped(self, type(self).__mro__[2])

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
        twin.__dict__["_tsld"] = GraphState(
            state.config, state.taps, state.device, None, graphs, state.layered, state.recompute
        )
        return twin


@cache
def prepared_class(base: type[PreTrainedModel]) -> type[PreparedModel]:
    """The model's own class with PreparedModel in front; it keeps the name, which checkpoints record."""
    return type(base.__name__, (PreparedModel, base), {"__doc__": base.__doc__, "__module__": __name__})


def retyped(model: PreTrainedModel, cls: type) -> Any:
    """A second object over the same modules, parameters and buffers, of another class."""
    twin: Any = object.__new__(cls)
    twin.__dict__.update({k: v for k, v in model.__dict__.items() if k != "_tsld"})
    return twin


def _output_name(model: PreTrainedModel) -> str:
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), "lm_head")


def _tapped(values: dict[str, Tensor], tap: str) -> tuple[Tensor, ...] | None:
    return tuple(v for k, v in values.items() if k.startswith(f"{tap}.")) or None
