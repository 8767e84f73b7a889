"""The program `optcompiler`, which is `python -m optcompiler` too."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from optcompiler.supervisor import supervised


def main() -> NoReturn:
    """Run the command line on `sys.argv` in a process of its own, and exit as it does."""
    supervised(_run)


def _run() -> NoReturn:
    from optcompiler.cli import main

    module = os.path.basename(sys.argv[0]) == os.path.basename(__file__)
    main(prog_name="python -m optcompiler" if module else "optcompiler")
    raise AssertionError("click's main ends with SystemExit")


if __name__ == "__main__":
    main()
