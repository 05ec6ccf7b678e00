"""Every representative kernel compiles for both architectures without spills or local memory. Needs nvcc, no GPU."""

from __future__ import annotations

import pytest

from tsld_fx.codegen.build import build_kernel
from tsld_fx.codegen.cache import KernelCache
from tsld_fx.codegen.compiler import KernelBuildError, Nvrtc, find_compiler, parse_resources
from tsld_fx.codegen.config import GemmConfig
from tsld_fx.codegen.render import QuantiseConfig, kernel_name, render, render_quantise
from tsld_fx.codegen.select_config import choose
from tsld_fx.codegen.spec import KernelSpec
from tsld_fx.errors import BackendError

TOKENS = (1, 8, 16, 64, 256, 2048)
SHAPES = ((4096, 4096), (22016, 4096))
KINDS = [("fp16", 2, 0), ("fp16", 2, 32), ("fp16", 2, 128), ("fp16", 4, 0), ("fp16", 8, 0), ("fp16", 8, 32)]
KINDS += [("bf16", 2, 0), ("bf16", 4, 128), ("bf16", 8, 0)]


@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(("activation", "bits", "group"), KINDS)
def test_no_spills(activation: str, bits: int, group: int, target: str) -> None:
    """One translation unit with the kernels that are chosen for few, some and many tokens."""
    spec = KernelSpec(activation, bits, group, target)  # type: ignore[arg-type]
    configs = list(dict.fromkeys(choose(spec, n, k, m, 132).config for n, k in SHAPES for m in TOKENS))
    compiler = find_compiler("nvcc")  # fails, and says why, on a machine without nvcc
    binary, log = compiler.compile(render(spec, configs), target)
    resources = parse_resources(log)
    assert {r.kernel for r in resources} == {kernel_name(spec, c) for c in configs}
    spilled = [r for r in resources if r.stack or r.spill_stores or r.spill_loads]
    assert not spilled
    assert "serialized" not in log, "wgmma instructions were serialised:\n" + log
    assert len(binary) > 1000


@pytest.mark.parametrize("quantised", ["int8", "fp8"])
def test_no_spills_with_activations_of_8_bits(quantised: str) -> None:
    spec = KernelSpec("bf16", 2, 0, "sm_90a", quantised)  # type: ignore[arg-type]
    configs = list(dict.fromkeys(choose(spec, n, k, m, 132).config for n, k in SHAPES for m in TOKENS))
    _, log = find_compiler("nvcc").compile(render(spec, configs), spec.target)
    rounding = [render_quantise(spec, QuantiseConfig.of(chunks)) for chunks in (32, 86, 400)]
    resources = parse_resources(log) + parse_resources(find_compiler("nvcc").compile("".join(rounding), spec.target)[1])
    assert len(resources) == len(configs) + 3
    assert not [r for r in resources if r.stack or r.spill_stores or r.spill_loads]
    assert "serialized" not in log


@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(("activation", "group"), [("fp16", 0), ("bf16", 128)])
def test_no_spills_for_some_tens_of_tokens(activation: str, group: int, target: str) -> None:
    spec = KernelSpec(activation, 2, group, target)  # type: ignore[arg-type]
    shapes = [(16, 16, 4, 4), (8, 12, 4, 5)] if spec.hopper else [(16, 16, 2, 3), (8, 12, 1, 4)]
    configs = [GemmConfig(t, 1, 1, w, r, s, "digits", cluster=spec.hopper) for t, w, r, s in shapes]
    more = ((64, 5, True, 3), (32, 6, True, 0), (16, 8, False, 3)) if spec.hopper else ()
    configs += [GemmConfig(t, 4, 1, 1, 1, s, "wgmma", cluster=cluster, ahead=ahead) for t, s, cluster, ahead in more]
    _, log = find_compiler("nvcc").compile(render(spec, configs), spec.target)
    assert len(resources := parse_resources(log)) == len(configs)
    assert not [r for r in resources if r.stack or r.spill_stores or r.spill_loads]
    assert "serialized" not in log


def test_ptx_for_the_driver() -> None:
    spec = KernelSpec("fp16", 2, 0, "compute_80")
    binary, _ = find_compiler("nvcc").compile(render(spec, [choose(spec, 64, 64, 1, 108).config]), spec.target)
    assert b".target sm_80" in binary and b"mma.sync" in binary


def test_nvrtc_compiles_the_same_source() -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")
    compiler = find_compiler("nvrtc")
    assert isinstance(compiler, Nvrtc)
    spec = KernelSpec("bf16", 4, 128, "sm_90a")
    binary, _ = compiler.compile(render(spec, [choose(spec, 64, 64, m, 132).config for m in (1, 128)]), spec.target)
    assert binary.startswith(b"\x7fELF")


def test_build_is_cached(cache_folder) -> None:
    spec = KernelSpec("fp16", 2)
    config = choose(spec, 64, 64, 1, 108).config
    first = build_kernel(spec, config)
    (entry,) = cache_folder.iterdir()
    assert {f.name for f in entry.iterdir()} == {"kernel.cu", "kernel.bin", "info.json"}
    assert build_kernel(spec, config) == first


def test_build_failure_says_what_where_and_how_to_mend(cache_folder, monkeypatch) -> None:
    monkeypatch.setattr("tsld_fx.codegen.build.render", lambda spec, configs: "#error broken on purpose\n")
    config = GemmConfig(1, 1, 1, 8, 1, 4)
    with pytest.raises(BackendError) as failure:
        build_kernel(KernelSpec("fp16", 2), config)
    text = str(failure.value)
    assert isinstance(failure.value, KernelBuildError)
    for part in (
        "broken on purpose",
        "KernelSpec(activation='fp16', bits=2",
        "backend='reference'",
        "CUDA_HOME",
    ):
        assert part in text


def test_a_disagreement_about_sizes_is_a_compile_error(monkeypatch) -> None:
    monkeypatch.setattr(GemmConfig, "shared_bytes", lambda self, spec: 4242)
    with pytest.raises(KernelBuildError, match=r"codegen/config\.py disagrees"):
        find_compiler("nvcc").compile(render(KernelSpec("fp16", 2), [GemmConfig(1, 1, 1, 8, 1, 4)]), "sm_80")


def test_no_compiler_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr("tsld_fx.codegen.compiler._nvcc_candidates", list)
    with pytest.raises(KernelBuildError, match="TSLD_NVCC"):
        find_compiler("nvcc")


def test_an_nvcc_that_does_not_run(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("TSLD_NVCC", str(tmp_path / "missing"))
    with pytest.raises(KernelBuildError, match="does not run"):
        find_compiler()


def test_an_nvcc_that_writes_nothing(monkeypatch, tmp_path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho V12.4.99\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("TSLD_NVCC", str(nvcc))
    with pytest.raises(KernelBuildError, match=r"ended with code 0 for sm_80"):
        find_compiler().compile("", "sm_80")


def test_settings_that_make_no_sense(monkeypatch) -> None:
    monkeypatch.setenv("TSLD_CUDA_COMPILER", "clang")
    with pytest.raises(KernelBuildError, match=r"TSLD_CUDA_COMPILER='clang'.*'nvcc' or 'nvrtc'"):
        find_compiler()
    monkeypatch.setenv("TSLD_CACHE_MAX_MB", "1 GB")
    with pytest.raises(KernelBuildError, match=r"TSLD_CACHE_MAX_MB='1 GB'.*MiB"):
        KernelCache.default()
