"""What to quantise and how: frozen dataclasses, checked when they are made, written to JSON and YAML as plain dicts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal

from tsld_fx.errors import ConfigError

Granularity = Literal["tensor", "channel", "group"]


def _choose(owner: str, name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{owner}: {name}={value!r} is not one of {', '.join(map(repr, allowed))}.")


def _check_group(owner: str, granularity: str, group_size: int | None) -> None:
    _choose(owner, "granularity", granularity, ("tensor", "channel", "group"))
    if granularity == "group":
        if not isinstance(group_size, int) or isinstance(group_size, bool) or group_size < 1:
            raise ConfigError(
                f"{owner}: granularity='group' needs a positive group_size, got {group_size!r}. "
                "Give the number of input features that share one scale, for example group_size=128."
            )
    elif group_size is not None:
        raise ConfigError(
            f"{owner}: group_size={group_size} has no meaning with granularity={granularity!r}. "
            "Use granularity='group' or leave group_size out."
        )


def check_positive(owner: str, name: str, value: float | None) -> None:
    """Refuse what is neither None nor a positive, finite number."""
    if value is not None and not (isinstance(value, int | float) and 0 < value < float("inf")):
        raise ConfigError(f"{owner}: {name} must be a positive number, got {value!r}.")


def check_type(owner: str, value: object, cls: type) -> None:
    """Refuse a configuration that is not of its class."""
    if not isinstance(value, cls):
        name = cls.__name__
        raise ConfigError(f"{owner}: expected a {name}, got {value!r}. Make one; {name}.from_dict reads plain data.")


@dataclass(frozen=True)
class TernaryWeight:
    """Ternary weights: every weight is -s, 0 or +s (codes 0, 1, 2; 2 bits when packed).

    Attributes:
        scale: how the scale s of a row, group or tensor is found.
            `twn`: threshold 0.7 * mean|w|, s = mean of |w| above it (Li et al., Ternary Weight Networks,
            arXiv 1605.04711, eq. 6 and section 2.2).
            `absmean`: s = mean|w|, code = round(w / s) clipped to [-1, 1] (BitNet b1.58, arXiv 2402.17764, section 2).
            `pact`: s = gamma * mean|w| with gamma learned (QuantGPT, arXiv 2203.10705, section 3.2).
            `lsq`: s learned with LSQ's gradient scaling (Esser et al., arXiv 1902.08153, section 2.2).
            `seq`: s learned, gradients as in stretched elastic quantisation (ParetoQ, arXiv 2502.02631).
        granularity: weights that share one scale: the whole `tensor`, an output `channel`, or a `group` of
            `group_size` consecutive input features of one output channel.
        clip_init: first gamma of `pact` (default 1.5, near the best ternary quantiser of Gaussian weights).
        dead_zone_bias: factor of Tequila (arXiv 2509.23809; its default 1e-3): the weights that become 0 add this many
            times their sum to the bias of their output channel, so that they get a gradient of their own. `convert`
            folds the sum into the layer's bias. None: no such bias.
    """

    scale: Literal["twn", "absmean", "pact", "lsq", "seq"] = "twn"
    granularity: Granularity = "channel"
    group_size: int | None = None
    clip_init: float | None = None
    dead_zone_bias: float | None = None

    def __post_init__(self) -> None:
        _choose("TernaryWeight", "scale", self.scale, ("twn", "absmean", "pact", "lsq", "seq"))
        _check_group("TernaryWeight", self.granularity, self.group_size)
        check_positive("TernaryWeight", "dead_zone_bias", self.dead_zone_bias)
        _check_clip("TernaryWeight", self.scale, self.clip_init)

    @property
    def bits(self) -> int:
        """Bits of a packed weight."""
        return 2

    @property
    def symmetric(self) -> bool:
        """A ternary code is always centred on zero."""
        return True

    @property
    def scheme(self) -> str:
        """The `scheme` argument of `tsld::fake_quant`."""
        return self.scale


@dataclass(frozen=True)
class AffineWeight:
    """4- or 8-bit weights: w = (code - zero) * s with an unsigned code.

    Attributes:
        bits: 4 or 8.
        symmetric: True fixes the zero point to 2^(bits-1); False learns it from the data (uint8 per scale).
        scale: `minmax`: the range of the weights, always with 0 in it (absolute maximum when symmetric).
            `pact`: the range is cut at +-gamma * mean|w| with gamma learned (QuantGPT, arXiv 2203.10705).
            `lsq`: s learned (arXiv 1902.08153), first value from the range; the zero point stays as first found.
            `seq`: the four levels -3, -1, 1, 3 times a learned s, ParetoQ's 2-bit quantiser (arXiv 2502.02631); it has
            no zero level and is stored in 4 bits, symmetric.
        granularity, group_size: as in `TernaryWeight`.
        clip_init: first gamma of `pact` (default 4.0 for 4 bits, 5.0 for 8 bits). `prepare` warns where
            it saturates more than 1 % of a layer's weights.
    """

    bits: Literal[4, 8] = 4
    symmetric: bool = False
    scale: Literal["minmax", "pact", "lsq", "seq"] = "minmax"
    granularity: Granularity = "channel"
    group_size: int | None = None
    clip_init: float | None = None

    def __post_init__(self) -> None:
        _choose("AffineWeight", "bits", self.bits, (4, 8))
        _choose("AffineWeight", "scale", self.scale, ("minmax", "pact", "lsq", "seq"))
        _choose("AffineWeight", "symmetric", self.symmetric, (True, False))
        if self.scale == "seq" and (self.bits, self.symmetric) != (4, True):
            raise ConfigError(
                f"AffineWeight: scale='seq' has four levels of the symmetric 4-bit range, got bits={self.bits} and "
                f"symmetric={self.symmetric}. Give bits=4, symmetric=True."
            )
        _check_group("AffineWeight", self.granularity, self.group_size)
        _check_clip("AffineWeight", self.scale, self.clip_init)

    @property
    def scheme(self) -> str:
        """The `scheme` argument of `tsld::fake_quant`."""
        return "absmax" if self.scale == "minmax" and self.symmetric else self.scale


def _check_clip(owner: str, scale: str, clip_init: float | None) -> None:
    if clip_init is not None and scale != "pact":
        raise ConfigError(f"{owner}: clip_init belongs to scale='pact', not to {scale!r}. Leave it out.")
    check_positive(owner, "clip_init", clip_init)


WeightSpec = TernaryWeight | AffineWeight


def group_size_code(spec: WeightSpec) -> int:
    """The `group_size` argument of the operators: 0 per output channel, -1 per tensor, else the group's length."""
    return {"tensor": -1, "channel": 0}.get(spec.granularity, spec.group_size or 0)


def _matches(pattern: str, name: str) -> bool:
    """`re:` patterns must match the whole name, others match it literally with `*` for any run of characters."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), name) is not None


@dataclass(frozen=True)
class QuantConfig:
    """Which linear layers of a model become low-bit, and how.

    Attributes:
        weight: the specification of every linear layer that nothing below names; None leaves them alone.
        overrides: module-name pattern -> specification, or None to leave the layer in full precision. The last
            matching pattern wins. A pattern is a name with `*` wildcards, or `re:` and a regular expression that
            matches the whole name.
        skip: modules left in full precision unless an override names them. `lm_head` means the model's output
            embedding whatever it is called.
        scale_lr_ratio: learning rate of learned scales and clips as a multiple of the weights' (`pact`, `lsq`).
    """

    weight: WeightSpec | None = field(default_factory=TernaryWeight)
    overrides: Mapping[str, WeightSpec | None] = field(default_factory=dict)
    skip: tuple[str, ...] = ("lm_head",)
    scale_lr_ratio: float = 0.1

    def __post_init__(self) -> None:
        if not isinstance(self.skip, tuple | list):
            raise ConfigError(f"QuantConfig: skip must be a tuple of names, got {self.skip!r}.")
        if not isinstance(self.overrides, Mapping):
            raise ConfigError(f"QuantConfig: overrides must map patterns to specifications, got {self.overrides!r}.")
        if self.weight is not None and not isinstance(self.weight, TernaryWeight | AffineWeight):
            raise ConfigError(f"QuantConfig: weight must be TernaryWeight, AffineWeight or None, got {self.weight!r}.")
        for pattern, spec in self.overrides.items():
            if spec is not None and not isinstance(spec, TernaryWeight | AffineWeight):
                raise ConfigError(
                    f"QuantConfig: overrides[{pattern!r}] must be TernaryWeight, AffineWeight or None, got {spec!r}."
                )
        for pattern in (*self.overrides, *self.skip):
            _check_pattern(pattern)
        check_positive("QuantConfig", "scale_lr_ratio", self.scale_lr_ratio)
        object.__setattr__(self, "overrides", MappingProxyType(dict(self.overrides)))
        object.__setattr__(self, "skip", tuple(self.skip))

    def __hash__(self) -> int:
        return hash((self.weight, tuple(self.overrides.items()), self.skip, self.scale_lr_ratio))

    def __reduce__(self) -> Any:
        return (QuantConfig.from_dict, (self.to_dict(),))

    def spec_for(self, module: str) -> WeightSpec | None:
        """The specification of the linear layer called `module`, None to leave it in full precision."""
        for pattern in reversed(tuple(self.overrides)):
            if _matches(pattern, module):
                return self.overrides[pattern]
        return None if any(_matches(pattern, module) for pattern in self.skip) else self.weight

    def check_patterns(self, modules: Iterable[str]) -> None:
        """Refuse an override that names no linear layer.

        Raises:
            ConfigError: it names the pattern and shows layers that exist.
        """
        names = list(modules)
        for pattern in self.overrides:
            if not any(_matches(pattern, name) for name in names):
                shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
                raise ConfigError(
                    f"QuantConfig.overrides: the pattern {pattern!r} matches no linear layer of the model. "
                    f"Its linear layers are {shown}. Patterns match whole module names; use '*' or 're:' for several."
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` turns back into an equal configuration.

        Overrides become a list of [pattern, specification]: their order counts, and JSON writers sort mappings.
        """
        return {
            "weight": _spec_to_dict(self.weight),
            "overrides": [[pattern, _spec_to_dict(spec)] for pattern, spec in self.overrides.items()],
            "skip": list(self.skip),
            "scale_lr_ratio": self.scale_lr_ratio,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantConfig:
        """Read what `to_dict` wrote, or the same shape from YAML (missing keys take their defaults).

        Raises:
            ConfigError: an unknown key or value.
        """
        known = [f.name for f in fields(cls)]
        if not isinstance(data, Mapping):
            raise ConfigError(f"quant: expected a mapping of {', '.join(known)}; got {data!r}.")
        values = dict(data)
        _refuse_unknown("quant", values, known)
        if "weight" in values:
            values["weight"] = _spec_from_dict("weight", values["weight"])
        if "overrides" in values:
            overrides = _pairs(values["overrides"] or {})
            values["overrides"] = {p: _spec_from_dict(f"overrides[{p!r}]", s) for p, s in overrides.items()}
        if values.get("skip", ()) is None:
            values["skip"] = ()
        return cls(**values)


def _pairs(overrides: Any) -> dict[Any, Any]:
    """A mapping, or a list of [pattern, specification] pairs, as a mapping in the same order."""
    if isinstance(overrides, Mapping):
        return dict(overrides)
    if isinstance(overrides, list) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in overrides):
        return {pattern: spec for pattern, spec in overrides}
    raise ConfigError(f"quant.overrides: expected a mapping of patterns to specifications, got {overrides!r}.")


def _check_pattern(pattern: str) -> None:
    if not isinstance(pattern, str):
        raise ConfigError(f"QuantConfig: the pattern {pattern!r} is not a string.")
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise ConfigError(f"QuantConfig: {pattern!r} is not a regular expression: {error}.") from None


def _spec_to_dict(spec: WeightSpec | None) -> dict[str, Any] | None:
    if spec is None:
        return None
    kind = "ternary" if isinstance(spec, TernaryWeight) else "affine"
    return {"kind": kind, **{k: v for k, v in asdict(spec).items() if v is not None}}


def _spec_from_dict(where: str, data: Any) -> WeightSpec | None:
    if data is None or isinstance(data, TernaryWeight | AffineWeight):
        return data
    if not isinstance(data, Mapping):
        raise ConfigError(f"quant.{where}: expected a mapping such as {{kind: ternary, scale: twn}}, got {data!r}.")
    values = dict(data)
    kind = values.pop("kind", "affine" if "bits" in values and values["bits"] != 2 else "ternary")
    _choose(f"quant.{where}", "kind", kind, ("ternary", "affine"))
    cls: type[TernaryWeight] | type[AffineWeight] = TernaryWeight if kind == "ternary" else AffineWeight
    if cls is TernaryWeight:
        values.pop("bits", None)
    _refuse_unknown(f"quant.{where}", values, [f.name for f in fields(cls)])
    return cls(**values)


def _refuse_unknown(where: str, values: Mapping[str, Any], known: list[str]) -> None:
    for key in values:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}. Known keys: {', '.join(known)}.")
