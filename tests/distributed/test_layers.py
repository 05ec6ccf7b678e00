"""The layered view: the bits of the flat graph, with and without recomputation, whole and cut into stages."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tests.models import build, ids, ternary
from tests.tiny_runs import arguments, random_rows
from tsld_fx import PreparedModel, QuantConfig, TernaryWeight, TSLDTrainer, prepare
from tsld_fx.distributed.pipeline import names_read
from tsld_fx.errors import ConfigError, PassError
from tsld_fx.passes.split_layers import layer_calls, split_layers, stage_graph

FAMILIES_HERE = ("llama", "gpt2", "gpt_neo", "gemma3")  # RoPE; tied with dropout; buffers cut to length; two masks


def batch() -> dict[str, Tensor]:
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, :4] = 0
    return {"input_ids": ids(3, 9), "attention_mask": mask, "labels": ids(3, 9, seed=1)}


def gradients(model: PreparedModel) -> tuple[Tensor, dict[str, Tensor], int]:
    """Logits, gradients and bytes saved for the backward pass of one step in train mode, parameters left out."""
    model.zero_grad()
    model.train()
    torch.manual_seed(3)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(**batch())
    assert outputs.loss is not None and outputs.logits is not None
    outputs.loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return outputs.logits.detach(), found, sum(kept.values())


@pytest.mark.parametrize("family", FAMILIES_HERE)
def test_view_and_recomputation_have_the_bits_of_the_flat_graph(family: str) -> None:
    model = copy.deepcopy(ternary(family)[0])
    logits, expected, bytes_flat = gradients(model)
    model.gradient_checkpointing_enable()
    again, found, bytes_layers = gradients(model)
    assert torch.equal(logits, again)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert bytes_layers < 0.5 * bytes_flat
    model.gradient_checkpointing_disable()
    assert gradients(model)[2] == bytes_flat


@pytest.mark.parametrize("family", FAMILIES_HERE)
def test_stages_in_a_row_have_the_bits_of_the_flat_graph(family: str) -> None:
    model = copy.deepcopy(ternary(family)[0])
    view = model.layer_view()
    stages = [view.stage(0, 1), view.stage(1, 2)]
    model.eval()
    feed = [batch()["input_ids"], batch()["attention_mask"]]
    with torch.no_grad():
        hidden = stages[0](*feed)
        assert hidden.shape == (3, 9, 32)
        logits = stages[1](hidden, *feed)["logits"]
        assert torch.equal(logits, model(input_ids=feed[0], attention_mask=feed[1]).logits)
    names = [names_read(stage) & {n for n, _ in model.named_parameters()} for stage in stages]
    assert names[0] | names[1] == {n for n, _ in model.named_parameters()}
    tied = model.config.get_text_config().tie_word_embeddings
    assert len(names[0] & names[1]) == (1 if tied else 0)


def test_view_reads_the_live_parameters_and_buffers_and_learned_scales() -> None:
    model = prepare(build("llama"), QuantConfig(weight=TernaryWeight(scale="lsq")))
    model.gradient_checkpointing_enable()
    first = model(**batch()).logits
    with torch.no_grad():
        for _, scale in model.learned_scales():
            scale.mul_(1.5)
    second = model(**batch()).logits
    assert not torch.allclose(first, second)
    model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()})
    assert not torch.allclose(model(**batch()).logits, second)
    model.gradient_checkpointing_disable()
    flat = model(**batch()).logits
    model.gradient_checkpointing_enable()
    assert torch.equal(model(**batch()).logits, flat)


def test_taps_and_positions_pass_through_the_view() -> None:
    model = copy.deepcopy(ternary("llama")[0])
    model.set_taps(("hidden_states", "attention_scores"))
    positions = torch.arange(9).flip(0)[None]
    feed = {"input_ids": ids(2, 9), "position_ids": positions}
    flat = model(**feed)
    model.gradient_checkpointing_enable()
    layered = model(**feed)
    for tap in ("hidden_states", "attention_scores"):
        assert len(getattr(layered, tap)) == 2
        for ours, theirs in zip(getattr(layered, tap), getattr(flat, tap), strict=True):
            assert torch.equal(ours, theirs)


def test_trainer_recomputes_with_the_same_weights(tmp_path: Path) -> None:
    trained: list[Any] = []
    for recompute in (False, True):
        model = copy.deepcopy(ternary("llama")[0])
        args = arguments(tmp_path / str(recompute), gradient_checkpointing=recompute, max_steps=2)
        TSLDTrainer(model=model, teacher=build("llama", seed=7), args=args, train_dataset=random_rows(8)).train()
        assert model.is_gradient_checkpointing == recompute
        trained.append(model.state_dict())
    assert all(torch.equal(trained[1][name], value) for name, value in trained[0].items())


@pytest.mark.parametrize("options", [{"use_reentrant": True}, {"every_n_layers": 2}, {"offload": True}, {"speed": 2}])
def test_options_that_recomputation_does_not_have_are_refused(options: dict[str, Any]) -> None:
    model = copy.deepcopy(ternary("llama")[0])
    with pytest.raises(ConfigError, match=f"{next(iter(options))}.*Leave"):
        model.gradient_checkpointing_enable(options)


def test_root_graph_is_short_and_stages_refuse_inner_values_of_earlier_ones() -> None:
    model = copy.deepcopy(ternary("llama")[0])
    layered = split_layers(model.graph_module.graph)
    assert [str(n.target) for n in layer_calls(layered.root)] == ["layer_0", "layer_1"]
    assert not any("fake_quant" in str(n.target) for n in layered.root.nodes)
    assert all(sum("fake_quant" in str(n.target) for n in layer.nodes) == 7 for layer in layered.layers)
    model.set_taps(("attention_scores",))
    with pytest.raises(PassError, match="--parallel fsdp"):
        stage_graph(split_layers(model.graph_module.graph).root, 1, 2)


def test_graph_without_layers_is_refused() -> None:
    flat = torch.fx.symbolic_trace(torch.nn.Linear(3, 3))
    with pytest.raises(PassError, match="no decoder layers"):
        split_layers(flat.graph)
