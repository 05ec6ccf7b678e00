"""The kernels for many tokens beside wgmma: tiles of mma.sync (sm_80 code)."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.conftest import Layer
from tsld_fx.codegen import LowBitGemm
from tsld_fx.codegen.config import GemmConfig
from tsld_fx.codegen.select_config import Plan

pytestmark = pytest.mark.gpu

TILES = [GemmConfig(*shape, "tile") for shape in ((256, 2, 4, 1, 4, 4), (128, 4, 2, 1, 4, 3), (64, 4, 1, 1, 2, 6))]


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
