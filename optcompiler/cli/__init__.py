"""The command line. `main` is the entry point `optcompiler`."""

from __future__ import annotations

from optcompiler.cli.app import main

__all__ = ["main"]
