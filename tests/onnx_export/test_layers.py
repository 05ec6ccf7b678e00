"""One packed layer in every dialect, format and shape, beside torch's operator; with and without the library."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from tests.onnx_export.layers import model_of, proto_of, random_layer, relative, session_of

FORMATS = [  # rows, inputs, bits, group, zeros, bias
    (24, 128, 2, 0, False, True),
    (65, 256, 2, 0, False, False),
    (3, 44, 2, 0, False, True),  # padded rows: 44 inputs in blocks of 32
    (7, 5, 2, -1, False, False),
    (33, 96, 2, 32, False, True),
    (16, 384, 2, 128, False, False),
    (20, 128, 4, 0, False, True),
    (20, 128, 4, 64, True, True),
    (11, 192, 4, 64, True, False),  # an odd number of blocks
    (9, 70, 4, 0, True, True),
    (12, 256, 8, 0, False, False),
    (12, 96, 8, 32, True, True),
    (5, 64, 8, -1, False, True),
]
SMALL_GROUPS = [(6, 40, 2, 8, False, True), (10, 48, 4, 16, True, False), (4, 60, 8, 20, True, True)]


def x_of(inputs: int, *leading: int, seed: int = 1) -> torch.Tensor:
    """Values of very different sizes, as activations have."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*leading, inputs, generator=generator) * torch.exp(torch.randn(inputs, generator=generator))


@pytest.mark.parametrize("dialect", ["custom", "ort", "qdq"])
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_stock_onnxruntime_computes_what_torch_does(dialect: str, form: tuple, tmp_path: Path) -> None:
    rows, inputs, bits, *rest = form
    layer = random_layer(rows, inputs, bits, *rest)
    dump = tmp_path / "optimised.onnx"
    session = session_of(proto_of(model_of(layer, dialect)), dump=dump)
    for leading in ((2, 3), (1, 1), (1, 40)):
        x = x_of(inputs, *leading)
        assert relative(session.run(None, {"x": x.numpy()})[0], layer(x)) < 2e-4
    optimised = onnx.load(dump)
    assert [n.op_type for n in optimised.graph.node].count("MatMulNBits") == 1, "the weight is not packed any more"


@pytest.mark.parametrize("dialect", ["custom", "ort", "qdq"])
@pytest.mark.parametrize("form", FORMATS[::3], ids=str)
def test_int8_activations_are_coarser_and_close(dialect: str, form: tuple) -> None:
    rows, inputs, bits, *rest = form
    layer = random_layer(rows, inputs, bits, *rest)
    x = x_of(inputs, 2, 9)
    session = session_of(proto_of(model_of(layer, dialect, "int8")))
    expected = layer(x)
    got = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
    assert 0 < float((got - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("form", FORMATS + SMALL_GROUPS, ids=str)
def test_library_computes_what_torch_does(form: tuple, library: Path, kernel_calls) -> None:  # type: ignore[no-untyped-def]
    rows, inputs, bits, *rest = form
    layer = random_layer(rows, inputs, bits, *rest)
    session = session_of(proto_of(model_of(layer, "custom")), library)
    before = kernel_calls()
    shapes = ((2, 3), (1, 1), (3, 107))  # the last is more than one round of 256 tokens
    for leading in shapes:
        x = x_of(inputs, *leading)
        assert relative(session.run(None, {"x": x.numpy()})[0], layer(x)) < 2e-4
    assert kernel_calls() == before + len(shapes)
    coarse = session_of(proto_of(model_of(layer, "custom", "int8")), library)
    x = x_of(inputs, 2, 9)
    got, expected = torch.from_numpy(coarse.run(None, {"x": x.numpy()})[0]), layer(x)
    assert 0 < float((got - expected).norm() / expected.norm()) < 0.03


@pytest.mark.parametrize("form", SMALL_GROUPS, ids=str)
def test_groups_without_a_kernel_run_unfolded_in_custom(form: tuple, caplog: pytest.LogCaptureFixture) -> None:
    rows, inputs, bits, *rest = form
    layer = random_layer(rows, inputs, bits, *rest)
    model = model_of(layer, "custom")
    assert "multiple of 32" in caplog.text and "build-ort-op" in caplog.text
    x = x_of(inputs, 2, 3)
    assert relative(session_of(proto_of(model)).run(None, {"x": x.numpy()})[0], layer(x)) < 1e-5


@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("with_library", [False, True])
def test_any_number_of_leading_dimensions(rank: int, with_library: bool, library: Path) -> None:
    layer = random_layer(6, 64)
    session = session_of(proto_of(model_of(layer, "custom", rank=rank)), library if with_library else None)
    x = x_of(64, *(2, 3, 4)[: rank - 1])
    assert relative(session.run(None, {"x": x.numpy()})[0], layer(x)) < 1e-4


@pytest.mark.parametrize("with_library", [False, True])
def test_rows_of_zeros(with_library: bool, library: Path) -> None:
    layer = random_layer(6, 64)
    session = session_of(proto_of(model_of(layer, "custom")), library if with_library else None)
    zeros = np.zeros((1, 2, 64), np.float32)
    np.testing.assert_array_equal(session.run(None, {"x": zeros})[0], layer(torch.from_numpy(zeros)).numpy())
    if with_library:  # the function's Split refuses nothing at all
        assert session.run(None, {"x": zeros[:, :0]})[0].shape == (1, 0, 6)


def test_two_sessions_share_the_library(library: Path, kernel_calls) -> None:  # type: ignore[no-untyped-def]
    layer, x = random_layer(6, 64), x_of(64, 1, 2)
    sessions = [session_of(proto_of(model_of(layer, "custom")), library) for _ in range(2)]
    before = kernel_calls()
    first, second = (s.run(None, {"x": x.numpy()})[0] for s in sessions)
    np.testing.assert_array_equal(first, second)
    assert kernel_calls() == before + 2


def test_library_says_what_is_wrong_with_a_node(library: Path) -> None:
    layer = random_layer(6, 64)
    for name, value, words in (("bits", 3, "bits is 3"), ("in_features", 640, "packed rows have 16 bytes")):
        proto = proto_of(model_of(layer, "custom"))
        next(a for a in proto.graph.node[0].attribute if a.name == name).i = value
        with pytest.raises(Exception, match=f"ai.tsld::LowBitLinear: {words}"):
            session_of(proto, library)
