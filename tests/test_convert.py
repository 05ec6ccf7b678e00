"""`convert`: the lowered model computes, generates and weighs what it should, and is a snapshot."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import TextIteratorStreamer

from tests.models import FAMILIES, build, ids, left_padded, ternary
from tsld_fx import AffineWeight, LoweredModel, PreparedModel, QuantConfig, TernaryWeight, convert, prepare
from tsld_fx.lowbit_linear import LowBitLinear
from tsld_fx.passes.graph_tools import attribute, calls

FORMATS = {
    "twn": TernaryWeight(),
    "twn-tensor": TernaryWeight(granularity="tensor"),
    "twn-group": TernaryWeight(granularity="group", group_size=4),
    "absmean": TernaryWeight(scale="absmean"),
    "ternary-pact-group": TernaryWeight(scale="pact", granularity="group", group_size=4),
    "ternary-lsq": TernaryWeight(scale="lsq"),
    "ternary-seq-dead-zone": TernaryWeight(scale="seq", dead_zone_bias=1e-3),
    "twn-dead-zone-group": TernaryWeight(granularity="group", group_size=4, dead_zone_bias=0.1),
    "four-levels": AffineWeight(bits=4, symmetric=True, scale="seq"),
    "4-bit": AffineWeight(bits=4),
    "4-bit-symmetric-group": AffineWeight(bits=4, symmetric=True, granularity="group", group_size=4),
    "4-bit-pact-tensor": AffineWeight(bits=4, scale="pact", granularity="tensor"),
    "8-bit-lsq": AffineWeight(bits=8, scale="lsq"),
    "8-bit-symmetric-lsq-tensor": AffineWeight(bits=8, symmetric=True, scale="lsq", granularity="tensor"),
    "8-bit-pact": AffineWeight(bits=8, scale="pact"),
}


def relative(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def trained_weights(prepared: PreparedModel) -> Iterator[tuple[str, Tensor]]:
    """Layer -> its fake-quantised weight [out, in], computed by the graph itself."""
    graph_module = prepared.graph_module
    values: dict[str, Tensor] = {}
    with torch.no_grad():
        for node in graph_module.graph.nodes:
            if node.op == "get_attr":
                values[node.name] = attribute(graph_module, node.target)
            elif node.op == "call_function" and all(a.name in values for a in node.all_input_nodes):
                args = torch.fx.map_arg(node.args, lambda n: values[n.name])
                values[node.name] = node.target(*args, **node.kwargs)
    for node in calls(graph_module.graph, torch.ops.tsld.fake_quant.default):
        yield node.meta["tsld_module"], values[node.name]


def assert_bit_equal(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype == torch.float32
    assert torch.equal(ours.contiguous().view(torch.int32), theirs.contiguous().view(torch.int32))


@pytest.mark.parametrize("family", FAMILIES)
def test_lowered_model_and_graph_agree_with_the_prepared_model(family: str) -> None:
    prepared, lowered = ternary(family)
    padded, mask = left_padded()
    keep = mask.bool()
    with torch.no_grad():
        trained = prepared(padded, attention_mask=mask).logits[keep]
        assert relative(lowered(padded, attention_mask=mask).logits[keep], trained) <= 1e-5
        assert relative(lowered.graph_module(padded, mask)["logits"][keep], trained) <= 1e-5
    assert calls(lowered.graph_module.graph, torch.ops.tsld.lowbit_linear.default)
    assert not calls(lowered.graph_module.graph, torch.ops.tsld.fake_quant.default)
    assert isinstance(lowered, LoweredModel)
    assert isinstance(lowered, type(build(family)))
    assert lowered.backend == "cpu"


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_weights_equal_the_trained_ones_bit_for_bit(family: str) -> None:
    prepared, lowered = ternary(family)
    layers = lowered.lowbit_layers()
    trained = dict(trained_weights(prepared))
    assert layers.keys() == trained.keys()
    for name, weight in trained.items():
        assert_bit_equal(layers[name].dequantize(), weight)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_survives_the_conversion_bit_for_bit(name: str) -> None:
    prepared = prepare(build("gpt2"), QuantConfig(weight=FORMATS[name])).train()
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.02)
    for step in range(2):
        prepared(ids(seed=step), labels=ids(seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    lowered = convert(prepared)
    layers = lowered.lowbit_layers()
    for layer, weight in trained_weights(prepared):
        assert_bit_equal(layers[layer].dequantize(), weight)
    with torch.no_grad():
        assert relative(lowered(ids()).logits, prepared.eval()(ids()).logits) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_with_cache_equals_the_prepared_models_without(family: str) -> None:
    prepared, lowered = ternary(family)
    padded, mask = left_padded((7, 4))
    for arguments in ({"input_ids": ids(2, 5)}, {"input_ids": padded, "attention_mask": mask}):
        with_cache = lowered.generate(**arguments, max_new_tokens=8, do_sample=False, eos_token_id=None)
        without = prepared.generate(**arguments, max_new_tokens=8, do_sample=False, eos_token_id=None)
        assert with_cache.shape[1] == arguments["input_ids"].shape[1] + 8
        assert torch.equal(with_cache, without)


def test_left_padded_generation_equals_each_prompt_alone() -> None:
    _, lowered = ternary("llama")
    padded, mask = left_padded((7, 4))
    together = lowered.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)
    for row, length in enumerate((7, 4)):
        prompt = padded[row : row + 1, -length:]
        alone = lowered.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert torch.equal(together[row, 7:], alone[0, length:])


def test_static_cache_and_beams_work() -> None:
    _, lowered = ternary("llama")
    prompt = ids(2, 5)
    plain = lowered.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(lowered.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, **static), plain)
    assert lowered.generate(prompt, max_new_tokens=6, num_beams=2, eos_token_id=None).shape == (2, 11)


def test_sampling_repeats_with_its_seed() -> None:
    _, lowered = ternary("gpt2")
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(lowered.generate(ids(2, 5), max_new_tokens=12, do_sample=True, top_k=50, eos_token_id=None))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


class NumberTokenizer:
    """Writes token numbers as words: all that a streamer asks of a tokenizer."""

    def decode(self, tokens: Tensor | list[int], **_: object) -> str:
        return "".join(f"{int(token)} " for token in tokens)


def test_generation_streams() -> None:
    _, lowered = ternary("llama")
    streamer = TextIteratorStreamer(NumberTokenizer(), skip_prompt=True, timeout=60)
    result = lowered.generate(ids(1, 5), max_new_tokens=6, do_sample=False, eos_token_id=None, streamer=streamer)
    assert "".join(streamer).split() == [str(int(token)) for token in result[0, 5:]]


def test_prepared_trains_on_and_the_lowered_model_stays_what_it_was() -> None:
    for family in ("gpt2", "llama"):
        prepared = prepare(build(family), QuantConfig(weight=TernaryWeight(scale="lsq"))).train()
        before_state = {n: v.clone() for n, v in prepared.state_dict().items()}
        lowered = convert(prepared)
        assert prepared.training
        assert not lowered.training
        after_state = prepared.state_dict()
        assert after_state.keys() == before_state.keys()
        assert all(torch.equal(after_state[n], v) for n, v in before_state.items())
        snapshot, graph_snapshot = (
            lowered(ids()).logits,
            lowered.graph_module(ids(), torch.ones_like(ids()))["logits"],
        )
        optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
        losses = []
        for _ in range(4):
            loss = prepared(ids(), labels=ids()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        assert torch.equal(lowered(ids()).logits, snapshot)
        assert torch.equal(lowered.graph_module(ids(), torch.ones_like(ids()))["logits"], graph_snapshot)
        assert not torch.equal(convert(prepared)(ids()).logits, snapshot)
        storages = {v.data_ptr() for v in prepared.state_dict().values()}
        assert not storages & {v.data_ptr() for v in lowered.state_dict().values()}


def test_changes_to_the_lowered_model_do_not_reach_the_prepared_one() -> None:
    prepared = prepare(build("gpt2"))
    lowered = convert(prepared)
    before = prepared(ids()).logits
    with torch.no_grad():
        for tensor in lowered.state_dict().values():
            tensor.zero_()
    assert torch.equal(prepared(ids()).logits, before)


def test_head_of_eight_bits_tied_to_the_embedding_is_a_packed_copy() -> None:
    for family in ("gpt2", "qwen3"):
        config = QuantConfig(overrides={"lm_head": AffineWeight(bits=8)})
        prepared = prepare(build(family), config)
        lowered = convert(prepared)
        head, embedding = lowered.get_output_embeddings(), lowered.get_input_embeddings()
        assert isinstance(head, LowBitLinear)
        assert head.bits == 8
        assert torch.equal(embedding.weight, prepared.get_input_embeddings().weight)
        with torch.no_grad():
            trained = prepared(ids()).logits
            assert relative(lowered(ids()).logits, trained) <= 1e-5
            assert relative(lowered.graph_module(ids(), torch.ones_like(ids()))["logits"], trained) <= 1e-5
        assert prepared.get_output_embeddings().weight is prepared.get_input_embeddings().weight


def test_tied_head_in_full_precision_stays_tied() -> None:
    _, lowered = ternary("gpt2")
    assert lowered.get_output_embeddings().weight is lowered.get_input_embeddings().weight


def test_packed_weights_are_fifteen_times_smaller_and_no_float_copy_remains() -> None:
    model = build("llama", hidden_size=1024, intermediate_size=1024, head_dim=64, num_hidden_layers=1)
    full = {name: p.numel() * 4 for name, p in model.named_parameters()}
    lowered = convert(prepare(model))
    for name, layer in lowered.lowbit_layers().items():
        size = sum(t.numel() * t.element_size() for t in layer.buffers())
        assert full[f"{name}.weight"] >= 15 * size, name
    kept = sum(p.numel() * 4 for p in lowered.parameters())
    assert kept == sum(size for name, size in full.items() if "_proj" not in name)
    in_graph = {n.target for n in lowered.graph_module.graph.nodes if n.op == "get_attr"}
    assert not [n for n in in_graph if n.endswith("proj.weight")]


def test_post_training_quantisation_needs_no_training() -> None:
    model = build("llama")
    lowered = convert(prepare(model, QuantConfig(weight=AffineWeight(bits=8))))
    with torch.no_grad():
        assert relative(lowered(ids()).logits, model(ids()).logits) < 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_codes_and_scales(dtype: torch.dtype) -> None:
    prepared, lowered = ternary("llama")
    half = copy.deepcopy(lowered).to(dtype)
    for name, layer in half.lowbit_layers().items():
        assert layer.weight_scale.dtype == torch.float32
        assert layer.weight_packed.dtype == torch.uint8
        assert_bit_equal(layer.dequantize(), lowered.lowbit_layers()[name].dequantize())
    with torch.no_grad():
        out = half(ids()).logits
        assert out.dtype == dtype
        assert relative(out.float(), prepared(ids()).logits) < 0.1
        assert half.graph_module(ids(), torch.ones_like(ids()))["logits"].dtype == dtype
    assert lowered.dtype == torch.float32


def test_deep_copy_of_a_lowered_model_is_a_model_of_its_own() -> None:
    _, lowered = ternary("gpt2")
    twin = copy.deepcopy(lowered)
    before = lowered(ids()).logits
    assert torch.equal(twin(ids()).logits, before)
    twin.transformer.h[0].attn.c_attn.weight_packed.zero_()
    assert torch.equal(lowered(ids()).logits, before)
    assert not torch.equal(twin(ids()).logits, before)
    in_graph = twin.graph_module(ids(), torch.ones_like(ids()))["logits"]
    torch.testing.assert_close(in_graph, twin(ids()).logits, rtol=1e-5, atol=1e-5)


def test_graph_of_a_prepared_model_with_taps_converts_without_them() -> None:
    prepared = prepare(build("llama"))
    prepared.set_taps(("hidden_states", "attention_scores"))
    lowered = convert(prepared)
    assert list(lowered.graph_module(ids(), torch.ones_like(ids()))) == ["logits"]
    assert len(prepared(ids()).hidden_states) == 2
