"""The Triton kernels of training against the plain-torch definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests import test_top_logits as top_logits
from tests.test_fused_loss import OBJECTIVES, batch, plain, with_grad
from tsld_fx import losses, ops, quantizers  # noqa: F401
from tsld_fx.top_logits import TopLogits, top_of_head

pytestmark = pytest.mark.gpu


def on_gpu(values: dict) -> dict:
    return {k: v.cuda() if isinstance(v, Tensor) else v for k, v in values.items()}


@pytest.mark.parametrize("vocabulary", [37, 5000])
@pytest.mark.parametrize("chunk", [0, 4, 11, 25])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_fused_loss_equals_the_plain_losses(name: str, chunk: int, vocabulary: int) -> None:
    distill = OBJECTIVES[name]
    values = batch(chunk, vocabulary=vocabulary)
    exact = with_grad(on_gpu(values), "hidden", "weight", "bias")
    single = {k: v.float() if v.is_floating_point() else v for k, v in values.items()}
    ours = with_grad(on_gpu(single), "hidden", "weight", "bias")
    expected, _ = plain(distill, exact)
    found = losses.fused_head_loss(**ours, distill=distill, chunk_tokens=chunk)
    expected.backward()
    found.loss.backward()
    torch.testing.assert_close(found.loss.double(), expected, rtol=1e-5, atol=1e-5)
    for key in ("hidden", "weight", "bias"):
        error = (ours[key].grad.double() - exact[key].grad).norm() / exact[key].grad.norm()
        assert error < 1e-4, key


def test_autocast_keeps_float32_gradients_near_float64() -> None:
    values = batch(3, vocabulary=3000)
    exact = with_grad(on_gpu(values), "hidden", "weight")
    single = {k: v.float() if v.is_floating_point() else v for k, v in values.items()}
    plain(OBJECTIVES["tsld"], exact)[0].backward()
    errors = []
    for fused in (True, False):
        ours = with_grad(on_gpu(single), "hidden", "weight")
        with torch.autocast("cuda", torch.bfloat16):
            loss = (
                losses.fused_head_loss(**ours, distill=OBJECTIVES["tsld"], chunk_tokens=4).loss
                if fused
                else plain(OBJECTIVES["tsld"], ours)[0]
            )
        loss.backward()
        assert ours["weight"].grad.dtype == torch.float32
        errors.append(
            [float((ours[k].grad - exact[k].grad).norm() / exact[k].grad.norm()) for k in ("hidden", "weight")]
        )
    assert all(a < max(1.2 * b, 0.01) for a, b in zip(*errors, strict=True)), errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_of_the_teacher_gives_the_loss_of_float64(dtype: torch.dtype) -> None:
    values = batch(5, vocabulary=5000)
    exact = with_grad(on_gpu(values), "hidden", "weight", "bias")
    top = top_logits.top_of(exact, 16)
    expected = top_logits.plain(exact, OBJECTIVES["tsld"], top)
    expected.backward()
    single = {k: v.float() if v.is_floating_point() else v for k, v in values.items()}
    ours = with_grad(on_gpu(single), "hidden", "weight", "bias")
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = top_logits.fused(ours, OBJECTIVES["tsld"], TopLogits(*(t.cuda() for t in vars(top).values())), 4)[0]
    found.backward()
    limit = 1e-4 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(found.double(), expected, rtol=limit, atol=limit)
    for key in ("hidden", "weight", "bias"):
        error = (ours[key].grad.double() - exact[key].grad).norm() / exact[key].grad.norm()
        assert error < limit, key
    kept = top_of_head(ours["teacher_hidden"], ours["teacher_weight"], ours["teacher_bias"], ours["labels"], 16)
    torch.testing.assert_close(kept.rest.double(), top.rest, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(kept.scores.double(), top.scores, rtol=1e-4, atol=1e-4)


def test_dead_weights_feed_the_bias_as_on_a_cpu() -> None:
    weight, bias = torch.randn(40, 256), torch.randn(40)
    expected = torch.ops.tsld.dead_zone_bias(weight, None, bias, "twn", 0, 0.01)
    leaf = weight.cuda().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        found = torch.ops.tsld.dead_zone_bias(leaf, None, bias.cuda(), "twn", 0, 0.01)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-5)
    found.sum().backward()
    zeros = torch.ops.tsld.fake_quant(leaf.detach(), None, None, "twn", 2, 0) == 0
    assert torch.equal(leaf.grad, zeros * 0.01)


SCHEMES = [("twn", 2), ("absmean", 2), ("absmax", 4), ("minmax", 4), ("absmax", 8), ("minmax", 8)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("rows", "columns", "group"), [(33, 300, 0), (64, 2048, 128), (5, 11008, 0), (16, 96, 32)])
@pytest.mark.parametrize(("scheme", "bits"), SCHEMES)
def test_fake_quant_finds_the_scales_and_packing_repeats_them(
    scheme: str, bits: int, rows: int, columns: int, group: int, transposed: bool
) -> None:
    g = torch.Generator().manual_seed(rows)
    weight = torch.randn(columns, rows, generator=g).t() if transposed else torch.randn(rows, columns, generator=g)
    weight[1] = 0
    exact = quantizers.fake_quantize(weight.double(), None, None, scheme, bits, group)
    ours = torch.ops.tsld.fake_quant(weight.cuda(), None, None, scheme, bits, group)
    assert ours.stride() == quantizers.fake_quantize(weight, None, None, scheme, bits, group).stride()
    near = torch.isclose(ours.cpu().double(), exact, rtol=1e-5, atol=1e-6)
    assert near.float().mean() > 0.999  # a value on the edge between two codes may fall to either side
    packed = quantizers.quantize(weight.cuda(), None, None, scheme, bits, group)
    zero = packed.zero if packed.zero is not None else (1 if bits == 2 else 2 ** (bits - 1))
    columns_of = packed.scale.shape[1]
    lines = packed.codes.view(rows, columns_of, -1).float() - (
        zero.view(rows, columns_of, 1).float() if isinstance(zero, Tensor) else zero
    )
    assert torch.equal((lines * packed.scale.view(rows, columns_of, 1)).view(rows, columns), ours)
    frozen = torch.ops.tsld.fake_quant(weight.cuda(), packed.scale, packed.zero, scheme, bits, group)
    assert torch.equal(frozen, ours)
    with torch.autocast("cuda", torch.bfloat16):
        low = torch.ops.tsld.fake_quant(weight.cuda(), None, None, scheme, bits, group)
    assert torch.equal(low, ours.bfloat16())


@pytest.mark.parametrize("group", [0, 64])
@pytest.mark.parametrize(
    ("scheme", "bits", "zeros"),
    [
        ("lsq", 2, False), ("lsq", 4, True), ("lsq", 4, False), ("pact", 8, True), ("seq", 2, False), ("seq", 4, False),
    ],
)  # fmt: skip
def test_learned_scales_have_the_definitions_values_and_gradients(
    scheme: str, bits: int, zeros: bool, group: int
) -> None:
    weight, grad = torch.randn(48, 320), torch.randn(48, 320)
    shape = quantizers.scale_shape(48, 320, group)
    scale = torch.rand(shape) + 0.1
    zero = torch.randint(0, 2**bits, shape, dtype=torch.uint8) if zeros else None
    where = None if zero is None else zero.cuda()
    expected = quantizers.fake_quantize(weight, scale, zero, scheme, bits, group)
    ours, sizes = weight.cuda().requires_grad_(), scale.cuda().requires_grad_()
    result = torch.ops.tsld.fake_quant(ours, sizes, where, scheme, bits, group)
    assert torch.equal(result.cpu(), expected)
    result.backward(grad.cuda())
    grad_weight, grad_scale = quantizers.straight_through(grad, weight, scale, zero, scheme, bits, group)
    assert torch.equal(ours.grad.cpu(), grad_weight)
    torch.testing.assert_close(sizes.grad.cpu(), grad_scale, rtol=1e-4, atol=1e-4)
