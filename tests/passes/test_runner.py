"""run_passes: order, traces, dumps and errors; the pipelines' order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from tests.graphs import export
from tsld_fx import QuantConfig
from tsld_fx.errors import ConfigError, PassError
from tsld_fx.passes import (
    DropMetadataAsserts,
    InsertFakeQuant,
    PassTrace,
    capture_pipeline,
    convert_pipeline,
    prepare_pipeline,
    run_passes,
)
from tsld_fx.passes.graph_tools import aten, calls


@dataclass(frozen=True)
class DoubleRelu(PassBase):
    """A pass that somebody else wrote: relu(x) -> relu(x) + relu(x)."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        nodes = calls(graph_module.graph, aten.relu.default)
        for node in nodes:
            with graph_module.graph.inserting_after(node):
                twice = graph_module.graph.call_function(aten.add.Tensor, (node, node))
            node.replace_all_uses_with(twice, delete_user_cb=lambda user, made=twice: user is not made)
        return PassResult(graph_module, bool(nodes))


class Failing(PassBase):
    def call(self, graph_module: fx.GraphModule) -> PassResult:
        raise KeyError("lost node")


class Refusing(PassBase):
    def call(self, graph_module: fx.GraphModule) -> PassResult:
        raise ConfigError("Refusing: not this one.")


class Forgetful(PassBase):
    def call(self, graph_module: fx.GraphModule) -> None:
        return None


class Breaking(PassBase):
    """Leaves a graph that uses a node before it is made."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        first = next(iter(graph_module.graph.nodes))
        output = next(n for n in reversed(graph_module.graph.nodes) if n.op == "output")
        first.prepend(output)
        return PassResult(graph_module, True)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).relu()


def graph() -> fx.GraphModule:
    return export(Net(), torch.randn(2, 3))


def test_passes_run_in_order_and_the_module_is_recompiled() -> None:
    graph_module, x = graph(), torch.randn(2, 3)
    expected = graph_module(x)
    seen: list[PassTrace] = []
    graph_module = run_passes(graph_module, [DropMetadataAsserts(), DoubleRelu(), InsertFakeQuant()], seen.append)
    assert [(t.name, t.modified) for t in seen] == [
        ("DropMetadataAsserts", False),
        ("DoubleRelu", True),
        ("InsertFakeQuant", True),
    ]
    assert seen[0].changes() == {}
    assert seen[1].changes() == {"aten.add.Tensor": 1}
    assert seen[2].changes() == {"tsld.fake_quant.default": 1}
    assert all(trace.seconds >= 0 for trace in seen)
    assert "fake_quant" in graph_module.code
    assert not torch.equal(graph_module(x), expected)


def test_dump_folder_gets_a_file_for_each_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "made" / "here"
    monkeypatch.setenv("TSLD_DUMP", str(folder))
    run_passes(graph(), [DropMetadataAsserts(), DoubleRelu()])
    files = sorted(folder.iterdir())
    names = [f.name.split("_", 1)[1] for f in files]
    passes = ("DropMetadataAsserts", "DoubleRelu")
    assert names == [f"{name}.{when}.txt" for name in passes for when in ("after", "before")]
    assert "aten.add.Tensor" not in files[3].read_text()
    dumped = files[2].read_text()
    assert dumped.startswith("# DoubleRelu: modified=True")
    assert "# +1 aten.add.Tensor" in dumped
    assert "torch.ops.aten.add.Tensor(relu, relu)" in dumped


def test_dump_folder_that_is_a_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TSLD_DUMP", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"TSLD_DUMP=.*file: cannot be made a folder"):
        run_passes(graph(), [DoubleRelu()])


def test_without_the_variable_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TSLD_DUMP", raising=False)
    monkeypatch.chdir(tmp_path)
    run_passes(graph(), [DoubleRelu()])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "one, said",
    [
        (Failing(), "^Failing: the pass failed on this graph: 'lost node'"),
        (Forgetful(), "Forgetful: "),
        (Breaking(), "^Breaking: the pass failed on this graph"),
    ],
)
def test_failure_names_the_pass(one: PassBase, said: str) -> None:
    with pytest.raises(PassError, match=said) as caught:
        run_passes(graph(), [one])
    if isinstance(one, Failing):
        assert isinstance(caught.value.__cause__, KeyError)


def test_refusal_passes_through_as_it_is() -> None:
    with pytest.raises(ConfigError, match=r"^Refusing: not this one\.$"):
        run_passes(graph(), [Refusing()])


def test_pipelines_read_in_the_order_of_their_documentation() -> None:
    def names(passes: tuple[PassBase, ...]) -> list[str]:
        return [type(one).__name__ for one in passes]

    assert names(capture_pipeline()) == ["InlineHigherOrderOps", "DropMetadataAsserts"]
    prepare = prepare_pipeline(QuantConfig(), ("hidden_states",), "embed_out")
    assert names(prepare) == ["FoldTransposedLinear", "InsertFakeQuant", "InsertDistillationHooks"]
    assert prepare[1].output_embedding == "embed_out"
    assert prepare[2].taps == ("hidden_states",)
    assert names(convert_pipeline())[-3:] == ["FreezeScales", "PackWeights", "LowerLinear"]


def test_passes_are_values() -> None:
    assert InsertFakeQuant() == InsertFakeQuant()
    assert InsertFakeQuant(output_embedding="x") != InsertFakeQuant()
    with pytest.raises(AttributeError):
        InsertFakeQuant().output_embedding = "y"  # type: ignore[misc]
