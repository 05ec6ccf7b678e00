"""tsld::fake_quant under autocast, and inside a WeightCache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tsld_fx import ops  # noqa: F401
from tsld_fx.quantizers import fake_quantize
from tsld_fx.weight_cache import WeightCache

TWN = (None, None, "twn", 2, 0)


def fake_quant(weight: Tensor, *how: Any) -> Tensor:
    return torch.ops.tsld.fake_quant(weight, *(how or TWN))


@pytest.mark.parametrize("how", [TWN, (None, None, "minmax", 4, 8), (torch.rand(6, 1) + 0.1, None, "lsq", 4, 0)])
def test_autocast_rounds_the_same_values_once(how: Any) -> None:
    weight = torch.randn(6, 16, requires_grad=True)
    exact = fake_quant(weight, *how)
    with torch.autocast("cpu", torch.bfloat16):
        low = fake_quant(weight, *how)
        assert fake_quant(weight.double(), *how).dtype == torch.float64
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, exact.bfloat16())
    grad = torch.randn(6, 16).bfloat16()
    low.backward(grad)
    ours, weight.grad = weight.grad, None
    exact.backward(grad.float())
    assert ours.dtype == torch.float32
    assert torch.equal(ours, weight.grad)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    monkeypatch.setattr("tsld_fx.quantizers.fake_quantize", lambda *a: calls.append(1) or fake_quantize(*a))
    return calls


def test_a_cache_computes_once_until_the_weight_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, cache = counted(monkeypatch), WeightCache()
    weight = torch.nn.Parameter(torch.randn(6, 16))
    with cache:
        first, second = fake_quant(weight), fake_quant(weight)
    assert len(calls) == 1
    assert first is not second
    (first.sum() + 2 * second.sum()).backward()
    assert torch.equal(weight.grad, torch.full((6, 16), 3.0))
    fake_quant(weight)  # outside nothing is kept
    assert len(calls) == 2
    with torch.no_grad():
        weight.mul_(-1)
    with cache:
        assert torch.equal(fake_quant(weight), fake_quantize(weight, *TWN))
    assert len(calls) == 3
    cache.clear()
    with cache:
        fake_quant(weight)
    assert len(calls) == 4


def test_a_cache_tells_views_schemes_scales_and_dtypes_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, cache = counted(monkeypatch), WeightCache()
    weight, scale = torch.randn(8, 8), torch.rand(8, 1) + 0.1
    variants = [
        (weight, TWN), (weight.t(), TWN), (weight, (None, None, "absmean", 2, 0)),
        (weight, (None, None, "minmax", 4, 4)), (weight, (scale, None, "lsq", 4, 0)), (weight[:4], TWN),
    ]  # fmt: skip
    with cache:
        for _ in range(2):
            for one, how in variants:
                assert torch.equal(fake_quant(one, *how), fake_quantize(one, *how))
        assert len(calls) == len(variants)
        scale.add_(0.5)
        assert torch.equal(
            fake_quant(weight, scale, None, "lsq", 4, 0), fake_quantize(weight, scale, None, "lsq", 4, 0)
        )
        with torch.inference_mode():
            still = torch.randn(4, 4)
            assert torch.equal(fake_quant(still), fake_quantize(still, *TWN))


def test_an_error_leaves_the_cache_closed() -> None:
    with pytest.raises(RuntimeError, match="stop"), WeightCache():
        raise RuntimeError("stop")
    from tsld_fx import weight_cache

    assert weight_cache._open is None
