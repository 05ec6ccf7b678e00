"""DropMetadataAsserts: assertions on dtype and device go."""

from __future__ import annotations

import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

from tests.graphs import apply, assert_runs_in_torchs_pass_manager, assert_untouched, export, text
from tsld_fx.passes import DropMetadataAsserts


class Cast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.float64) + 1


def test_assertions_are_removed() -> None:
    graph_module = export(Cast(), torch.randn(3))
    assert "_assert_tensor_metadata" in text(graph_module)
    graph_module, modified = apply(DropMetadataAsserts(), graph_module)
    assert modified
    assert_expected_inline(
        text(graph_module),
        """\
to = aten.to.dtype(x, torch.float64)
add = aten.add.Tensor(to, 1)
return pytree.tree_unflatten((add,), self._out_spec)""",
    )
    assert torch.equal(graph_module(torch.ones(3)), torch.full((3,), 2.0).double())


def test_graph_runs_in_another_dtype_afterwards() -> None:
    graph_module, _ = apply(DropMetadataAsserts(), export(Cast(), torch.randn(3)))
    assert torch.equal(graph_module(torch.ones(3).half()), torch.full((3,), 2.0).double())


def test_graph_without_assertions_is_untouched_and_the_pass_is_idempotent() -> None:
    assert_untouched(DropMetadataAsserts(), export(nn.Linear(3, 2), torch.randn(1, 3)))
    graph_module, _ = apply(DropMetadataAsserts(), export(Cast(), torch.randn(3)))
    assert_untouched(DropMetadataAsserts(), graph_module)


def test_runs_in_torchs_pass_manager() -> None:
    assert_runs_in_torchs_pass_manager(DropMetadataAsserts(), export(Cast(), torch.randn(3)))
