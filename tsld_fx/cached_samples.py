"""Training samples and batches that carry what a teacher cache has of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Dataset

from tsld_fx.teacher_cache import TOP, TeacherCache, fingerprint

FIELDS = ("tsld_sample", "tsld_print", "tsld_row")  # what `CachedSamples` adds to an item


class CachedSamples(Dataset[dict[str, Any]]):
    """A data set whose items carry their number, their fingerprint, and their row where the cache has one."""

    def __init__(self, data: Dataset[Any], cache: TeacherCache) -> None:
        self.data, self.cache = data, cache

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = dict(self.data[index])
        mark = fingerprint(item)
        return item | dict(zip(FIELDS, (index, mark, self.cache.get(index, mark)), strict=True))


class CachedBatches:
    """A collator that hands the samples to another one and adds the teacher's rows where all samples have one.

    It adds `tsld_sample` and `tsld_print` [B] int64, `token_scores` [B, T - 1], and `teacher_hidden` [B, T, H] or
    `top_indices`, `top_log_probs` [B, T, k] and `top_rest` [B, T].
    """

    def __init__(self, collator: Callable[[list[Any]], Any]) -> None:
        self.collator = collator

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        if FIELDS[0] not in items[0]:  # evaluation
            return dict(self.collator(items))
        extra = [[item[name] for item in items] for name in FIELDS]
        batch = dict(self.collator([{k: v for k, v in item.items() if k not in FIELDS} for item in items]))
        batch["tsld_sample"] = torch.tensor(extra[0])
        batch["tsld_print"] = torch.tensor([mark - 2**64 if mark >= 2**63 else mark for mark in extra[1]])
        if all(row is not None for row in extra[2]):
            batch["token_scores"] = torch.stack([row.scores for row in extra[2]])
            if extra[2][0].hidden is not None:
                batch["teacher_hidden"] = torch.stack([row.hidden for row in extra[2]])
            if extra[2][0].top is not None:
                batch |= {name: torch.stack([row.top[i] for row in extra[2]]) for i, name in enumerate(TOP)}
        return batch
