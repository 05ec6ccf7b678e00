"""Runtime modules: what is built without a GPU, and what is refused before anything runs."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import tsld_fx
from tests.models import build, ids
from tsld_fx import AffineWeight, QuantConfig, convert, prepare
from tsld_fx.codegen.layout import KernelWeights, dequantise
from tsld_fx.codegen.runtime_module import LinearKernel, plan_ranges, targets_of
from tsld_fx.codegen.select_config import choose
from tsld_fx.codegen.spec import KernelSpec
from tsld_fx.errors import BackendError, CheckpointError, ConfigError, TsldError
from tsld_fx.runtime_linear import RuntimeLinear, open_library

CONFIG = QuantConfig(overrides={"*.o_proj": AffineWeight(bits=4), "*.down_proj": None})
MAX_TOKENS = 4


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lowered = convert(prepare(build("llama"), CONFIG))
    return tsld_fx.build_runtime_module(lowered, tmp_path_factory.mktemp("module") / "tiny", max_tokens=MAX_TOKENS)


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(built, tmp_path / "module"))


def fake_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], shared: int = 1 << 18, driver: int = 13010):
    properties = SimpleNamespace(
        name="GPU", major=capability[0], minor=capability[1], shared_memory_per_block_optin=shared
    )
    for name, value in {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_properties": properties,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr("tsld_fx.codegen.driver.driver_version", lambda: driver)


def machine_code(library: bytes) -> list[int]:
    """Architectures of the CUDA ELF images within a library."""
    found = []
    for match in re.finditer(rb"\x7fELF\x02\x01", library):
        (machine,) = struct.unpack_from("<H", library, match.start() + 18)
        if machine == 190:  # EM_CUDA
            (flags,) = struct.unpack_from("<I", library, match.start() + 48)
            found.append(flags >> 8 & 0xFF if flags >> 8 & 0xFF in (80, 90) else flags & 0xFF)
    return found


def test_folder_holds_kernels_weights_and_a_manifest(built: Path) -> None:
    assert {f.name for f in built.iterdir()} >= {"manifest.json", "kernels.so", "model.safetensors", "config.json"}
    manifest = json.loads((built / "manifest.json").read_text())
    assert (manifest["format_version"], manifest["dtype"], manifest["max_tokens"]) == (1, "float16", MAX_TOKENS)
    assert [t["name"] for t in manifest["targets"]] == ["sm_90a", "sm_80", "compute_80"]
    assert set(manifest["functions"]) == {
        "tsld_linear_w2_fp16_row_32x32", "tsld_linear_w2_fp16_row_16x32", "tsld_linear_w2_fp16_row_44x32",
        "tsld_linear_w4_fp16_row_32x32",
    }  # fmt: skip
    assert "nvcc" in manifest["built_with"]["compiler"]
    library = (built / "kernels.so").read_bytes()
    code = machine_code(library)
    assert len(manifest["kernels"]) == 3 * len(code) / 2 and set(code) == {80, 90}
    assert library.count(b".target sm_80") == len(code) // 2  # PTX
    symbols = subprocess.run(["nm", "-D", "--defined-only", built / "kernels.so"], capture_output=True, text=True)
    exported = {line.split()[-1] for line in symbols.stdout.splitlines()}
    for name in manifest["functions"]:
        assert {f"__tvm_ffi_{name}", f"__tvm_ffi_{name}_plan"} <= exported
    assert not [s for s in exported if "tsld" in s and not s.startswith("__tvm_ffi_")]


def test_weights_are_the_models_in_kernel_layout(built: Path) -> None:
    lowered = convert(prepare(build("llama"), CONFIG))
    tensors, manifest = load_file(built / "model.safetensors"), json.loads((built / "manifest.json").read_text())
    assert set(manifest["layers"]) == set(lowered.lowbit_layers())
    for name, layer in lowered.lowbit_layers().items():
        parts = [tensors.get(f"{name}.weight_{p}") for p in ("codes", "meta", "row_scale", "row_zero")]
        weights = KernelWeights(*parts, layer.bits, manifest["layers"][name]["group"], *layer.weight.shape)
        assert torch.equal(dequantise(weights), layer.dequantize())
        assert f"{name}.weight_packed" not in tensors
    down = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(tensors[down], lowered.get_parameter(down).half())


@pytest.mark.parametrize(("capability", "multiprocessors"), [(90, 132), (90, 114), (80, 108), (86, 84), (120, 170)])
def test_library_plans_as_the_runtime_compiler_does(built: Path, capability: int, multiprocessors: int) -> None:
    """Launch shapes in C++ equal those in Python, also on a chip with other numbers of multiprocessors."""
    manifest, library = json.loads((built / "manifest.json").read_text()), open_library(str(built / "kernels.so"))
    target = {90: "sm_90a", 80: "sm_80", 86: "sm_80"}.get(capability, "compute_80")
    for name, function in manifest["functions"].items():
        n, k, spec = function["n"], function["k"], KernelSpec(**function["spec"], target=target)
        for m in range(1, MAX_TOKENS + 1):
            plan = next(p for last, p in plan_ranges(spec, n, k, MAX_TOKENS) if m <= last)
            tiles, chunks = -(-n // 16), -(-k // 128)
            expected = (
                plan.splits, *plan.grid(m, tiles, multiprocessors),
                plan.shared_bytes(spec, m, tiles, chunks, multiprocessors), plan.partial_floats(m, tiles),
                plan.counters(m, tiles, multiprocessors),
            )  # fmt: skip
            assert library.plan(name, m, capability, multiprocessors)[1:] == expected
    with pytest.raises(ValueError, match=r"no kernels for compute capability 7\.5"):
        library.plan(name, 1, 75, 40)
    with pytest.raises(ValueError, match=rf"{name}: {MAX_TOKENS + 1} tokens.*at most {MAX_TOKENS}\. .*max_tokens"):
        library.plan(name, MAX_TOKENS + 1, 90, 132)


@pytest.mark.parametrize("target", ["sm_80", "sm_90a", "compute_80"])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (22016, 4096), (40, 5000)])
def test_plan_tables_say_what_choose_says(n: int, k: int, target: str) -> None:
    spec = KernelSpec("fp16", 2, target=target)
    ranges = plan_ranges(spec, n, k)
    assert [m for m, _ in ranges] == sorted({m for m, _ in ranges})
    tokens = [*range(1, 40), *torch.randint(40, 3000, (40,)).tolist(), 65536, 10**6]
    for m in tokens:
        table = next(p for last, p in ranges if m <= last)
        chosen = choose(spec, n, k, m, 132 if target == "sm_90a" else 108)
        tiles = -(-n // 16)
        assert (table.config, table.splits) == (chosen.config, chosen.splits), m
        assert table.grid(m, tiles, 120) == chosen.grid(m, tiles, 120)


def test_architectures() -> None:
    assert targets_of(("sm_90",)) == ("sm_90a", "compute_90")
    assert targets_of("sm_86") == ("sm_86", "compute_86")
    for wrong in ((), ("sm_75",), ("80",), (90,)):
        with pytest.raises(BackendError, match=r"arch"):
            targets_of(wrong)
    kernel = LinearKernel(KernelSpec("bf16", 4, 32), 8, 64)
    assert kernel.name == "tsld_linear_w4_bf16_g32_8x64"


def test_refused_to_build(tmp_path: Path) -> None:
    prepared = prepare(build("llama"))
    lowered = convert(prepared)
    with pytest.raises(ConfigError, match="convert"):
        tsld_fx.build_runtime_module(prepared, tmp_path / "m")
    with pytest.raises(BackendError, match="sm_75"):
        tsld_fx.build_runtime_module(lowered, tmp_path / "m", arch=("sm_75",))
    with pytest.raises(ConfigError, match=r"float32.*float16"):
        tsld_fx.build_runtime_module(lowered, tmp_path / "m", dtype=torch.float32)
    with pytest.raises(ConfigError, match="max_tokens=0"):
        tsld_fx.build_runtime_module(lowered, tmp_path / "m", max_tokens=0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(CheckpointError, match="in the way"):
        tsld_fx.build_runtime_module(lowered, tmp_path / "mine")
    small = convert(prepare(build("llama"), QuantConfig(weight=AffineWeight(granularity="group", group_size=4))))
    with pytest.raises(BackendError, match=r"model\.layers\.0\..*not 4"):
        tsld_fx.build_runtime_module(small, tmp_path / "m")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["mine"]


@pytest.mark.parametrize("missing", ["nvcc", "g++"])
def test_no_compiler_leaves_no_folder(tmp_path: Path, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing == "g++":
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setattr("tsld_fx.codegen.runtime_module.shutil.which", lambda name: None)
    else:
        monkeypatch.setattr("tsld_fx.codegen.compiler._nvcc_candidates", list)
        monkeypatch.setenv("TSLD_CUDA_COMPILER", "nvcc")
    with pytest.raises(TsldError, match=r"Install"):
        tsld_fx.build_runtime_module(convert(prepare(build("gpt2"))), tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_machine_without_a_gpu_is_refused(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("tsld_fx.checkpoint.from_pretrained", lambda *_, **__: pytest.fail("loaded before it refused"))
    for options in ({}, {"backend": "cuda"}, {"device": "cuda"}):
        with pytest.raises(BackendError, match=r"needs an NVIDIA GPU"):
            tsld_fx.load(built, **options)
    with pytest.raises(BackendError, match=r"on CUDA devices, not on 'cpu'"):
        tsld_fx.load(built, device="cpu")
    with pytest.raises(BackendError, match=r"backend='reference'.*CUDA kernels only"):
        tsld_fx.load(built, backend="reference")


def test_device_or_driver_that_cannot_run_it_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch, (7, 5))
    with pytest.raises(BackendError, match=r"sm_90a, sm_80, compute_80, none for cuda:0.*7\.5.*8\.0 or later"):
        tsld_fx.load(folder)
    with pytest.raises(BackendError, match=r"no cuda:2"):
        tsld_fx.load(folder, device="cuda:2")
    fake_gpu(monkeypatch, (9, 0), driver=12080)
    with pytest.raises(BackendError, match=r"built with CUDA 13\.\d.*supports CUDA 12\.8.*Update the driver"):
        tsld_fx.load(folder)
    fake_gpu(monkeypatch, (8, 6), shared=1000)
    with pytest.raises(BackendError, match=r"bytes of shared memory.*has 1000.*sm_86"):
        tsld_fx.load(folder)
    fake_gpu(monkeypatch, (9, 0))
    with pytest.raises(BackendError, match=r"computes in float16"):
        tsld_fx.load(folder, dtype=torch.bfloat16)
    change(folder, lambda m: m.update(targets=[{"name": "sm_80", "shared_bytes": 0}]))
    with pytest.raises(BackendError, match=r"kernels for sm_80, none for.*9\.0.*arch=\('sm_90'"):
        tsld_fx.load(folder)


def change(folder: Path, edit: Callable[[dict], object], name: str = "manifest.json") -> None:
    content = json.loads((folder / name).read_text())
    edit(content)
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: change(f, lambda m: m.update(format_version=2)), r"format version 2.*runs version 1"),
        (lambda f: change(f, lambda m: m.pop("files")), r"manifest\.json: damaged"),
        (lambda f: (f / "manifest.json").write_text("{"), r"manifest\.json: damaged"),
        (lambda f: (f / "kernels.so").write_bytes((f / "kernels.so").read_bytes()[:-9]), r"kernels\.so: \d+ bytes"),
        (lambda f: (f / "kernels.so").write_bytes(b"x" * (f / "kernels.so").stat().st_size), r"of other content"),
        (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors: missing"),
        (lambda f: (f / "config.json").write_text("{}"), r"config\.json: 2 bytes"),
    ],
)
def test_damaged_module_is_refused(folder: Path, damage: Callable[[Path], object], said: str) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=said):
        tsld_fx.load(folder)


def forge(folder: Path) -> None:
    """Make the manifest agree with files that were changed on purpose."""
    for name in ("config.json", "model.safetensors"):
        size = (folder / name).stat().st_size
        change(folder, lambda m, name=name, size=size: m["files"][name].update(bytes=size))


def test_module_of_other_shapes_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch, (9, 0))
    change(folder, lambda c: c.update(intermediate_size=48), "config.json")
    forge(folder)
    with pytest.raises(CheckpointError, match=r"32 inputs and 44 outputs.*\(32, 48\).*other shapes"):
        tsld_fx.load(folder)
    change(folder, lambda m: m["layers"]["model.layers.0.mlp.up_proj"].update(function="tsld_linear_nothing"))
    with pytest.raises(BackendError, match=r"no function 'tsld_linear_nothing'.*other shapes"):
        tsld_fx.load(folder)


def test_transformers_may_initialise_around_a_layer() -> None:
    model = build("gpt2")
    attention = model.transformer.h[0].attn
    width = attention.c_proj.nx
    made = RuntimeLinear(width, width, {"codes": 16, "row_scale": width}, True, "none", "", torch.float16)
    attention.c_proj = made
    model._init_weights(attention)  # reaches for c_proj.weight
    assert (made.weight.shape, made.weight.dtype, made.weight.device.type) == ((width, width), torch.float16, "meta")


def test_weights_on_the_cpu_are_refused(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch, (9, 0))
    from tsld_fx.checkpoint import from_pretrained

    model = from_pretrained(built, dtype=torch.float16)
    with pytest.raises(BackendError, match=r"input is on cpu, the weights on cpu.*CUDA device"):
        model(ids())
    with pytest.raises(BackendError, match=r"not saved again"):
        model.save_pretrained(built.parent / "again")


def test_library_refuses_tensors_it_was_not_built_for(built: Path) -> None:
    run = open_library(str(built / "kernels.so")).function("tsld_linear_w2_fp16_row_44x32")
    x, y = torch.zeros(1, 32, dtype=torch.float16), torch.zeros(1, 44, dtype=torch.float16)
    codes, scale = torch.zeros(16, dtype=torch.uint8), torch.zeros(48)
    with pytest.raises(ValueError, match="not on a CUDA device"):
        run(x, codes, None, scale, None, None, y, None, None)


def test_graphs_of_a_module_carry_its_functions(built: Path) -> None:
    """compile_decode captures a runtime module as any model; running the graphs needs a GPU."""
    from tsld_fx.checkpoint import from_pretrained
    from tsld_fx.decode.graphs import build_graphs

    graphs = build_graphs(from_pretrained(built, dtype=torch.float16), 2, 16)
    for graph_module in (graphs.prefill, graphs.decode):
        names = [str(node.target) for node in graph_module.graph.nodes]
        assert names.count("tsld.kernel_linear.default") == 12 and names.count("tsld.cached_attention.default") == 2
