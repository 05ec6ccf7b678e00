"""Which backends can run a lowered model here."""

from __future__ import annotations

from tsld_fx.errors import BackendError

BACKENDS = ("reference",)


def check_backend(name: str) -> str:
    """Resolve `auto` and refuse what this version cannot run.

    Raises:
        BackendError: it names the backends that exist.
    """
    if name == "auto":
        return "reference"
    if name not in BACKENDS:
        raise BackendError(
            f"backend={name!r} is not available in this version of tsld_fx. "
            f"Use backend='auto' or one of {', '.join(map(repr, BACKENDS))}."
        )
    return name
