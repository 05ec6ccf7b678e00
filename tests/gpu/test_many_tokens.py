"""The kernels for many tokens beside wgmma: tiles of mma.sync (sm_80 code), and 8-bit x that is rounded on the way."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.conftest import Layer
from tsld_fx.codegen import LowBitGemm
from tsld_fx.codegen.config import GemmConfig
from tsld_fx.codegen.select_config import Plan

pytestmark = pytest.mark.gpu

hopper = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="kernels for Hopper"
)
TILES = [GemmConfig(*shape, "tile") for shape in ((256, 2, 4, 1, 4, 4), (128, 4, 2, 1, 4, 3), (64, 4, 1, 1, 2, 6))]
NARROW = [GemmConfig(256, 8, 1, 1, 1, stages, "narrow") for stages in (3, 5)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(17, 64), (299, 1187), (1024, 8192)])
@pytest.mark.parametrize("config", TILES, ids=lambda c: c.name)
def test_tiles(make_layer, config: GemmConfig, n: int, k: int, dtype: torch.dtype) -> None:
    layer: Layer = make_layer(n, k, 2, 0)
    target = "compute_80" if torch.cuda.get_device_capability() == (9, 0) else None
    gemm = LowBitGemm.pack(*layer.arguments(), target=target)
    for m, splits in ((1, 1), (70, 3), (config.tokens, 1), (517, 2)):
        x = torch.randn(m, k, dtype=dtype, device="cuda")
        bias = torch.randn(n, dtype=dtype, device="cuda") if m % 2 else None
        expected = x.double() @ layer.weight.T + (0 if bias is None else bias.double())
        chunks = -(-k // 128)
        plan = Plan(config, -(-chunks // -(-chunks // min(splits, chunks))))
        torch.full((m, n), float("nan"), dtype=dtype, device="cuda")  # the next output lies here
        error = float((gemm(x, bias, plan=plan).double() - expected).norm() / expected.norm())
        assert error <= (1e-3 if dtype == torch.float16 else 8e-3), (m, splits)


@hopper
@pytest.mark.parametrize(("n", "k"), [(17, 64), (299, 1187), (2048, 1024)])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("config", NARROW, ids=lambda c: c.name)
def test_narrow_gives_the_bits_of_wgmma(make_layer, config: GemmConfig, kind: str, n: int, k: int) -> None:
    """Sums of int8 are exact; those of fp8 run over the same inputs in the same order."""
    layer: Layer = make_layer(n, k, 2, 0)
    gemm = LowBitGemm.pack(*layer.arguments())
    for m in (1, 255, 257, 1500):
        x = torch.randn(m, k, dtype=torch.float16, device="cuda")
        x[m // 2, k // 2] = float("nan")
        bias = torch.randn(n, dtype=torch.float16, device="cuda")
        wanted = gemm(x, bias, quantise=kind, plan=Plan(GemmConfig(256, 8, 1, 1, 1, 4, "wgmma")))
        for _ in range(3):  # the counters must be back at zero
            found = gemm(x, bias, quantise=kind, plan=Plan(config))
            assert torch.equal(found.nan_to_num(7), wanted.nan_to_num(7)), m
        assert found[m // 2].isnan().all() and int(found.isnan().sum()) == n


@hopper
def test_narrow_on_two_streams_at_once(make_layer) -> None:
    layer: Layer = make_layer(4096, 1024, 2, 0)
    gemm = LowBitGemm.pack(*layer.arguments())
    x = torch.randn(2048, 1024, dtype=torch.float16, device="cuda")
    plans = [Plan(config) for config in NARROW]
    expected = gemm(x, quantise="int8", plan=plans[0])
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = []
    for i in range(20):
        with torch.cuda.stream(streams[i % 2]):
            results.append(gemm(x, quantise="int8", plan=plans[i // 2 % 2]))
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for y in results)
