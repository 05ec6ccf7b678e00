"""Training samples that no batch can be made of are refused before training starts."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from tsld_fx.errors import DataError
from tsld_fx.prepared_inputs import check_length, check_tokens

_PROBES = 8


def check_samples(data: Any, model: PreTrainedModel, stacked: bool) -> None:
    """Look at a few samples over the length of a data set; streams are left to the first batch.

    Args:
        data: with `input_ids` [T] per sample (tensors or lists); other samples are left to their collator.
        stacked: whether the collator stacks samples as they are, so that they need one length.

    Raises:
        DataError: no samples, tokens that the model does not have, too many of them, or several lengths.
    """
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        return
    count = len(data)
    if not count:
        raise DataError("train_dataset has no samples. Give text of at least one block.")
    lengths: dict[int, int] = {}  # -> number of a sample
    for index in sorted({i * (count - 1) // (_PROBES - 1) for i in range(_PROBES)}):
        sample = data[index]
        if "input_ids" not in sample:
            return
        tokens = torch.as_tensor(sample["input_ids"])
        check_tokens(tokens, model)
        check_length(model, tokens.numel())
        lengths.setdefault(tokens.numel(), index)
    if stacked and len(lengths) > 1:
        (short, one), *_, (long, other) = sorted(lengths.items())
        raise DataError(
            f"train_dataset: sample {one} has {short} tokens, sample {other} has {long}, and the default "
            "collator only stacks. Cut all to one length, or give a data_collator that pads, such as "
            "tsld_fx.task_data.collate."
        )
