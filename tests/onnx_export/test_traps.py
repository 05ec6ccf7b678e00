"""Behaviour of onnxruntime and onnx that the export works around; each test fails when its workaround is not needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper
from onnx.inliner import inline_local_functions
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from tests.onnx_export.layers import model_of, proto_of, random_layer, relative, session_of
from tests.onnx_export.test_layers import x_of
from tsld_fx.errors import ExportError
from tsld_fx.onnx.graph import packed_layers
from tsld_fx.onnx.verify import _check_packed
from tsld_fx.packing import dequantize


class MatMulNBits(OpRun):
    """com.microsoft::MatMulNBits in numpy, from its specification; the reference evaluator has none."""

    op_domain = "com.microsoft"

    def _run(self, a, b, scales, zeros=None, g_idx=None, bias=None, K=0, N=0, bits=4, block_size=32, **_):  # type: ignore[no-untyped-def]
        def codes(packed: np.ndarray, count: int) -> np.ndarray:
            shifts = np.arange(0, 8, bits, dtype=np.uint8)
            return ((packed[..., None] >> shifts) & (2**bits - 1)).reshape(N, -1)[:, :count].astype(np.float32)

        count = scales.size // N
        points = np.full((N, count), 2.0 ** (bits - 1)) if zeros is None else codes(zeros.reshape(N, -1), count)
        levels = codes(b.reshape(N, -1), count * block_size).reshape(N, count, block_size)
        weight = ((levels - points[..., None]) * scales.reshape(N, count, 1)).reshape(N, -1)[:, :K]
        y = a @ weight.T.astype(np.float32)
        return (y.astype(np.float32) if bias is None else (y + bias).astype(np.float32),)


@pytest.mark.parametrize("dialect", ["custom", "ort"])
@pytest.mark.parametrize("activations", ["a16", "int8"])
@pytest.mark.parametrize(
    "form", [(9, 64, 2, 0), (3, 44, 2), (6, 96, 4, 32, True), (5, 64, 8, 0, True, False), (6, 40, 2, 8)], ids=str
)
def test_reference_evaluator_runs_the_function_body(dialect: str, activations: str, form: tuple) -> None:
    """An independent reading of the file: the function, MatMulNBits by its specification, no onnxruntime."""
    layer = random_layer(*form)
    if dialect == "ort" and form[-1] == 8:
        with pytest.raises(ExportError, match="multiple of 32"):
            model_of(layer, dialect, activations)
        return
    proto = proto_of(model_of(layer, dialect, activations))
    x = x_of(layer.in_features, 2, 3)
    inlined = inline_local_functions(proto)  # the evaluator does not hand `new_ops` on to functions
    (y,) = ReferenceEvaluator(inlined, new_ops=[MatMulNBits]).run(None, {"x": x.numpy()})
    assert relative(y, layer(x)) < 1e-5


def test_ir_version_is_pinned() -> None:
    """onnx writes a newer IR version than onnxruntime reads."""
    proto = proto_of(model_of(random_layer(4, 32), "custom"))
    session_of(proto)
    proto.ir_version = onnx.IR_VERSION
    with pytest.raises(Exception, match="IR version"):
        session_of(proto)


def test_two_bit_default_zero_point_is_two() -> None:
    """MatMulNBits without zero points takes 2, ours is 1: `ort` shifts the codes, `custom` gives zero points."""
    layer = random_layer(4, 64, bias=False)
    proto = proto_of(model_of(layer, "ort"))
    (codes,) = (t for t in proto.graph.initializer if t.name == "fc.codes")
    np.testing.assert_array_equal(
        onnx.numpy_helper.to_array(codes).reshape(4, -1), layer.packed.numpy() + np.uint8(0b01010101)
    )
    codes.raw_data = layer.packed.numpy().tobytes()
    x = x_of(64, 1, 2)
    wrong = session_of(proto).run(None, {"x": x.numpy()})[0]
    minus_one = x @ (dequantize(layer.packed, layer.scales, None, 2, 0, 64) - layer.scales).T
    assert relative(wrong, minus_one) < 1e-4


def test_fusion_quantises_activations_unasked() -> None:
    """DequantizeLinear + MatMul becomes MatMulNBits with int8 activations, whatever it says: limbs keep 16 bits."""
    layer, x = random_layer(64, 256, bias=False), x_of(256, 1, 8)
    plain, limbs = (session_of(proto_of(model_of(layer, "qdq", a))) for a in ("int8", "a16"))
    assert relative(plain.run(None, {"x": x.numpy()})[0], layer(x)) > 1e-3
    assert relative(limbs.run(None, {"x": x.numpy()})[0], layer(x)) < 1e-4


def test_fusion_of_two_bit_weights_needs_whole_bytes_of_columns() -> None:
    """With 65 columns the fused operator computes something else; the file has 68."""
    layer, x = random_layer(65, 64, bias=False), x_of(64, 1, 8)
    proto = proto_of(model_of(layer, "qdq"))
    assert next(t for t in proto.graph.initializer if t.name == "fc.weight").dims == [64, 68]
    assert relative(session_of(proto).run(None, {"x": x.numpy()})[0], layer(x)) < 1e-4


def test_weights_of_qdq_stay_inputs_by_outputs() -> None:
    """Behind a Transpose, with zero points, they crash the session: no Transpose stands before a MatMul."""
    proto = proto_of(model_of(random_layer(20, 64, 4, 32, True), "qdq"))
    assert "Transpose" not in {node.op_type for node in proto.graph.node}
    (weight,) = (t for t in proto.graph.initializer if t.name == "fc.weight")
    assert weight.dims == [64, 20] and weight.data_type == onnx.TensorProto.UINT4


def test_two_bit_types_need_opset_25_and_ir_13() -> None:
    proto = proto_of(model_of(random_layer(8, 64), "qdq"))
    assert (proto.opset_import[0].version, proto.ir_version) == (25, 13)
    assert next(t for t in proto.graph.initializer if t.name == "fc.weight").data_type == onnx.TensorProto.INT2
    proto.opset_import[0].version = 24
    with pytest.raises(Exception, match=r"tensor\(int2\)"):
        session_of(proto)


def test_constant_folding_unfolds_a_body_of_standard_operators(tmp_path: Path) -> None:
    """Why the body is MatMulNBits; and `verify` finds it out."""
    layer = random_layer(40, 80, 2, 8)
    proto, dump = proto_of(model_of(layer, "custom")), tmp_path / "o.onnx"
    file = tmp_path / "m.onnx"
    onnx.save(proto, file)
    session_of(proto, dump=dump)
    folded = [t for t in onnx.load(dump).graph.initializer if sorted(t.dims) == [40, 80] and t.data_type == 1]
    assert len(folded) == 1
    _check_packed(file, dump, [(40, 80)], unfolded=1)
    with pytest.raises(ExportError, match="turned 1 of 1 packed weights into float32"):
        _check_packed(file, dump, [(40, 80)], unfolded=0)


def test_nodes_become_matmul_nbits_once_with_scales_folded(tmp_path: Path) -> None:
    dump = tmp_path / "o.onnx"
    session_of(proto_of(model_of(random_layer(40, 256), "custom")), dump=dump)
    optimised = onnx.load(dump)
    (node,) = (n for n in optimised.graph.node if n.op_type == "MatMulNBits")
    constants = {t.name: list(t.dims) for t in optimised.graph.initializer}
    assert [constants[name] for name in node.input[1:4]] == [[40, 2, 32], [40, 2], [40, 1]]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("zeros", [True, False])
def test_optional_inputs_given_as_empty_names(bias: bool, zeros: bool, library: Path) -> None:
    """The lite custom op API crashes on them; the function has to do without, too."""
    layer, x = random_layer(8, 64, 4, 0, zeros, bias), x_of(64, 1, 3)
    proto = proto_of(model_of(layer, "custom"))
    node = proto.graph.node[0]
    assert node.input[-1] != "" and len(node.input) == (5 if bias else 4 if zeros else 3)
    for used in (None, library):
        assert relative(session_of(proto, used).run(None, {"x": x.numpy()})[0], layer(x)) < 1e-4
    node.input.extend([""] * (5 - len(node.input)))
    assert relative(session_of(proto, library).run(None, {"x": x.numpy()})[0], layer(x)) < 1e-4


def test_registered_kernel_wins_over_the_function(library: Path, kernel_calls: Any) -> None:
    """The kernel replaces a function of the same name, whatever its overload."""
    layer, x = random_layer(8, 64), x_of(64, 1, 3)
    proto = proto_of(model_of(layer, "custom"))
    assert proto.graph.node[0].overload == proto.functions[0].overload != ""
    del proto.functions[0].node[:]
    proto.functions[0].node.append(helper.make_node("Identity", ["x"], [proto.functions[0].output[0]]))
    before = kernel_calls()
    assert relative(session_of(proto, library).run(None, {"x": x.numpy()})[0], layer(x)) < 1e-4
    assert kernel_calls() == before + 1


def test_file_without_functions_needs_the_library(library: Path) -> None:
    proto = proto_of(model_of(random_layer(8, 64), "custom"))
    del proto.functions[:]
    with pytest.raises(Exception, match=r"ai\.tsld"):
        session_of(proto)
    session_of(proto, library)


def test_library_keeps_names_of_dynamic_sizes(library: Path) -> None:
    """A size that onnxruntime does not know reaches the library as -1 and must not come back as one."""
    proto = proto_of(model_of(random_layer(8, 64), "custom"))
    assert session_of(proto, library).get_outputs()[0].shape == ["a", "b", 8]
    for value in (proto.graph.input[0], proto.graph.output[0]):
        for size in value.type.tensor_type.shape.dim[:2]:
            size.Clear()
    assert session_of(proto, library).get_outputs()[0].shape[2] == 8


@pytest.mark.parametrize("group", [16, 24])
def test_blocks_without_a_fast_kernel_are_refused(group: int) -> None:
    layer = random_layer(4, group * 4, 2, group)
    for dialect in ("ort", "qdq"):
        with pytest.raises(ExportError, match=rf"'fc' has scales for groups of {group} inputs.*dialect='custom'"):
            model_of(layer, dialect)


@pytest.mark.parametrize(("inputs", "group", "block"), [(256, 0, 128), (192, 0, 64), (96, 0, 32), (512, 64, 64)])
def test_block_is_the_largest_fast_one(inputs: int, group: int, block: int) -> None:
    proto = proto_of(model_of(random_layer(4, inputs, 2, group), "ort"))
    (node,) = (n for n in proto.graph.node if n.op_type == "MatMulNBits")
    values = {a.name: a.i for a in node.attribute}
    assert (values["block_size"], values["accuracy_level"]) == (block, 4)


def test_unlowered_nodes_are_gone() -> None:
    model = model_of(random_layer(4, 64), "ort")
    assert packed_layers(model) == [] and "ai.tsld" not in model.opset_imports


def test_two_limbs_hold_sixteen_bits() -> None:
    """The low limb's step is 1/254 of the high one's: at most max|x| / 64,516 of a block is lost."""
    from tsld_fx.onnx.blocks import Blocks, Nodes, split_limbs

    x = x_of(256, 64)
    nodes = Nodes()
    import onnx_ir as ir

    given = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([64, 256]))
    both = split_limbs(nodes, given, Blocks(128, 2))
    both.name, both.type, both.shape = "both", ir.TensorType(ir.DataType.FLOAT), ir.Shape([128, 256])
    graph = ir.Graph([given], [both], nodes=nodes.made, opset_imports={"": 21}, name="limbs")
    session = onnxruntime.InferenceSession(proto_of(ir.Model(graph, ir_version=10)).SerializeToString())
    high, low = torch.from_numpy(session.run(None, {"x": x.numpy()})[0]).double().chunk(2)
    torch.testing.assert_close((high + low).float(), x, rtol=1e-6, atol=1e-7)
    top = x.double().reshape(64, 2, 128).abs().amax(-1, keepdim=True)
    step = top / 127
    levels = high.reshape(64, 2, 128) / step
    assert (levels - levels.round()).abs().max() < 1e-4 and levels.abs().max() < 127.001
    assert (low.reshape(64, 2, 128).abs() <= step * 0.5001).all()
