"""torch.export of one architecture once per process: most of the time of a test that prepares a model went there.

What is remembered is the exported program, in which parameters are names; each capture makes its own graph of it.
"""

from __future__ import annotations

import json
from collections.abc import Hashable
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from transformers import PreTrainedModel

from tsld_fx import capture

_MOST = 64
_programs: dict[Hashable, ExportedProgram] = {}
_export = capture._export


def remember_captures() -> None:
    """From now on `tsld_fx.capture` exports models that are alike in all that an export can see once."""
    capture._export = _remembered


def _remembered(model: PreTrainedModel, with_positions: bool, training: bool) -> ExportedProgram:
    seen = None if any(_is_altered(module) for module in model.modules()) else _what_export_sees(model)
    key = (seen, with_positions, training, torch.get_default_dtype(), torch.is_autocast_enabled("cpu"))
    if seen is None or key not in _programs:
        program = _export(model, with_positions, training)
        if seen is None:
            return program
        program._state_dict = {}  # the model's parameters need not live on
        if len(_programs) >= _MOST:
            del _programs[next(iter(_programs))]
        _programs[key] = program
    return _programs[key]


def _is_altered(module: nn.Module) -> bool:
    return "forward" in vars(module) or bool(module._forward_hooks or module._forward_pre_hooks)


def _what_export_sees(model: PreTrainedModel) -> Hashable:
    config = json.dumps(model.config.to_dict(), default=str, sort_keys=True)
    modules = tuple((name, type(m), _code(m), _plain_attributes(m)) for name, m in model.named_modules())
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}
    described = tuple(
        (name, first.setdefault(id(t), name), t.shape, t.dtype, t.device, t.requires_grad) for name, t in tensors
    )
    return config, model.config._attn_implementation, modules, described


def _code(module: nn.Module) -> Hashable:
    return getattr(type(module).forward, "__code__", None)


def _plain_attributes(module: nn.Module) -> Hashable:
    plain: dict[str, Any] = {k: v for k, v in vars(module).items() if isinstance(v, int | float | str | tuple | None)}
    return repr(sorted((k, v) for k, v in plain.items() if k != "training"))
