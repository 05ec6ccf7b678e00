"""Tiny ternary models on the reference backend, whose float32 sums are the oracle of compiled programs."""

from __future__ import annotations

from functools import cache

import tsld_fx
from tests.models import build


@cache
def reference(family: str) -> tsld_fx.LoweredModel:
    """The lowered model of a family, for tests that do not change it."""
    return tsld_fx.convert(prepared(family), backend="reference")


@cache
def prepared(family: str) -> tsld_fx.PreparedModel:
    """The prepared model behind it."""
    return tsld_fx.prepare(build(family))
