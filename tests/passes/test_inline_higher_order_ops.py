"""InlineHigherOrderOps: regions without gradients or autocast become plain nodes."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

from tests.graphs import apply, assert_runs_in_torchs_pass_manager, assert_untouched, export, text
from tsld_fx.errors import PassError
from tsld_fx.passes import DropMetadataAsserts, InlineHigherOrderOps


class NoGrad(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        with torch.no_grad():
            scale, shift = y.sin(), y.cos()
        return y * scale + shift


class FullPrecision(nn.Module):
    """What rotary embeddings do: an outer product that autocast must not round."""

    def forward(self, x: Tensor, frequencies: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            angles = frequencies[:, :, None].float() @ x[:, None, :].float()
        return angles.cos()


class Nested(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x + 1
            with torch.autocast("cpu", enabled=False):
                z = y.exp()
            w = z - y
        return x * w


def test_region_without_gradients_is_inlined_and_its_results_detached() -> None:
    graph_module = export(NoGrad(), torch.randn(3))
    assert "wrap_with_set_grad_enabled" in text(graph_module)
    graph_module, modified = apply(InlineHigherOrderOps(), graph_module)
    assert modified
    assert_expected_inline(
        text(graph_module),
        """\
mul = aten.mul.Tensor(x, 2)
sin_1 = aten.sin.default(mul)
cos_1 = aten.cos.default(mul)
detach_default = aten.detach.default(sin_1)
detach_default_1 = aten.detach.default(cos_1)
mul_1 = aten.mul.Tensor(mul, detach_default)
add = aten.add.Tensor(mul_1, detach_default_1)
return pytree.tree_unflatten((add,), self._out_spec)""",
    )


def test_outer_product_in_full_precision_becomes_a_multiplication() -> None:
    graph_module = export(FullPrecision(), torch.randn(2, 5), torch.randn(2, 4))
    assert "wrap_with_autocast" in text(graph_module)
    graph_module, _ = apply(InlineHigherOrderOps(), graph_module)
    graph_module, _ = apply(DropMetadataAsserts(), graph_module)
    assert_expected_inline(
        text(graph_module),
        """\
unsqueeze = aten.unsqueeze.default(frequencies, 2)
to = aten.to.dtype(unsqueeze, torch.float32)
unsqueeze_1 = aten.unsqueeze.default(x, 1)
to_1 = aten.to.dtype(unsqueeze_1, torch.float32)
matmul_1 = aten.mul.Tensor(to, to_1)
cos = aten.cos.default(matmul_1)
return pytree.tree_unflatten((cos,), self._out_spec)""",
    )
    x, frequencies = torch.randn(2, 5), torch.randn(2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = graph_module(x, frequencies)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, FullPrecision()(x, frequencies), rtol=0, atol=0)


@pytest.mark.parametrize("module", [NoGrad(), Nested()])
def test_values_and_gradients_stay(module: nn.Module) -> None:
    graph_module, _ = apply(InlineHigherOrderOps(), export(module, torch.randn(3)))
    assert "wrap_with" not in text(graph_module)
    ours = torch.randn(3, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    graph_module(ours).sum().backward()
    module(theirs).sum().backward()
    assert torch.equal(graph_module(ours), module(theirs))
    assert torch.equal(ours.grad, theirs.grad)
    assert torch.is_grad_enabled()


def test_bodies_are_removed_and_the_pass_is_idempotent() -> None:
    graph_module, _ = apply(InlineHigherOrderOps(), export(Nested(), torch.randn(3)))
    assert not [name for name, _ in graph_module.named_children() if "submod" in name or "inlined" in name]
    assert_untouched(InlineHigherOrderOps(), graph_module)


def test_graph_without_regions_is_untouched() -> None:
    assert_untouched(InlineHigherOrderOps(), export(nn.Linear(3, 2), torch.randn(1, 3)))


def test_runs_in_torchs_pass_manager() -> None:
    graph_module = assert_runs_in_torchs_pass_manager(InlineHigherOrderOps(), export(NoGrad(), torch.randn(3)))
    assert graph_module(torch.ones(3)).shape == (3,)


def test_region_whose_result_is_used_whole_is_refused() -> None:
    graph_module = export(NoGrad(), torch.randn(3))
    region = next(n for n in graph_module.graph.nodes if "wrap_with_set_grad_enabled" in str(n.target))
    with graph_module.graph.inserting_after(region):
        graph_module.graph.call_function(len, (region,))
    with pytest.raises(PassError, match=r"InlineHigherOrderOps: node len_1 uses .*other than by getitem"):
        InlineHigherOrderOps()(graph_module)
