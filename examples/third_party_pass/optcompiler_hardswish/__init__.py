"""A third-party plugin of optcompiler: the pass `hard-activations`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from optcompiler import hookimpl

if TYPE_CHECKING:
    from optcompiler import Pass


@hookimpl
def optcompiler_passes() -> Iterable[type[Pass]]:
    from optcompiler_hardswish.hard_activations import HardActivations

    return [HardActivations]
