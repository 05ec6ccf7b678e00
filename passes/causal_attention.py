"""CausalAttention: attention over whole blocks names its mask instead of reading one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from tsld_fx.passes.graph_tools import argument, aten, attribute, calls


@dataclass(frozen=True)
class CausalAttention(PassBase):
    """For batches without padding: the attention kernel skips what a causal mask hides (and may be FlashAttention).

    before: scaled_dot_product_attention(q, k, v, mask)      mask made of attention_mask
    after:  scaled_dot_product_attention(q, k, v, None, 0.0, True)

    A mask is replaced only if it is the causal one for an attention_mask of ones of the given length: the nodes that
    make it are run to see. Sliding windows shorter than that, and masks with position biases, stay. The graph is then
    right for unpadded batches of at most `tokens` tokens.

    Fields:
        tokens: length T of the batches.
    """

    tokens: int

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        known: dict[fx.Node, bool] = {}
        modified = False
        for node in calls(graph_module.graph, aten.scaled_dot_product_attention.default):
            mask = argument(node, 3, "attn_mask")
            if not isinstance(mask, fx.Node) or argument(node, 5, "is_causal", False):
                continue
            if mask not in known:
                known[mask] = _is_causal(_value(graph_module, mask, self.tokens, {}))
            if known[mask]:
                rest = {k: v for k, v in node.kwargs.items() if k not in ("attn_mask", "dropout_p", "is_causal")}
                node.args = (*node.args[:3], None, argument(node, 4, "dropout_p", 0.0), True)
                node.kwargs = rest
                modified = True
        if modified:
            graph_module.graph.eliminate_dead_code()
        return PassResult(graph_module, modified)


def _value(graph_module: fx.GraphModule, node: fx.Node, tokens: int, env: dict[fx.Node, Any]) -> Any:
    """What a node gives for one block of zeros, all of it attended."""
    if node not in env:
        if node.op == "placeholder":
            device = next(graph_module.parameters()).device
            env[node] = (torch.ones if node.name == "attention_mask" else torch.zeros)(
                1, tokens, dtype=torch.long, device=device
            )
        elif node.op == "get_attr":
            env[node] = attribute(graph_module, str(node.target))
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: _value(graph_module, n, tokens, env))
            with torch.no_grad():
                env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return env[node]


def _is_causal(mask: Any) -> bool:
    """Whether a mask [.., T, T] lets every token see itself and all before it, and nothing else."""
    if not isinstance(mask, Tensor) or mask.ndim < 2 or mask.shape[-1] != mask.shape[-2]:
        return False
    allowed = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril().expand_as(mask)
    if mask.dtype == torch.bool:
        return torch.equal(mask, allowed)
    return bool((mask.masked_select(allowed) == 0).all() and (mask.masked_select(~allowed) < -1e4).all())
