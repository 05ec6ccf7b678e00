"""TabulateRotary: cosine and sine of the rotary embedding are looked up, not computed in each step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from tsld_fx import decode_ops  # noqa: F401  (registers the operator)
from tsld_fx.passes.graph_tools import aten, attribute, calls, erase_dead, fake_of
from tsld_fx.passes.insert_kv_cache import HOLDER


@dataclass(frozen=True)
class TabulateRotary(PassBase):
    """The tables of all positions are made once, by the graph's own operators.

    before: cos, sin = f(position_ids); cached_attention(q, k, v, cos, sin, position_ids, ...)      [B, T, D]
    after:  cached_attention(q, k, v, kv_cache.cos_0, kv_cache.sin_0, position_ids, ...)            [length, D]

    Only where cos and sin depend on position_ids and nothing else, one position at a time.
    """

    length: int

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph, modified = graph_module.graph, False
        made: dict[fx.Node, fx.Node | None] = {}
        for node in calls(graph, torch.ops.tsld.cached_attention.default):
            pair = node.args[3:5]
            if any(not isinstance(t, fx.Node) or t.op == "get_attr" for t in pair):
                continue
            for name, source in zip(("cos", "sin"), pair, strict=True):
                if source not in made:
                    made[source] = self._table(graph_module, node, name, source)
            tables = [made[source] for source in pair]
            if all(table is not None for table in tables):
                for index, table in enumerate(tables):
                    node.update_arg(3 + index, table)
                modified = True
        for source in made:
            erase_dead(graph, source)
        return PassResult(graph_module, modified)

    def _table(self, graph_module: fx.GraphModule, user: fx.Node, name: str, source: fx.Node) -> fx.Node | None:
        """A get_attr node of the table of `source`, before the first attention; None where it is no such table."""
        holder = graph_module.get_submodule(HOLDER)
        device = holder.get_buffer("key_0").device
        every = torch.arange(self.length, device=device)
        value, backwards = (_evaluate(graph_module, source, p[None]) for p in (every, every.flip(0)))
        if value is None or backwards is None or value.ndim != 3 or value.shape[:2] != (1, self.length):
            return None
        if not torch.equal(value, backwards.flip(1)):
            return None  # a row depends on other positions
        leaf = f"{name}_{sum(key.startswith(name) for key in holder._buffers)}"
        holder.register_buffer(leaf, value[0].contiguous(), persistent=False)
        with user.graph.inserting_before(user):
            table = user.graph.get_attr(f"{HOLDER}.{leaf}")
        fake_of(graph_module, table, value[0])
        return table


def _evaluate(graph_module: fx.GraphModule, wanted: fx.Node, positions: Tensor) -> Tensor | None:
    """The value of a node for position_ids [1, length]; None where it depends on values of another input."""
    needed, pending = set(), [wanted]
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending.extend(node.all_input_nodes)
    values: dict[fx.Node, Any] = {}
    for node in graph_module.graph.nodes:
        if node not in needed:
            continue
        if node.op == "placeholder":
            only_sizes = all(u.target is aten.sym_size.int for u in node.users if u in needed)
            if node.name != "position_ids" and not only_sizes:
                return None
            values[node] = positions
        elif node.op == "get_attr":
            values[node] = attribute(graph_module, str(node.target))
        elif node.op == "call_function":
            args, kwargs = (fx.map_arg(part, values.__getitem__) for part in (node.args, node.kwargs))
            with torch.no_grad():
                values[node] = node.target(*args, **kwargs)
        else:
            return None
    found = values[wanted]
    return found if isinstance(found, Tensor) else None
