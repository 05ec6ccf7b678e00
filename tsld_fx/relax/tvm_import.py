"""`import tvm`, checked: the one place that knows which version of it this code is written for."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version

from tsld_fx.errors import BackendError
from tsld_fx.relax.run import leave_threads_alone

TVM_VERSION = "0.27.0"
_INSTALL = "Install it with `pip install 'tsld-fx[tvm]'`."


def check_tvm(user: str) -> str:
    """The version of TVM that is installed, without importing it (which takes seconds).

    Args:
        user: what needs TVM, for the message.

    Raises:
        BackendError: TVM is not installed, or is not the version that this code is written for.
    """
    try:
        found = version("apache-tvm")
    except PackageNotFoundError:
        raise BackendError(f"{user} needs Apache TVM {TVM_VERSION}, which is not installed. {_INSTALL}") from None
    if found != TVM_VERSION and not found.startswith(TVM_VERSION + "."):
        raise BackendError(
            f"{user} is written for Apache TVM {TVM_VERSION}; version {found} is installed, whose importer and passes "
            f"differ. {_INSTALL}"
        )
    return found


def load_tvm(user: str = "tsld_fx.relax") -> None:
    """Import tvm once, and put back `sys.excepthook`, which it replaces.

    Raises:
        BackendError: as `check_tvm`, or the installed package does not load.
    """
    if "tvm" in sys.modules:
        check_tvm(user)
        return
    check_tvm(user)
    leave_threads_alone()
    hook = sys.excepthook
    try:
        import tvm  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendError(f"{user}: Apache TVM is installed but does not load ({error}). {_INSTALL}") from error
    finally:
        sys.excepthook = hook
