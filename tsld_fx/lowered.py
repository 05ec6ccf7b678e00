"""`convert`: from trained fake-quantised weights to packed ones, in the graph and in the Hugging Face model."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from transformers import PreTrainedModel

from tsld_fx.backends import check_activations, check_backend, check_rounding, use_backend
from tsld_fx.capture import attach, capture, max_positions
from tsld_fx.errors import ConfigError
from tsld_fx.hf_quantizer import TsldHfQuantizer, TsldQuantizationConfig
from tsld_fx.lowbit_linear import LowBitLinear
from tsld_fx.model_card import write_card
from tsld_fx.passes.graph_tools import attribute, calls, module_path
from tsld_fx.passes.pipelines import convert_pipeline
from tsld_fx.passes.runner import Listener, run_passes
from tsld_fx.prepared import PreparedModel
from tsld_fx.prepared_inputs import check_ids, check_length, check_tokens
from tsld_fx.whole_files import check_folder

if TYPE_CHECKING:
    from tsld_fx.decode import Decoder

_OWN = ("_tsld_graph", "_tsld_decoder")  # attributes that belong to one object and are neither copied nor saved


class LoweredModel(PreTrainedModel):
    """Mixed into the model's own class by `convert` and `load`: packed linear layers, everything else as it was.

    forward, generate (with every KV cache that the architecture supports), save_pretrained and pipelines are
    transformers' own; `graph_module` is the same model as one graph.
    """

    backend: str
    _tsld_graph: list[fx.GraphModule]  # in a list so that nn.Module does not register it as a child
    _tsld_decoder: dict[str, Any]  # "decoder", and the "place" (dtype, device) it was compiled for

    @property
    def graph_module(self) -> fx.GraphModule:
        """The flat inference graph with tsld::lowbit_linear nodes; input_ids, attention_mask -> {"logits"}."""
        place = (self.dtype, self.device)
        if self._tsld_graph and self._tsld_graph[0].meta["place"] != place:  # `.half()` or `.cuda()` came after it
            self._tsld_graph.clear()
        if not self._tsld_graph:
            self._tsld_graph.append(capture(_plain(self), training=False))
            self._tsld_graph[0].meta["place"] = place
        return self._tsld_graph[0]

    def lowbit_layers(self) -> dict[str, LowBitLinear]:
        """Name -> packed layer."""
        return {name: module for name, module in self.named_modules() if isinstance(module, LowBitLinear)}

    def compile_decode(self, max_batch_size: int = 1, max_length: int | None = None, **options: Any) -> Decoder:
        """Prepare fast generation: `generate` then runs over a static KV cache, one CUDA graph replay per token.

        Calls that the decoder does not serve (more or longer sequences, beam search, logits processors, streamers)
        go to transformers' generate as before. See docs/decode.md.

        Args:
            max_batch_size: sequences in one call.
            max_length: tokens of a sequence, prompt included; default the model's positions, at most 4096.
            options: `cuda_graphs=False` runs without CUDA graphs, `fuse=False` without fused operators,
                `check=False` skips the comparison with the model's own logits.

        Raises:
            CaptureError: the model's attention has no static form (sliding windows, no fused attention).
            BackendError: out of memory.
        """
        from tsld_fx.decode import Decoder

        length = min(max_positions(self) or 4096, 4096) if max_length is None else max_length
        self._tsld_decoder.clear()
        self._tsld_decoder.update(
            decoder=Decoder(_plain(self), max_batch_size, length, **options),
            place=(self.dtype, self.device),
        )
        return self._tsld_decoder["decoder"]  # type: ignore[no-any-return]

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' generate; over the static cache of `compile_decode` where that serves the call.

        Raises:
            DataError: no token numbers, or prompt and new tokens are more than the model has learned positions for.
        """
        prompt = inputs if inputs is not None else kwargs.get("input_ids")
        if prompt is not None:
            check_ids(prompt, "generate", "Of a tokenizer's result pass generate(**encoded).")
            if prompt.device.type == "cpu":  # a GPU would have to be waited for
                check_tokens(prompt, self)
            new = kwargs.get("max_new_tokens") or getattr(kwargs.get("generation_config"), "max_new_tokens", None)
            length = kwargs.get("max_length") if new is None else prompt.shape[1] + new
            check_length(self, max(prompt.shape[1], (length or 0) - 1))  # the last token is never fed back
        made = None if args else self._decoded(inputs, kwargs)
        return super().generate(inputs, *args, **kwargs) if made is None else made

    def _decoded(self, inputs: Tensor | None, kwargs: dict[str, Any]) -> Tensor | None:
        """What the compiled decoder generates, None where there is none or it does not serve the call."""
        if not self._tsld_decoder:
            return None
        if self._tsld_decoder["place"] != (self.dtype, self.device):  # `.half()` or `.cuda()` came after it
            self._tsld_decoder.clear()
            return None
        from tsld_fx.decode.options import options_of, prompt_of

        prompt = prompt_of(inputs, kwargs)
        options = None if prompt is None else options_of(self, prompt[0].shape[1], kwargs)
        decoder: Decoder = self._tsld_decoder["decoder"]
        if prompt is None or options is None or not decoder.serves(*prompt, options):
            return None
        return decoder.generate(*prompt, options)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """transformers' save_pretrained; a folder without a README.md of its own also gets a model card.

        Raises:
            CheckpointError: a file is in the way of the folder.
        """
        check_folder(os.fspath(save_directory))
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            write_card(self.config, Path(save_directory))

    def __deepcopy__(self, memo: dict[int, Any]) -> LoweredModel:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if k not in _OWN})
        twin.__dict__["_tsld_decoder"] = {}
        twin.__dict__["_tsld_graph"] = [attach(copy.deepcopy(g.graph), twin, g) for g in self._tsld_graph]
        for ours, theirs in zip(twin._tsld_graph, self._tsld_graph, strict=True):
            ours.meta["place"] = theirs.meta["place"]
        return twin


@dataclass(frozen=True)
class _Layer:
    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    group_size: int
    in_features: int
    bias: Tensor | None


def convert(
    prepared: PreparedModel, backend: str = "auto", *, activations: str = "a16", listener: Listener | None = None
) -> LoweredModel:
    """Freeze the scales, pack the weights and lower every quantised linear to tsld::lowbit_linear.

    The dequantised weight of each layer equals the trained fake-quantised one bit for bit. The result is a snapshot:
    it shares nothing with `prepared`, which stays as it was and can be trained on.

    Args:
        prepared: what `prepare` returned, trained or not (not trained: post-training quantisation).
        backend: `reference` (plain torch, on any device), `cuda` (the result is moved to a CUDA device, where fp16
            and bf16 activations run low-bit kernels: call `.to(torch.float16)` or `.to(torch.bfloat16)` on it),
            `cpu` (kernels built by the system's C++ compiler, once), or `auto`: the kernels of the device that
            `prepared` lies on, or `reference`, with a warning, where they cannot run.
        activations: how kernels take the inputs of a layer; checkpoints record it. `a16`: on CUDA as they are, on the
            CPU as two int8 limbs or more, a relative error of at most 1e-4 a layer; `int8` (CPU, Hopper GPUs): rounded
            to 8 bits per row, about 1e-2; `fp8` (Hopper GPUs): likewise to e4m3, about 3e-2; `add` (CPU): float32
            additions and subtractions only. On GPUs 8 bits need many tokens and ternary layers with one scale per
            channel or tensor, `add` needs ternary layers; other layers and calls run `a16` (docs/cuda.md).
        listener: called after each pass.

    Raises:
        TsldError: not a prepared model, a backend that is unknown or cannot run here, or weights that are not finite.
    """
    if not isinstance(prepared, PreparedModel):
        raise ConfigError(
            f"convert: expected the result of tsld_fx.prepare, got {type(prepared).__name__}. Call prepare first; "
            "tsld_fx.load reads a model that was converted and saved."
        )
    check_activations(activations, backend)
    check_backend(backend, prepared.device)
    config = prepared.quant_config
    weights = [w for w in (config.weight, *config.overrides.values()) if w is not None]
    check_rounding(activations, backend, prepared.device, [(w.bits, w.granularity == "group") for w in weights])
    graph_module = prepared.graph_module
    snapshot = fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph))  # containers of its own
    snapshot = run_passes(snapshot, convert_pipeline(), listener)
    layers = _packed_layers(snapshot)
    if not layers:
        raise ConfigError(f"convert: {config} leaves every layer in full precision, so there is nothing to pack.")
    modules = {name: _module(layer) for name, layer in layers.items()}
    lowered = _clone(prepared, "", modules, {})
    lowered = _as_lowered(lowered, type(prepared).__mro__[2])
    lowered.config = _config(prepared, modules, activations)
    attach_quantizer(lowered)
    lowered.__dict__["_tsld_graph"] = [attach(copy.deepcopy(snapshot.graph), lowered, snapshot)]
    lowered._tsld_graph[0].meta["place"] = (lowered.dtype, lowered.device)
    lowered.__dict__["backend"] = use_backend(lowered, lowered.lowbit_layers(), backend, activations)
    return lowered


def _packed_layers(graph_module: fx.GraphModule) -> dict[str, _Layer]:
    layers = {}
    for node in calls(graph_module.graph, torch.ops.tsld.lowbit_linear.default):
        packed, scale, zero, bias = (None if a is None else attribute(graph_module, a.target) for a in node.args[1:5])
        name = module_path(node) or str(node.args[1].target).rpartition(".")[0]
        bits, group_size, in_features = node.args[5:]
        layers[name] = _Layer(packed, scale, zero, bits, group_size, in_features, bias)
    return layers


def _module(layer: _Layer) -> LowBitLinear:
    rows, bias = layer.packed.shape[0], layer.bias
    module = LowBitLinear(
        layer.in_features, rows, layer.bits, layer.group_size,
        zero=layer.zero is not None, bias=bias is not None, device="meta",
    )  # fmt: skip
    module.weight_packed, module.weight_scale, module.weight_zero = layer.packed, layer.scale, layer.zero
    if bias is not None:
        module.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return module.eval()


def _clone(module: nn.Module, name: str, replaced: dict[str, LowBitLinear], seen: dict[int, Any]) -> Any:
    """Copy a module tree with some layers replaced; tied parameters stay tied, replaced weights are never copied."""
    if name in replaced:
        return replaced[name]
    if id(module) in seen:
        return seen[id(module)]
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    seen[id(module)] = twin
    for kind in ("_parameters", "_buffers"):
        twin.__dict__[kind] = {k: _clone_tensor(v, seen) for k, v in module.__dict__[kind].items()}
    twin.__dict__["training"] = False
    twin.__dict__["_modules"] = {
        child: None if value is None else _clone(value, f"{name}.{child}".lstrip("."), replaced, seen)
        for child, value in module._modules.items()
    }
    return twin


def _clone_tensor(tensor: Tensor | None, seen: dict[int, Any]) -> Any:
    if tensor is None:
        return None
    if id(tensor) not in seen:
        copied = tensor.detach().clone()
        seen[id(tensor)] = nn.Parameter(copied, requires_grad=False) if isinstance(tensor, nn.Parameter) else copied
    return seen[id(tensor)]


@cache
def lowered_class(base: type[PreTrainedModel]) -> type[LoweredModel]:
    """The model's own class with LoweredModel in front; it keeps the name, which checkpoints record."""
    return type(base.__name__, (LoweredModel, base), {"__doc__": base.__doc__, "__module__": __name__})


def _as_lowered(model: PreTrainedModel, base: type) -> LoweredModel:
    lowered: LoweredModel = object.__new__(lowered_class(base))
    lowered.__dict__.update({k: v for k, v in model.__dict__.items() if k != "_tsld"})
    lowered.__dict__.update(backend="reference", _tsld_graph=[], _tsld_decoder={})
    return lowered


def as_lowered(model: PreTrainedModel, backend: str, activations: str = "a16") -> LoweredModel:
    """Give a packed model that transformers loaded the extra methods of a LoweredModel."""
    lowered = _as_lowered(model, type(model))
    lowered.__dict__["backend"] = use_backend(lowered, lowered.lowbit_layers(), backend, activations)
    return lowered


def _plain(lowered: LoweredModel) -> Any:
    twin: Any = object.__new__(type(lowered).__mro__[2])
    twin.__dict__.update({k: v for k, v in lowered.__dict__.items() if k not in (*_OWN, "backend")})
    return twin


def _config(prepared: PreparedModel, modules: dict[str, LowBitLinear], activations: str) -> Any:
    config = copy.deepcopy(prepared.config)
    del config.tsld_fx
    quantization = TsldQuantizationConfig.of(prepared.quant_config, modules, activations)
    config.quantization_config = quantization
    head = prepared.get_output_embeddings()
    if any(prepared.get_submodule(name) is head for name in modules):
        config.tie_word_embeddings = False  # the packed head is a copy of its own
    return config


def attach_quantizer(model: PreTrainedModel) -> None:
    """Mark a model as quantised for transformers' save_pretrained."""
    quantization = model.config.quantization_config
    model.__dict__["hf_quantizer"] = TsldHfQuantizer(quantization, pre_quantized=True)
    model.__dict__["is_quantized"] = True
    model.__dict__["quantization_method"] = quantization.quant_method
