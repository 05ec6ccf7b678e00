"""From a Hugging Face decoder, or a folder, to a prepared model."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tsld_fx.capture import check_decoder
from tsld_fx.config import QuantConfig, check_type
from tsld_fx.distill import DistillConfig
from tsld_fx.errors import CheckpointError, ConfigError
from tsld_fx.passes.runner import Listener
from tsld_fx.prepared import LEARNED_LEAVES, PreparedModel, prepared_class, retyped
from tsld_fx.prepared_state import GraphState

logger = logging.getLogger(__name__)


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
    config, distill = config or QuantConfig(), distill or DistillConfig("gt")
    check_type("prepare", config, QuantConfig)
    check_type("prepare", distill, DistillConfig)
    if isinstance(model, PreparedModel):
        raise ConfigError("prepare: the model is prepared already. Load it again to prepare it in another way.")
    check_decoder(model)
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise ConfigError("prepare: the model's weights are quantised already. Start from the float checkpoint.")
    _upcast(model)
    prepared = graph_model(model, config, distill.taps, listener)
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
    wrapped: PreparedModel = retyped(model, prepared_class(base))
    wrapped.config = copy.deepcopy(model.config)
    device = model.get_input_embeddings().weight.device
    wrapped.__dict__["_tsld"] = GraphState(config, taps, device, listener)
    wrapped._graph(False)
    return wrapped


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


__all__ = ["graph_model", "load_prepared", "prepare"]
