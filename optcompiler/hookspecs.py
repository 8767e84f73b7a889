"""Every extension point of optcompiler, on one page.

A plugin is a module (or object) that a distribution names in the entry-point group `optcompiler`
and that implements any of these hooks with `optcompiler.hookimpl`. Each hook returns instances;
names must be unique across all plugins. Plugin modules are imported to list what exists, so import
torch inside the functions that need it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from optcompiler.backend import Backend
    from optcompiler.cost import CostModel
    from optcompiler.observers import Observer
    from optcompiler.ops import OpSpec
    from optcompiler.rewriting import Pass

PROJECT = "optcompiler"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def optcompiler_passes() -> Iterable[type[Pass]]:  # type: ignore[empty-body]
    """Pass classes, each constructible without arguments. Named by their `name`."""


@hookspec
def optcompiler_backends() -> Iterable[Backend]:  # type: ignore[empty-body]
    """Backends, named by their `name`, which is what a target begins with."""


@hookspec
def optcompiler_ops() -> Iterable[OpSpec]:  # type: ignore[empty-body]
    """Operators: torch meaning, cost and channel coupling. Called when a program is first read."""


@hookspec
def optcompiler_cost_models() -> Iterable[CostModel]:  # type: ignore[empty-body]
    """Cost models, named by their `name`; `compile(cost_model="name")` picks one."""


@hookspec
def optcompiler_observers() -> Iterable[type[Observer]]:  # type: ignore[empty-body]
    """Calibration observers that turn observed values into a range, named by their `name`."""
