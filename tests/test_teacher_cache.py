"""Teacher caches: epochs after the first give the same training without the teacher; every mismatch is refused."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.models import VOCABULARY, build, ternary
from tests.tiny_runs import Recorder, Rows, arguments, random_rows
from tsld_fx import DistillConfig, TSLDTrainer
from tsld_fx.cached_samples import CachedSamples
from tsld_fx.errors import CheckpointError, ConfigError, DataError, TsldError
from tsld_fx.teacher_cache import TeacherCache, fingerprint, teacher_digest


def run(folder: Path, rows: Rows, distill: DistillConfig, teacher: PreTrainedModel, **changes: Any) -> tuple[Any, list]:
    recorder, calls = Recorder(), []
    layer = teacher.model.layers[0]
    hook = layer.register_forward_hook(lambda *_: calls.append(1))
    values = {"max_steps": -1, "num_train_epochs": 3, "learning_rate": 0.01, "optim": "sgd", **changes}
    trainer = TSLDTrainer(
        model=copy.deepcopy(ternary("llama")[0]), teacher=teacher, distill=distill, train_dataset=rows,
        args=arguments(folder, **values), callbacks=[recorder],
    )  # fmt: skip
    calls.clear()  # what looks at the head runs the teacher too
    trainer.train()
    hook.remove()
    return recorder.values("loss"), calls


@pytest.mark.parametrize(
    ("kind", "method", "workers"),
    [
        ("token_scores", "tsld", 0),
        ("hidden_states", "tsld", 0),
        ("hidden_states", "logit", 0),
        ("hidden_states", "tsld", 2),
        ("top_logits", "tsld", 2),
        ("top_logits", "logit_gt", 0),
    ],
)
def test_later_epochs_read_the_cache_and_train_alike(kind: Any, method: Any, workers: int, tmp_path: Path) -> None:
    teacher, rows = build("llama", seed=7), random_rows(10)
    rows.columns["labels"][3, :4] = -100
    plain, calls = run(tmp_path / "plain", rows, DistillConfig(method), teacher)
    assert len(calls) == 9
    cached = DistillConfig(method, teacher_cache=kind, cached_logits=VOCABULARY)  # all of them: the same loss
    ours, calls = run(tmp_path / "cached", rows, cached, teacher, dataloader_num_workers=workers)
    close = 1e-3 if kind == "top_logits" else 1e-6  # log-probabilities are kept in float16
    assert ours == pytest.approx(plain, rel=close)
    assert len(calls) == (9 if kind == "token_scores" else 3)
    shared = replace(cached, cache_folder=str(tmp_path / "cached" / "teacher_cache"))
    again, calls = run(tmp_path / "again", rows, shared, teacher)
    assert again == pytest.approx(ours, rel=1e-6)
    assert len(calls) == (9 if kind == "token_scores" else 0)


def test_half_filled_cache_goes_on(tmp_path: Path) -> None:
    teacher, rows = build("llama", seed=7), random_rows(12)
    distill = DistillConfig(teacher_cache="hidden_states", cache_folder=str(tmp_path / "cache"))
    _, calls = run(tmp_path / "one", rows, distill, teacher, max_steps=2)
    assert len(calls) == 2
    _, calls = run(tmp_path / "two", rows, distill, teacher, num_train_epochs=1)
    assert len(calls) == 1


def cache(
    folder: Path, rows: Rows | None = None, teacher: PreTrainedModel | None = None, kind: str = "hidden_states"
) -> TeacherCache:
    count = 5 if kind == "top_logits" else 0
    return TeacherCache(folder, kind, rows or random_rows(6), teacher or build("llama", seed=7), count=count)


def fill(folder: Path, **how: Any) -> TeacherCache:
    made, rows = cache(folder, **how), random_rows(6)
    marks = [fingerprint(rows[i]) for i in range(6)]
    top = None
    if how.get("kind") == "top_logits":
        top = (torch.zeros(6, 12, 5).int(), torch.randn(6, 12, 5).half(), torch.rand(6, 12))
    made.put(range(6), marks, torch.randn(6, 11), torch.randn(6, 12, 32).bfloat16(), top)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_come_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    made, rows = cache(tmp_path / "c"), random_rows(6)
    scores, hidden = torch.randn(2, 11), torch.randn(2, 12, 32).to(dtype)
    marks = [fingerprint(rows[i]) for i in (4, 1)]
    made.put([4, 1], marks, scores, hidden)
    assert made.filled() == 2
    again = cache(tmp_path / "c")
    row = CachedSamples(rows, again)[1]["tsld_row"]
    assert torch.equal(row.scores, scores[1])
    assert torch.equal(row.hidden, hidden[1])
    assert CachedSamples(rows, again)[0]["tsld_row"] is None


def test_processes_that_begin_a_cache_at_once_share_it(tmp_path: Path) -> None:
    late = cache(tmp_path / "c")
    fill(tmp_path / "c")
    late._create(torch.zeros(1, 12, 32).bfloat16())  # it had looked before the other's folder was there
    assert late.filled() == cache(tmp_path / "c").filled() == 6


def test_other_data_or_another_teacher_is_refused(tmp_path: Path) -> None:
    fill(tmp_path / "c")
    with pytest.raises(DataError, match="data is"):
        cache(tmp_path / "c", rows=random_rows(6, seed=1))
    with pytest.raises(DataError, match="samples is 6 there and 7"):
        cache(tmp_path / "c", rows=random_rows(7))
    with pytest.raises(DataError, match="teacher is"):
        cache(tmp_path / "c", teacher=build("llama", seed=8))
    with pytest.raises(DataError, match="kind is"):
        cache(tmp_path / "c", kind="token_scores")
    made, changed = cache(tmp_path / "c"), random_rows(6)
    changed.columns["input_ids"][2, 0] += 1  # behind the probes' back
    with pytest.raises(DataError, match="sample 2"):
        CachedSamples(changed, made)[2]


def test_one_changed_bit_of_the_teacher_shows() -> None:
    teacher = build("llama", seed=7)
    before = teacher_digest(teacher)
    assert before == teacher_digest(copy.deepcopy(teacher))
    with torch.no_grad():
        teacher.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-6
    assert teacher_digest(teacher) != before


@pytest.mark.parametrize("file", ["scores.bin", "hidden.bin", "top_indices.bin", "top_log_probs.bin", "top_rest.bin"])
def test_damage_is_found(file: str, tmp_path: Path) -> None:
    kind = "top_logits" if file.startswith("top") else "hidden_states"
    fill(tmp_path / "c", kind=kind)
    data = bytearray((tmp_path / "c" / file).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "c" / file).write_bytes(data)
    made = cache(tmp_path / "c", kind=kind)
    with pytest.raises(CheckpointError, match="damaged"):
        [CachedSamples(random_rows(6), made)[i] for i in range(6)]
    (tmp_path / "c" / file).write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=r"bytes instead of"):
        cache(tmp_path / "c", kind=kind)
    record = tmp_path / "c" / "cache.json"
    record.write_text(json.dumps({"version": 1}))
    with pytest.raises(CheckpointError, match="cannot be read"):
        cache(tmp_path / "c", kind=kind)


def test_refusals_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="top_k"):
        DistillConfig(teacher_cache="top_k")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="only TSLD"):
        DistillConfig("logit", teacher_cache="token_scores")
    with pytest.raises(ConfigError, match="fused"):
        DistillConfig(teacher_cache="token_scores", fused=False)
    with pytest.raises(ConfigError, match="cached_logits"):
        DistillConfig(teacher_cache="top_logits", cached_logits=0)
    with pytest.raises(ConfigError, match="soften"):
        DistillConfig(losses=[{"kind": "logit", "temperature": 2.0}], teacher_cache="top_logits")
    with pytest.raises(ConfigError, match="vocabulary of 97"):
        TSLDTrainer(
            model=copy.deepcopy(ternary("llama")[0]), teacher=build("llama", seed=7), train_dataset=random_rows(4),
            distill=DistillConfig(teacher_cache="top_logits", cached_logits=98), args=arguments(tmp_path / "t"),
        )  # fmt: skip
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("something")
    with pytest.raises(CheckpointError, match="not empty"):
        cache(tmp_path / "full")
    uneven = [{"input_ids": torch.arange(n), "labels": torch.arange(n)} for n in (4, 5)]
    with pytest.raises(DataError, match="4 to 5 tokens"):
        TeacherCache(tmp_path / "c", "token_scores", uneven, build("llama"))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="length"):
        TeacherCache(tmp_path / "c", "token_scores", iter([]), build("llama"))  # type: ignore[arg-type]
    capped = copy.deepcopy(ternary("gemma2")[0])
    with pytest.raises(TsldError, match="linear head"):
        TSLDTrainer(
            model=capped, teacher=build("gemma2", seed=7), train_dataset=random_rows(4),
            distill=DistillConfig(teacher_cache="token_scores"), args=arguments(tmp_path / "t"),
        )  # fmt: skip
    assert not (tmp_path / "c").exists()
