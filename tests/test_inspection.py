"""`tsld-fx inspect` and the functions under it: passes, graphs, and the table of layers."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.models import build
from tests.tiny_runs import float_folder, run_cli, tokenizer, workspace, write_yaml
from tsld_fx import AffineWeight, QuantConfig, TernaryWeight, convert, prepare
from tsld_fx.inspection import float32_bytes, layer_table, packed_bytes, trace_passes, weights_equal

pytestmark = pytest.mark.xdist_group("inspection")
CONFIG = QuantConfig(
    overrides={
        "*.mlp.*": AffineWeight(bits=4, granularity="group", group_size=4),
        "*.v_proj": AffineWeight(bits=8, symmetric=True),
        "*.k_proj": TernaryWeight("absmean", "tensor"),
        "*.o_proj": None,
    }
)


@cache
def folders() -> dict[str, Path]:
    prepared = prepare(build("llama", vocab_size=120), CONFIG)
    made = {"prepared": workspace() / "i_prepared", "converted": workspace() / "i_converted"}
    prepared.save_pretrained(made["prepared"])
    convert(prepared).save_pretrained(made["converted"])
    for folder in made.values():
        tokenizer().save_pretrained(folder)
    return made


def cells(text: str, layer: str) -> list[str]:
    """The cells of one row of a printed table."""
    row = next(line for line in text.splitlines() if re.match(rf"(│ )?{re.escape(layer)} ", line))
    return [cell.strip() for cell in re.split("│" if "│" in row else "  +", row.strip("│"))][1:]


@pytest.mark.parametrize("kind", ["prepared", "converted"])
def test_layers_of_a_prepared_and_a_converted_model(kind: str) -> None:
    outcome = run_cli("inspect", folders()[kind])
    assert outcome.code == 0, outcome.err
    prefix = "model.layers.0."
    assert cells(outcome.out, prefix + "self_attn.q_proj")[:4] == ["32 x 32", "2", "twn", "channel"]
    assert cells(outcome.out, prefix + "self_attn.k_proj")[:4] == ["16 x 32", "2", "absmean", "tensor"]
    assert cells(outcome.out, prefix + "self_attn.v_proj")[:4] == ["16 x 32", "8", "absmax", "channel"]
    assert cells(outcome.out, prefix + "self_attn.o_proj")[:4] == ["32 x 32", "32", "-", "-"]
    assert cells(outcome.out, prefix + "mlp.down_proj")[:4] == ["32 x 44", "4", "minmax", "group 4"]
    assert cells(outcome.out, "lm_head")[:4] == ["120 x 32", "32", "-", "-"]
    assert max(len(line) for line in outcome.out.splitlines() if line.startswith("model.")) <= 80
    assert ("Passes" in outcome.out) == (kind == "prepared")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_float_model_shows_every_pass_and_what_it_would_become(family: str) -> None:
    outcome = run_cli("inspect", float_folder(family))
    assert outcome.code == 0, outcome.err
    layer, shape = {
        "llama": ("model.layers.1.mlp.up_proj", "44 x 32"),
        "gpt2": ("transformer.h.1.mlp.c_fc", "128 x 32"),
    }[family]
    assert cells(outcome.out, layer)[:4] == [shape, "2", "twn", "channel"]
    assert cells(outcome.out, "InsertFakeQuant")[0] == "yes"
    assert f"+{14 if family == 'llama' else 8} tsld.fake_quant.default" in outcome.out
    assert cells(outcome.out, "FoldTransposedLinear")[0] == ("yes" if family == "gpt2" else "no")
    assert "tsld.lowbit_linear.default" in outcome.out


def test_config_says_how_to_prepare_and_graph_prints_the_code_after_a_pass(tmp_path: Path) -> None:
    file = write_yaml(tmp_path / "quant.yaml", {"quant": {"weight": {"bits": 8}}})
    outcome = run_cli("inspect", float_folder(), "--config", file, "--graph", "InsertFakeQuant")
    assert cells(outcome.out, "model.layers.0.mlp.up_proj")[1:3] == ["8", "minmax"]
    assert outcome.out.count("torch.ops.tsld.fake_quant.default(") == 14
    assert "torch.ops.tsld.lowbit_linear.default(" not in outcome.out
    lowered = run_cli("inspect", float_folder(), "--graph", "LowerLinear")
    assert lowered.out.count("torch.ops.tsld.lowbit_linear.default(") == 14
    unknown = run_cli("inspect", float_folder(), "--graph", "FlyToTheMoon")
    assert unknown.code == 2
    assert "no pass 'FlyToTheMoon' ran. Those that did: " in unknown.err and "InsertFakeQuant" in unknown.err


def test_shares_of_zero_and_sizes_are_those_of_the_weights() -> None:
    prepared = prepare(build("llama"), CONFIG)
    lowered = convert(prepared)
    rows = {row.name: row for row in layer_table(lowered)}
    assert layer_table(prepared) == layer_table(lowered)
    layers = lowered.lowbit_layers()
    for name, layer in layers.items():
        assert rows[name].zeros == pytest.approx(float((layer.dequantize() == 0).double().mean())), name
    q, down, v = (rows[f"model.layers.0.{n}"] for n in ("self_attn.q_proj", "mlp.down_proj", "self_attn.v_proj"))
    assert q.bytes == 32 * 32 // 4 + 32 * 4
    assert down.bytes == 32 * 44 // 2 + 32 * 11 * (4 + 1)
    assert v.bytes == 16 * 32 + 16 * 4
    assert rows["lm_head"].bytes == 97 * 32 * 4
    assert packed_bytes(list(rows.values())) == sum(rows[n].bytes for n in layers)
    assert float32_bytes(list(rows.values())) == sum(4 * m.out_features * m.in_features for m in layers.values())


def test_equality_check_sees_one_changed_code() -> None:
    prepared = prepare(build("llama"), CONFIG)
    lowered = convert(prepared)
    assert weights_equal(prepared, lowered)
    layer = lowered.lowbit_layers()["model.layers.1.self_attn.q_proj"]
    layer.weight_packed[3, 2] ^= 0b01
    assert not weights_equal(prepared, lowered)


def test_trace_names_what_came_and_went_in_order() -> None:
    records, lowered = trace_passes(build("llama"))
    names = [record.name for record in records]
    assert names.index("InsertFakeQuant") < names.index("PackWeights") < names.index("LowerLinear")
    by_name = {record.name: record for record in records}
    assert by_name["InsertFakeQuant"].changes == {"tsld.fake_quant.default": 14}
    assert by_name["LowerLinear"].changes["tsld.lowbit_linear.default"] == 14
    assert all(record.seconds >= 0 for record in records)
    assert lowered(torch.zeros(1, 3, dtype=torch.long)).logits.shape == (1, 3, 97)
