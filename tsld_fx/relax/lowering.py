"""tsld::lowbit_linear and aten.linear -> calls of scheduled PrimFuncs, while TVM's importer walks the graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from tsld_fx.relax.kernels import MatmulSpec, matmul_function


@dataclass(frozen=True)
class CpuMatmuls:
    """Converters for the matrix products of a CPU program.

    lanes, table: of `MatmulSpec`, what the target's vectors are.
    """

    lanes: int
    table: bool

    def lowbit_linear(self, node: fx.Node, importer: Any) -> Any:
        """tsld::lowbit_linear(x, packed, scales, zeros, bias, bits, group_size, in_features).

        before: lowbit_linear(x [..., in], packed, ...)
        after:  reshape(call_tir(lowbit_w2_NxK, x [m, in] as float32, packed, scales, [zeros], [bias]), [..., out])
        """
        found: list[Any] = [None if a is None else importer.env[a] for a in node.args[:5]]
        x, packed, scales, zeros, bias = found
        bits, group_size, in_features = node.args[5:8]
        weights = [w for w in (packed, scales, zeros) if w is not None]
        out_features = int(packed.ty.shape[0])
        spec = self._spec(importer, x, out_features, in_features, bits, group_size, zeros is not None, bias is not None)
        return self._call(importer, spec, x, weights, bias)

    def linear(self, node: fx.Node, importer: Any) -> Any:
        """aten.linear(x, weight, bias) with a float32 weight; TVM's own lowering of it has no schedule."""
        found: list[Any] = [None if a is None else importer.env[a] for a in (*node.args, None)[:3]]
        x, weight, bias = found
        if str(weight.ty.dtype) != "float32" or len(weight.ty.shape) != 2:
            return importer._linear(node)
        out_features, in_features = (int(size) for size in weight.ty.shape)
        spec = self._spec(importer, x, out_features, in_features, 32, 0, False, bias is not None)
        return self._call(importer, spec, x, [weight], bias)

    def _spec(self, importer: Any, x: Any, *format: Any) -> MatmulSpec:
        rows = rows_of(x)
        out_features, in_features, bits, group_size, zeros, bias = format
        return MatmulSpec(
            out_features, in_features, bits, group_size, zeros, bias,
            rows if isinstance(rows, int) else None, self.lanes, self.table,
        )  # fmt: skip

    def _call(self, importer: Any, spec: MatmulSpec, x: Any, weights: list[Any], bias: Any) -> Any:
        from tvm import relax

        builder, shape, dtype = importer.block_builder, list(x.ty.shape), str(x.ty.dtype)
        rows = rows_of(x)
        x = builder.emit(relax.op.reshape(x, [rows, spec.in_features]))
        if dtype != "float32":
            x = builder.emit(relax.op.astype(x, "float32"))
            bias = None if bias is None else builder.emit(relax.op.astype(bias, "float32"))
        function = builder.add_func(matmul_function(spec), spec.name)
        arguments = [x, *weights, *([] if bias is None else [bias])]
        result = relax.call_tir(function, arguments, out_ty=relax.TensorType([rows, spec.out_features], "float32"))
        y = builder.emit(result)
        if dtype != "float32":
            y = builder.emit(relax.op.astype(y, dtype))
        return builder.emit(relax.op.reshape(y, [*shape[:-1], spec.out_features]))


def rows_of(x: Any) -> Any:
    """Number of rows of x [..., in]: an int where all sizes are known, else an expression."""
    rows: Any = 1
    for size in list(x.ty.shape)[:-1]:
        number = getattr(size, "value", None)
        rows = rows * (int(number) if number is not None else size)
    return rows
