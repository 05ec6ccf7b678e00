"""Our CUDA kernels inside a Relax module: the converter, and the object file with kernels and launchers."""

from __future__ import annotations

import subprocess
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from tsld_fx.codegen import runtime_module as modules
from tsld_fx.codegen.compiler import KernelBuildError
from tsld_fx.codegen.layout import KernelWeights, kernel_group, to_kernel_layout
from tsld_fx.codegen.render import environment
from tsld_fx.codegen.runtime_module import LinearKernel
from tsld_fx.codegen.spec import KernelSpec
from tsld_fx.codegen.workspace import COUNTERS_PER_LAUNCH
from tsld_fx.errors import BackendError
from tsld_fx.relax.lowering import rows_of

PARTS = ("codes", "meta", "row_scale", "row_zero")
_COUNTERS = "tsld_counters"


@dataclass
class CudaMatmuls:
    """Converts tsld::lowbit_linear to calls of our kernels; collects which kernels and weights they need.

    The kernels take fp16: activations of another type are cast to it, results back.

    layers: packed weight's name -> its kernel layout. `kernels`, `weights` are filled while the importer runs.
    """

    layers: dict[str, KernelWeights]
    targets: tuple[str, ...]
    kernels: list[LinearKernel] = field(default_factory=list)

    def lowbit_linear(self, node: fx.Node, importer: Any) -> Any:
        """before: lowbit_linear(x, packed, ...); after: call_dps_packed(tsld_linear_.._relax, x, layout.., counters).

        The second output is the kernels' workspace: partial sums of blocks that share an output tile.
        """
        from tvm import relax

        builder, x = importer.block_builder, importer.env[node.args[0]]
        bias = None if node.args[4] is None else importer.env[node.args[4]]
        weights = self.layers[str(node.args[1].target if isinstance(node.args[1], fx.Node) else node.args[1])]
        kernel = LinearKernel(
            KernelSpec("fp16", weights.bits, weights.group), weights.out_features, weights.in_features
        )
        if kernel not in self.kernels:
            self.kernels.append(kernel)
        rows, shape, dtype = rows_of(x), list(x.ty.shape), str(x.ty.dtype)
        x = builder.emit(relax.op.reshape(x, [rows, kernel.k]))
        if dtype != "float16":
            x = builder.emit(relax.op.astype(x, "float16"))
        if bias is not None and str(bias.ty.dtype) != "float16":
            bias = builder.emit(relax.op.astype(bias, "float16"))
        none = relax.const(np.zeros(0, "float16"))
        parts = [_constant(getattr(weights, part)) for part in PARTS]
        counters = relax.const(np.zeros(COUNTERS_PER_LAUNCH, "int32"))
        outputs = [
            relax.TensorType([rows, kernel.n], "float16"),
            relax.TensorType([workspace_floats(kernel, rows, self.targets)], "float32"),
        ]
        arguments = [x, *parts, none if bias is None else bias, counters]
        call = relax.call_dps_packed(f"{kernel.name}_relax", arguments, out_ty=outputs)
        y = builder.emit(relax.TupleGetItem(builder.emit(call), 0))
        if dtype != "float16":
            y = builder.emit(relax.op.astype(y, dtype))
        return builder.emit(relax.op.reshape(y, [*shape[:-1], kernel.n]))


def _constant(tensor: Tensor | None) -> Any:
    from tvm import relax

    return relax.const(np.zeros(0, "uint8") if tensor is None else tensor.cpu().numpy())


def kernel_layouts(program: Any, lowered: Any) -> dict[str, KernelWeights]:
    """Placeholder of a packed weight in an exported program -> that layer's weights in the kernels' layout.

    Raises:
        BackendError: a format that no kernel serves; it names the layer.
    """
    found = {}
    for spec in program.graph_signature.input_specs:
        name = str(spec.target or "")
        if name.endswith(".weight_packed"):
            path = name.partition(".")[2].rpartition(".")[0]  # without the module that was exported around the model
            layer = lowered.get_submodule(path)
            if layer.in_features % 8:
                raise BackendError(
                    f"compile: {path} has {layer.in_features} inputs; the CUDA kernels need rows of a multiple of 8 "
                    "(16 bytes). Leave the layer out with QuantConfig.skip."
                )
            try:
                kernel_group(layer.group_size, layer.in_features)
            except BackendError as error:
                raise BackendError(f"compile: {path}: {error}") from None
            parts = (layer.weight_packed, layer.weight_scale, layer.weight_zero)
            packed, scales, zeros = (None if part is None else part.cpu() for part in parts)
            found[spec.arg.name] = to_kernel_layout(
                packed, scales, zeros, layer.bits, layer.group_size, layer.in_features
            )
    return found


def workspace_floats(kernel: LinearKernel, rows: Any, targets: tuple[str, ...]) -> Any:
    """An upper bound of the partial sums of a launch with `rows` tokens, float32 values."""
    splits = 1
    for target in targets:
        spec = replace(kernel.spec, target=target)
        splits = max(splits, *(plan.splits for _, plan in modules.plan_ranges(spec, kernel.n, kernel.k)))
    return splits * (rows + 256) * (-(-kernel.n // 16) * 16 + 512) if splits > 1 else 1


def build_object(kernels: list[LinearKernel], targets: tuple[str, ...], out: Path, max_rows: int | None) -> list[str]:
    """Compile kernels and launchers into an object file; returns the functions that it exports.

    Raises:
        KernelBuildError: no CUDA compiler or host compiler, or something does not compile.
    """
    host, flags = modules.host_compiler()
    with tempfile.TemporaryDirectory(prefix="tsld-module-") as name:
        folder = Path(name)
        source, _ = modules.module_source(kernels, targets, folder, max_rows)
        linears = [{"index": index, "name": kernel.name} for index, kernel in enumerate(kernels)]
        source += environment().get_template("relax_linear.cc.j2").render(linears=linears)
        (folder / "module.cc").write_text(source)
        kept = [flag for flag in flags if not flag.startswith(("-L", "-l")) and flag != "-shared"]
        command = [*host, *kept, "-c", str(folder / "module.cc"), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise KernelBuildError(f"compile: {host[0]} ended with code {done.returncode}:\n{done.stderr.strip()}")
    return [f"{kernel.name}_relax" for kernel in kernels]


def check_dtype(dtype: torch.dtype) -> None:
    """Refuse a model whose activations TVM's CUDA program cannot take.

    Raises:
        BackendError: neither float32 nor float16.
    """
    if dtype not in (torch.float32, torch.float16):
        raise BackendError(
            f"compile: target='cuda' takes float32 and float16 models, not {dtype}. Use .to(torch.float16)."
        )
