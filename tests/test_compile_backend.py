"""`torch.compile(model, backend="tsld_fx")`: packed weights inside somebody else's compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from tests.models import build, ids, left_padded
from tsld_fx import AffineWeight, QuantConfig, TernaryWeight, prepare
from tsld_fx.dynamo_backend import tsld_fx as backend

FORMATS = {
    "twn": TernaryWeight(),
    "ternary-lsq-group": TernaryWeight(scale="lsq", granularity="group", group_size=4),
    "4-bit-pact": AffineWeight(bits=4, scale="pact"),
    "8-bit-tensor": AffineWeight(bits=8, symmetric=True, granularity="tensor"),
}


class Inner:
    """The backend inside: keeps the graphs that it is given and runs them as they are."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, graph_module: fx.GraphModule, example_inputs: Any) -> Any:
        self.graphs.append(graph_module)
        return graph_module

    def count(self, name: str) -> int:
        nodes = self.graphs[-1].graph.nodes
        return sum(n.op == "call_function" and str(n.target).startswith(f"tsld.{name}") for n in nodes)


@pytest.fixture
def inner() -> Inner:
    torch.compiler.reset()
    return Inner()


def compiled(model: nn.Module, inner: Inner) -> Any:
    return torch.compile(model, backend=backend, options={"inner": inner}, fullgraph=True)


class Projection(nn.Module):
    """A module of somebody else with a fake-quantised weight [in, out] or [out, in]."""

    def __init__(self, transposed: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        shape = (12, 8) if transposed else (8, 12)
        self.weight = nn.Parameter(torch.randn(shape, dtype=dtype))
        self.bias, self.transposed = nn.Parameter(torch.randn(8, dtype=dtype)), transposed

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.t() if self.transposed else self.weight
        quantised = torch.ops.tsld.fake_quant(weight, None, None, scheme="twn", bits=2, group_size=0)
        return functional.linear(x.relu(), quantised, bias=self.bias) + 1


def test_backend_is_found_by_its_name() -> None:
    torch.compiler.reset()
    assert "tsld_fx" in torch.compiler.list_backends()
    model, x = Projection(), torch.randn(5, 12)
    with torch.no_grad():
        ours = torch.compile(model, backend="tsld_fx")(x)
        torch.testing.assert_close(ours, model(x))


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neo", "llama"])
def test_every_linear_of_a_prepared_model_is_lowered(family: str, inner: Inner) -> None:
    prepared = prepare(build(family))
    layers = sum("fake_quant" in str(n.target) for n in prepared.graph_module.graph.nodes)
    padded, mask = left_padded()
    with torch.no_grad():
        ours = compiled(prepared, inner)(padded, attention_mask=mask).logits
        torch.testing.assert_close(ours, prepared(padded, attention_mask=mask).logits)
    assert inner.count("lowbit_linear") == layers
    assert inner.count("fake_quant") == inner.count("dequantize") == 0
    names = [str(n.target) for n in inner.graphs[0].graph.nodes if n.op == "placeholder"]
    assert not any(part in name for name in names for part in ("c_fc_parameters_weight", "fc1_parameters_weight",
                                                               "up_proj_parameters_weight"))  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_weights_changed_between_calls_are_packed_again_without_compiling(name: str, inner: Inner) -> None:
    prepared = prepare(build("gpt2", n_layer=1), QuantConfig(FORMATS[name]))
    run = compiled(prepared, inner)
    with torch.no_grad():
        first = run(ids()).logits
        torch.testing.assert_close(first, prepared(ids()).logits)
        for parameter in prepared.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        torch.testing.assert_close(run(ids()).logits, prepared(ids()).logits)
        assert not torch.allclose(run(ids()).logits, first)
        prepared.load_state_dict({n: t.roll(1, -1) for n, t in prepared.state_dict().items()})
        torch.testing.assert_close(run(ids()).logits, prepared(ids()).logits)
    assert len(inner.graphs) == 1


def test_training_keeps_the_fake_quantisation_and_its_gradients(inner: Inner) -> None:
    prepared = prepare(build("llama", num_hidden_layers=1), QuantConfig(FORMATS["ternary-lsq-group"]))
    run = compiled(prepared, inner)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
    run(ids(), labels=ids()).loss.backward()
    assert inner.count("fake_quant") == 7
    ours = {n: p.grad.clone() for n, p in prepared.named_parameters()}
    prepared.zero_grad()
    prepared(ids(), labels=ids()).loss.backward()
    for name, parameter in prepared.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad)
    for _ in range(2):  # evaluation between the steps of an optimiser
        optimizer.step()
        with torch.no_grad():
            torch.testing.assert_close(run(ids()).logits, prepared(ids()).logits)
        assert inner.count("lowbit_linear") == 7
    assert len(inner.graphs) == 2


@pytest.mark.parametrize("transposed", [False, True])
def test_module_that_calls_the_operator_itself_is_lowered(transposed: bool, inner: Inner) -> None:
    model = Projection(transposed)
    run = compiled(model, inner)
    for rows in (3, 4, 5):
        x = torch.randn(rows, 12)
        with torch.inference_mode():
            torch.testing.assert_close(run(x), model(x))
        assert inner.count("lowbit_linear") == 1
    assert len(inner.graphs) <= 2


def test_gradients_flow_to_the_activations_over_frozen_packed_weights(inner: Inner) -> None:
    model = Projection().requires_grad_(False)
    x = torch.randn(3, 12, requires_grad=True)
    compiled(model, inner)(x).sum().backward()
    assert inner.count("lowbit_linear") == 1
    ours, x.grad = x.grad, None
    model(x).sum().backward()
    torch.testing.assert_close(ours, x.grad)


def test_autocast_keeps_the_dtype_of_the_result(inner: Inner) -> None:
    model, x = Projection(), torch.randn(3, 12)
    run = compiled(model, inner)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours, theirs = run(x), model(x)
    assert inner.count("lowbit_linear") == 1
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.1)


def test_what_cannot_be_packed_stays_as_it_is(inner: Inner) -> None:
    class OfActivations(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x @ torch.ops.tsld.fake_quant(y + 1, None, None, "twn", 2, 0)

    x, y = torch.randn(3, 4), torch.randn(4, 5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(OfActivations(), inner)(x, y), OfActivations()(x, y))
        assert inner.count("fake_quant") == 1
        half = Projection(dtype=torch.bfloat16)  # rounding to bfloat16 comes after the scale: no packed form has it
        z = torch.randn(3, 12, dtype=torch.bfloat16)
        assert torch.equal(compiled(half, inner)(z), half(z))
        assert inner.count("fake_quant") == 1


def test_graph_without_quantisation_goes_through_untouched(inner: Inner) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4)
    with torch.no_grad():
        assert torch.equal(compiled(model, inner)(x), model(x))
    assert len(inner.graphs) == 1


def test_weight_with_nan_is_refused_by_name_of_the_pass(inner: Inner) -> None:
    model = Projection()
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
        with pytest.raises(Exception, match=r"FreezeScales.*NaN or Inf"):
            compiled(model, inner)(torch.randn(2, 12))


@pytest.mark.parametrize(("name", "said"), [("tsld_fx", "this backend itself"), ("nowhere", "is no backend")])
def test_inner_backend_that_cannot_be_is_refused(name: str, said: str) -> None:
    torch.compiler.reset()
    with torch.no_grad(), pytest.raises(Exception, match=said):
        torch.compile(Projection(), backend=backend, options={"inner": name})(torch.randn(2, 12))


def test_options_and_mode_reach_inductor() -> None:
    torch.compiler.reset()
    model, x = Projection(), torch.randn(2, 12)
    with torch.no_grad():
        run = torch.compile(model, backend=backend, options={"inner": "inductor", "max_autotune": False})
        torch.testing.assert_close(run(x), model(x))
        with pytest.raises(Exception, match="no_such_option"):
            torch.compile(Projection(), backend=backend, options={"no_such_option": 1})(torch.randn(3, 12))
