"""Small exported graphs for the tests of passes, and their text for golden comparisons."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassBase
from torch.fx.passes.infra.pass_manager import PassManager


def export(module: nn.Module, *args: Tensor, **kwargs: Any) -> fx.GraphModule:
    """The graph of a module as anybody gets it from torch.export."""
    return torch.export.export(module.eval(), args, strict=False, **kwargs).module(check_guards=False)


def apply(one: PassBase, graph_module: fx.GraphModule) -> tuple[fx.GraphModule, bool]:
    """Run one pass as a pass manager does, and check that the graph is sound afterwards."""
    result = one(graph_module)
    assert result is not None
    result.graph_module.graph.lint()
    result.graph_module.recompile()
    return result.graph_module, result.modified


def text(graph_module: fx.GraphModule) -> str:
    """The graph's code without comments, signatures and clean-up, for `assertExpectedInline`."""
    lines = []
    for line in graph_module.code.splitlines():
        line = re.sub(r"\s*#.*$", "", line).split(";  ")[0].rstrip()
        line = line.replace("torch.ops.", "")
        if line and "import" not in line and "fx_pytree" not in line and not line.lstrip().startswith("def forward"):
            lines.append(line.strip())
    return "\n".join(lines)


def assert_untouched(one: PassBase, graph_module: fx.GraphModule) -> None:
    """The pass says that it changed nothing, and that is true."""
    before = str(graph_module.graph)
    graph_module, modified = apply(one, graph_module)
    assert not modified
    assert str(graph_module.graph) == before


def assert_runs_in_torchs_pass_manager(one: PassBase, graph_module: fx.GraphModule) -> fx.GraphModule:
    """The pass works inside somebody else's pipeline."""
    result = PassManager(passes=[one], run_checks_after_each_pass=True)(graph_module)
    assert result.modified
    return result.graph_module
