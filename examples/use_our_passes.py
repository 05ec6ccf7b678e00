"""Our passes, and one of your own, in your pipeline: any module, torch's PassManager, torch.compile, AOTInductor.

    python examples/use_our_passes.py

The model is a plain torch MLP: nothing here needs transformers' models. Every step is a torch.fx pass. The last part
compiles a shared library, which needs a C++ compiler (g++).
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
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
    rows = ({0: Dim.DYNAMIC},)  # any number of rows, here and in the exports below
    graph_module = torch.export.export(model, (x,), dynamic_shapes=rows).module(check_guards=False)

    # Ternary weights in `up`, 4 bits in `down`.
    config = QuantConfig(TernaryWeight(), overrides={"down": AffineWeight(bits=4)})
    trainable = PassManager(passes=[ReluToSilu(), InsertFakeQuant(config)])(graph_module).graph_module
    train(trainable, x, target)
    expected = trainable(x)

    # In somebody else's compile: the backend packs the fake-quantised weights of whatever graph Dynamo traces.
    # `inner` compiles the result; leave it out for inductor.
    compiled = torch.compile(trainable, backend="tsld_fx", options={"inner": "aot_eager"})
    with torch.no_grad():
        assert torch.allclose(compiled(x), expected, atol=1e-5)
        print("torch.compile(backend='tsld_fx') agrees")

    # Ahead of time: the passes of convert, and a listener that hears what each of them did.
    packed = run_passes(
        trainable,
        [FreezeScales(), PackWeights(), LowerLinear()],
        listener=lambda trace: print(f"{trace.name}: {trace.changes()}"),
    )
    assert torch.allclose(packed(x), expected, atol=1e-5)
    for name, buffer in packed.named_buffers():
        print(f"{name}: {str(buffer.dtype).removeprefix('torch.')} {list(buffer.shape)}")

    # The packed graph is an ordinary exported program: save it, load it, compile it into a library.
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        torch.export.save(torch.export.export(packed, (x,), dynamic_shapes=rows), folder / "mlp.pt2")
        program = torch.export.load(folder / "mlp.pt2")
        assert torch.allclose(program.module()(x[:7]), expected[:7], atol=1e-5)
        library = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "mlp_aoti.pt2"))
        run = torch._inductor.aoti_load_package(library)
        with torch.no_grad():
            assert torch.allclose(run(x[:9]), expected[:9], atol=1e-5)
        print("torch.export and AOTInductor agree")


def train(trainable: fx.GraphModule, x: Tensor, target: Tensor) -> None:
    """The graph is an ordinary module over the model's own parameters."""
    optimizer = torch.optim.Adam(trainable.parameters(), lr=1e-2)
    losses = []
    for _ in range(ROUNDS):
        loss = nn.functional.mse_loss(trainable(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in {ROUNDS} steps")


if __name__ == "__main__":
    main()
