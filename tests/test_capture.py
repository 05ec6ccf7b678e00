"""The captured graph computes what the Hugging Face model computes, for every family and input."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.models import FAMILIES, POSITIONS, TIED, UNQUANTISED, build, ids, left_padded
from tests.models import unquantised as pair
from tsld_fx import prepare
from tsld_fx.capture import capture
from tsld_fx.errors import DataError
from tsld_fx.passes import PassTrace


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    assert torch.isfinite(theirs).all()
    assert (ours - theirs).abs().max() <= 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_models_for_every_batch_and_length(family: str) -> None:
    model, prepared = pair(family)
    with torch.no_grad():
        for batch, tokens in ((1, 1), (2, 1), (1, 2), (3, 7), (1, POSITIONS), (2, POSITIONS)):
            batch_ids = ids(batch, tokens)
            assert_same(prepared(batch_ids).logits, model(batch_ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_batch_equals_the_model_and_each_sequence_alone(family: str) -> None:
    model, prepared = pair(family)
    lengths = (9, 5, 1)
    padded, mask = left_padded(lengths)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        ours = prepared(padded, attention_mask=mask, position_ids=positions).logits
        theirs = model(padded, attention_mask=mask, position_ids=positions).logits
        assert_same(ours[mask.bool()], theirs[mask.bool()])
        for row, length in enumerate(lengths):
            alone = model(padded[row : row + 1, -length:]).logits[0]
            torch.testing.assert_close(ours[row, -length:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_mask_without_positions_equals_the_model(family: str) -> None:
    model, prepared = pair(family)
    padded, mask = left_padded((7, 3))
    with torch.no_grad():
        ours, theirs = (m(padded, attention_mask=mask).logits for m in (prepared, model))
    assert_same(ours[mask.bool()], theirs[mask.bool()])


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_position_ids_reach_the_model(family: str) -> None:
    model, prepared = pair(family)
    batch_ids = ids(2, 6)
    shifted = (torch.arange(6) + 7).expand(2, 6)
    spread = torch.tensor([[0, 3, 4, 9, 10, 20]])
    with torch.no_grad():
        assert_same(prepared(batch_ids, position_ids=shifted).logits, model(batch_ids, position_ids=shifted).logits)
        ours = prepared(batch_ids, position_ids=spread).logits
        assert_same(ours, model(batch_ids, position_ids=spread.expand(2, 6)).logits)
        assert (ours - model(batch_ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_sliding_window_is_in_the_graph(family: str) -> None:
    """With a window of 5 in every layer, two layers see at most 9 tokens back."""
    changes = {"layer_types": ["sliding_attention"] * 2} if family != "mistral" else {}
    model = build(family, **changes)
    prepared = prepare(model, UNQUANTISED)
    before = ids(1, 16)
    after = before.clone()
    after[0, 0] = 3 if before[0, 0] != 3 else 4
    with torch.no_grad():
        first, second = prepared(before).logits, prepared(after).logits
        assert_same(first, model(before).logits)
    assert torch.equal(first[0, 9:], second[0, 9:])
    assert not torch.equal(first[0, 8], second[0, 8])


@pytest.mark.parametrize("family", FAMILIES)
def test_model_from_a_folder_equals_the_one_saved(family: str, tmp_path: Path) -> None:
    model, _ = pair(family)
    model.save_pretrained(tmp_path)
    prepared = prepare(AutoModelForCausalLM.from_pretrained(tmp_path), UNQUANTISED)
    batch_ids = ids(2, 12)
    with torch.no_grad():
        assert_same(prepared(batch_ids).logits, model(batch_ids).logits)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_eager_attention_is_captured_too(family: str) -> None:
    model = build(family)
    model.set_attn_implementation("eager")
    prepared = prepare(model, UNQUANTISED)
    padded, mask = left_padded()
    with torch.no_grad():
        ours, theirs = (m(padded, attention_mask=mask).logits for m in (prepared, model))
    assert_same(ours[mask.bool()], theirs[mask.bool()])


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_shared_under_their_own_names(family: str) -> None:
    model, prepared = pair(family)
    theirs = dict(model.named_parameters(remove_duplicate=False))
    ours = dict(prepared.named_parameters(remove_duplicate=False))
    read = {n.target for n in prepared.graph_module.graph.nodes if n.op == "get_attr"}
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is theirs[name] for name in ours)
    assert list(prepared.state_dict()) == list(model.state_dict())
    in_graph = dict(prepared.graph_module.named_parameters(remove_duplicate=False))
    used = {id(in_graph[name]) for name in read & in_graph.keys()}
    assert used == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("family", TIED)
def test_tied_head_and_embedding_stay_one_parameter(family: str) -> None:
    _, prepared = pair(family)
    assert prepared.get_output_embeddings().weight is prepared.get_input_embeddings().weight


def test_gpt2_keeps_the_layout_of_its_weights() -> None:
    model, prepared = pair("gpt2")
    shape = prepared.state_dict()["transformer.h.0.attn.c_attn.weight"].shape
    assert shape == model.transformer.h[0].attn.c_attn.weight.shape == (32, 96)


def test_changes_to_parameters_are_seen_by_the_graph() -> None:
    model = build("llama")
    prepared, other = prepare(model, UNQUANTISED), build("llama", seed=5)
    batch_ids = ids()
    with torch.no_grad():
        prepared.load_state_dict(other.state_dict())
        assert_same(prepared(batch_ids).logits, other(batch_ids).logits)
        model.model.norm.weight.mul_(2)
        other.model.norm.weight.mul_(2)
        assert_same(prepared(batch_ids).logits, other(batch_ids).logits)


def test_replaced_parameters_and_buffers_are_seen_by_the_graph() -> None:
    model, other = build("llama"), build("llama")
    prepared = prepare(model, UNQUANTISED)
    batch_ids = ids()
    before = prepared(batch_ids).logits
    for changed in (prepared, other):
        changed.model.norm.weight = nn.Parameter(torch.full((32,), 0.5))
        changed.model.rotary_emb.inv_freq = changed.model.rotary_emb.inv_freq * 2
    with torch.no_grad():
        assert_same(prepared(batch_ids).logits, other(batch_ids).logits)
        other.model.rotary_emb.inv_freq /= 2
        assert (other(batch_ids).logits - prepared(batch_ids).logits).abs().max() > 1e-3
        assert (before - prepared(batch_ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_moving_to_another_dtype_after_the_capture_is_seen_by_the_graph(family: str) -> None:
    prepared = prepare(build(family), UNQUANTISED).double()
    padded, mask = left_padded()
    with torch.no_grad():
        ours = prepared(padded, attention_mask=mask).logits[mask.bool()]
        theirs = build(family).double()(padded, attention_mask=mask).logits[mask.bool()]
    assert ours.dtype == torch.float64
    assert (ours - theirs).abs().max() < 1e-5  # rotary angles and norms stay in float32


@pytest.mark.parametrize("family", ["gpt_neo", "gemma2", "qwen3"])
def test_float64_model_is_captured_in_float64(family: str) -> None:
    model = build(family).double()
    prepared = prepare(model, UNQUANTISED)
    with torch.no_grad():
        assert_same(prepared(ids()).logits, model(ids()).logits)
    assert prepared(ids()).logits.dtype == torch.float64


def test_deep_copy_is_a_model_of_its_own() -> None:
    for family in ("gpt2", "llama"):
        original = prepare(build(family))
        twin = copy.deepcopy(original)
        batch_ids = ids()
        with torch.no_grad():
            before = original(batch_ids).logits
            assert torch.equal(twin(batch_ids).logits, before)
            assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in original.parameters()}
            for parameter in twin.parameters():
                parameter.mul_(1.5)
            assert torch.equal(original(batch_ids).logits, before)
            assert not torch.equal(twin(batch_ids).logits, before)
        assert (twin.get_output_embeddings().weight is twin.get_input_embeddings().weight) == (family == "gpt2")


def test_the_given_model_stays_what_it_was() -> None:
    model = build("llama")
    model.model.layers[0].eval()
    model.model.layers[1].train()
    modes = [m.training for m in model.modules()]
    batch_ids = ids()
    before = model(batch_ids).logits
    prepare(model)
    assert [m.training for m in model.modules()] == modes
    assert type(model).__module__.startswith("transformers.")
    assert torch.equal(model(batch_ids).logits, before)
    assert not hasattr(model.config, "tsld_fx")
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_model_is_upcast_in_place_and_the_log_says_so(
    dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build("llama").to(dtype).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == dtype
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with caplog.at_level(logging.WARNING, logger="tsld_fx"):
        prepared = prepare(model)
    assert {p.dtype for p in prepared.parameters()} == {torch.float32}
    assert all(torch.equal(p, before[name].float()) for name, p in prepared.named_parameters())
    assert model.dtype == torch.float32
    assert str(dtype).removeprefix("torch.") in caplog.text
    assert "float32" in caplog.text


def test_float32_model_is_prepared_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="tsld_fx"):
        prepare(build("gpt2"))
    assert caplog.text == ""


def test_capture_leaves_plain_operators_and_reports_its_passes() -> None:
    seen: list[PassTrace] = []
    model = build("llama")
    graph_module = capture(model, listener=seen.append)
    targets = [str(n.target) for n in graph_module.graph.nodes if n.op == "call_function"]
    assert not [t for t in targets if "wrap_with" in t or "_assert_tensor_metadata" in t]
    assert [trace.name for trace in seen] == ["InlineHigherOrderOps", "DropMetadataAsserts"]
    assert [n.name for n in graph_module.graph.nodes if n.op == "placeholder"] == [
        "input_ids",
        "attention_mask",
    ]
    assert isinstance(graph_module, nn.Module)


def test_sequence_longer_than_learned_positions_is_refused_before_it_runs() -> None:
    for family in ("gpt2", "opt", "gpt_neo"):
        _, prepared = pair(family)
        with pytest.raises(DataError, match=f"{POSITIONS + 1} tokens are more than the {POSITIONS} positions"):
            prepared(ids(1, POSITIONS + 1))
