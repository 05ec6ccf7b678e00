"""A second compilation of the same architecture starts at once: neither exported nor imported again, only looked up.

A request is everything that the code depends on: configuration, formats and shapes of the weights (not their values),
buffers that are no part of the state, the graph if there is one, and the versions and sources that take part.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from tsld_fx.codegen.cache import KernelCache
from tsld_fx.codegen.compiler import KernelBuildError
from tsld_fx.errors import BackendError
from tsld_fx.lowered import LoweredModel
from tsld_fx.passes.graph_tools import attribute
from tsld_fx.relax.cpu_target import CpuTarget

_HEADER = 8  # bytes before the description that say how long it is


@dataclass(frozen=True)
class _Builder:
    """A compiler for `KernelCache` whose source is a request."""

    build: Callable[[], tuple[bytes, dict[str, Any]]]
    version: str

    def flags(self, target: str) -> list[str]:
        """The request says it all."""
        return []

    def compile(self, source: str, target: str) -> tuple[bytes, str]:
        """-> (length, description, library), "")."""
        library, description = self.build()
        header = json.dumps(description).encode()
        return len(header).to_bytes(_HEADER, "little") + header + library, ""


def look_up(
    lowered: LoweredModel,
    target: CpuTarget,
    options: dict[str, Any],
    build: Callable[[], tuple[bytes, dict[str, Any]]],
) -> tuple[bytes, dict[str, Any]]:
    """-> (library, description) of a request, from the cache or from `build`.

    Raises:
        BackendError: the cache folder cannot be written.
    """
    name = f"llvm {target.mcpu} {target.machine}"
    builder = _Builder(build, f"tsld_fx {version('tsld-fx')} {_sources()}")
    try:
        data, _ = KernelCache.default().get_or_build(request(lowered, options), name, builder)
    except KernelBuildError as error:
        raise BackendError(str(error)) from error
    size = int.from_bytes(data[:_HEADER], "little")
    return data[_HEADER + size :], json.loads(data[_HEADER : _HEADER + size])


def request(lowered: LoweredModel, options: dict[str, Any]) -> str:
    """The JSON of everything that decides what is compiled."""
    state = lowered.state_dict(keep_vars=True)
    places: dict[int, int] = {}
    tensors = {
        name: [str(t.dtype), list(t.shape), places.setdefault(t.data_ptr(), len(places))] for name, t in state.items()
    }
    layers = {
        name: [layer.in_features, layer.out_features, layer.bits, layer.group_size]
        for name, layer in lowered.lowbit_layers().items()
    }
    others = {name: _digest(buffer) for name, buffer in lowered.named_buffers() if name not in state}
    own = type(lowered).__mro__[2]
    graph = str(lowered._tsld_graph[0].graph) if lowered._tsld_graph else None
    config = json.loads(lowered.config.to_json_string(use_diff=False))
    config.pop("_name_or_path", None)  # where it was loaded from
    facts = {
        "config": config, "class": own.__qualname__,
        "code": hashlib.sha256(Path(inspect.getfile(own)).read_bytes()).hexdigest(), "graph": graph,
        "tensors": tensors, "layers": layers, "buffers": others, "options": options,
        "versions": {name: version(name) for name in ("torch", "transformers", "apache-tvm")},
    }  # fmt: skip
    return json.dumps(facts, sort_keys=True, default=str)


def weight(lowered: LoweredModel, name: str) -> Tensor:
    """The tensor that a compiled function calls `name`: the model's, or one that only its graph has."""
    try:
        return attribute(lowered, name)
    except AttributeError:
        return attribute(lowered.graph_module, name)


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().float().numpy().tobytes()).hexdigest()


def _sources() -> str:
    """A digest of this folder and of the captures that it starts from."""
    here = Path(__file__).parent
    files = [*here.glob("*.py"), *here.glob("*.j2"), here.parent / "capture.py", here.parent / "cached_capture.py"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:16]
