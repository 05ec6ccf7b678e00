"""The check of an exported file: it runs in onnxruntime, says what torch says, and its weights stay packed."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tsld_fx.cached_capture import cache_names, default_positions
from tsld_fx.capture import max_positions
from tsld_fx.errors import ExportError
from tsld_fx.lowered import LoweredModel
from tsld_fx.ops import _lowbit_linear

# Largest difference of logits of attended tokens. a16: largest deviation / largest logit. int8: as vectors,
# |a - b| / |b|; what int8 activations cost depends on the model, and this only finds models that are wrong.
TOLERANCE = {"a16": 1e-3, "int8": 0.25}


def open_session(model: Path, library: Path | None = None, dump: Path | None = None, threads: int = 0) -> Any:
    """An onnxruntime session on the CPU.

    Args:
        library: operator library to register.
        dump: write the optimised model here, its tensors in a file beside it.

    Raises:
        ExportError: onnxruntime cannot load the file: cut short, too new for it, an operator it lacks.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, threads
    if library is not None:
        if not library.is_file():
            raise ExportError(
                f"onnxruntime: there is no operator library {library}. Build it with tsld-fx build-ort-op --out."
            )
        options.register_custom_ops_library(str(library.resolve()))
    if dump is not None:
        options.optimized_model_filepath = str(dump)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", dump.name + ".data")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    try:
        return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        text = " ".join(str(error).split())
        raise ExportError(
            f"onnxruntime {onnxruntime.__version__} cannot load {model}: {text[:400]}. A file cut short has to be "
            f"exported again; a version that is too old has to be upgraded ({requirement(model)})."
        ) from error


def requirement(model: Path) -> str:
    """What the file's metadata say that it needs."""
    import onnx

    try:
        loaded = onnx.load(model, load_external_data=False)
    except Exception:
        return "the file itself cannot be read"
    return next((p.value for p in loaded.metadata_props if p.key == "tsld_fx.requires"), "the file does not say which")


def verify(
    model: Path, lowered: LoweredModel, weights: Sequence[tuple[int, int]], activations: str, unfolded: int
) -> float:
    """Run the file on a left-padded batch beside torch; returns the relative difference of the logits.

    Args:
        weights: (rows, inputs) of each packed layer.
        unfolded: layers that may become float32 weights in memory.

    Raises:
        ExportError: it does not load, differs by more than TOLERANCE, or onnxruntime unfolded packed weights.
    """
    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder) / "optimised.onnx"
        session = open_session(model, dump=dump)
        _check_packed(model, dump, weights, unfolded)
    tokens, mask = _batch(lowered)
    positions = any(value.name == "position_ids" for value in session.get_inputs())
    expected = _torch_logits(lowered, tokens, mask, positions)
    got = run(session, tokens, mask)
    kept = mask.bool()
    difference = (got - expected)[kept]
    if activations == "a16":
        error = float(difference.abs().max() / expected[kept].abs().max())
    else:
        error = float(difference.norm() / expected[kept].norm())
    if not error <= TOLERANCE[activations]:
        report = "This is an error of tsld_fx; please report it with the model's config.json."
        remedy = "Use activations='a16': int8 is too coarse for this model." if activations == "int8" else report
        raise ExportError(
            f"export: onnxruntime's logits differ from torch's by {error:.1e} (allowed {TOLERANCE[activations]:.0e} "
            f"with activations={activations!r}). Nothing was written. {remedy}"
        )
    return error


def run(session: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """Logits [B, T, vocabulary] of a session; a model with a cache gets the tokens in two calls."""
    names = [value.name for value in session.get_inputs()]
    if "position_ids" not in names:
        (logits,) = session.run(["logits"], {"input_ids": tokens.numpy(), "attention_mask": mask.numpy()})
        return torch.from_numpy(logits)
    layers = sum(name.startswith("past_key_values.") for name in names) // 2
    shape = next(value.shape for value in session.get_inputs() if value.name.startswith("past_key_values."))
    cache = [np.zeros((len(tokens), shape[1], 0, shape[3]), np.float32)] * (2 * layers)
    positions, parts, width = default_positions(mask, tokens.shape[1]), [], tokens.shape[1]
    for start, end in ((0, width - 1), (width - 1, width)):
        feed = {
            "input_ids": tokens[:, start:end].numpy(),
            "attention_mask": mask[:, :end].numpy(),
            "position_ids": positions[:, start:end].numpy(),
            **dict(zip(cache_names("past_key_values", layers), cache, strict=True)),
        }
        logits, *cache = session.run(["logits", *cache_names("present", layers)], feed)
        parts.append(torch.from_numpy(logits))
    return torch.cat(parts, dim=1)


def _batch(lowered: LoweredModel) -> tuple[Tensor, Tensor]:
    """Random tokens [2, T], the second row padded on the left."""
    width = min(12, (max_positions(lowered) or 24) // 2)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(lowered.config.get_text_config().vocab_size, (2, width), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, : width // 3] = 0
    return tokens, mask


def _torch_logits(lowered: LoweredModel, tokens: Tensor, mask: Tensor, positions: bool) -> Tensor:
    given = {"position_ids": default_positions(mask, tokens.shape[1])} if positions else {}
    with torch.no_grad(), _Exact():
        return lowered(input_ids=tokens, attention_mask=mask, **given).logits.float()


class _Exact(TorchDispatchMode):
    """Packed layers compute in plain float32, whatever backend and activations the model is set to."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.tsld.lowbit_linear.default:
            func = _lowbit_linear
        return func(*args, **(kwargs or {}))


def _check_packed(model: Path, dump: Path, weights: Sequence[tuple[int, int]], unfolded: int) -> None:
    """Compare the float tensors before and after onnxruntime's optimisation."""
    import onnx

    before = onnx.load(model, load_external_data=False)
    after = onnx.load(dump, load_external_data=False)
    grown = _float_shapes(after) - _float_shapes(before)
    wanted = Counter(tuple(sorted(shape)) for shape in weights)
    found = sum(min(count, wanted[shape]) for shape, count in grown.items())
    operators = Counter(node.op_type for node in after.graph.node)
    packed = operators["MatMulNBits"] + operators["LowBitLinear"]
    if found > unfolded or packed < len(weights) - unfolded:
        import onnxruntime

        raise ExportError(
            f"export: onnxruntime {onnxruntime.__version__} turned {max(found, len(weights) - packed)} of "
            f"{len(weights)} packed weights into float32 ones, so the file saves no memory there. Install a version "
            f"that {requirement(model)} allows, or pass verify=False to keep the file."
        )


def _float_shapes(model: Any) -> Counter[tuple[int, ...]]:
    """How many 2-D float tensors of each shape (smaller size first) a model holds."""
    tensors = (t for t in model.graph.initializer if t.data_type in (1, 10, 16) and len(t.dims) == 2)
    return Counter(tuple(sorted(t.dims)) for t in tensors)
