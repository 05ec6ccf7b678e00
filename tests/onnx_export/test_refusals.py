"""What export_onnx, build-ort-op and a session refuse, with the remedy, before anything is written."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import tsld_fx
from tests.models import ternary, unquantised
from tsld_fx.cli import export as _  # noqa: F401  (registers the commands)
from tsld_fx.cli.main import app
from tsld_fx.onnx import op_library, requirements, write
from tsld_fx.onnx.verify import open_session


def refused(match: str, **changes: Any) -> None:
    given = {"lowered": ternary("llama")[1], "path": Path("never.onnx"), **changes}
    with pytest.raises(tsld_fx.TsldError, match=match):
        tsld_fx.export_onnx(**given)
    assert not Path("never.onnx").exists()


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_models_that_are_not_lowered() -> None:
    refused(r"prepared, not converted.*tsld_fx\.convert\(prepared\)", lowered=ternary("llama")[0])
    refused(r"got LlamaForCausalLM.*torch\.onnx\.export", lowered=unquantised("llama")[0])
    half = copy.deepcopy(ternary("gpt2")[1]).to(torch.float16)
    refused(r"float16.*dtype=torch\.float32", lowered=half)
    refused(r"lies on meta\. Call \.to\('cpu'\)", lowered=half.to("meta"))


def test_choices() -> None:
    refused("dialect='tflite' is unknown. Choose one of 'custom', 'ort', 'qdq'", dialect="tflite")
    refused("activations='fp8' is unknown", activations="fp8")
    refused("target_ort='newest' is not an onnxruntime version", target_ort="newest")


@pytest.mark.parametrize("dialect", requirements.DIALECTS)
def test_onnxruntime_too_old_for_the_dialect(dialect: str) -> None:
    refused(
        "2-bit weights needs onnxruntime>=1.28, target_ort is 1.23.2.*Upgrade", dialect=dialect, target_ort="1.23.2"
    )


def test_installed_onnxruntime_too_old_to_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "installed_onnxruntime", lambda: "1.24.4")
    refused("needs onnxruntime>=1.28; 1.24.4 is installed.*verify=False")


@pytest.mark.parametrize(
    ("dialect", "opset", "words"),
    [("custom", 18, "needs opset 21 to 25"), ("qdq", 24, "needs opset 25 to 25"), ("ort", 26, "writes no later one")],
)
def test_opsets_that_cannot_carry_a_dialect(dialect: str, opset: int, words: str) -> None:
    refused(words, dialect=dialect, opset=opset)


def test_targets(tmp_path: Path) -> None:
    Path("folder.onnx").mkdir()
    refused("is a folder", path="folder.onnx", verify=False)
    Path("file").write_text("")
    refused("is a file", path="file", verify=False)
    refused("cannot write to", path="file/inside/m.onnx", verify=False)


@pytest.mark.parametrize(
    ("dialect", "bits", "runtime", "opset", "ir"),
    [("custom", 2, (1, 28), 21, 10), ("ort", 4, (1, 20), 21, 10), ("qdq", 4, (1, 20), 21, 10),
     ("ort", 8, (1, 22), 21, 10), ("qdq", 2, (1, 28), 25, 13), ("qdq", 8, (1, 25), 21, 10)],
)  # fmt: skip
def test_requirements_table(dialect: str, bits: int, runtime: tuple, opset: int, ir: int) -> None:
    assert requirements.requirements(dialect, {bits}) == requirements.Requirements(runtime, opset, ir)


def test_truncated_file() -> None:
    from tests.onnx_export.layers import model_of, proto_of, random_layer

    data = proto_of(model_of(random_layer(8, 64), "custom")).SerializeToString()
    Path("cut.onnx").write_bytes(data[: len(data) // 2])
    with pytest.raises(tsld_fx.TsldError, match=r"cannot load cut\.onnx.*cut short has to be exported again"):
        open_session(Path("cut.onnx"))


def test_missing_library() -> None:
    with pytest.raises(tsld_fx.TsldError, match=r"no operator library none\.so.*tsld-fx build-ort-op"):
        open_session(Path("m.onnx"), Path("none.so"))


def test_library_that_cannot_be_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(match: str, **given: Any) -> None:
        with pytest.raises(tsld_fx.TsldError, match=match):
            op_library.build_op_library("made.so", **given)
        assert not Path("made.so").exists()

    fails(r"no onnxruntime_cxx_api\.h in .*nowhere", ort_include=tmp_path / "nowhere")
    old = tmp_path / "include" / "onnxruntime"
    old.mkdir(parents=True)
    (old / op_library.HEADER).write_text("#error of this header\n")
    (old / "onnxruntime_c_api.h").write_text("#define ORT_API_VERSION 16\n")
    fails(r"of onnxruntime 1\.16; 1\.17 or later", ort_include=tmp_path / "include")
    (old / "onnxruntime_c_api.h").write_text("#define ORT_API_VERSION 22\n")
    fails("error of this header.*g[+][+] 9", ort_include=tmp_path / "include")
    monkeypatch.setattr(op_library, "_usual_places", lambda: [])
    fails("libonnxruntime-dev.*--ort-include")
    monkeypatch.setattr(op_library.shutil, "which", lambda name: None)
    fails(r"no C\+\+ compiler", ort_include=tmp_path / "include")


def test_full_disk_leaves_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    file = Path("m.onnx")
    file.write_bytes(b"precious")
    target = write.Target.of(file)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write.ir, "save", full)
    graph = SimpleNamespace(graph=SimpleNamespace(initializers={}))
    with pytest.raises(tsld_fx.TsldError, match="No space left on device"), write.staged(target) as staging:
        write.save(graph, staging, target)
    assert file.read_bytes() == b"precious" and list(Path().iterdir()) == [file]


def test_command_line(tmp_path: Path) -> None:
    lowered = ternary("gpt2")[1]
    lowered.save_pretrained("packed")
    Path("packed/tokenizer.json").write_text("{}")
    done = CliRunner().invoke(app, ["export", "packed", "out", "--kv-cache", "--dialect", "ort", "--no-verify"])
    assert done.exit_code == 0 and "8 packed layers, dialect ort" in " ".join(done.output.split()), done.output
    names = {"config.json", "genai_config.json", "generation_config.json", "model.onnx", "tokenizer.json"}
    assert {f.name for f in Path("out").iterdir()} == names
    done = CliRunner().invoke(app, ["export", "packed", "other", "--target-ort", "1.20"])
    assert isinstance(done.exception, tsld_fx.TsldError) and not Path("other").exists()
    done = CliRunner().invoke(app, ["build-ort-op", "--ort-include", "packed"])
    assert isinstance(done.exception, tsld_fx.TsldError) and "onnxruntime_cxx_api.h" in str(done.exception)
