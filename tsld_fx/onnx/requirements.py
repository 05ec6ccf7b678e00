"""Which onnxruntime, opset and IR version a dialect needs; measured on onnxruntime 1.20 to 1.31, CPU."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from tsld_fx.errors import ExportError

DIALECTS = ("custom", "ort", "qdq")
ACTIVATIONS = ("a16", "int8")
NEWEST_OPSET = 25  # torch.onnx writes no later one

# Oldest onnxruntime that runs MatMulNBits of these bits with a fast kernel. 1.24 to 1.27 unpack 2-bit weights at every
# call (200 times slower than 1.28); 1.23 refuses them; 8 bits came with 1.22.
_MATMUL_NBITS = {2: (1, 28), 4: (1, 20), 8: (1, 22)}
# DequantizeLinear + MatMul is fused to the same kernel from these versions on; INT2 and UINT2 are types of opset 25.
_FUSED = {2: (1, 28), 4: (1, 20), 8: (1, 25)}


@dataclass(frozen=True)
class Requirements:
    """What a file asks of its reader: `onnxruntime` (major, minor) at least, the opset and the IR version it has."""

    onnxruntime: tuple[int, int]
    opset: int
    ir: int

    @property
    def text(self) -> str:
        """As the file's metadata say it."""
        return f"onnxruntime>={'.'.join(map(str, self.onnxruntime))}"


def requirements(dialect: str, bits: set[int], opset: int | None = None) -> Requirements:
    """The oldest versions that run a dialect with weights of these bit widths.

    Args:
        opset: write this one instead of the oldest that has everything.

    Raises:
        ExportError: the dialect cannot be written in `opset`.
    """
    table = _FUSED if dialect == "qdq" else _MATMUL_NBITS
    oldest = 25 if dialect == "qdq" and 2 in bits else 21
    if opset is not None and opset not in range(oldest, NEWEST_OPSET + 1):
        why = "2-bit tensor types came with opset 25" if oldest == 25 else "blocked DequantizeLinear and functions"
        why = why if opset in range(oldest) else "torch writes no later one"
        raise ExportError(
            f"export: opset {opset!r} cannot carry dialect {dialect!r} with {_listed(bits)}-bit weights; it needs "
            f"opset {oldest} to {NEWEST_OPSET} ({why}). Leave opset out."
        )
    chosen = oldest if opset is None else opset
    runtime = max([table[b] for b in bits] + [_runtime_of_opset(chosen)])
    return Requirements(runtime, chosen, 13 if chosen >= 25 else 11 if chosen >= 23 else 10)


def check_target(needs: Requirements, dialect: str, bits: set[int], target_ort: str | None) -> None:
    """Refuse an onnxruntime that is too old for the file.

    Raises:
        ExportError: it names the version that is needed, or says that `target_ort` is no version.
    """
    if target_ort is None:
        return
    have = parse(str(target_ort))
    if have < needs.onnxruntime:
        other = ", or quantise to 4 bits, which run from 1.20 on" if 2 in bits else ""
        raise ExportError(
            f"export: dialect {dialect!r} with {_listed(bits)}-bit weights needs {needs.text}, target_ort is "
            f"{target_ort}: older ones refuse the operator or unpack the weights at every call. "
            f"Upgrade the target{other}."
        )


def installed_onnxruntime() -> str:
    """Version of the onnxruntime that is installed, of whichever distribution.

    Raises:
        ExportError: there is none.
    """
    for name in ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise ExportError("export: onnxruntime is not installed. Run pip install 'tsld-fx[onnx]', or pass verify=False.")


def parse(text: str) -> tuple[int, int]:
    """'1.28.0' -> (1, 28).

    Raises:
        ExportError: not a version number.
    """
    found = re.fullmatch(r"v?(\d+)\.(\d+)(\..*)?", text.strip())
    if found is None:
        raise ExportError(f"export: target_ort={text!r} is not an onnxruntime version. Give one such as '1.28'.")
    return int(found[1]), int(found[2])


def _runtime_of_opset(opset: int) -> tuple[int, int]:
    return {21: (1, 20), 22: (1, 21), 23: (1, 23), 24: (1, 24), 25: (1, 24)}[opset]


def _listed(bits: set[int]) -> str:
    return ", ".join(map(str, sorted(bits)))
