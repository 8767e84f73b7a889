"""Loading plugins and looking things up by name. One `Registry` per compiler; no global manager."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pluggy

from optcompiler import hookspecs
from optcompiler.errors import InputError, PluginError

if TYPE_CHECKING:
    from optcompiler.backend import Backend
    from optcompiler.cost import CostModel
    from optcompiler.observers import Observer
    from optcompiler.ops import OpTable
    from optcompiler.rewriting import Pass

GROUP = "optcompiler"
LOAD_VARIABLE = "OPTCOMPILER_LOAD_PLUGINS"


@dataclass(frozen=True)
class Loaded:
    """One plugin: entry-point name, distribution and version it came from, and its object."""

    name: str
    distribution: str
    version: str
    plugin: Any

    def __str__(self) -> str:
        return f"{self.name} ({self.distribution} {self.version})"


class Registry:
    """Everything that plugins offer.

    Entry points of the group `optcompiler` load in order of their names. The environment variable
    `OPTCOMPILER_LOAD_PLUGINS` narrows them: empty loads none, a comma list loads those. `extra`
    registers objects given in Python. Raises `PluginError` when an import fails, naming the
    distribution and version, or when two plugins claim one name, naming both.
    """

    def __init__(self, *, load: Iterable[str] | None = None, extra: Iterable[Any] = ()) -> None:
        self.manager = pluggy.PluginManager(hookspecs.PROJECT)
        self.manager.add_hookspecs(hookspecs)
        self.loaded: list[Loaded] = []
        for entry in _entry_points(load):
            self._add(_load(entry))
        for plugin in extra:
            name = getattr(plugin, "__name__", type(plugin).__name__)
            self._add(Loaded(name, "given in Python", "-", plugin))

    def _add(self, loaded: Loaded) -> None:
        try:
            self.manager.register(loaded.plugin, loaded.name)
            self.manager.check_pending()
        except (pluggy.PluginValidationError, ValueError) as error:
            raise PluginError(f"plugin {loaded}: {error}") from error
        self.loaded.append(loaded)

    def _call(self, hook: str) -> Iterator[tuple[Loaded, Any]]:
        for loaded in self.loaded:
            method = getattr(loaded.plugin, hook, None)
            if method is None or self.manager.parse_hookimpl_opts(loaded.plugin, hook) is None:
                continue
            try:
                items = list(method())
            except Exception as error:
                raise PluginError(
                    f"plugin {loaded}: {hook} raised {type(error).__name__}: {error}."
                ) from error
            for item in items:
                yield loaded, item

    def _named(self, hook: str, kind: str) -> dict[str, tuple[Loaded, Any]]:
        found: dict[str, tuple[Loaded, Any]] = {}
        for loaded, item in self._call(hook):
            name = getattr(item, "name", None)
            if not isinstance(name, str) or not name:
                raise PluginError(f"plugin {loaded}: {hook} gave {item!r}, which has no name.")
            if name in found:
                raise PluginError(
                    f"{kind} {name!r} is claimed by two plugins: {found[name][0]} and {loaded}; "
                    f"uninstall one, or choose with {LOAD_VARIABLE}."
                )
            found[name] = (loaded, item)
        return found

    @cached_property
    def passes(self) -> dict[str, type[Pass]]:
        """Pass classes by name, with their owners in `owners`."""
        return {k: v for k, (_, v) in self._passes.items()}

    @cached_property
    def _passes(self) -> dict[str, tuple[Loaded, type[Pass]]]:
        return self._named("optcompiler_passes", "pass")

    @cached_property
    def backends(self) -> dict[str, Backend]:
        return {k: v for k, (_, v) in self._backends.items()}

    @cached_property
    def _backends(self) -> dict[str, tuple[Loaded, Backend]]:
        return self._named("optcompiler_backends", "backend")

    @cached_property
    def cost_models(self) -> dict[str, CostModel]:
        from optcompiler.cost import RooflineCostModel

        found = self._named("optcompiler_cost_models", "cost model")
        models: dict[str, CostModel] = {RooflineCostModel.name: RooflineCostModel()}
        return models | {k: v for k, (_, v) in found.items()}

    @cached_property
    def observers(self) -> dict[str, type[Observer]]:
        return {k: v for k, (_, v) in self._named("optcompiler_observers", "observer").items()}

    @cached_property
    def ops(self) -> OpTable:
        """Built-in operators and those of plugins."""
        from optcompiler.ops import OpTable, builtin_specs

        return OpTable([*builtin_specs(), *(spec for _, spec in self._call("optcompiler_ops"))])

    @cached_property
    def domains(self) -> frozenset[str]:
        """Domains of the operators that plugins declare; asks no built-in one, so stays light."""
        return frozenset(spec.domain for _, spec in self._call("optcompiler_ops"))

    def owner_of_pass(self, name: str) -> str:
        """`distribution version` of the plugin with the pass, "-" for one given in Python."""
        entry = self._passes.get(name)
        return f"{entry[0].distribution} {entry[0].version}" if entry else "-"

    def backend(self, name: str) -> Backend:
        return _find(self.backends, name, "target")

    def pass_class(self, name: str) -> type[Pass]:
        return _find(self.passes, name, "pass")

    def cost_model(self, name: str) -> CostModel:
        return _find(self.cost_models, name, "cost model")

    def describe(self) -> list[dict[str, Any]]:
        """A row per plugin, for `optcompiler plugins`."""
        rows = []
        for loaded in self.loaded:
            rows.append(
                {
                    "name": loaded.name,
                    "distribution": loaded.distribution,
                    "version": loaded.version,
                    "passes": [n for n, (o, _) in self._passes.items() if o is loaded],
                    "backends": [n for n, (o, _) in self._backends.items() if o is loaded],
                    "hooks": sorted(
                        h
                        for h in _hook_names()
                        if self.manager.parse_hookimpl_opts(loaded.plugin, h)
                    ),
                }
            )
        return rows


def _hook_names() -> list[str]:
    return [name for name in vars(hookspecs) if name.startswith("optcompiler_")]


def _find(table: dict[str, Any], name: str, kind: str) -> Any:
    if name not in table:
        raise InputError(f"no {kind} {name!r}; there is {', '.join(sorted(table)) or 'none'}.")
    return table[name]


def _entry_points(load: Iterable[str] | None) -> list[importlib.metadata.EntryPoint]:
    found = sorted(importlib.metadata.entry_points(group=GROUP), key=lambda e: e.name)
    seen: dict[str, importlib.metadata.EntryPoint] = {}
    for entry in found:
        other = seen.get(entry.name)
        if other is not None and (other.value, _owner(other)) != (entry.value, _owner(entry)):
            raise PluginError(
                f"plugin name {entry.name!r} is claimed by {' '.join(_owner(other))} and "
                f"{' '.join(_owner(entry))}; uninstall one."
            )
        seen[entry.name] = entry
    if load is None and LOAD_VARIABLE in os.environ:
        load = [n.strip() for n in os.environ[LOAD_VARIABLE].split(",") if n.strip()]
    if load is None:
        return list(seen.values())
    wanted = list(load)
    missing = [n for n in wanted if n not in seen]
    if missing:
        raise InputError(f"no plugin {missing[0]!r}; installed are {', '.join(seen) or 'none'}.")
    return [e for n, e in seen.items() if n in wanted]


def _owner(entry: importlib.metadata.EntryPoint) -> tuple[str, str]:
    return (entry.dist.name, entry.dist.version) if entry.dist else ("unknown", "unknown")


def _load(entry: importlib.metadata.EntryPoint) -> Loaded:
    name, version = _owner(entry)
    try:
        plugin = entry.load()
    except Exception as error:
        raise PluginError(
            f"plugin {entry.name!r} of {name} {version} failed to import: "
            f"{type(error).__name__}: {error}; update or uninstall {name}, or leave it out with "
            f"{LOAD_VARIABLE}."
        ) from error
    return Loaded(entry.name, name, version, plugin)
