"""Do something as soon as another package is imported, without importing it."""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def after_import(module: str, action: Callable[[], Any]) -> None:
    """Call `action` once `module` has been imported, now if it is there already.

    `import tsld_fx` registers operators with torch and a quantiser with transformers. It takes milliseconds, not the
    seconds that torch and transformers take, because it does both when somebody imports those.
    """
    if module in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Watcher(module, action))


class _Watcher(importlib.abc.MetaPathFinder):
    """Lets the other finders find a module, and adds an action to its execution."""

    def __init__(self, module: str, action: Callable[[], Any]) -> None:
        self.module, self.action = module, action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        specs = (finder.find_spec(fullname, path, target) for finder in list(sys.meta_path))
        spec = next((found for found in specs if found is not None), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def execute_and_act(module: ModuleType) -> None:
                execute(module)
                _act(self.action)

            loader.exec_module = execute_and_act
        return spec


def _act(action: Callable[[], Any]) -> None:
    """Act now, or, while a module of ours is half imported and must not be needed by others, at the next import."""
    if _half_imported():
        sys.meta_path.insert(0, _Later(action))
    else:
        action()


def _half_imported() -> bool:
    own = __name__.partition(".")[0] + "."
    specs = (getattr(module, "__spec__", None) for name, module in list(sys.modules.items()) if name.startswith(own))
    return any(getattr(spec, "_initializing", False) for spec in specs)


class _Later(importlib.abc.MetaPathFinder):
    """Acts when any module is looked for and none of ours is half imported."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self.action = action

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if not _half_imported():
            sys.meta_path.remove(self)
            self.action()
