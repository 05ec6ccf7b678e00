"""QuantConfig and DistillConfig: defaults, patterns, round trips, and what they refuse."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tsld_fx
from tsld_fx import AffineWeight, DistillConfig, LossTerm, QuantConfig, TernaryWeight, TsldError
from tsld_fx.config import WeightSpec, group_size_code
from tsld_fx.errors import ConfigError


def test_defaults_are_ternary_twn_per_channel_without_the_head() -> None:
    config = QuantConfig()
    assert config.weight == TernaryWeight(scale="twn", granularity="channel")
    assert config.skip == ("lm_head",)
    assert dict(config.overrides) == {}
    assert config.spec_for("model.layers.0.mlp.up_proj") == TernaryWeight()
    assert config.spec_for("lm_head") is None


@pytest.mark.parametrize(
    "pattern, name, matches",
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head", False),
        ("model.layers.0.*", "model.layers.0.mlp.up_proj", True),
        ("model.layers.0.*", "model.layers.01.mlp", False),
        ("*.mlp.*", "model.layers.3.mlp.up_proj", True),
        ("model.layers.?", "model.layers.3", False),  # only '*' is special
        ("a.b", "axb", False),  # a dot is a dot
        ("re:.*mlp.*", "model.layers.3.mlp.up_proj", True),
        ("re:mlp", "model.mlp", False),  # the whole name
        (r"re:model\.layers\.(0|11)\..*", "model.layers.11.q", True),
        (r"re:model\.layers\.(0|11)\..*", "model.layers.1.q", False),
    ],
)
def test_patterns_match_whole_names(pattern: str, name: str, matches: bool) -> None:
    config = QuantConfig(weight=None, overrides={pattern: AffineWeight(bits=8)})
    assert (config.spec_for(name) is not None) == matches
    assert (QuantConfig(skip=(pattern,)).spec_for(name) is None) == matches


def test_overrides_beat_skip_and_the_last_match_wins() -> None:
    config = QuantConfig(
        overrides={"a.*": AffineWeight(bits=4), "a.b": None, "lm_head": AffineWeight(bits=8)},
        skip=("lm_head", "a.*", "c"),
    )
    assert config.spec_for("a.x") == AffineWeight(bits=4)
    assert config.spec_for("a.b") is None
    assert config.spec_for("lm_head") == AffineWeight(bits=8)
    assert config.spec_for("c") is None
    assert config.spec_for("d") == TernaryWeight()


def test_override_that_matches_nothing_is_refused_with_the_names_there_are() -> None:
    config = QuantConfig(overrides={"model.layer.0.*": None})
    with pytest.raises(ConfigError, match=r"'model\.layer\.0\.\*' matches no linear layer.*model\.layers\.0\.q.*re:"):
        config.check_patterns(["model.layers.0.q", "model.layers.0.k"])
    QuantConfig(overrides={"re:.*": None}).check_patterns(["a"])


groups = st.sampled_from([{"granularity": "tensor"}, {"granularity": "channel"}]) | st.integers(1, 512).map(
    lambda size: {"granularity": "group", "group_size": size}
)
clips = st.none() | st.floats(0.1, 10)


@st.composite
def weight_specs(draw: st.DrawFn) -> WeightSpec:
    group = draw(groups)
    if draw(st.booleans()):
        scale = draw(st.sampled_from(["twn", "absmean", "pact", "lsq", "seq"]))
        clip, factor = draw(clips) if scale == "pact" else None, draw(st.none() | st.floats(1e-5, 1))
        return TernaryWeight(scale=scale, clip_init=clip, dead_zone_bias=factor, **group)
    scale = draw(st.sampled_from(["minmax", "pact", "lsq"]))
    return AffineWeight(
        bits=draw(st.sampled_from([4, 8])),
        symmetric=draw(st.booleans()),
        scale=scale,
        clip_init=draw(clips) if scale == "pact" else None,
        **group,
    )


names = st.text("abc.*_019", min_size=1, max_size=12)
configs = st.builds(
    QuantConfig,
    weight=st.none() | weight_specs(),
    overrides=st.dictionaries(names, st.none() | weight_specs(), max_size=3),
    skip=st.lists(names, max_size=3).map(tuple),
    scale_lr_ratio=st.floats(1e-3, 10),
)


@given(config=configs)
def test_quant_config_survives_json_and_pickle(config: QuantConfig) -> None:
    assert QuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    again = pickle.loads(pickle.dumps(config))
    assert again == config
    assert hash(again) == hash(config)
    assert list(again.overrides) == list(config.overrides), "the order of overrides decides"


@pytest.mark.parametrize(
    "data, expected",
    [
        ({}, QuantConfig()),
        ({"weight": {"scale": "absmean"}}, QuantConfig(weight=TernaryWeight(scale="absmean"))),
        ({"weight": {"bits": 4}}, QuantConfig(weight=AffineWeight(bits=4))),
        ({"weight": {"bits": 2}}, QuantConfig()),
        ({"weight": {"kind": "affine", "bits": 8, "symmetric": True}}, QuantConfig(AffineWeight(8, True))),
        ({"weight": None, "skip": None, "overrides": None}, QuantConfig(weight=None, skip=())),
        ({"overrides": {"a": None, "b": {"bits": 8}}}, QuantConfig(overrides={"a": None, "b": AffineWeight(8)})),
    ],
)
def test_short_forms_from_yaml(data: dict[str, Any], expected: QuantConfig) -> None:
    assert QuantConfig.from_dict(data) == expected


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: TernaryWeight(scale="max"), "TernaryWeight: scale='max' is not one of 'twn'"),
        (lambda: TernaryWeight(granularity="row"), "granularity='row' is not one of 'tensor'"),
        (lambda: TernaryWeight(granularity="group"), "granularity='group' needs a positive group_size, got None"),
        (lambda: TernaryWeight(granularity="group", group_size=0), "positive group_size, got 0"),
        (lambda: TernaryWeight(granularity="group", group_size=-8), "positive group_size, got -8"),
        (lambda: TernaryWeight(granularity="group", group_size=64.0), "positive group_size, got 64.0"),
        (lambda: TernaryWeight(group_size=64), "group_size=64 has no meaning with granularity='channel'"),
        (lambda: TernaryWeight(clip_init=1.0), "clip_init belongs to scale='pact'"),
        (lambda: TernaryWeight(scale="pact", clip_init=0.0), "clip_init must be a positive number, got 0.0"),
        (lambda: AffineWeight(bits=3), "AffineWeight: bits=3 is not one of 4, 8"),
        (lambda: AffineWeight(bits=2), "bits=2 is not one of 4, 8"),
        (lambda: AffineWeight(scale="twn"), "scale='twn' is not one of 'minmax'"),
        (lambda: AffineWeight(symmetric=None), "symmetric=None is not one of True, False"),
        (lambda: QuantConfig(weight="ternary"), "weight must be TernaryWeight, AffineWeight or None"),
        (lambda: QuantConfig(overrides={"a": "skip"}), r"overrides\['a'\] must be TernaryWeight"),
        (lambda: QuantConfig(overrides={"re:(": None}), r"'re:\(' is not a regular expression"),
        (lambda: QuantConfig(skip=("re:[",)), r"'re:\[' is not a regular expression"),
        (lambda: QuantConfig(skip="lm_head"), "skip must be a tuple of names"),
        (lambda: QuantConfig(skip=None), "skip must be a tuple of names, got None"),
        (lambda: QuantConfig(overrides=[("a", None)]), "overrides must map patterns to specifications"),
        (lambda: QuantConfig(scale_lr_ratio=0.0), "scale_lr_ratio must be a positive number"),
        (lambda: QuantConfig(scale_lr_ratio=float("inf")), "scale_lr_ratio must be a positive number"),
        (lambda: QuantConfig.from_dict("ternary"), "quant: expected a mapping of weight, overrides"),
        (lambda: QuantConfig.from_dict({"skip": 5}), "skip must be a tuple of names, got 5"),
        (lambda: DistillConfig(losses=LossTerm("gt")), "losses must be a list of LossTerms, got LossTerm"),
        (lambda: DistillConfig(method=["tsld"]), r"method=\['tsld'\] is not one of gt"),
        (lambda: DistillConfig(fused="no"), "fused must be true or false, got 'no'"),
        (lambda: DistillConfig("gt", teacher_cache="hidden_states"), "logits need; here are gt"),
        (lambda: DistillConfig("l2l", teacher_cache="hidden_states"), "here are logit, hidden, attention"),
        (lambda: QuantConfig.from_dict({"weights": {}}), "unknown key 'weights'. Known keys: weight"),
        (lambda: QuantConfig.from_dict({"weight": {"size": 1}}), "quant.weight: unknown key 'size'"),
        (lambda: QuantConfig.from_dict({"weight": {"kind": "float"}}), "kind='float' is not one of"),
        (lambda: QuantConfig.from_dict({"weight": "ternary"}), "expected a mapping such as"),
        (lambda: QuantConfig.from_dict({"overrides": {"a.*": 4}}), r"overrides\['a\.\*'\]: expected a mapping"),
        (lambda: QuantConfig.from_dict({"skip": "lm_head"}), "skip must be a"),
        (lambda: QuantConfig.from_dict({"overrides": ["a"]}), "quant.overrides: expected a mapping"),
        (lambda: QuantConfig(overrides={3: None}), "the pattern 3 is not a string"),
        (lambda: QuantConfig(skip=(3,)), "the pattern 3 is not a string"),
        (lambda: QuantConfig(scale_lr_ratio="fast"), "scale_lr_ratio must be a positive number, got 'fast'"),
        (lambda: TernaryWeight(scale="pact", clip_init="wide"), "clip_init"),
        (lambda: TernaryWeight(scale=["twn"]), "scale"),
        (lambda: DistillConfig(method="kd"), "method='kd' is not one of gt, logit"),
        (lambda: DistillConfig(losses=[]), r"losses must be a list of LossTerms, got \[\]"),
        (lambda: DistillConfig(losses=[{"kind": "kl"}]), "kind='kl' is not one of"),
        (lambda: DistillConfig(losses=[{"kind": "gt", "name": 1}]), "unknown key 'name'. Known keys: kind"),
        (lambda: DistillConfig(temperature=0.0), "temperature must be a positive number, got 0.0"),
        (lambda: DistillConfig(reduction="max"), "reduction='max' is not 'sum' or 'mean'"),
        (lambda: DistillConfig(temperature="hot"), "temperature"),
        (lambda: DistillConfig(losses=[3]), "expected a mapping such as .*got 3"),
        (lambda: DistillConfig(losses=[{}]), "expected a mapping such as .*kind"),
        (lambda: LossTerm("gt", weight=-1.0), "weight must be a number and not negative, got -1.0"),
        (lambda: LossTerm("gt", weight=float("nan")), "not negative, got nan"),
        (lambda: LossTerm("tsld", temperature=-1.0), "temperature must be a positive number"),
        (lambda: DistillConfig.from_dict({"tau": 1.0}), "distill: unknown key 'tau'"),
    ],
)
def test_contradictions_are_refused_by_name(make: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        make()
    assert isinstance(caught.value, TsldError)


def test_order_of_overrides_survives_a_writer_that_sorts_keys() -> None:
    config = QuantConfig(overrides={"re:.*mlp.*": AffineWeight(bits=4), "model.layers.0.*": None})
    again = QuantConfig.from_dict(json.loads(json.dumps(config.to_dict(), sort_keys=True)))
    assert again == config
    assert again.spec_for("model.layers.0.mlp.up_proj") is None


def test_overrides_cannot_be_changed_behind_the_configuration() -> None:
    given_overrides = {"a": None}
    config = QuantConfig(overrides=given_overrides)
    given_overrides["b"] = None
    assert list(config.overrides) == ["a"]
    with pytest.raises(TypeError):
        config.overrides["c"] = None  # type: ignore[index]


def test_group_sizes_of_the_operators() -> None:
    assert group_size_code(TernaryWeight(granularity="tensor")) == -1
    assert group_size_code(TernaryWeight()) == 0
    assert group_size_code(AffineWeight(granularity="group", group_size=64)) == 64


@pytest.mark.parametrize(
    "method, kinds, teacher, taps",
    [
        ("gt", ["gt"], False, ()),
        ("logit", ["logit"], True, ()),
        ("logit_gt", ["logit", "gt"], True, ()),
        ("l2l", ["logit", "hidden", "attention"], True, ("hidden_states", "attention_scores")),
        ("tsld", ["tsld", "gt"], True, ()),
    ],
)
def test_methods_stand_for_their_losses(method: str, kinds: list[str], teacher: bool, taps: tuple[str, ...]) -> None:
    config = DistillConfig(method=method, temperature=7.0, reduction="mean")
    assert [term.kind for term in config.terms()] == kinds
    assert all(term.weight == 1.0 for term in config.terms())
    assert config.needs_teacher == teacher
    assert config.taps == taps
    assert [t.temperature for t in config.terms() if t.kind == "tsld"] == [7.0] * kinds.count("tsld")
    assert {t.temperature for t in config.terms() if t.kind != "tsld"} <= {None}
    assert DistillConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_list_of_losses_replaces_the_method() -> None:
    terms = [LossTerm("tsld", 0.5, 5.0, "mean"), {"kind": "hidden", "weight": 2.0}]
    config = DistillConfig(losses=terms)
    assert config.terms() == (LossTerm("tsld", 0.5, 5.0, "mean"), LossTerm("hidden", 2.0))
    assert config.taps == ("hidden_states",)
    assert DistillConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert DistillConfig().method == "tsld"


def test_public_names_exist() -> None:
    for name in tsld_fx.__all__:
        assert getattr(tsld_fx, name) is not None, name
    with pytest.raises(AttributeError, match="no attribute 'quantize'"):
        _ = tsld_fx.quantize
