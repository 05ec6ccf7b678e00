"""Generation over a static cache: the tokens of transformers' generate, and which calls it serves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from tests.models import POSITIONS, build, ids, left_padded
from tsld_fx import LoweredModel, convert, prepare
from tsld_fx.decode import Decoder, decoder
from tsld_fx.decode.options import Options
from tsld_fx.decode.select import Selection, next_tokens
from tsld_fx.errors import CaptureError, ConfigError, DataError

FAMILIES = ("llama", "qwen3", "gpt2", "opt", "opt_projected")
_MODELS: dict[str, LoweredModel] = {}


def model(family: str) -> LoweredModel:
    """A lowered model with a compiled decoder for three sequences."""
    if family not in _MODELS:
        _MODELS[family] = convert(prepare(build(family)), backend="reference")
        _MODELS[family].compile_decode(max_batch_size=3, max_length=POSITIONS)
    return _MODELS[family]


def transformers_generate(lowered: LoweredModel, *args: Tensor, **options: object) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(lowered), "_decoded", lambda *_: None)
        return lowered.generate(*args, **options)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list:
    """Every call that a decoder serves is noted here."""
    seen: list[tuple] = []
    original = Decoder.generate

    def generate(self: Decoder, *args: object) -> Tensor:
        seen.append(args)
        return original(self, *args)

    monkeypatch.setattr(Decoder, "generate", generate)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("eos", [None, 2])
def test_greedy_tokens_are_those_of_transformers(family: str, eos: int | None, served: list) -> None:
    lowered = model(family)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": eos, "pad_token_id": 0}
    tokens, mask = left_padded()
    for inputs in ({"input_ids": ids(1, 7, 3)}, {"input_ids": tokens, "attention_mask": mask}):
        expected = transformers_generate(lowered, **inputs, **options)
        assert torch.equal(lowered.generate(**inputs, **options), expected)
    assert len(served) == 2


def test_sequences_end_and_are_filled_up_as_transformers_does(served: list) -> None:
    """A token that comes early ends the sequences, at different lengths."""
    lowered, (tokens, mask) = model("llama"), left_padded()
    free = transformers_generate(
        lowered, tokens, attention_mask=mask, max_new_tokens=25, do_sample=False, eos_token_id=None
    )
    made = free[:, tokens.shape[1] :]
    ends = [int(made[0, 3]), int(made[1, 9])]
    for eos in (ends, ends[0]):
        options = {
            "attention_mask": mask,
            "max_new_tokens": 25,
            "do_sample": False,
            "eos_token_id": eos,
            "pad_token_id": 1,
        }
        assert torch.equal(lowered.generate(tokens, **options), transformers_generate(lowered, tokens, **options))
    assert len(served) == 2


def test_calls_that_are_not_served_go_to_transformers(served: list) -> None:
    lowered = model("llama")
    prompt = ids(2, 5)
    for options in (
        {"num_beams": 2}, {"repetition_penalty": 1.3}, {"max_new_tokens": 1, "use_cache": False},
        {"return_dict_in_generate": True}, {"min_new_tokens": 3},
    ):  # fmt: skip
        lowered.generate(prompt, **{"max_new_tokens": 4, "do_sample": False, **options})
    lowered.generate(ids(4, 5), max_new_tokens=2, do_sample=False)  # more sequences than compiled for
    lowered.generate(inputs=None, max_new_tokens=2, bos_token_id=1, do_sample=False)
    assert not served
    assert lowered.generate(prompt, max_length=9, do_sample=False, eos_token_id=None).shape == (2, 9)
    assert lowered.generate(prompt, do_sample=False, eos_token_id=None).shape == (2, 20)  # transformers' default
    config = copy.deepcopy(lowered.generation_config)
    config.max_new_tokens, config.do_sample, config.eos_token_id = 6, False, None
    assert lowered.generate(prompt, generation_config=config).shape == (2, 11)
    assert len(served) == 3


def test_decoder_does_not_outlive_a_change_of_dtype_or_a_copy(served: list) -> None:
    lowered = copy.deepcopy(model("llama"))
    lowered.generate(ids(1, 4), max_new_tokens=2, do_sample=False)
    assert not served  # a copy has none
    lowered.compile_decode(max_length=20)
    lowered.generate(ids(1, 4), max_new_tokens=2, do_sample=False)
    assert len(served) == 1
    lowered.to(torch.float64).generate(ids(1, 4), max_new_tokens=2, do_sample=False)
    assert len(served) == 1


def test_sampling_draws_from_the_distribution() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0, -3.0]])
    many = 40_000
    rows = logits.expand(many, -1)
    for how, temperature, top_p in (
        (Selection(True), 1.0, 1.0), (Selection(True), 0.5, 1.0), (Selection(True, 3), 1.3, 1.0),
        (Selection(True, 0, True), 1.0, 0.8), (Selection(True, 4, True), 2.0, 0.9),
        (Selection(True, 0, True), 1.0, 0.0),
    ):  # fmt: skip
        drawn = next_tokens(rows, how, torch.tensor(temperature), torch.tensor(top_p))
        expected = (logits[0] / temperature).softmax(-1)
        if how.top_k:
            expected[how.top_k :] = 0
            expected /= expected.sum()
        if how.top_p:
            expected[(expected.cumsum(0) - expected >= top_p) & (torch.arange(5) > 0)] = 0
            expected /= expected.sum()
        share = torch.bincount(drawn, minlength=5) / many
        assert float((share - expected).abs().max()) < 4 * 0.5 / many**0.5, how
        assert not share[expected == 0].any()
    assert next_tokens(logits, Selection(), torch.ones(()), torch.ones(())).tolist() == [0]


def test_sampling_is_repeatable_and_different_rows_differ(served: list) -> None:
    lowered = model("gpt2")
    options = {
        "max_new_tokens": 12,
        "do_sample": True,
        "top_k": 20,
        "top_p": 0.95,
        "temperature": 1.5,
        "eos_token_id": None,
    }
    prompt = ids(1, 4).expand(3, -1)
    torch.manual_seed(1)
    first = lowered.generate(prompt, **options)
    torch.manual_seed(1)
    assert torch.equal(lowered.generate(prompt, **options), first)
    assert len({tuple(row) for row in first.tolist()}) == 3
    assert len(served) == 2


def test_unfused_graphs_give_the_same_tokens() -> None:
    lowered = copy.deepcopy(model("llama"))
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    expected = transformers_generate(lowered, ids(2, 6), **options)
    seen: list[str] = []
    made = lowered.compile_decode(2, POSITIONS, fuse=False, listener=lambda trace: seen.append(trace.name))
    assert torch.equal(lowered.generate(ids(2, 6), **options), expected)
    assert "InsertKVCache" in seen and "FuseProjections" not in seen
    assert made.graphs.cache_bytes == 2 * 2 * 2 * 2 * POSITIONS * 8 * 4


def test_models_without_a_static_form_are_refused() -> None:
    for family, said in (
        ("mistral", r"windows of 5 tokens.*max_length=40"),
        ("gemma3", r"windows of 5 tokens"),
        ("gpt_neo", r"no fused attention"),
    ):
        lowered = convert(prepare(build(family)), backend="reference")
        with pytest.raises(CaptureError, match=said):
            lowered.compile_decode(max_length=POSITIONS)
        lowered.generate(ids(1, 4), max_new_tokens=2)
    lowered = convert(prepare(build("mistral")), backend="reference")
    lowered.compile_decode(max_length=5)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    assert torch.equal(lowered.generate(ids(1, 2), **options), transformers_generate(lowered, ids(1, 2), **options))


def test_attention_that_is_not_causal_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    lowered = convert(prepare(build("mistral")), backend="reference")
    monkeypatch.setattr("tsld_fx.decode.graphs.check_model", lambda *_: None)  # as if the config said nothing
    with pytest.raises(CaptureError, match=r"differ from MistralForCausalLM's own by.*not the causal one"):
        lowered.compile_decode(max_length=POSITIONS)


def test_bad_sizes_are_refused() -> None:
    lowered = model("llama")
    with pytest.raises(ConfigError, match="max_batch_size=0"):
        Decoder(lowered, 0)
    with pytest.raises(CaptureError, match=r"max_length=41.*40 positions"):
        Decoder(lowered, 1, POSITIONS + 1)
    options = Options(30, Selection(), 1.0, 1.0, (), 0)
    small = Decoder(lowered, 1, 20)
    for tokens, said in ((ids(1, 4), r"1 sequences of 4 \+ 30 tokens.*max_length=20"), (ids(2, 4), r"2 sequences")):
        with pytest.raises(DataError, match=said):
            small.generate(tokens, torch.ones_like(tokens), options)


def test_batches_share_graphs_by_powers_of_two() -> None:
    made = Decoder.__new__(Decoder)
    made.max_batch_size = 12
    assert [made._bucket(b) for b in (1, 2, 3, 4, 5, 8, 9, 12)] == [1, 2, 4, 4, 8, 8, 12, 12]
    tokens, mask = left_padded((4, 2))
    aligned, last = decoder._left_aligned(tokens, mask, 4)
    assert aligned[0].tolist() == tokens[0].tolist() and aligned[1, :2].tolist() == tokens[1, 2:].tolist()
    assert last.tolist() == [3, 1]
