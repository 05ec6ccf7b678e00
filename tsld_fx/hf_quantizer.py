"""The quantiser that transformers finds under `quant_method: tsld_fx`; importing this module registers it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tsld_fx.config import QuantConfig
from tsld_fx.errors import CheckpointError
from tsld_fx.lowbit_linear import LowBitLinear
from tsld_fx.packing import check_packed

if TYPE_CHECKING:  # this module is imported while transformers still is
    from transformers import PreTrainedModel

METHOD = "tsld_fx"
FORMAT_VERSION = 1
_LAYER_KEYS = ("in_features", "out_features", "bits", "group_size", "zero", "bias")


@register_quantization_config(METHOD)
class TsldQuantizationConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint: format version, how it was quantised, and each packed layer.

    Attributes:
        quant: QuantConfig.to_dict() of the model that was prepared.
        layers: module name -> in_features, out_features, bits, group_size (0 channel, -1 tensor), zero, bias.
        activations: how kernels take the inputs of the layers (`a16`, `int8`, `fp8` or `add`, see `convert`).
    """

    def __init__(
        self,
        format_version: int = FORMAT_VERSION,
        quant: Mapping[str, Any] | None = None,
        layers: Mapping[str, Mapping[str, Any]] | None = None,
        activations: str = "a16",
        **kwargs: Any,
    ) -> None:
        if format_version != FORMAT_VERSION:
            raise CheckpointError(
                f"this checkpoint has format_version {format_version}; this tsld_fx reads version {FORMAT_VERSION}. "
                "Install the tsld_fx that wrote it, or convert the model again."
            )
        if not isinstance(layers or {}, Mapping) or not all(isinstance(v, Mapping) for v in (layers or {}).values()):
            raise CheckpointError("quantization_config.layers is not a table of layers. Convert the model again.")
        self.quant_method = METHOD
        self.format_version = format_version
        self.quant = dict(quant or {})
        self.layers = {name: dict(layer) for name, layer in (layers or {}).items()}
        self.activations = activations

    @classmethod
    def of(
        cls, quant: QuantConfig, modules: Mapping[str, LowBitLinear], activations: str = "a16"
    ) -> TsldQuantizationConfig:
        """Describe packed layers."""
        layers = {
            name: {
                "in_features": m.in_features,
                "out_features": m.out_features,
                "bits": m.bits,
                "group_size": m.group_size,
                "zero": m.weight_zero is not None,
                "bias": m.bias is not None,
            }
            for name, m in modules.items()
        }
        return cls(quant=quant.to_dict(), layers=layers, activations=activations)


@register_quantizer(METHOD)
class TsldHfQuantizer(HfQuantizer):
    """Puts empty LowBitLinear layers into a model skeleton before transformers loads the packed tensors."""

    requires_calibration = True  # weights are packed by tsld_fx.convert, never while loading
    quantization_config: TsldQuantizationConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for name, layer in self.quantization_config.layers.items():
            if sorted(layer) != sorted(_LAYER_KEYS):
                raise CheckpointError(f"quantization_config.layers[{name!r}] has keys {sorted(layer)}. Convert again.")
            try:
                old = model.get_submodule(name)
            except AttributeError:
                raise CheckpointError(
                    f"the checkpoint packs a layer {name!r} that {type(model).__name__} does not have. "
                    "Load it with the model class it was saved from."
                ) from None
            dtype = next((p.dtype for p in old.parameters()), None)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, LowBitLinear(**layer, device="meta", dtype=dtype))
        keep = set(model._keep_in_fp32_modules_strict or ())
        model._keep_in_fp32_modules_strict = keep | {"weight_scale"}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for name, module in model.named_modules():
            if isinstance(module, LowBitLinear) and module.weight_packed.device.type != "meta":
                check_packed(
                    name, module.weight_packed, module.weight_scale, module.weight_zero,
                    module.bits, module.group_size, module.in_features,
                )  # fmt: skip
        for parameter in model.parameters():
            parameter.requires_grad_(False)

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype | None:
        """Any float dtype works for what is not packed; the scales stay float32."""
        return dtype

    def is_serializable(self) -> bool:
        """save_pretrained works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed weights do not train."""
        return False
