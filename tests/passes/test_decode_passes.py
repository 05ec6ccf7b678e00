"""The passes of decode graphs: RMSNorm, gated activation, KV cache, last token."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional

from tests.graphs import apply, assert_runs_in_torchs_pass_manager, assert_untouched, text
from tests.graphs import export as raw_export
from tests.models import build, ids
from tsld_fx.capture import capture
from tsld_fx.errors import PassError
from tsld_fx.passes import (
    FuseGatedActivation,
    FuseRMSNorm,
    InsertKVCache,
    SelectLastToken,
    TabulateRotary,
    run_passes,
)
from tsld_fx.passes.graph_tools import calls
from tsld_fx.passes.insert_kv_cache import set_fresh
from tsld_fx.passes.pipelines import capture_pipeline, decode_pipeline


def export(module: nn.Module, *args: Tensor, **kwargs: object) -> torch.fx.GraphModule:
    """As `capture` leaves a graph: without assertions."""
    return run_passes(raw_export(module, *args, **kwargs), capture_pipeline())


class Norm(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, dtype=dtype))

    def norm(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        total = a + b
        return self.norm(total), total * 2


def test_norm_and_the_addition_before_it_become_one() -> None:
    module, (a, b) = Norm(), torch.randn(2, 3, 8)
    graph_module, modified = apply(FuseRMSNorm(), export(module, a, b))
    assert modified
    assert_expected_inline(
        text(graph_module),
        """\
weight = self.weight
add_rms_norm_default = tsld.add_rms_norm.default(a, b, weight, 1e-06)
getitem = add_rms_norm_default[0]
getitem_1 = add_rms_norm_default[1]
to = aten.to.dtype(getitem_1, torch.float32)
mul_2 = aten.mul.Tensor(to, 2)
return pytree.tree_unflatten((getitem, mul_2), self._out_spec)""",
    )
    for ours, theirs in zip(graph_module(a, b), module(a, b), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert_untouched(FuseRMSNorm(), graph_module)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_norm_gives_the_same_bits(dtype: torch.dtype) -> None:
    module, a, b = Norm(dtype), torch.randn(3, 8, dtype=dtype), torch.randn(3, 8, dtype=dtype)
    graph_module = assert_runs_in_torchs_pass_manager(FuseRMSNorm(), export(module, a, b))
    assert not calls(graph_module.graph, torch.ops.aten.rsqrt.default)
    assert all(torch.equal(x, y) for x, y in zip(graph_module(a, b), module(a, b), strict=True))


class OtherNorms(Norm):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        first = (1 + self.weight) * (a * torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + 1e-6))  # Gemma
        second = self.weight * (b * torch.rsqrt(b.pow(2).mean(0, keepdim=True) + 1e-6))  # over another dimension
        scale = torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + 1e-6)  # used twice
        return first + second + self.weight * (a * scale) + scale


def test_other_norms_are_untouched() -> None:
    assert_untouched(FuseRMSNorm(), export(OtherNorms(), *torch.randn(2, 3, 8)))


class Gate(nn.Module):
    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return up * functional.silu(gate)


class TwiceGate(nn.Module):
    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        active = functional.silu(gate)
        return active * up + active + functional.silu(up) * 2.0


def test_gated_activation() -> None:
    gate, up = torch.randn(2, 3, 8)
    graph_module, modified = apply(FuseGatedActivation(), export(Gate(), gate, up))
    assert modified
    assert_expected_inline(
        text(graph_module),
        """\
silu_mul_default = tsld.silu_mul.default(gate, up)
return pytree.tree_unflatten((silu_mul_default,), self._out_spec)""",
    )
    assert torch.equal(graph_module(gate, up), Gate()(gate, up))
    assert_untouched(FuseGatedActivation(), graph_module)
    assert_untouched(FuseGatedActivation(), export(TwiceGate(), gate, up))


class Attention(nn.Module):
    """One layer with four heads of queries and two of keys and values; the mask is the usual one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.qkv, self.head = nn.Embedding(11, 16), nn.Linear(16, 32), nn.Linear(16, 11)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> dict[str, Tensor]:
        batch, tokens = input_ids.shape
        x = self.embedding(input_ids) + position_ids[..., None]
        q, k, v = self.qkv(x).split([16, 8, 8], -1)
        q, k, v = (part.view(batch, tokens, -1, 4).transpose(1, 2) for part in (q, k, v))
        k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(batch, 4, tokens, 4) for t in (k, v))
        mask = torch.ones(tokens, tokens, dtype=torch.bool).tril() & attention_mask[:, None, None].bool()
        out = functional.scaled_dot_product_attention(q, k, v, mask, scale=0.25)
        return {"logits": self.head(out.transpose(1, 2).reshape(batch, tokens, 16))}


def attention_graph() -> tuple[Attention, torch.fx.GraphModule, Tensor, Tensor]:
    module, tokens = Attention(), torch.randint(0, 11, (2, 6))
    positions = torch.arange(6).expand(2, -1)
    sizes = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    inputs = (tokens, torch.ones_like(tokens), positions.contiguous())
    return module, export(module, *inputs, dynamic_shapes=(sizes, sizes, sizes)), tokens, positions


def test_cache_takes_the_place_of_the_mask() -> None:
    graph_module, modified = apply(InsertKVCache(3, 10), attention_graph()[1])
    assert modified
    (node,) = calls(graph_module.graph, torch.ops.tsld.cached_attention.default)
    assert [str(a) for a in node.args[3:6]] == ["None", "None", "position_ids"] and node.args[9:] == (0.25, False)
    assert not calls(graph_module.graph, torch.ops.aten.tril.default)
    assert [n.name for n in graph_module.graph.nodes if n.op == "placeholder"] == ["input_ids", "position_ids"]
    assert graph_module.kv_cache.key_0.shape == (3, 2, 10, 4)
    assert_untouched(InsertKVCache(3, 10), graph_module)


def test_tokens_one_by_one_give_the_logits_of_all_at_once() -> None:
    module, graph_module, tokens, positions = attention_graph()
    run_passes(graph_module, (InsertKVCache(3, 10),))
    expected = module(tokens, torch.ones_like(tokens), positions)["logits"]

    def logits(first: int, end: int, fresh: bool) -> Tensor:
        set_fresh(graph_module, fresh)
        inputs = tokens[:, first:end], positions[:, first:end]
        return torch.fx.Interpreter(graph_module).run(*inputs, enable_io_processing=False)[0]

    parts = [logits(0, 3, True), *(logits(t, t + 1, False) for t in range(3, 6))]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected)


class MaskedEmbedding(Attention):
    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> dict[str, Tensor]:
        out = super().forward(input_ids, attention_mask, position_ids)
        return {"logits": out["logits"] * attention_mask[..., None]}


def test_a_mask_that_does_more_than_masking_is_refused() -> None:
    tokens = torch.randint(0, 11, (2, 6))
    inputs = (tokens, torch.ones_like(tokens), torch.arange(6).expand(2, -1).contiguous())
    with pytest.raises(PassError, match=r"attention_mask is used for more than attention.*transformers' generate"):
        InsertKVCache(2, 8)(export(MaskedEmbedding(), *inputs))


def test_graphs_without_attention_or_positions() -> None:
    assert_untouched(InsertKVCache(1, 4), export(Gate(), *torch.randn(2, 3, 8)))
    graph_module = capture(build("gpt2"), training=False)
    with pytest.raises(PassError, match="with_positions=True"):
        InsertKVCache(1, 4)(graph_module)


@pytest.mark.parametrize(("family", "rotary"), [("llama", True), ("qwen3", True), ("gpt2", False)])
def test_rotary_embeddings_are_taken_in(family: str, rotary: bool) -> None:
    graph_module = capture(build(family), training=False, with_positions=True)
    run_passes(graph_module, decode_pipeline(2, 20))
    nodes = calls(graph_module.graph, torch.ops.tsld.cached_attention.default)
    assert len(nodes) == 2
    assert all((node.args[3] is not None) is rotary for node in nodes)
    norms = calls(graph_module.graph, torch.ops.tsld.rms_norm.default, torch.ops.tsld.add_rms_norm.default)
    assert bool(norms) is rotary
    assert not calls(graph_module.graph, torch.ops.aten.neg.default, torch.ops.aten.rsqrt.default)


class Rotary(Attention):
    """Cosine and sine of the positions, times something else of the input where `other` says so."""

    def __init__(self, other: str = "") -> None:
        super().__init__()
        self.other = other

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> dict[str, Tensor]:
        batch, tokens = input_ids.shape
        q, k, v = self.qkv(self.embedding(input_ids)).split([16, 8, 8], -1)
        q, k, v = (part.view(batch, tokens, -1, 4).transpose(1, 2) for part in (q, k, v))
        angle = position_ids[..., None].float() * torch.tensor([1.0, 0.1, 1.0, 0.1])
        if self.other == "tokens":
            angle = angle * input_ids[..., None]
        if self.other == "positions":
            angle = angle - position_ids[:, :1, None]
        cos, sin = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)

        def turn(x: Tensor) -> Tensor:
            return x * cos + torch.cat([-x[..., 2:], x[..., :2]], -1) * sin

        q, k = turn(q), turn(k)
        k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(batch, 4, tokens, 4) for t in (k, v))
        mask = torch.ones(tokens, tokens, dtype=torch.bool).tril() & attention_mask[:, None, None].bool()
        out = functional.scaled_dot_product_attention(q, k, v, mask, scale=0.25)
        return {"logits": self.head(out.transpose(1, 2).reshape(batch, tokens, 16))}


@pytest.mark.parametrize("other", ["", "tokens", "positions"])
def test_rotary_tables(other: str) -> None:
    """Tables take the place of cosine and sine where these depend on each position alone."""
    module, tokens = Rotary(other), torch.randint(1, 11, (2, 6))
    positions, sizes = torch.arange(6).expand(2, -1).contiguous(), {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    inputs = (tokens, torch.ones_like(tokens), positions)
    graph_module = export(module, *inputs, dynamic_shapes=(sizes, sizes, sizes))
    run_passes(graph_module, (InsertKVCache(3, 10, fresh=True),))
    if other:
        assert_untouched(TabulateRotary(10), graph_module)
        return
    graph_module, modified = apply(TabulateRotary(10), graph_module)
    assert modified and not calls(graph_module.graph, torch.ops.aten.cos.default, torch.ops.aten.sin.default)
    (node,) = calls(graph_module.graph, torch.ops.tsld.cached_attention.default)
    assert [str(a.target) for a in node.args[3:5]] == ["kv_cache.cos_0", "kv_cache.sin_0"]
    assert graph_module.kv_cache.cos_0.shape == (10, 4)
    got = torch.fx.Interpreter(graph_module).run(tokens, positions, enable_io_processing=False)[0]
    torch.testing.assert_close(got, module(*inputs)["logits"])
    assert_untouched(TabulateRotary(10), graph_module)


def test_last_token_only() -> None:
    model = build("llama")
    graph_module = capture(model, training=False)
    expected = graph_module(ids(3, 7), torch.ones_like(ids(3, 7)))["logits"]
    run_passes(graph_module, (SelectLastToken(),))
    last = torch.tensor([6, 0, 3])
    got = graph_module(ids(3, 7), torch.ones_like(ids(3, 7)), last)["logits"]
    torch.testing.assert_close(got, expected[torch.arange(3), last][:, None])
    assert_untouched(SelectLastToken(), graph_module)
    with pytest.raises(PassError, match="no linear behind the output"):
        SelectLastToken()(export(Gate(), *torch.randn(2, 3, 8)))
