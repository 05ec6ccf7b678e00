"""A pipeline without backward pass, for the teacher and for evaluation: any placement of stages, any shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tsld_fx.distributed.data import Batch
from tsld_fx.distributed.placement import Placement


def run_forward(
    stages: Mapping[int, Callable[..., Any]],
    placement: Placement,
    batches: Sequence[Batch],
    hidden_like: Callable[[Batch], Tensor],
    consume: Callable[[int, Any], None],
    rank: int,
) -> None:
    """Send micro-batches through the stages in lock step: at tick t stage s works on micro-batch t - s.

    All transfers of a tick start together, so that no order of sends and receives can block.

    Args:
        stages: this process's stages by number; called with (hidden,) and a batch's tensors.
        hidden_like: an empty hidden state [B, T, H] for a batch.
        consume: called with the number of a micro-batch and the last stage's result, on the process that has it.
    """
    last, arrived = placement.stages - 1, dict[tuple[int, int], Tensor]()
    with torch.no_grad():
        for tick in range(len(batches) + last):
            transfers, coming = [], dict[tuple[int, int], Tensor]()
            for stage, module in stages.items():
                number = tick - stage
                if not 0 <= number < len(batches):
                    continue
                before = () if stage == 0 else (arrived.pop((stage, number)),)
                feed = {name: batches[number][name] for name in ("input_ids", "attention_mask", "labels")}
                value = module(*before, **feed)
                if stage == last:
                    consume(number, value)
                elif placement.rank_of[stage + 1] == rank:
                    coming[stage + 1, number] = value
                else:
                    peer = placement.rank_of[stage + 1]
                    transfers.append(dist.P2POp(dist.isend, value.contiguous(), peer, tag=stage))
            for stage in stages:
                number = tick - stage + 1
                if stage and placement.rank_of[stage - 1] != rank and 0 <= number < len(batches):
                    buffer = coming[stage, number] = hidden_like(batches[number])
                    transfers.append(dist.P2POp(dist.irecv, buffer, placement.rank_of[stage - 1], tag=stage - 1))
            for work in dist.batch_isend_irecv(transfers) if transfers else ():
                work.wait()
            arrived |= coming
