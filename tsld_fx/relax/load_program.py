"""Run a compiled program folder on torch tensors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tsld_fx.errors import CheckpointError, DataError
from tsld_fx.relax.run import Program, ProgramError


class CompiledProgram:
    """A compiled model on this machine; `load` makes it.

    Attributes:
        program: the loader underneath, on numpy arrays (`tsld_fx/relax/run.py`).
    """

    def __init__(self, program: Program) -> None:
        self.program = program

    @property
    def functions(self) -> dict[str, Any]:
        """Name -> inputs and weights of every function in the program."""
        return self.program.functions

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits float32 [B, T, vocabulary] of input_ids int64 [B, T].

        Raises:
            DataError: sizes that the program was not compiled for, or tokens that the model does not have.
        """
        return self._run(lambda: torch.from_numpy(self.program(_numpy(input_ids), _numpy(attention_mask)).copy()))

    def generate(
        self, input_ids: Tensor, max_new_tokens: int, attention_mask: Tensor | None = None, **ends: Any
    ) -> Tensor:
        """Greedy generation with a KV cache: int64 [B, T + new], equal to transformers' with do_sample=False.

        Args:
            ends: `eos_token_id` and `pad_token_id`; default the model's.

        Raises:
            DataError: as `__call__`.
        """
        ids, mask = _numpy(input_ids), _numpy(attention_mask)
        return self._run(lambda: torch.from_numpy(self.program.generate(ids, max_new_tokens, mask, **ends)))

    @staticmethod
    def _run(call: Any) -> Any:
        try:
            return call()
        except ProgramError as error:
            raise DataError(str(error)) from error


def load(path: str | Path, *, device: str | None = None, threads: int | None = None) -> CompiledProgram:
    """Load what `tsld_fx.relax.compile` wrote, checksums included.

    Args:
        path: the program folder.
        device: `cpu`, `cuda` or `cuda:1`; default what it was built for.
        threads: CPU threads; default torch's.

    Raises:
        CheckpointError: no whole program, another format or TVM version, or a machine that cannot run it.
    """
    hook = sys.excepthook
    try:
        chosen = torch.get_num_threads() if threads is None else threads
        return CompiledProgram(Program(path, device=device, threads=chosen, verify=True))
    except ProgramError as error:
        raise CheckpointError(str(error)) from error
    finally:
        sys.excepthook = hook


def _numpy(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().cpu().numpy()
