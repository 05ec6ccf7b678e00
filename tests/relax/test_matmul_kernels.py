"""The PrimFuncs of the matrix products against float64, for every format, odd shapes and kinds of vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tsld_fx.packing import dequantize, pack
from tsld_fx.relax.cpu_target import cpu_target
from tsld_fx.relax.kernels import MatmulSpec, matmul_function, render
from tsld_fx.relax.tvm_import import load_tvm

HOST = cpu_target()
SPECS = [  # out, in, bits, group, zeros, bias, tokens
    MatmulSpec(7, 300, 2, 0, bias=True),
    MatmulSpec(9, 512, 2, 32),
    MatmulSpec(6, 768, 2, 256, bias=True, tokens=5),
    MatmulSpec(5, 44, 2, -1),
    MatmulSpec(4, 60, 2, 20, bias=True),
    MatmulSpec(5, 1, 2),
    MatmulSpec(1, 260, 4, 0, zeros=True),
    MatmulSpec(8, 256, 4, 128, bias=True),
    MatmulSpec(10, 384, 4, 32, zeros=True, tokens=1),
    MatmulSpec(7, 130, 8, 0, zeros=True, bias=True),
    MatmulSpec(8, 256, 8, 64),
    MatmulSpec(97, 33, 32, bias=True),
    MatmulSpec(8, 128, 32, tokens=9),
]


def run(spec: MatmulSpec, target: object, x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    """The product on TVM."""
    load_tvm()
    import tvm

    function = matmul_function(spec).with_attr("global_symbol", "product")
    built = tvm.compile(tvm.IRModule({"product": function}), target=target)
    y = torch.full((x.shape[0], spec.out_features), float("nan"))
    built["product"](*(tvm.runtime.tensor(t.numpy()) for t in (x, *weights)), out := tvm.runtime.tensor(y.numpy()))
    return torch.from_numpy(out.numpy())


def weights_of(spec: MatmulSpec, generator: torch.Generator) -> tuple[list[torch.Tensor], torch.Tensor]:
    """-> (tensors that the product takes, the float64 weight)."""
    n, k, bits = spec.out_features, spec.in_features, spec.bits
    if bits == 32:
        dense = torch.randn(n, k, generator=generator)
        return [dense], dense.double()
    codes = torch.randint(0, 3 if bits == 2 else 2**bits, (n, k), dtype=torch.uint8, generator=generator)
    shape = (1, 1) if spec.group_size == -1 else (n, 1 if spec.group_size == 0 else k // spec.group_size)
    scales = torch.rand(shape, generator=generator) + 0.1
    zeros = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator) if spec.zeros else None
    packed = pack(codes, bits)
    weight = dequantize(packed, scales, zeros, bits, spec.group_size, k)
    return [packed, scales, *([] if zeros is None else [zeros])], weight.double()


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("vectors", ["host", "portable"])
def test_product_equals_float64(spec: MatmulSpec, vectors: str) -> None:
    host = vectors == "host"
    spec = MatmulSpec(**{**spec.__dict__, "lanes": HOST.lanes if host else 4, "table": HOST.table and host})
    load_tvm()
    target = HOST.tvm() if host else cpu_target("llvm:generic").tvm()
    generator = torch.Generator().manual_seed(sum(map(ord, spec.name)))
    weights, dense = weights_of(spec, generator)
    bias = torch.randn(spec.out_features, generator=generator) if spec.bias else None
    for tokens in [spec.tokens] if spec.tokens else [6]:
        x = torch.randn(tokens, spec.in_features, generator=generator)
        x[0] *= 1e3
        y = run(spec, target, x, *weights, *([] if bias is None else [bias]))
        exact = x.double() @ dense.T + (0 if bias is None else bias.double())
        bound = x.double().abs() @ dense.abs().T + 1
        assert float(((y - exact).abs() / bound).max()) < 1e-6


def test_same_bits_for_any_number_of_threads() -> None:
    load_tvm()
    import tvm_ffi

    spec = MatmulSpec(37, 512, 2, 0, lanes=HOST.lanes, table=HOST.table)
    generator = torch.Generator().manual_seed(5)
    weights, _ = weights_of(spec, generator)
    x = torch.randn(7, 512, generator=generator)
    threads = tvm_ffi.get_global_func("runtime.config_threadpool")
    results = []
    for count in (1, 2, 4):
        threads(1, count)
        results.append(run(spec, HOST.tvm(), x, *weights).numpy())
    assert np.array_equal(results[0], results[1]) and np.array_equal(results[0], results[2])


def test_portable_script_names_no_x86_instruction() -> None:
    for spec in SPECS:
        assert "llvm.x86" not in render(spec)
    assert "llvm.x86.avx512.permvar" in render(MatmulSpec(8, 512, 2, lanes=16, table=True))
