"""KernelSpec + GemmConfig -> CUDA source. Pure: the template only instantiates the headers of cuda_templates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import jinja2

from tsld_fx.codegen.config import GemmConfig
from tsld_fx.codegen.spec import CHUNK, KernelSpec
from tsld_fx.cuda_templates import TEMPLATE_DIR
from tsld_fx.errors import BackendError

_TYPES = {"fp16": "Fp16", "bf16": "Bf16"}
_QUANTISED = {"int8": "Int8", "fp8": "Fp8"}
_MOST_VECS = 8  # vectors of eight inputs that a thread keeps in registers when it rounds them
_REGISTERS = 65536  # of a multiprocessor


@lru_cache(maxsize=1)
def environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE_DIR),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )


def kernel_name(spec: KernelSpec, config: GemmConfig) -> str:
    """Name of the kernel's entry function, unique per specification and configuration."""
    return f"tsld_{spec.name}_{config.name}"


def _kernel(spec: KernelSpec, config: GemmConfig) -> dict[str, object]:
    """What the template writes for one kernel."""
    if config.kernel in ("mma", "tile"):
        entry = config.kernel.title()
        shape = [config.tokens, config.warps_n, config.warps_m, config.warps_k, config.row_tiles]
    elif config.kernel == "stream":
        entry, shape = "Stream", [config.tokens, config.warps_k, config.row_tiles]
    elif not config.serves(spec):
        raise BackendError(
            f"{config.name} does not serve {spec}: Hopper's kernels need sm_90a, and digits ternary weights with one "
            "scale per row or 128 inputs and 16-bit activations. Choose another configuration."
        )
    elif config.kernel == "digits":
        entry, shape = "Digits", [config.tokens, config.warps_k, config.row_tiles]
    else:
        entry, shape = config.kernel.title(), [config.tokens, config.warps_n // 4, config.row_tiles]
    activation = f"tsld::{_TYPES[spec.activation]}"
    if spec.quantised:
        if entry != "Wgmma":
            raise BackendError(f"{config.name} takes 16-bit activations only. Choose a wgmma configuration for {spec}.")
        activation = f"tsld::{_QUANTISED[spec.quantised]}<{activation}>"
    arguments = [activation, spec.bits, spec.group, *shape, config.stages]
    if config.kernel == "digits":
        arguments.append(str(config.cluster).lower())
    elif config.cluster or config.ahead:
        arguments += [str(config.cluster).lower(), config.ahead]
    if config.digits and (spec.bits != 2 or spec.group not in (0, CHUNK)):
        raise BackendError(f"{config.name} takes ternary weights with one scale per row or 128 inputs, not {spec}.")
    if spec.norm or spec.gated or config.digits:
        if entry != "Stream":
            raise BackendError(f"{config.name} computes the product alone. Choose a stream configuration for {spec}.")
        arguments += [str(flag).lower() for flag in (spec.norm, spec.gated, config.digits)]
    return {
        "name": kernel_name(spec, config),
        "comment": f"{config.block_rows} rows x {config.block_tokens} tokens per block",
        "config": f"{entry}Config<{', '.join(map(str, arguments))}>",
        "entry": f"{entry}Gemm",
        "tensor_map": config.tensor_copies,
        "threads": config.threads,
        "bounds": f"{config.threads}, {config.least_blocks(spec)}",
        "shared_bytes": config.shared_bytes(spec),
    }


@dataclass(frozen=True)
class QuantiseConfig:
    """How a kernel rounds activations: threads of a block, vectors of eight inputs that a thread keeps, and blocks that
    a multiprocessor holds."""

    threads: int
    vecs: int
    blocks: int

    @staticmethod
    def of(chunks: int) -> QuantiseConfig:
        """For rows of so many chunks: four vectors a thread at most, where that is possible. Found on an H200."""
        vectors = chunks * CHUNK // 8
        threads = next((t for t in (128, 256) if vectors <= 4 * t), 512)
        vecs = max(1, min(-(-vectors // threads), _MOST_VECS))
        registers = -(-(8 * vecs + 28) // 8) * 8  # vectors of two tokens, and the rest
        return QuantiseConfig(threads, vecs, _REGISTERS // (threads * registers))


def quantise_name(spec: KernelSpec, config: QuantiseConfig) -> str:
    """Name of the kernel that rounds the activations of `spec` to 8 bits."""
    return f"tsld_quantise_{spec.activation}_{spec.quantised}_t{config.threads}_v{config.vecs}"


def render_quantise(spec: KernelSpec, config: QuantiseConfig) -> str:
    """Source of the kernel that rounds activations to 8 bits, one scale per token."""
    if spec.quantised is None:
        raise BackendError(f"{spec} keeps its activations as they are: there is nothing to quantise.")
    return (
        environment()
        .get_template("quantise.cu.j2")
        .render(
            name=quantise_name(spec, config),
            config=config,
            type=f"tsld::{_QUANTISED[spec.quantised]}<tsld::{_TYPES[spec.activation]}>",
        )
    )


def render(spec: KernelSpec, configs: Sequence[GemmConfig]) -> str:
    """Source of one translation unit with a kernel for each configuration."""
    kernels = [_kernel(spec, config) for config in configs]
    headers = sorted({f"gemm_{config.kernel}.cuh" for config in configs})
    title = f"Low-bit GEMM: {spec.bits}-bit weights, {spec.activation} activations, group {spec.group}"
    return environment().get_template("gemm.cu.j2").render(title=title, headers=headers, kernels=kernels)
