"""`tsld_fx.analysis`: every figure against a plain recomputation, on every way a model can come."""

from __future__ import annotations

import json
from pathlib import Path

import pandas
import pytest
import torch
from torch import Tensor

from tests.models import VOCABULARY, build, ids
from tsld_fx import QuantConfig, TernaryWeight, analysis, convert, losses, prepare
from tsld_fx.analysis.activations import as_modules, attention_of
from tsld_fx.analysis.tokens import rank_correlation
from tsld_fx.errors import AnalysisError, DataError

LENGTH = 24


def pair(family: str = "llama") -> tuple:
    """A teacher, its ternary student and a batch."""
    return build(family).double(), as_modules(prepare(build(family))).double(), ids(3, LENGTH, seed=5)


def relative(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher).square().sum((0, 2)) / teacher.square().sum((0, 2))


def test_errors_equal_a_plain_recomputation() -> None:
    teacher, student, batch = pair()
    found = analysis.errors_by_place(teacher, student, [batch[:1], batch[1:]])
    with torch.no_grad():
        theirs = teacher(input_ids=batch, output_hidden_states=True)
        ours = student(input_ids=batch, output_hidden_states=True)
        assert found.relative["hidden_state", "accumulated"].shape == (2, LENGTH)
        wanted = relative(ours.hidden_states[1], theirs.hidden_states[1])  # [2] is behind the final norm
        torch.testing.assert_close(found.relative["hidden_state", "accumulated"][0], wanted)
        torch.testing.assert_close(found.relative["logits", "accumulated"][0], relative(ours.logits, theirs.logits))
        squared = (ours.logits - theirs.logits).square().mean((0, 2))
        torch.testing.assert_close(found.mean_squared["logits", "accumulated"][0], squared)

        places = teacher.model.rotary_emb(theirs.hidden_states[1], torch.arange(LENGTH)[None])
        given = teacher.model.layers[1].input_layernorm(theirs.hidden_states[1])
        full = teacher.model.layers[1].self_attn(given, position_embeddings=places, attention_mask=None)[0]
        low = student.model.layers[1].self_attn(given, position_embeddings=places, attention_mask=None)[0]
        torch.testing.assert_close(found.relative["attention_output", "local"][1], relative(low, full))
    first = {mode: found.relative["attention_output", mode][0] for mode in ("accumulated", "local")}
    torch.testing.assert_close(first["accumulated"], first["local"])  # both see the embeddings


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "gemma3"])
def test_every_architecture_and_every_kind_of_model(family: str) -> None:
    teacher, batch = build(family), ids(2, LENGTH)
    students = {
        "float": build(family),
        "trained": prepare(build(family), QuantConfig(weight=TernaryWeight(scale="absmean"))),
        "packed": convert(prepare(build(family), QuantConfig(weight=TernaryWeight(scale="absmean")))),
    }
    found = {k: analysis.analyze(teacher, s, batch.flatten(), length=LENGTH, map_tokens=8) for k, s in students.items()}
    assert all(float(v.abs().max()) == 0 for v in found["float"].errors.relative.values())
    for key, value in found["packed"].errors.relative.items():
        torch.testing.assert_close(value, found["trained"].errors.relative[key], rtol=1e-4, atol=1e-6)
        assert float(value.min()) > 0 and torch.isfinite(value).all()
    for theirs, ours in found["packed"].maps.values():
        assert theirs.shape == ours.shape == (4, 8, 8)
        torch.testing.assert_close(theirs.sum(-1), torch.ones(4, 8))
        assert float(theirs.triu(1).abs().max()) == 0 and not torch.equal(theirs, ours)
    assert attention_of(analysis.decoder_layers(teacher)[0]) is not None
    assert teacher.config._attn_implementation == build(family).config._attn_implementation
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in teacher.modules()]
    analysis.run(teacher, batch)
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in teacher.modules()]


@pytest.mark.parametrize("seed", [0, 1])
def test_token_table_equals_a_plain_recomputation(seed: int) -> None:
    teacher, student, _ = pair()
    batch = ids(4, LENGTH, seed=seed)
    table = analysis.token_table(teacher, student, [batch[:3], batch[3:]], temperature=3.0)
    with torch.no_grad():
        theirs, ours = (m(input_ids=batch).logits[:, :-1] for m in (teacher, student))
    p, q = theirs.softmax(-1), ours.softmax(-1)
    chosen = p.gather(-1, batch[:, 1:, None])[..., 0]
    close = lambda a, b: torch.testing.assert_close(a.double(), b.double().flatten(), rtol=1e-4, atol=1e-6)  # noqa: E731
    close(table.confidence, p.amax(-1))
    close(table.probability, chosen)
    close(table.teacher_loss, -chosen.log())
    close(table.student_loss, -q.gather(-1, batch[:, 1:, None])[..., 0].log())
    close(table.divergence, (p * (p / q).log()).sum(-1))
    weights = (-chosen.log() / 3.0).softmax(-1) * (LENGTH - 1)
    close(table.scale, weights)
    assert torch.equal(table.agree, (p.argmax(-1) == q.argmax(-1)).flatten())
    assert table.sequence.unique().tolist() == [0, 1, 2, 3] and int(table.position.max()) == LENGTH - 2
    assert losses.token_scales(theirs.new_zeros(1, 2, VOCABULARY), batch[:1, :2]).sum() == 1
    bins = table.by_confidence(4)
    assert sum(b["tokens"] for b in bins) == table.target.numel()
    frame = pandas.DataFrame({"a": table.confidence.double(), "b": table.scale.double()})
    assert rank_correlation(table.confidence, table.scale) == pytest.approx(frame.corr("spearman").iloc[0, 1], abs=1e-6)


def test_growth_along_the_sequence() -> None:
    values = torch.ones(2, 32, dtype=torch.float64)
    values[1] = torch.arange(32) + 1.0
    values[:, 0] = 1e6  # the first token does not count
    found = analysis.PlaceErrors({("hidden_state", "accumulated"): values}, {})
    assert found.growth("hidden_state") == pytest.approx([1.0, 28.5 / 6.5])


def test_loss_curves_of_runs(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "epoch": 0.5, "loss": 5.0, "loss_tsld": 3.0, "loss_gt": 2.0},
        {"step": 2, "epoch": 1.0, "eval_loss": 1.5},
        {"step": 3, "epoch": 2.0, "eval_loss": 1.25},
        {"step": 4, "epoch": 3.0, "eval_loss": 1.75},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curve = analysis.read_curves(tmp_path, "tsld")
    assert curve.training == [(0.5, 2.0)] and curve.objective == [(0.5, 5.0)]
    assert curve.validation == [(1.0, 1.5), (2.0, 1.25), (3.0, 1.75)] and curve.overfitting() == 0.5
    assert [row["curve"] for row in curve.rows()] == ["training", "objective", "validation", "validation", "validation"]
    plain = [{"step": 1, "epoch": 0.5, "loss": 2.5}]
    (tmp_path / "metrics.jsonl").write_text(json.dumps(plain[0]) + "\n")
    assert (
        analysis.read_curves(tmp_path).training == [(0.5, 2.5)] and analysis.read_curves(tmp_path).overfitting() is None
    )
    with pytest.raises(AnalysisError, match=r"no metrics\.jsonl with log lines"):
        analysis.read_curves(tmp_path / "absent")


def test_models_that_do_not_belong_together_are_refused() -> None:
    teacher, tokens = build("llama"), ids(1, 64)[0]
    with pytest.raises(AnalysisError, match="the student has layers 3, the teacher 2"):
        analysis.analyze(teacher, build("llama", num_hidden_layers=3), tokens, length=16)
    with pytest.raises(AnalysisError, match="hidden_size 16, the teacher 32"):
        analysis.analyze(teacher, build("llama", hidden_size=16), tokens, length=16)
    with pytest.raises(DataError, match="the text has 64 tokens; give at least one window of length=128"):
        analysis.analyze(teacher, build("llama"), tokens, length=128)
    with pytest.raises(DataError, match="outside the model's vocabulary"):
        analysis.analyze(teacher, build("llama"), tokens + VOCABULARY, length=16)
