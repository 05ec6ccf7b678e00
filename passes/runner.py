"""Run passes in order over a graph module; the only place that lints, recompiles and dumps."""

from __future__ import annotations

import inspect
import itertools
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase

from tsld_fx.errors import ConfigError, PassError, TsldError

logger = logging.getLogger(__name__)
_DUMPED = itertools.count()  # numbers the dumps of a process, over all of its pipelines
Listener = Callable[["PassTrace"], None]


@dataclass(frozen=True)
class PassTrace:
    """What one pass did: its name, whether it changed anything, seconds, and the graph's text before and after."""

    name: str
    modified: bool
    seconds: float
    before: Counter[str] = field(repr=False)
    after: Counter[str] = field(repr=False)
    graph_module: fx.GraphModule = field(repr=False)

    def changes(self) -> dict[str, int]:
        """Operator -> how many more (or fewer) of it there are after the pass."""
        names = {*self.before, *self.after}
        return {n: self.after[n] - self.before[n] for n in sorted(names) if self.after[n] != self.before[n]}


def op_counts(graph: fx.Graph) -> Counter[str]:
    """Operator name -> number of calls in the graph."""
    targets = (node.target for node in graph.nodes if node.op == "call_function")
    return Counter(target.__name__ if inspect.isbuiltin(target) else str(target) for target in targets)


def run_passes(
    graph_module: fx.GraphModule, passes: Sequence[PassBase], listener: Listener | None = None
) -> fx.GraphModule:
    """Apply the passes in order and return the transformed graph module.

    With the environment variable TSLD_DUMP=<folder> the graph's code before and after each pass is written
    there, with the count of the operators that came and went.

    Args:
        listener: called after each pass with what it did.

    Raises:
        TsldError: what a pass refused, unchanged; any other failure becomes a PassError that names the pass.
    """
    dump = os.environ.get("TSLD_DUMP")
    for one in passes:
        name = type(one).__name__
        start, before = time.perf_counter(), op_counts(graph_module.graph)
        code = graph_module.code if dump else ""
        try:
            result = one(graph_module)
            if result is None:
                raise PassError(f"{name}: the pass returned no PassResult.")
            graph_module = result.graph_module
            if result.modified:
                graph_module.graph.lint()
                graph_module.recompile()
        except TsldError:
            raise
        except Exception as error:
            raise PassError(f"{name}: the pass failed on this graph: {error}") from error
        trace = PassTrace(
            name,
            result.modified,
            time.perf_counter() - start,
            before,
            op_counts(graph_module.graph),
            graph_module,
        )
        logger.debug("%s: modified=%s in %.2f s %s", name, trace.modified, trace.seconds, trace.changes())
        if listener is not None:
            listener(trace)
        if dump:
            _write_dump(Path(dump), trace, code)
    return graph_module


def _write_dump(folder: Path, trace: PassTrace, before: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"TSLD_DUMP={folder}: cannot be made a folder ({error.strerror}). Name another.") from error
    header = [f"# {trace.name}: modified={trace.modified}, {trace.seconds:.3f} s"]
    header += [f"# {change:+d} {name}" for name, change in trace.changes().items()]
    stem = f"{next(_DUMPED):03d}_{trace.name}"
    (folder / f"{stem}.before.txt").write_text(before)
    (folder / f"{stem}.after.txt").write_text("\n".join(header) + "\n" + trace.graph_module.code)
