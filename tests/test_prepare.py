"""`prepare`: what it quantises, what it names, how it trains, saves and generates."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.models import FAMILIES, build, ids, left_padded, ternary
from tsld_fx import AffineWeight, DistillConfig, QuantConfig, TernaryWeight, load_prepared, prepare
from tsld_fx.errors import CheckpointError, DataError
from tsld_fx.passes import PassTrace
from tsld_fx.passes.graph_tools import calls
from tsld_fx.prepared import PreparedModel


def quantised(prepared: PreparedModel) -> dict[str, tuple]:
    """Layer -> (scheme, bits, group_size) of its fake_quant node."""
    nodes = calls(prepared.graph_module.graph, torch.ops.tsld.fake_quant.default)
    return {node.meta["tsld_module"]: node.args[3:] for node in nodes}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_but_the_head_is_ternary_by_default(family: str) -> None:
    prepared, _ = ternary(family)
    head = prepared.get_output_embeddings()
    linears = {
        name for name, module in prepared.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and module is not head
    }  # fmt: skip
    found = quantised(prepared)
    assert found.keys() == linears
    assert set(found.values()) == {("twn", 2, 0)}


def test_overrides_beat_skip_and_the_last_match_wins() -> None:
    config = QuantConfig(
        weight=TernaryWeight(),
        overrides={
            "re:.*mlp.*": AffineWeight(bits=4, granularity="group", group_size=4),
            "model.layers.0.mlp.down_proj": TernaryWeight(scale="absmean", granularity="tensor"),
            "model.layers.1.self_attn.*": None,
            "lm_head": AffineWeight(bits=8, symmetric=True),
        },
        skip=("lm_head", "model.layers.0.self_attn.q_proj"),
    )
    found = quantised(prepare(build("llama"), config))
    assert found == {
        "model.layers.0.self_attn.k_proj": ("twn", 2, 0),
        "model.layers.0.self_attn.v_proj": ("twn", 2, 0),
        "model.layers.0.self_attn.o_proj": ("twn", 2, 0),
        "model.layers.0.mlp.gate_proj": ("minmax", 4, 4),
        "model.layers.0.mlp.up_proj": ("minmax", 4, 4),
        "model.layers.0.mlp.down_proj": ("absmean", 2, -1),
        "model.layers.1.mlp.gate_proj": ("minmax", 4, 4),
        "model.layers.1.mlp.up_proj": ("minmax", 4, 4),
        "model.layers.1.mlp.down_proj": ("minmax", 4, 4),
        "lm_head": ("absmax", 8, 0),
    }


def test_head_tied_to_the_embedding_is_quantised_for_the_linear_only() -> None:
    prepared = prepare(build("qwen3"), QuantConfig(weight=None, overrides={"lm_head": AffineWeight(bits=8)}))
    graph = prepared.graph_module.graph
    embedding = calls(graph, torch.ops.aten.embedding.default)[0]
    assert embedding.args[0].op == "get_attr"
    assert quantised(prepared) == {"lm_head": ("minmax", 8, 0)}


def test_state_dict_has_the_models_names_plus_learned_scales() -> None:
    model = build("gpt2")
    names = list(model.state_dict())
    config = QuantConfig(
        weight=TernaryWeight(scale="lsq"),
        overrides={
            "*.mlp.c_fc": AffineWeight(bits=4, scale="pact"),
            "*.0.mlp.c_proj": AffineWeight(scale="lsq"),
        },
    )
    prepared = prepare(model, config)
    state = prepared.state_dict()
    extra = set(state) - set(names)
    attention = {f"transformer.h.{i}.attn.{m}.weight_scale" for i in (0, 1) for m in ("c_attn", "c_proj")}
    clips = {f"transformer.h.{i}.mlp.c_fc.weight_clip" for i in (0, 1)}
    zero_0 = {f"transformer.h.0.mlp.c_proj.{leaf}" for leaf in ("weight_scale", "weight_zero")}
    assert extra == attention | clips | zero_0 | {"transformer.h.1.mlp.c_proj.weight_scale"}
    assert [n for n in state if n in names] == names
    assert state["transformer.h.0.attn.c_attn.weight_scale"].shape == (96, 1)
    assert state["transformer.h.0.mlp.c_proj.weight_zero"].dtype == torch.uint8
    learned = [n for n, _ in prepared.learned_scales()]
    assert set(learned) == {n for n in extra if not n.endswith("zero")}
    assert all(p.requires_grad for _, p in prepared.learned_scales())


@pytest.mark.parametrize("scale", ["lsq", "pact"])
def test_learned_scales_receive_gradients_and_move(scale: str) -> None:
    cut = {"clip_init": 2.0} if scale == "pact" else {}  # a clip beyond every weight gets no gradient
    four_bits = AffineWeight(scale=scale, **cut)
    config = QuantConfig(weight=TernaryWeight(scale=scale), overrides={"*.up_proj": four_bits})
    prepared = prepare(build("llama"), config).train()
    before = {n: p.detach().clone() for n, p in prepared.learned_scales()}
    prepared(ids(), labels=ids()).loss.backward()
    torch.optim.SGD([p for _, p in prepared.learned_scales()], lr=0.1).step()
    assert len(before) == 14
    for name, scale_now in prepared.learned_scales():
        assert torch.isfinite(scale_now).all(), name
        assert not torch.equal(scale_now, before[name]), name


def test_loss_is_the_models_own_cross_entropy() -> None:
    prepared = prepare(build("llama"), QuantConfig(weight=None))
    batch_ids, mask = left_padded()
    labels = batch_ids.masked_fill(mask == 0, -100)
    ours = prepared(batch_ids, attention_mask=mask, labels=labels).loss
    theirs = build("llama")(batch_ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_taps_are_named_outputs_that_equal_the_models_own(name: str) -> None:
    model = build(name)
    model.set_attn_implementation("eager")
    reference = copy.deepcopy(model)
    distill = DistillConfig(method="l2l")
    prepared = prepare(build(name), QuantConfig(weight=None), distill=distill)
    batch_ids = ids()
    ours = prepared(batch_ids)
    theirs = reference(batch_ids, output_hidden_states=True, output_attentions=True)
    assert len(ours.hidden_states) == len(ours.attention_scores) == 2
    torch.testing.assert_close(ours.hidden_states[0], theirs.hidden_states[1], rtol=1e-4, atol=1e-5)
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    for scores, probabilities in zip(ours.attention_scores, theirs.attentions, strict=True):
        assert torch.isfinite(scores[..., causal]).all()
        ours_soft = scores.masked_fill(~causal, float("-inf")).softmax(-1)
        torch.testing.assert_close(ours_soft, probabilities, rtol=1e-4, atol=1e-5)
    prepared.set_taps(())
    assert prepared(batch_ids).hidden_states is None
    assert torch.equal(prepared(batch_ids).logits, ours.logits)
    prepared.set_taps(("hidden_states",))
    assert torch.equal(prepared(batch_ids).hidden_states[1], ours.hidden_states[1])


def test_listener_sees_every_pass_in_order() -> None:
    seen: list[PassTrace] = []
    prepare(build("gpt2"), listener=seen.append)
    assert [(t.name, t.modified) for t in seen][-3:] == [
        ("FoldTransposedLinear", True),
        ("InsertFakeQuant", True),
        ("InsertDistillationHooks", False),
    ]
    assert seen[-2].changes() == {"tsld.fake_quant.default": 8}


def test_generation_without_cache_follows_the_graph_greedily() -> None:
    prepared, _ = ternary("llama")
    start = ids(2, 4)
    grown = start
    with torch.no_grad():
        for _ in range(6):
            grown = torch.cat([grown, prepared(grown).logits[:, -1:].argmax(-1)], dim=1)
    generated = prepared.generate(start, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(generated, grown)


def test_saved_prepared_model_comes_back_with_its_learned_scales(tmp_path: Path) -> None:
    config = QuantConfig(
        weight=TernaryWeight(scale="lsq", granularity="group", group_size=8),
        overrides={
            "*.mlp.gate_proj": AffineWeight(bits=4, scale="lsq"),
            "*.mlp.up_proj": AffineWeight(scale="pact"),
        },
    )
    overrides_down = {"*.mlp.down_proj": TernaryWeight(scale="pact")}
    config = QuantConfig(weight=config.weight, overrides={**config.overrides, **overrides_down})
    prepared = prepare(build("llama"), config)
    with torch.no_grad():
        for _, scale in prepared.learned_scales():
            scale.mul_(1 + 0.2 * torch.rand_like(scale))
        prepared.get_submodule("model.layers.0.mlp.gate_proj").weight_zero.add_(1)
    prepared.save_pretrained(tmp_path)
    again = load_prepared(tmp_path)
    assert again.quant_config == config
    ours, theirs = again.state_dict(), prepared.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert torch.equal(again(ids()).logits, prepared(ids()).logits)


def test_saved_prepared_model_is_an_ordinary_checkpoint_for_transformers(tmp_path: Path) -> None:
    model = build("gpt2")
    prepare(model).save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(plain).__name__ == "GPT2LMHeadModel"
    assert torch.equal(plain(ids()).logits, model(ids()).logits)


def test_prepared_checkpoint_without_a_learned_scale_is_refused(tmp_path: Path) -> None:
    prepare(build("llama"), QuantConfig(weight=TernaryWeight(scale="lsq"))).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight_scale"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight_scale.* is missing"):
        load_prepared(tmp_path)


def test_initial_clip_that_saturates_many_weights_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    narrow = QuantConfig(weight=None, overrides={"*.0.mlp.up_proj": AffineWeight(scale="pact", clip_init=1.0)})
    wide = QuantConfig(weight=None, overrides={"*.0.mlp.up_proj": AffineWeight(scale="pact", clip_init=6.0)})
    with caplog.at_level(logging.WARNING, logger="tsld_fx"):
        prepare(build("llama"), wide)
        assert caplog.text == ""
        prepare(build("llama"), narrow)
    assert "model.layers.0.mlp.up_proj" in caplog.text
    assert "saturates" in caplog.text


def test_inputs_without_a_place_in_the_graph_are_refused() -> None:
    prepared, lowered = ternary("llama")
    cache = lowered(ids(1, 3), use_cache=True).past_key_values
    with pytest.raises(DataError, match="input_ids"):
        prepared(inputs_embeds=torch.zeros(1, 2, 32))
    with pytest.raises(DataError, match=r"input_ids \[batch, tokens\] .*got torch.int64 \[3\]"):
        prepared(torch.tensor([3, 4, 5]))
    with pytest.raises(DataError, match="no KV cache"):
        prepared(ids(1, 1), past_key_values=cache)
    with pytest.raises(DataError, match="output_hidden_states"):
        prepared(ids(1, 3), output_hidden_states=True)
