"""Our passes, and one of your own, over a graph that torch.export made of any module.

    python examples/passes_in_your_pipeline.py

The model is a plain torch MLP: nothing here needs transformers' models. Every step is a torch.fx pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager

from tsld_fx import AffineWeight, QuantConfig, TernaryWeight
from tsld_fx.passes import FreezeScales, InsertFakeQuant, LowerLinear, PackWeights, run_passes
from tsld_fx.passes.graph_tools import aten, calls

ROUNDS = 200


class Mlp(nn.Module):
    """Two linears with a ReLU between them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


@dataclass(frozen=True)
class ReluToSilu(PassBase):
    """A pass of your own.

    before: relu(x)
    after:  silu(x)
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        nodes = calls(graph_module.graph, aten.relu.default)
        for node in nodes:
            node.target = aten.silu.default
        return PassResult(graph_module, bool(nodes))


def main() -> None:
    torch.manual_seed(0)
    model, x = Mlp(), torch.randn(256, 16)
    target = torch.sin(x[:, :4])
    graph_module = torch.export.export(model, (x,)).module(check_guards=False)

    # Ternary weights in `up`, 4 bits in `down`.
    config = QuantConfig(TernaryWeight(), overrides={"down": AffineWeight(bits=4)})
    trainable = PassManager(passes=[ReluToSilu(), InsertFakeQuant(config)])(graph_module).graph_module

    # The graph is an ordinary module over the model's own parameters: train it.
    optimizer = torch.optim.Adam(trainable.parameters(), lr=1e-2)
    losses = []
    for _ in range(ROUNDS):
        loss = nn.functional.mse_loss(trainable(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in {ROUNDS} steps")

    # tsld_fx's own runner does the same as torch's PassManager, and tells a listener what each pass did.
    expected = trainable(x)
    packed = run_passes(
        trainable,
        [FreezeScales(), PackWeights(), LowerLinear()],
        listener=lambda trace: print(f"{trace.name}: {trace.changes()}"),
    )
    assert torch.allclose(packed(x), expected, atol=1e-5)
    for name, buffer in packed.named_buffers():
        print(f"{name}: {str(buffer.dtype).removeprefix('torch.')} {list(buffer.shape)}")


if __name__ == "__main__":
    main()
