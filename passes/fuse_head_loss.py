"""FuseHeadLoss: head and losses as one operator, so that the graph never holds logits [B, T, V]."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from tsld_fx import fused_loss  # noqa: F401  (registers tsld::head_loss)
from tsld_fx.passes.graph_tools import argument, aten, copy_origin, set_val

TOP = ("top_indices", "top_log_probs", "top_rest")
INPUTS = ("labels", "teacher_hidden", "teacher_weight", "teacher_bias", "segment_ids", "token_scores", *TOP)
RESULTS = ("loss", "loss_terms", "token_scores")


@dataclass(frozen=True)
class FuseHeadLoss(PassBase):
    """Replace the linear head at the end of a graph, and the losses over its logits, by tsld::head_loss.

    before: output({"logits": linear(h, W, b)})
    after:  output({"loss": head_loss(h, W, b, teacher_hidden, teacher_weight, teacher_bias, labels, ...)[0],
                    "loss_terms": ...[1], "token_scores": ...[2]})

    The graph gets the inputs `INPUTS` after its own, all None unless given. W may be tied to the embedding, or the
    result of a tsld::fake_quant; other outputs (taps) stay. A graph whose logits are not the plain result of a linear
    (soft-capped, scaled) is left alone.

    Fields:
        kinds: losses to sum: "gt", "logit", "tsld", "tsld_mean".
        weights, temperatures: one for each (see `tsld_fx.distill.LossTerm`).
    """

    kinds: tuple[str, ...]
    weights: tuple[float, ...]
    temperatures: tuple[float, ...]

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        output = next(n for n in reversed(graph.nodes) if n.op == "output")
        head = head_of(output)
        if head is None:
            return PassResult(graph_module, False)
        others = {k: v for k, v in output.args[0].items() if k != "logits"} if isinstance(output.args[0], dict) else {}
        given = _add_inputs(graph, head)
        with graph.inserting_before(output):
            call = graph.call_function(
                torch.ops.tsld.head_loss.default,
                (
                    head.args[0], head.args[1], argument(head, 2, "bias"),
                    given["teacher_hidden"], given["teacher_weight"], given["teacher_bias"], given["labels"],
                    given["segment_ids"], given["token_scores"],
                    list(self.kinds), list(self.weights), list(self.temperatures), 0, None,
                    *(given[name] for name in TOP),
                ),
            )  # fmt: skip
            results = [graph.call_function(operator.getitem, (call, index)) for index in range(3)]
        for node in (call, *results):
            copy_origin(node, head)
            set_val(node)
        output.args = (dict(zip(RESULTS, results, strict=True)) | others,)
        graph.erase_node(head)
        _forget_signature(graph_module)
        return PassResult(graph_module, True)


def head_of(output: fx.Node) -> fx.Node | None:
    """The linear that makes the logits; None when they are anything else, or when something else reads them."""
    value: Any = output.args[0]
    value = value.get("logits") if isinstance(value, dict) else value
    while isinstance(value, tuple | list) and len(value) == 1:
        value = value[0]
    is_head = isinstance(value, fx.Node) and value.target is aten.linear.default and set(value.users) == {output}
    return value if is_head else None


def _forget_signature(graph_module: fx.GraphModule) -> None:
    """Drop what torch.export knows of inputs and outputs: its pytree, and its check of every call's arguments."""
    graph_module.graph.set_codegen(fx.graph.CodeGen())
    hooks = graph_module._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if "check_input_constraints" in getattr(hook, "__name__", "")]:
        del hooks[key]
        graph_module._forward_pre_hooks_with_kwargs.pop(key, None)


def _add_inputs(graph: fx.Graph, head: fx.Node) -> dict[str, fx.Node]:
    """The placeholders of the operator, with the student's own shapes as their meta values."""
    last = next(n for n in reversed(graph.nodes) if n.op == "placeholder")
    like = {"teacher_hidden": head.args[0], "teacher_weight": head.args[1], "teacher_bias": None}
    added = {}
    for name in INPUTS:
        with graph.inserting_after(last):
            node = graph.placeholder(name, default_value=None)
        source = like.get(name, next(n for n in graph.nodes if n.op == "placeholder"))
        if isinstance(source, fx.Node) and name not in ("token_scores", "segment_ids", *TOP) and "val" in source.meta:
            node.meta["val"] = source.meta["val"]
        else:
            node.meta["val"] = None
        added[name] = last = node
    return added
