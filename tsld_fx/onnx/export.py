"""`export_onnx`: a lowered model as an ONNX file."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from tsld_fx.errors import ExportError
from tsld_fx.lowered import LoweredModel
from tsld_fx.onnx import requirements as required

logger = logging.getLogger(__name__)


def export_onnx(
    lowered: LoweredModel,
    path: str | Path,
    dialect: str = "custom",
    kv_cache: bool = False,
    activations: str = "a16",
    target_ort: str | None = None,
    verify: bool = True,
    *,
    opset: int | None = None,
    tokenizer: Any = None,
) -> Path:
    """Write a lowered model for onnxruntime and other ONNX runtimes.

    Inputs: input_ids and attention_mask [batch, sequence] int64; output: logits [batch, sequence, vocabulary] float32.
    With `kv_cache`, also position_ids and past_key_values.{i}.key and .value [batch, kv_heads, past, head_dim] in and
    present.{i}.key and .value out, as optimum and onnxruntime-genai name them.

    Args:
        lowered: from `convert` or `load`, float32, on the CPU.
        path: a file `*.onnx`, or a folder for model.onnx, config.json and the tokenizer. With `kv_cache` the folder
            also gets genai_config.json. Over 1 GiB, tensors go to a second file beside the model.
        dialect: `custom` (ai.tsld::LowBitLinear with a function body: smallest, runs anywhere, fastest with the
            operator library), `ort` (onnxruntime's MatMulNBits) or `qdq` (standard DequantizeLinear).
        activations: `a16` (float activations; the kernels may use two int8 limbs, 16 bits, for each) or `int8`.
        target_ort: version of the onnxruntime that will read it, such as "1.28"; refused when it is too old.
        verify: run the file beside torch, and check that onnxruntime keeps the weights packed.
        opset: write this opset instead of the oldest that the dialect needs.
        tokenizer: written beside the model; default: the files of the folder that the model was loaded from.

    Returns:
        The path of the .onnx file.

    Raises:
        TsldError: a model that is not lowered, an unknown dialect, an onnxruntime or opset that is too old for it,
            group sizes that it has no fast kernel for, or a file that does not compute what the model does. The
            target is then as it was.
    """
    model = _check_model(lowered)
    _check_choice("dialect", dialect, required.DIALECTS)
    _check_choice("activations", activations, required.ACTIVATIONS)
    bits = {layer.bits for layer in model.lowbit_layers().values()}
    needs = required.requirements(dialect, bits, opset)
    required.check_target(needs, dialect, bits, target_ort)
    _check_libraries()
    if verify:
        _check_installed(needs)

    from tsld_fx.onnx import custom, files, ort, qdq, write
    from tsld_fx.onnx import verify as checks
    from tsld_fx.onnx.graph import packed_layers, trace

    target = write.Target.of(path)
    if dialect != "custom":
        packed = model.lowbit_layers().items()
        ort.check([(name, layer.in_features, layer.weight_scale.shape[1]) for name, layer in packed], dialect)
    with write.staged(target) as staging:
        graph = trace(model, kv_cache, needs.opset)
        weights, unfolded = [(layer.rows, layer.in_features) for layer in packed_layers(graph)], set[str]()
        if dialect == "custom":
            unfolded = custom.lower(graph, activations)
        elif dialect == "ort":
            ort.lower(graph, activations)
        else:
            qdq.lower(graph, activations)
        graph.ir_version = needs.ir
        files.describe(graph, dialect, activations, needs)
        write.save(graph, staging, target)
        if verify:
            error = checks.verify(staging / target.model.name, model, weights, activations, len(unfolded))
            logger.info("%s: logits differ from torch's by %.1e", target.model, error)
        if kv_cache or Path(path).suffix != ".onnx":
            files.write_beside(model, staging, target.model.name, kv_cache, tokenizer)
    return target.model


def _check_model(model: Any) -> LoweredModel:
    import torch

    from tsld_fx.prepared import PreparedModel

    if isinstance(model, PreparedModel):
        raise ExportError(
            "export_onnx: the model is prepared, not converted: its weights are still float. "
            "Call tsld_fx.convert(prepared) and export the result."
        )
    if not isinstance(model, LoweredModel):
        raise ExportError(
            f"export_onnx: expected a lowered model, got {type(model).__name__}. tsld_fx.convert and tsld_fx.load "
            "return one; a float model goes through torch.onnx.export."
        )
    layers = model.lowbit_layers()
    if not layers:
        raise ExportError("export_onnx: the model has no packed layers; torch.onnx.export writes float models.")
    if model.device.type != "cpu":
        raise ExportError(f"export_onnx: the model lies on {model.device}. Call .to('cpu') on it first.")
    if {p.dtype for p in model.parameters() if p.is_floating_point()} != {torch.float32}:
        raise ExportError(
            f"export_onnx: the model's other parameters are {model.dtype}, which onnxruntime's CPU kernels do not "
            "compute in. Load it with tsld_fx.load(path, dtype=torch.float32), or call .to(torch.float32) on it."
        )
    return model


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ExportError(f"export_onnx: {name}={value!r} is unknown. Choose one of {', '.join(map(repr, choices))}.")


def _check_libraries() -> None:
    try:
        import onnx  # noqa: F401
        import onnx_ir  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError(f"export_onnx: {error.name} is not installed. Run pip install 'tsld-fx[onnx]'.") from error


def _check_installed(needs: required.Requirements) -> None:
    have = required.installed_onnxruntime()
    if required.parse(have) < needs.onnxruntime:
        raise ExportError(
            f"export_onnx: this file needs {needs.text}; {have} is installed here, so it cannot be verified. "
            "Upgrade onnxruntime, or pass verify=False to write it for another machine."
        )
