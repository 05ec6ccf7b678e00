"""Train and eval mode, autocast, gradients, and the models that capture refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2Model,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.models import FAMILIES, UNQUANTISED, VOCABULARY, WITH_DROPOUT, build, ids, left_padded, ternary, unquantised
from tsld_fx import TsldError, prepare
from tsld_fx.errors import CaptureError

SMALL_BERT = BertConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)


@pytest.mark.parametrize("family", WITH_DROPOUT)
def test_dropout_follows_train_and_eval(family: str) -> None:
    model, prepared = unquantised(family)
    batch_ids = ids()
    try:
        prepared.train()
        model.train()
        for module in model.modules():  # LayerDrop, which the graph leaves out, would draw random numbers of its own
            if hasattr(module, "layerdrop"):
                module.training = False
        torch.manual_seed(7)
        first, second = prepared(batch_ids).logits, prepared(batch_ids).logits
        torch.manual_seed(7)
        theirs = model(batch_ids).logits
    finally:
        prepared.eval()
        model.eval()
    assert not torch.equal(first, second)
    assert torch.equal(first, theirs), "the same random numbers give the model's own training pass"
    assert torch.equal(prepared(batch_ids).logits, model(batch_ids).logits)


def test_model_prepared_in_train_mode_starts_in_train_mode() -> None:
    model = build("gpt2").train()
    prepared = prepare(model)
    batch_ids = ids()
    assert prepared.training
    assert not torch.equal(prepared(batch_ids).logits, prepared(batch_ids).logits)
    prepared.eval()
    assert torch.equal(prepared(batch_ids).logits, prepared(batch_ids).logits)
    prepared.train()
    assert not torch.equal(prepared(batch_ids).logits, prepared(batch_ids).logits)


def test_graph_with_positions_follows_the_mode_too() -> None:
    prepared = prepare(build("gpt2"))
    batch_ids = ids()
    positions = torch.arange(batch_ids.shape[1])[None]
    prepared(batch_ids, position_ids=positions)
    prepared.train()
    noisy = [prepared(batch_ids, position_ids=positions).logits for _ in range(2)]
    prepared.eval()
    calm = [prepared(batch_ids, position_ids=positions).logits for _ in range(2)]
    assert not torch.equal(*noisy)
    assert torch.equal(*calm)


def test_layers_dropped_at_random_in_training_are_all_kept_in_the_graph() -> None:
    model = build("opt", layerdrop=0.5).train()
    prepared = prepare(model, UNQUANTISED)
    assert all(module.training for module in model.modules())
    prepared.eval()
    model.eval()
    assert torch.equal(prepared(ids()).logits, model(ids()).logits)


def twn(weight: np.ndarray) -> np.ndarray:
    """Ternary weight of each row of a float64 matrix, by the formula (arXiv 1605.04711, eq. 6)."""
    result = np.zeros_like(weight)
    for row in range(weight.shape[0]):
        threshold = 0.7 * np.mean(np.abs(weight[row]))
        kept = np.abs(weight[row]) > threshold
        if kept.any():
            result[row, kept] = np.sign(weight[row, kept]) * np.mean(np.abs(weight[row, kept]))
    return result


def quantised_by_hand(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's parameters, every linear weight but the head's replaced by an independent ternary leaf."""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is head or type(module).__name__ not in ("Linear", "Conv1D"):
            continue
        weight = module.weight.detach().double().numpy()
        by_hand = twn(weight.T).T if type(module).__name__ == "Conv1D" else twn(weight)
        leaves[f"{name}.weight"] = torch.tensor(by_hand.copy(), dtype=torch.float32, requires_grad=True)
    return leaves


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_of_an_eager_model_with_weights_quantised_by_hand(family: str) -> None:
    model, (prepared, _) = build(family), ternary(family)
    leaves = quantised_by_hand(model)
    batch_ids, mask = left_padded((8, 6))
    labels = batch_ids.masked_fill(mask == 0, -100)
    theirs = torch.func.functional_call(
        model,
        leaves,
        (),
        {"input_ids": batch_ids, "attention_mask": mask, "use_cache": False},
        tie_weights=True,
    ).logits
    shifted = nn.functional.cross_entropy(theirs[:, :-1].reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1))
    shifted.backward()
    prepared.zero_grad(set_to_none=True)
    ours = prepared(batch_ids, attention_mask=mask, labels=labels)
    ours.loss.backward()
    try:
        torch.testing.assert_close(ours.logits[mask.bool()], theirs[mask.bool()], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.loss, shifted, rtol=1e-5, atol=1e-6)
        for name, parameter in prepared.named_parameters():
            assert parameter.grad is not None, name
            assert leaves[name].grad is not None, name
            largest = leaves[name].grad.abs().max()
            error = (parameter.grad - leaves[name].grad).abs().max()
            assert error <= 1e-4 * largest + 1e-7, f"{name}: {error:.2e} of {largest:.2e}"
    finally:
        prepared.zero_grad(set_to_none=True)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "qwen3"])
def test_bf16_autocast_works_and_stays_near_float32(family: str) -> None:
    model, prepared = unquantised(family)
    batch_ids = ids()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = prepared(batch_ids, labels=batch_ids)
        theirs = model(batch_ids).logits
    exact = model(batch_ids).logits
    ours.loss.backward()
    assert torch.isfinite(ours.loss)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in prepared.parameters())
    prepared.zero_grad(set_to_none=True)
    allowed = 2 * (theirs.float() - exact).abs().max() + 1e-3
    assert (ours.logits.float() - exact).abs().max() <= allowed


def test_autocast_trains_the_quantised_model() -> None:
    prepared = prepare(build("llama")).train()
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.05)
    losses = []
    for _ in range(8):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = prepared(ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


class Branching(nn.Module):
    """An MLP whose Python control flow depends on the data."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() > 0 else self.inner(-x)


def test_data_dependent_branch_is_refused_and_the_message_names_its_module() -> None:
    model = build("llama").train()
    model.model.layers[1].mlp = Branching(model.model.layers[1].mlp)
    with pytest.raises(CaptureError) as caught:
        prepare(model)
    message = str(caught.value)
    assert "model.layers.1.mlp" in message
    assert "Branching" in message
    assert "data-dependent" in message
    assert torch.is_grad_enabled()
    assert all(module.training for module in model.modules())


def t5() -> PreTrainedModel:
    sizes = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes))


SMALL_GPT2 = GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=2, n_positions=16)
REFUSED = {
    "encoder-decoder": (t5, "T5ForConditionalGeneration is an encoder-decoder model"),
    "no head": (lambda: GPT2Model(SMALL_GPT2), "GPT2Model has no language-modelling head"),
    "classifier": (lambda: GPT2ForSequenceClassification(SMALL_GPT2), "no language-modelling head"),
    "masked LM": (lambda: BertForMaskedLM(SMALL_BERT), "BertForMaskedLM is not causal"),
    "bidirectional with LM head": (lambda: BertLMHeadModel(SMALL_BERT), "BertLMHeadModel is not causal"),
    "not transformers": (lambda: nn.Linear(3, 3), "got Linear"),
    "not a module": (lambda: "gpt2", "got str"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_causal_decoder_is_refused_with_a_remedy(kind: str) -> None:
    make, said = REFUSED[kind]
    with pytest.raises(CaptureError, match=said) as caught:
        prepare(make())
    assert isinstance(caught.value, TsldError)
    assert "AutoModelForCausalLM" in str(caught.value)
