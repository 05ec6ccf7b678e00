"""RetargetDevice: devices baked into a graph move."""

from __future__ import annotations

import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

from tests.graphs import apply, assert_runs_in_torchs_pass_manager, assert_untouched, export, text
from tsld_fx.passes import RetargetDevice

META = RetargetDevice(torch.device("meta"))


class Constants(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ones(3, device=x.device) + torch.zeros(3, device="cpu")


def test_every_device_is_replaced() -> None:
    graph_module, modified = apply(RetargetDevice(torch.device("cuda", 1)), export(Constants(), torch.randn(3)))
    assert modified
    assert_expected_inline(
        text(graph_module),
        """\
ones = aten.ones.default([3], device = device(type='cuda', index=1), pin_memory = False)
add = aten.add.Tensor(x, ones)
zeros = aten.zeros.default([3], device = device(type='cuda', index=1), pin_memory = False)
add_1 = aten.add.Tensor(add, zeros)
return pytree.tree_unflatten((add_1,), self._out_spec)""",
    )


def test_graph_runs_on_the_new_device() -> None:
    graph_module, _ = apply(META, export(Constants(), torch.randn(3)))
    assert graph_module(torch.empty(3, device="meta")).device.type == "meta"
    graph_module, _ = apply(RetargetDevice(torch.device("cpu")), graph_module)
    x = torch.randn(3)
    assert torch.equal(graph_module(x), Constants()(x))


def test_graph_that_is_there_already_is_untouched() -> None:
    assert_untouched(RetargetDevice(torch.device("cpu")), export(Constants(), torch.randn(3)))
    assert_untouched(META, export(nn.Linear(3, 2), torch.randn(1, 3)))
    graph_module, _ = apply(META, export(Constants(), torch.randn(3)))
    assert_untouched(META, graph_module)


def test_runs_in_torchs_pass_manager() -> None:
    assert_runs_in_torchs_pass_manager(META, export(Constants(), torch.randn(3)))
