"""Runtime modules on a GPU: the same bits as backend='cuda', without a compiler."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tsld_fx
from tests.models import build, ids
from tsld_fx import AffineWeight, LoweredModel, QuantConfig, convert, prepare
from tsld_fx.codegen import compiler
from tsld_fx.errors import BackendError

pytest.importorskip("tvm_ffi")
pytestmark = pytest.mark.gpu

SIZES = {"llama": {"hidden_size": 256, "intermediate_size": 1100, "head_dim": 64}, "gpt2": {"n_embd": 64}}
MIXED = {
    family: QuantConfig(overrides={layer: AffineWeight(bits=4, granularity="group", group_size=64)})
    for family, layer in (("llama", "*.o_proj"), ("gpt2", "*.attn.c_proj"))
}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and the runtime module of the same model, built for this device's own code."""
    folder = tmp_path_factory.mktemp(request.param)
    lowered = convert(prepare(build(request.param, **SIZES[request.param]), MIXED[request.param]), backend="reference")
    lowered.save_pretrained(folder / "checkpoint")
    major, minor = torch.cuda.get_device_capability()
    tsld_fx.build_runtime_module(lowered, folder / "module", arch=(f"sm_{major}{minor}",))
    return folder / "checkpoint", folder / "module"


def load_module(path: Path, monkeypatch: pytest.MonkeyPatch) -> LoweredModel:
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "_nvcc_candidates", list)
        patch.setattr(compiler, "find_compiler", lambda *_: pytest.fail("compiled"))
        return tsld_fx.load(path)


def test_module_gives_the_bits_of_the_compiled_backend(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tsld_fx.load(folders[0], backend="cuda", dtype=torch.float16)
    module = load_module(folders[1], monkeypatch)
    assert (module.backend, module.device.type, module.dtype) == ("cuda", "cuda", torch.float16)
    for shape in ((1, 1), (2, 9), (3, 37), (8, 40)):
        tokens = ids(*shape).cuda()
        with torch.no_grad():
            ours, theirs = module(tokens).logits, expected(tokens).logits
        assert ours.isfinite().all() and torch.equal(ours, theirs)
    prompt = ids(2, 7).cuda()
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(module.generate(prompt, **options), expected.generate(prompt, **options))


def test_module_under_a_cuda_graph(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    module = load_module(folders[1], monkeypatch)
    layer = next(m for m in module.modules() if type(m).__name__ == "RuntimeLinear")
    x = torch.randn(2, layer.in_features, dtype=torch.float16, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        layer(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = layer(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, layer(x))


def test_older_architectures_run_through_ptx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lowered = convert(prepare(build("llama", **SIZES["llama"])), backend="reference")
    tsld_fx.build_runtime_module(lowered, tmp_path / "module", arch=("sm_80",), dtype=torch.bfloat16, max_tokens=18)
    module = load_module(tmp_path / "module", monkeypatch)
    reference = lowered.to("cuda", torch.bfloat16)
    for shape in ((1, 1), (2, 9)):
        tokens = ids(*shape).cuda()
        with torch.no_grad():
            ours, theirs = module(tokens).logits.double(), reference(tokens).logits.double()
        assert float((ours - theirs).norm() / theirs.norm()) < 6e-2


def test_input_on_the_cpu_is_refused(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    module = load_module(folders[1], monkeypatch)
    with pytest.raises((BackendError, RuntimeError), match="cpu"):
        module(ids())
    layer = next(m for m in module.modules() if type(m).__name__ == "RuntimeLinear")
    with pytest.raises(BackendError, match=r"float16"):
        layer(torch.zeros(1, layer.in_features, dtype=torch.bfloat16, device="cuda"))


def test_module_decodes_over_a_static_cache(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    module = load_module(folders[1], monkeypatch)
    prompt, options = ids(2, 7).cuda(), {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    decoder = module.compile_decode(2, 40)  # compares logits with the module's own
    assert len(module.generate(prompt, **options)[0]) == 19
    assert decoder._steps  # it was served
