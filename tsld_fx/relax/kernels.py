"""Low-bit and dense matrix products as scheduled TVMScript: y[m, n] = sum_k x[m, k] * w[n, k] + bias[n], all float32.

The weights stay in the canonical packed format. A vector of `lanes` 32-bit words holds lanes * 32 / bits consecutive
codes of a row; shifting it right by j * bits brings code j of every word to the bottom. So x is first copied into that
order, P[m, block, j, lane], and then each product is: shift, decode, multiply, add. Every sum has a fixed order,
whatever the number of threads. What does not fill a block (the end of a row, odd groups) is summed one by one.
`matmul.py.j2` is the script; nothing here imports tvm except `matmul_function`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

ROWS, TOKENS = 4, 4  # register tile: output rows x tokens


@dataclass(frozen=True)
class MatmulSpec:
    """One matrix product with a fixed weight.

    bits: 2 (ternary), 4 or 8; 32 for dense float32 weights.
    group_size: inputs per scale; 0 one scale per row, -1 one for all.
    zeros: whether zero points are given (else 1 for ternary, 2^(bits-1) for 4 and 8 bits).
    bias: whether a bias is added.
    tokens: number of rows of x, None when it is only known at run time.
    lanes: float32 values per vector: 4, 8 or 16.
    table: decode through AVX-512's permutation of a table of 16 entries instead of a conversion.
    """

    out_features: int
    in_features: int
    bits: int
    group_size: int = 0
    zeros: bool = False
    bias: bool = False
    tokens: int | None = None
    lanes: int = 4
    table: bool = False

    @property
    def name(self) -> str:
        """Unique within a module for one CPU."""
        kind = "dense" if self.bits == 32 else f"lowbit_w{self.bits}"
        group = {0: "", -1: "_tensor"}.get(self.group_size, f"_g{self.group_size}")
        tokens = "" if self.tokens is None else f"_m{self.tokens}"
        return f"{kind}_{self.out_features}x{self.in_features}{group}{'_z' * self.zeros}{'_b' * self.bias}{tokens}"


def _cut(spec: MatmulSpec) -> tuple[int, int, bool]:
    """-> (segments with one scale, vector blocks per segment, whether lanes of a block have scales of their own)."""
    codes = 32 // spec.bits
    block, group = spec.lanes * codes, spec.group_size
    whole = spec.in_features // block
    if whole and group <= 0:
        return 1, whole, False
    if whole and group % block == 0:
        return spec.in_features // group, group // block, False
    if whole and block % group == 0 and group % codes == 0:
        return whole, 1, True
    return 0, 0, False


def render(spec: MatmulSpec) -> str:
    """The TVMScript of a product. Pure."""
    segments, per_segment, per_lane = _cut(spec)
    N, K, codes, dense = spec.out_features, spec.in_features, 32 // spec.bits, spec.bits == 32
    group = spec.group_size if spec.group_size > 0 else K
    M = "M" if spec.tokens is None else str(spec.tokens)
    whole_tiles, last_tokens = (
        (f"{M} // {TOKENS}", f"{M} % {TOKENS}")
        if spec.tokens is None
        else (spec.tokens // TOKENS, spec.tokens % TOKENS)
    )
    row_loops = [(0, N // ROWS, ROWS), (N - N % ROWS, N % ROWS, 1)]
    token_loops = [(0, whole_tiles, TOKENS), (f"{M} - {M} % {TOKENS}", last_tokens, 1)]
    return _template().render(
        name=spec.name, N=N, K=K, M=M, L=spec.lanes, TOKENS=TOKENS, tokens=spec.tokens, bits=spec.bits, dense=dense,
        bias=spec.bias, zeros=spec.zeros, table=spec.table and spec.lanes == 16 and spec.bits <= 4 and not spec.zeros,
        mask=2 ** min(spec.bits, 8) - 1, middle=float(1 if spec.bits == 2 else 2 ** (min(spec.bits, 8) - 1)),
        width=K if dense else -(-K * spec.bits // 8), codes=codes, block=spec.lanes * codes,
        segments=segments, per_segment=per_segment, per_lane=per_lane, blocks=segments * per_segment,
        first_rest=segments * per_segment * spec.lanes * codes, group=group, groups=K // group,
        one_scale=spec.group_size == -1, scale_rows=1 if spec.group_size == -1 else N,
        halves=[w for w in (8, 4, 2) if w < spec.lanes],
        row_loops=[loop for loop in row_loops if loop[1]], token_loops=[loop for loop in token_loops if loop[1]],
    )  # fmt: skip


@cache
def _template() -> jinja2.Template:
    text = Path(__file__).with_name("matmul.py.j2").read_text()
    return jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(text)


@cache
def matmul_function(spec: MatmulSpec) -> Any:
    """The scheduled PrimFunc (x, weight, [scales], [zeros], [bias], y) of a product.

    x float32 [tokens, in]; weight uint8 [out, bytes] canonical packed, or float32 [out, in]; scales float32 and zeros
    uint8 [out, groups], [out, 1] or [1, 1]; bias float32 [out]; y float32 [tokens, out].
    """
    import tvm

    return tvm.script.from_source(render(spec))
