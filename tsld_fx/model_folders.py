"""Models in folders: float, prepared (a training run's result) and converted ones, and the way between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tsld_fx.backends import check_backend
from tsld_fx.capture import max_positions
from tsld_fx.checkpoint import from_pretrained, load, read_config, weight_files
from tsld_fx.config import AffineWeight, QuantConfig
from tsld_fx.demo import ASSETS
from tsld_fx.errors import BackendError, CaptureError, CheckpointError, ConfigError, TsldError
from tsld_fx.hf_quantizer import METHOD
from tsld_fx.lowered import LoweredModel, convert
from tsld_fx.model_card import write_card
from tsld_fx.preparation import load_prepared, prepare
from tsld_fx.prepared import PreparedModel
from tsld_fx.text_data import DEMO
from tsld_fx.whole_files import check_folder, whole_folder

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def model_folder(name: str | Path) -> str:
    """The folder that `demo` stands for (unless a folder of that name exists); any other name unchanged."""
    return str(ASSETS) if str(name) == DEMO and not Path(name).exists() else str(name)


def load_float(name: str) -> PreTrainedModel:
    """A float model in float32 from a folder, a run's folder, the hub, or `demo` for the embedded one.

    Raises:
        TsldError: not there, damaged, quantised already, or an encoder-decoder model.
    """
    name = _model_in(name)
    folder = Path(name)
    if folder.exists():
        config = read_config(folder)
        if (config.get("quantization_config") or {}).get("quant_method") == METHOD:
            raise CheckpointError(f"{name}: this model is converted already. Give the float model it was made from.")
        if "tsld_fx" in config:
            raise CheckpointError(f"{name}: this model is trained to low bits. Give the float model it was made from.")
        weight_files(folder)
    try:
        encoder_decoder = bool(AutoConfig.from_pretrained(name).is_encoder_decoder)
        if not encoder_decoder and folder.exists():
            return from_pretrained(folder, dtype=torch.float32)
        if not encoder_decoder:
            return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except TsldError:
        raise
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"{name}: cannot be loaded as a causal language model ({type(error).__name__}: {first}). "
            "Give a folder with config.json and weights, or a name on the hub."
        ) from error
    raise CaptureError(f"{name}: an encoder-decoder model. tsld_fx handles decoder-only models; give one of those.")


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer beside a model; a run's folder stands for the model in it.

    Raises:
        CheckpointError: there is none.
    """
    folder = _model_in(name)
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"{name}: no tokenizer can be loaded from it ({first}). Save one there with tokenizer.save_pretrained."
        ) from None


def check_device(device: str, dtype: str | None) -> torch.dtype | None:
    """Refuse a device that is not there or a dtype that models do not compute in; returns the dtype.

    Raises:
        TsldError: it says what there is.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise BackendError(f"--device {device}: not a device. Give cpu, cuda or cuda:N.") from None
    if kind not in ("cpu", "cuda"):
        raise BackendError(f"--device {device}: models run on cpu and cuda here. Give one of these.")
    check_backend("auto", device)
    if dtype not in (None, *_DTYPES):
        raise ConfigError(f"--dtype {dtype}: give one of {', '.join(_DTYPES)}.")
    return None if dtype is None else _DTYPES[dtype]


def load_any(name: str, device: str = "cpu", dtype: str | None = None) -> PreTrainedModel:
    """A float, prepared or converted model, in eval mode; a run's folder stands for the model in it.

    Args:
        device: where to put it; a packed model runs the kernels of that device.
        dtype: `float16` or `bfloat16` instead of float32; a prepared model has no other than float32.

    Raises:
        TsldError: not a model, a damaged one, or a device or dtype that it cannot have.
    """
    wanted = check_device(device, dtype)
    folder = Path(_model_in(name))
    config = read_config(folder) if folder.is_dir() else {}
    if (config.get("quantization_config") or {}).get("quant_method") == METHOD:
        options: dict[str, Any] = {} if wanted is None else {"dtype": wanted}
        return load(folder, device=None if device == "cpu" else device, **options).eval()
    if "tsld_fx" in config:
        if wanted not in (None, torch.float32):
            raise ConfigError(f"--dtype {dtype}: {name} is not converted, and trains in float32. Convert it first.")
        return load_prepared(folder).to(device).eval()
    return load_float(str(folder)).to(device=device, dtype=wanted).eval()


def _model_in(name: str | Path) -> str:
    """A run's folder means its `model` folder."""
    inner = Path(name) / "model"
    if (Path(name) / "run.yaml").is_file() and not inner.exists():
        raise CheckpointError(f"{name}: this run has not finished. Give its command again; it resumes.")
    return str(inner) if (inner / "config.json").is_file() else model_folder(name)


def check_window(length: int, model: PreTrainedModel) -> None:
    """Refuse windows longer than the model's positions.

    Raises:
        ConfigError: it gives both lengths.
    """
    limit = max_positions(model)
    if limit is not None and length > limit:
        raise ConfigError(f"windows of {length} tokens are more than the model's {limit} positions. Choose fewer.")
    if length < 2:
        raise ConfigError(f"windows need at least 2 tokens, got {length}.")


def convert_folder(
    name: str,
    out: str | Path,
    *,
    backend: str = "auto",
    activations: str = "a16",
    head_bits: int | None = None,
    force: bool = False,
) -> tuple[PreparedModel, LoweredModel]:
    """Convert a run's result (or a float model, without training) and save it with its tokenizer.

    Args:
        head_bits: 8 also packs the output embedding of a float model.
        force: replace an output folder that is not empty.

    Raises:
        TsldError: the folder is taken, or the model cannot be converted.
    """
    out, folder = Path(out), _model_in(name)
    check_folder(out)
    if Path(folder).resolve().is_relative_to(out.resolve()):
        raise CheckpointError(f"{out}: the output folder is or holds the model to convert. Choose another folder.")
    if out.exists() and any(out.iterdir()) and not force:
        raise CheckpointError(f"{out}: the output folder is not empty. Choose another one, or replace it with --force.")
    trained = Path(folder).is_dir() and "tsld_fx" in read_config(Path(folder))
    if trained and head_bits is not None:
        raise ConfigError("--head-bits belongs to float models; a trained one is packed as it was trained.")
    if head_bits not in (None, 8):
        raise ConfigError(f"--head-bits {head_bits}: the head can be packed in 8 bits or left as it is.")
    prepared = load_prepared(folder) if trained else _post_training(folder, head_bits)
    tokenizer = load_tokenizer(folder)
    lowered = convert(prepared.eval(), backend, activations=activations)
    run = Path(folder).parent
    with whole_folder(out) as target:
        lowered.save_pretrained(target)
        write_card(lowered.config, target, run if (run / "run.yaml").is_file() else None)
        tokenizer.save_pretrained(target)
    return prepared, lowered


def _post_training(folder: str, head_bits: int | None) -> PreparedModel:
    model = load_float(folder)
    head = model.get_output_embeddings()
    name = next(n for n, m in model.named_modules() if m is head)
    overrides = {} if head_bits is None else {name: AffineWeight(bits=8, symmetric=True)}
    return prepare(model, QuantConfig(overrides=overrides))
