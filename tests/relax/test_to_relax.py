"""`to_relax`: the module itself, its refusals, and what importing TVM must not do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tsld_fx
import tsld_fx.relax
from tests.models import POSITIONS, build, ids
from tests.relax.reference_models import prepared, reference
from tsld_fx import AffineWeight, QuantConfig
from tsld_fx.errors import BackendError, ConfigError
from tsld_fx.relax import tvm_import
from tsld_fx.relax.cpu_target import cpu_target
from tsld_fx.relax.translate import PARAMETER_NAMES, program_to_relax


def run(module: object, *inputs: Tensor) -> Tensor:
    """The logits of a module's `main`, through TVM's own default pipeline."""
    import tvm
    from tvm import relax

    machine = relax.VirtualMachine(tvm.compile(module, target=cpu_target().tvm()), tvm.cpu())
    return torch.from_numpy(machine["main"](*(tvm.runtime.tensor(t.numpy()) for t in inputs))[0].numpy())


def test_every_lowbit_linear_is_a_scheduled_primfunc() -> None:
    lowered = reference("llama")
    module = tsld_fx.to_relax(lowered, bind_params=False)
    from tvm.tirx import PrimFunc

    kernels = [f for f in module.functions.values() if isinstance(f, PrimFunc)]
    assert kernels and all(function.attrs["tirx.is_scheduled"] for function in kernels)
    names = [str(name) for name in module["main"].attrs[PARAMETER_NAMES]]
    layers = list(lowered.lowbit_layers())
    assert {n for n in names if n.endswith("weight_packed")} == {f"{layer}.weight_packed" for layer in layers}
    assert module.script().count("R.call_tir(cls.lowbit_w2_") == len(layers)
    assert module.script().count("R.call_tir(cls.dense_") == 1  # the head


def test_static_sizes_mixed_formats_and_bound_weights(tmp_path: Path) -> None:
    """4-bit groups with zero points, 8 bits, an 8-bit head, static tokens; through TVM's own pipeline and ours."""
    overrides = {
        "model.layers.0.mlp.*": AffineWeight(bits=4, granularity="group", group_size=4),
        "model.layers.1.self_attn.*": AffineWeight(bits=8, symmetric=True),
        "lm_head": AffineWeight(bits=8),
    }
    lowered = tsld_fx.convert(tsld_fx.prepare(build("llama"), QuantConfig(overrides=overrides)), backend="reference")
    module = tsld_fx.to_relax(lowered, batch=2, tokens=7)
    script = module.script()
    assert all(name in script for name in ("lowbit_w4_44x32_g4_z_m14", "lowbit_w8_97x32_z_m14"))
    x, mask = ids(2, 7), torch.ones(2, 7, dtype=torch.long)
    with torch.no_grad():
        expected = lowered(input_ids=x).logits
    program = tsld_fx.relax.load(tsld_fx.relax.compile(module, tmp_path / "program"))
    for result in (run(module, x, mask), program(x, mask)):
        assert float((result - expected).abs().max() / expected.abs().max()) < 1e-5


class Odd(nn.Module):
    """A module around an operator that no importer knows."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


def test_unknown_operator_names_node_and_module() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleDict({"odd": Odd()})

        def forward(self, x: Tensor) -> Tensor:
            return self.inner["odd"](x) + 1

    program = torch.export.export(Holder(), (torch.randn(3),), strict=False)
    with pytest.raises(BackendError, match=r"special_bessel_j0.*node special_bessel_j0.*module 'inner\.odd'.*pass"):
        program_to_relax(program, cpu_target(), bind_params=True)


@pytest.mark.parametrize(("version", "text"), [(None, "not installed"), ("0.21.0", "version 0.21.0 is installed")])
def test_absent_or_other_tvm_names_the_extra(version: str | None, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> str:
        if version is None:
            raise tvm_import.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(tvm_import, "version", find)
    with pytest.raises(BackendError, match=rf"{text}.*pip install 'tsld-fx\[tvm\]'"):
        tsld_fx.to_relax(reference("llama"))


def test_refusals_come_before_any_work() -> None:
    lowered = reference("llama")
    with pytest.raises(ConfigError, match=r"expected a lowered model.*convert"):
        tsld_fx.to_relax(prepared("llama"))
    with pytest.raises(ConfigError, match=rf"tokens={POSITIONS + 1} must lie in \[1, {POSITIONS}\]"):
        tsld_fx.to_relax(lowered, tokens=POSITIONS + 1)
    with pytest.raises(BackendError, match="target='metal' is not known"):
        tsld_fx.to_relax(lowered, target="metal")
    with pytest.raises(BackendError, match="target='llvm:pentium' is not known"):
        tsld_fx.to_relax(lowered, target="llvm:pentium")


def test_tsld_fx_imports_no_tvm_and_keeps_the_excepthook() -> None:
    code = (
        "import sys; hook = sys.excepthook; import tsld_fx, tsld_fx.relax; tsld_fx.relax.load; tsld_fx.to_relax\n"
        "assert not {'tvm', 'tvm_ffi'} & set(sys.modules)\n"
        "from tsld_fx.relax.tvm_import import load_tvm; load_tvm(); assert 'tvm' in sys.modules\n"
        "assert sys.excepthook is hook"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
