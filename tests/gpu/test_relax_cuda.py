"""A decoder through TVM on a GPU, with our kernels for its packed layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tsld_fx.relax
from tests.models import ids
from tests.relax.cuda_model import lowered, with_half_layers

pytestmark = pytest.mark.gpu


def test_program_equals_torch(tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    model = lowered()
    program = tsld_fx.relax.load(tsld_fx.relax.compile(model, tmp_path / "program", target="cuda", max_rows=64))
    for batch, tokens in ((2, 9), (1, 1), (3, 17)):
        x = ids(batch, tokens, seed=tokens)
        expected = with_half_layers(model, x)
        assert float((program(x) - expected).abs().max() / expected.abs().max()) < 2e-3
    prompt = ids(2, 5, seed=3)
    expected = model.generate(prompt, max_new_tokens=12, do_sample=False)
    assert torch.equal(program.generate(prompt, 12), expected)
