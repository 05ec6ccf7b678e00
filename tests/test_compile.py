"""torch.compile, torch.export and AOTInductor take prepared and lowered models whole."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

from tests.models import build, ids, left_padded, ternary
from tests.tiny_runs import arguments, random_rows
from tsld_fx import DistillConfig, LoweredModel, TSLDTrainer, convert, prepare

PAPER = ("gpt2", "opt", "gpt_neo", "llama")
ONE_LAYER = {
    "gpt2": {"n_layer": 1},
    "opt": {"num_hidden_layers": 1},
    "gpt_neo": {"num_layers": 1, "attention_types": [[["global"], 1]]},
    "llama": {"num_hidden_layers": 1},
}
BATCHES = ((2, 9), (3, 11), (4, 7))


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


@cache
def reference(family: str) -> LoweredModel:
    """A lowered model whose layers run plain torch, as they do in a program that is loaded again."""
    return convert(ternary(family)[0], backend="reference")


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", PAPER)
def test_prepared_model_trains_compiled_without_graph_breaks(family: str) -> None:
    prepared = prepare(build(family, **ONE_LAYER[family])).train()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(prepared, backend=counter, fullgraph=True)
    for seed, shape in enumerate(BATCHES):
        tokens = ids(*shape, seed=seed)
        results = []
        for model in (compiled, prepared):
            torch.manual_seed(seed)  # dropout is on
            loss = model(tokens, attention_mask=torch.ones_like(tokens), labels=tokens).loss
            prepared.zero_grad()
            loss.backward()
            results.append((loss.detach(), {n: p.grad.clone() for n, p in prepared.named_parameters()}))
        (ours, our_grads), (theirs, their_grads) = results
        close(ours, theirs)
        assert our_grads.keys() == their_grads.keys()
        for name, grad in our_grads.items():
            close(grad, their_grads[name])
    assert counter.frame_count <= 2  # the second shape makes batch and sequence dynamic, the third costs nothing


@pytest.mark.parametrize("family", PAPER)
def test_lowered_model_compiles_without_graph_breaks(family: str) -> None:
    _, lowered = ternary(family)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(lowered, backend=counter, fullgraph=True)
    padded, mask = left_padded()
    with torch.no_grad():
        for seed, shape in enumerate(BATCHES):
            close(compiled(ids(*shape, seed=seed)).logits, lowered(ids(*shape, seed=seed)).logits)
        ours, theirs = (m(padded, attention_mask=mask).logits[mask.bool()] for m in (compiled, lowered))
    close(ours, theirs)
    targets = {str(n.target) for g in counter.graphs for n in g.graph.nodes}
    assert any("lowbit_linear" in target for target in targets)


def test_inductor_trains_a_model_with_transposed_weights() -> None:
    prepared = prepare(build("gpt2", **ONE_LAYER["gpt2"]))
    compiled = torch.compile(prepared, fullgraph=True)
    loss = compiled(ids(), labels=ids()).loss
    loss.backward()
    ours = {n: p.grad.clone() for n, p in prepared.named_parameters()}
    prepared.zero_grad()
    prepared(ids(), labels=ids()).loss.backward()
    for name, parameter in prepared.named_parameters():
        close(ours[name], parameter.grad)


@pytest.mark.parametrize("scheme", ["twn", "absmean", "minmax", "absmax"])
@pytest.mark.parametrize("group_size", [0, 4, -1])
def test_fake_quantisation_of_a_transposed_weight_has_the_strides_it_promises(scheme: str, group_size: int) -> None:
    bits = 2 if scheme in ("twn", "absmean") else 4
    weight = torch.randn(8, 12).t()
    torch.library.opcheck(torch.ops.tsld.fake_quant.default, (weight, None, None, scheme, bits, group_size))
    with torch._subclasses.FakeTensorMode() as mode:
        promised = torch.ops.tsld.fake_quant(mode.from_tensor(weight), None, None, scheme, bits, group_size)
    real = torch.ops.tsld.fake_quant(weight, None, None, scheme, bits, group_size)
    assert promised.stride() == real.stride()


def test_trainer_with_torch_compile_takes_the_same_steps(tmp_path: Path) -> None:
    weights = []
    for compile_it in (False, True):
        torch.compiler.reset()
        student = prepare(build("llama", **ONE_LAYER["llama"]))
        teacher = build("llama", seed=1, **ONE_LAYER["llama"])
        changes = {"torch_compile": compile_it, "torch_compile_backend": "aot_eager"} if compile_it else {}
        args = arguments(tmp_path, max_steps=2, **changes)
        TSLDTrainer(
            model=student, teacher=teacher, distill=DistillConfig(method="l2l"), args=args, train_dataset=random_rows()
        ).train()
        weights.append({name: p.detach().clone() for name, p in student.named_parameters()})
    for name, weight in weights[0].items():
        close(weights[1][name], weight)


# ---------------------------------------------------------------- export
def export(lowered: LoweredModel) -> torch.export.ExportedProgram:
    tokens, both = ids(2, 8), {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    inputs = (tokens, torch.ones_like(tokens))
    return torch.export.export(lowered.graph_module, inputs, dynamic_shapes=(both, both), strict=False)


@pytest.mark.parametrize("family", PAPER)
def test_exported_graph_is_saved_and_loaded(family: str, tmp_path: Path) -> None:
    lowered = reference(family)
    padded, mask = left_padded()
    torch.export.save(export(lowered), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    ours = program.module()(padded, mask)["logits"][mask.bool()]
    close(ours, lowered.graph_module(padded, mask)["logits"][mask.bool()])
    nodes = [n for n in program.graph.nodes if n.target is torch.ops.tsld.lowbit_linear.default]
    assert len(nodes) == len(lowered.lowbit_layers())
    packed = {name: t for name, t in program.state_dict.items() if name.endswith("weight_packed")}
    assert len(packed) == len(nodes)
    assert all(t.dtype == torch.uint8 for t in packed.values())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_exported_transformers_view_is_saved_and_loaded(family: str, tmp_path: Path) -> None:
    lowered = reference(family)
    padded, mask = left_padded()
    both = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    inputs = {"input_ids": padded, "attention_mask": mask, "use_cache": False}
    shapes = {"input_ids": both, "attention_mask": both, "use_cache": None}
    with torch.no_grad():
        program = torch.export.export(lowered, (), inputs, dynamic_shapes=shapes, strict=False)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for tokens in (ids(3, 12), ids(2, 5)):
        ours = loaded(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
        close(ours.logits, lowered(tokens).logits)


def test_aot_inductor_package_runs_in_another_process(tmp_path: Path) -> None:
    lowered = convert(prepare(build("llama", **ONE_LAYER["llama"])), backend="reference")
    path = torch._inductor.aoti_compile_and_package(export(lowered), package_path=str(tmp_path / "model.pt2"))
    padded, mask = left_padded()
    with torch.no_grad():
        expected = lowered(padded, attention_mask=mask).logits
    torch.save((padded, mask, expected), tmp_path / "io.pt")
    code = """
import sys, torch
import tsld_fx  # registers tsld::lowbit_linear
padded, mask, expected = torch.load(sys.argv[2])
with torch.no_grad():
    logits = torch._inductor.aoti_load_package(sys.argv[1])(padded, mask)["logits"]
keep = mask.bool()
torch.testing.assert_close(logits[keep], expected[keep], rtol=1e-4, atol=1e-5)
print("agrees")
"""
    command = [sys.executable, "-c", code, path, str(tmp_path / "io.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "agrees"
