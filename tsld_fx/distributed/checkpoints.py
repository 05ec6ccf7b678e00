"""Sharded checkpoints (torch.distributed.checkpoint) by the model's own names: any number of processes reads them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_saver import save

from tsld_fx.errors import CheckpointError

_MODEL, _OPTIMIZER = "model.", "optimizer."


def save_state(
    folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, group: Any
) -> None:
    """Write parameters and optimiser state; every process writes what it holds.

    Keys: `model.<parameter>` and `optimizer.<parameter>/<value>`, such as `optimizer.lm_head.weight/exp_avg`.
    """
    state: dict[str, Any] = {f"{_MODEL}{name}": p.detach() for name, p in parameters.items()}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"{_OPTIMIZER}{name}/{key}"] = value
    with _quiet():
        save(state, checkpoint_id=str(folder), process_group=group)


def load_state(
    folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer | None, group: Any
) -> None:
    """Read what `save_state` wrote, from however many processes, into the parts that this process holds.

    Raises:
        CheckpointError: a parameter is missing or has another shape.
    """
    known = stored(folder)
    state: dict[str, Any] = {}
    for name, parameter in parameters.items():
        _check(folder, known, name, parameter)
        state[f"{_MODEL}{name}"] = parameter.detach()
    kept: dict[str, dict[str, Any]] = {name: {} for name in parameters}
    for key, meta in known.items() if optimizer is not None else ():
        name, _, leaf = key.removeprefix(_OPTIMIZER).rpartition("/")
        if key.startswith(_OPTIMIZER) and name in kept:
            kept[name][leaf] = state[key] = _room(meta, parameters[name])
    with _quiet():
        dcp.load(state, checkpoint_id=str(folder), process_group=group)
    for name in kept if optimizer is not None else ():
        values = {leaf: state[f"{_OPTIMIZER}{name}/{leaf}"] for leaf in kept[name]}
        if values:
            optimizer.state[parameters[name]] = values  # type: ignore[union-attr]


def read_model(folder: str | Path) -> dict[str, Tensor]:
    """The whole model in a sharded checkpoint, on the CPU of one process: parameter names -> tensors.

    Raises:
        CheckpointError: the folder is no such checkpoint.
    """
    folder = Path(folder)
    found = {k.removeprefix(_MODEL): m for k, m in stored(folder).items() if k.startswith(_MODEL)}
    state = {f"{_MODEL}{n}": torch.empty(m.size, dtype=m.properties.dtype) for n, m in found.items()}
    with _quiet():
        dcp.load(state, checkpoint_id=str(folder), no_dist=True)
    return {name.removeprefix(_MODEL): value for name, value in state.items()}


def stored(folder: Path) -> dict[str, Any]:
    """Keys of a checkpoint with their metadata.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    try:
        return dict(dcp.FileSystemReader(str(folder)).read_metadata().state_dict_metadata)
    except Exception as error:
        raise CheckpointError(
            f"{folder}: no sharded checkpoint, or a damaged one ({type(error).__name__}). "
            "Delete the folder; the run resumes from the checkpoint before it."
        ) from None


def _room(meta: Any, parameter: nn.Parameter) -> Any:
    """An empty value to load into: in shards like the parameter where it has the parameter's shape."""
    if not isinstance(meta, TensorStorageMetadata):
        return None
    if tuple(meta.size) == tuple(parameter.shape):
        return torch.zeros_like(parameter, dtype=meta.properties.dtype, requires_grad=False)
    return torch.zeros(meta.size, dtype=meta.properties.dtype)


def _check(folder: Path, known: Mapping[str, Any], name: str, parameter: nn.Parameter) -> None:
    meta = known.get(f"{_MODEL}{name}")
    if meta is None or tuple(meta.size) != tuple(parameter.shape):
        found = "is missing" if meta is None else f"has shape {list(meta.size)}, the model {list(parameter.shape)}"
        raise CheckpointError(f"{folder}: '{name}' {found}. The checkpoint belongs to another model.")


class _quiet(warnings.catch_warnings):
    """Without torch's notes on its own internals."""

    def __enter__(self) -> Any:
        found = super().__enter__()
        warnings.simplefilter("ignore")
        return found
