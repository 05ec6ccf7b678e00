"""How transformers loads the weights of a runtime module: `quant_method: tsld_fx_runtime`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tsld_fx.errors import BackendError, CheckpointError
from tsld_fx.runtime_linear import RuntimeLinear

METHOD = "tsld_fx_runtime"


@register_quantization_config(METHOD)
class TsldRuntimeConfig(QuantizationConfigMixin):
    """Attributes: layers: module name -> sizes, format and library function of each packed layer."""

    def __init__(self, layers: Mapping[str, Mapping[str, Any]] | None = None, **kwargs: Any) -> None:
        self.quant_method = METHOD
        self.layers = {name: dict(layer) for name, layer in (layers or {}).items()}


@register_quantizer(METHOD)
class TsldRuntimeQuantizer(HfQuantizer):
    """Puts empty RuntimeLinear layers into a model skeleton before transformers loads their tensors."""

    requires_calibration = True
    quantization_config: TsldRuntimeConfig

    def __init__(self, quantization_config: TsldRuntimeConfig, building: bool = False, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.building = building

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for name, layer in self.quantization_config.layers.items():
            try:
                old = model.get_submodule(name)
            except AttributeError:
                old = None
            sizes = (layer["in_features"], layer["out_features"])
            if old is None or _sizes(old) != sizes:
                raise CheckpointError(
                    f"the module holds a layer {name!r} of {sizes[0]} inputs and {sizes[1]} outputs; "
                    f"{type(model).__name__} of this config.json has "
                    f"{'none of that name' if old is None else _sizes(old)}. It was built for other shapes: build it "
                    "again."
                )
            dtype = next((p.dtype for p in old.parameters()), None)
            made = RuntimeLinear(*sizes, layer["shapes"], layer["bias"], layer["function"], "", dtype)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, made)
        keep = set(model._keep_in_fp32_modules_strict or ())
        model._keep_in_fp32_modules_strict = keep | {"weight_row_scale"}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for parameter in model.parameters():
            parameter.requires_grad_(False)

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype | None:
        """The module's own; `load_runtime_module` has checked it."""
        return dtype

    def is_serializable(self) -> bool:
        """Only while the module is built; a loaded one is copied as a folder."""
        if not self.building:
            raise BackendError("a runtime module is not saved again: copy its folder, or save the model it came from.")
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed weights do not train."""
        return False


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of nn.Linear or GPT-2's Conv1D."""
    weight = getattr(module, "weight", None)
    if weight is None or weight.ndim != 2:
        return None
    shape = tuple(weight.shape)
    return (shape[1], shape[0]) if isinstance(module, nn.Linear) else (shape[0], shape[1])
