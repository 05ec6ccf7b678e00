"""InsertKVCache: make a decoder graph without a cache compute new tokens over a static one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from tsld_fx import decode_ops  # noqa: F401  (registers the operator)
from tsld_fx.errors import PassError
from tsld_fx.passes.graph_tools import argument, aten, calls, copy_origin, erase_dead

HOLDER = "kv_cache"


@dataclass(frozen=True)
class InsertKVCache(PassBase):
    """Every fused attention writes its keys and values to a static cache and reads the earlier ones from there.

    before: y = scaled_dot_product_attention(rotary(q^T), repeat(rotary(k^T)), repeat(v^T), mask, scale=s)
    after:  y = cached_attention(q, k, v, cos, sin, position_ids, key_i, value_i, scratch, s, fresh)^T

    A token attends to all positions up to its own, so the mask goes, and with it the input attention_mask. q, k, v
    are [B, T, heads, D]; a rotary embedding is taken in where it has the form x * cos + rotate_half(x) * sin.

    Fields:
        batch, length: of the cache: `kv_cache.key_<i>` and `value_<i>`, [batch, kv_heads, length, D].
        scratch: float32 values of working memory that the kernels may ask for, `kv_cache.scratch`.
        fresh: the graph computes the first tokens of each sequence (prefill), not further ones.
    """

    batch: int
    length: int
    scratch: int = 0
    fresh: bool = False

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        nodes = calls(graph, aten.scaled_dot_product_attention.default)
        if not nodes:
            return PassResult(graph_module, False)
        inputs = {node.name: node for node in graph.nodes if node.op == "placeholder"}
        if "position_ids" not in inputs or "input_ids" not in inputs:
            raise PassError("InsertKVCache: the graph has no input position_ids. Capture it with with_positions=True.")
        for node in nodes:
            self._replace(graph_module, node, inputs["position_ids"])
        mask = inputs.get("attention_mask")
        if mask is not None:
            _drop(graph, mask, inputs["input_ids"])
        return PassResult(graph_module, True)

    def _replace(self, graph_module: fx.GraphModule, node: fx.Node, positions: fx.Node) -> None:
        graph, (query, key, value) = graph_module.graph, node.args[:3]
        key, value = _before_repeat(key), _before_repeat(value)
        q, q_tables = _before_rotary(query)
        k, k_tables = _before_rotary(key)
        if q_tables != k_tables:
            q, k, q_tables = query, key, (None, None)
        scale = node.kwargs.get("scale") or query.meta["val"].shape[-1] ** -0.5
        holder = _holder(graph_module)
        number = sum(name.startswith("key_") for name in holder._buffers)
        sample = k.meta["val"]
        for kind in ("key", "value"):
            made = torch.zeros(
                self.batch, int(sample.shape[1]), self.length, int(sample.shape[3]),
                dtype=sample.dtype, device=sample.device,
            )  # fmt: skip
            holder.register_buffer(f"{kind}_{number}", made, persistent=False)
        if "scratch" not in holder._buffers:
            made = torch.zeros(self.scratch, dtype=torch.float32, device=sample.device)
            holder.register_buffer("scratch", made, persistent=False)
        with graph.inserting_before(node):
            rows = [_transposed(graph, x) for x in (q, k, value)]
            memory = [graph.get_attr(f"{HOLDER}.{leaf}") for leaf in (f"key_{number}", f"value_{number}", "scratch")]
            attention = graph.call_function(
                torch.ops.tsld.cached_attention.default,
                (*rows, *q_tables, positions, *memory, float(scale), self.fresh),
            )
            result = graph.call_function(aten.transpose.int, (attention, 1, 2))
        for new in (attention, result):
            copy_origin(new, node)
        result.meta["val"] = node.meta["val"]
        attention.meta["val"] = node.meta["val"].transpose(1, 2)
        node.replace_all_uses_with(result)
        erase_dead(graph, node)


def set_fresh(graph_module: fx.GraphModule, fresh: bool) -> None:
    """Turn a decode graph into a prefill graph, or back."""
    for node in calls(graph_module.graph, torch.ops.tsld.cached_attention.default):
        node.update_arg(10, fresh)


def _holder(graph_module: fx.GraphModule) -> nn.Module:
    if not hasattr(graph_module, HOLDER):
        graph_module.add_module(HOLDER, nn.Module())
    return graph_module.get_submodule(HOLDER)


def _is(node: Any, *targets: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def _before_repeat(node: fx.Node) -> fx.Node:
    """[B, kv_heads, T, D] behind reshape(expand(unsqueeze(k, 2))) with whole slices between; else the node itself."""
    if not _is(node, aten.reshape.default, aten.view.default):
        return node
    expand = node.args[0]
    if not _is(expand, aten.expand.default):
        return node
    inner = _before_slices(expand.args[0])
    if not _is(inner, aten.unsqueeze.default) or inner.args[1] != 2:
        return node
    return _before_slices(inner.args[0])


def _before_slices(node: Any) -> Any:
    while _is(node, aten.slice.Tensor) and argument(node, 2, "start", 0) in (0, None):
        end = argument(node, 3, "end")
        if end is not None and not (isinstance(end, int) and end >= 2**62):
            break
        node = node.args[0]
    return node


def _before_rotary(node: fx.Node) -> tuple[fx.Node, tuple[fx.Node | None, fx.Node | None]]:
    """x and (cos, sin) of add(mul(x, cos), mul(cat(-x[D/2:], x[:D/2]), sin)); else the node itself and no tables."""
    none = node, (None, None)
    if not _is(node, aten.add.Tensor) or len(node.args) != 2 or node.kwargs:
        return none
    left, right = node.args
    if not _is(left, aten.mul.Tensor) or not _is(right, aten.mul.Tensor):
        return none
    x, turned = left.args[0], right.args[0]
    if not _is(turned, aten.cat.default) or len(turned.args[0]) != 2 or argument(turned, 1, "dim", 0) not in (-1, 3):
        return none
    half = x.meta["val"].shape[-1] // 2
    minus, first = turned.args[0]
    if not _is(minus, aten.neg.default) or not _slice_is(first, x, 0, half):
        return none
    if not _slice_is(minus.args[0], x, half, 2 * half):
        return none
    tables = tuple(_before_unsqueeze(mul.args[1]) for mul in (left, right))
    return none if None in tables else (x, tables)  # type: ignore[return-value]


def _slice_is(node: Any, x: fx.Node, start: int, end: int) -> bool:
    """Whether a node is x[..., start:end]; the end of the last half is often a huge number."""
    if not _is(node, aten.slice.Tensor) or node.args[0] is not x or node.args[1] not in (-1, 3):
        return False
    last, size = argument(node, 3, "end"), x.meta["val"].shape[-1]
    return (argument(node, 2, "start") or 0) == start and (size if last is None else min(last, size)) == end


def _before_unsqueeze(node: Any) -> fx.Node | None:
    """cos or sin [B, T, D] behind its unsqueeze over heads."""
    if _is(node, aten.unsqueeze.default) and node.args[1] == 1 and node.args[0].meta["val"].ndim == 3:
        return node.args[0]
    return None


def _transposed(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """[B, T, heads, D] of a node [B, heads, T, D]: what it was transposed from, or a new transpose."""
    if _is(node, aten.transpose.int) and tuple(node.args[1:]) == (1, 2):
        return node.args[0]
    made = graph.call_function(aten.transpose.int, (node, 1, 2))
    made.meta["val"] = node.meta["val"].transpose(1, 2)
    return made


def _drop(graph: fx.Graph, mask: fx.Node, ids: fx.Node) -> None:
    """Remove the input attention_mask; its sizes are those of input_ids."""
    for user in list(mask.users):
        if user.target is aten.sym_size.int:
            user.update_arg(0, ids)
    graph.eliminate_dead_code()
    if mask.users:
        user = next(iter(mask.users))
        raise PassError(
            f"InsertKVCache: attention_mask is used for more than attention (node {user.name}: {user.target}), which a "
            "static cache cannot reproduce. Use transformers' generate for this model."
        )
    graph.erase_node(mask)
