"""The command line `tsld-fx`."""

from tsld_fx.cli.main import main

__all__ = ["main"]
