"""Loading plugins and looking things up by name. One `Registry` per compiler; no global manager."""

from __future__ import annotations

import importlib.metadata
import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, is_dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

from optcompiler import hookspecs
from optcompiler._version import __version__
from optcompiler.errors import InputError, PluginError
from optcompiler.foreign import contained

if TYPE_CHECKING:
    from optcompiler.backend import Backend
    from optcompiler.cost import CostModel
    from optcompiler.guarding import GuardedBackend
    from optcompiler.observers import Observer
    from optcompiler.ops import OpSpec, OpTable
    from optcompiler.rewriting import Pass

GROUP = "optcompiler"
LOAD_VARIABLE = "OPTCOMPILER_LOAD_PLUGINS"

LIMIT_S = 60.0
"""What the import of a plugin, and each of its hooks, may take."""

MOST_ITEMS = 10_000

T = TypeVar("T")


@dataclass(frozen=True)
class Loaded:
    """One plugin: entry-point name, distribution and version it came from, and its object."""

    name: str
    distribution: str
    version: str
    plugin: Any

    @property
    def owner(self) -> str:
        return f"{self.distribution} {self.version}"

    def __str__(self) -> str:
        return f"{self.name} ({self.owner})"


OWN = Loaded("built in", "optcompiler", __version__, None)


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

            def collect(method: Callable[[], Iterable[Any]] = method) -> list[Any]:
                found: list[Any] = []
                for item in method():
                    found.append(item)
                    if len(found) > MOST_ITEMS:
                        raise ValueError(f"it gives more than {MOST_ITEMS} items")
                return found

            for item in _watched(f"plugin {loaded}: {hook}", collect):
                yield loaded, item

    def _named(
        self, hook: str, kind: str, base: type, *, classes: bool = False
    ) -> dict[str, tuple[Loaded, Any]]:
        """What the plugins give, by name: instances of `base`, or with `classes` subclasses."""
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
        for loaded, item in found.values():
            fits = (isinstance(item, type) and issubclass(item, base)) == classes
            if not fits or not (classes or isinstance(item, base)):
                wanted = f"a subclass of {base.__name__}" if classes else f"a {base.__name__}"
                raise PluginError(f"plugin {loaded}: {hook} gave {item!r}, which is not {wanted}.")
        return found

    @cached_property
    def passes(self) -> dict[str, type[Pass]]:
        """Pass classes by name, with their owners in `owners`."""
        return {k: v for k, (_, v) in self._passes.items()}

    @cached_property
    def _passes(self) -> dict[str, tuple[Loaded, type[Pass]]]:
        from optcompiler.rewriting import Pass, Stage

        found = self._named("optcompiler_passes", "pass", Pass, classes=True)
        for name, (loaded, cls) in found.items():
            if not is_dataclass(cls) or not isinstance(getattr(cls, "stage", None), Stage):
                raise PluginError(
                    f"plugin {loaded}: pass {name!r} is not a dataclass with a Stage as `stage`."
                )
            if inspect.isabstract(cls):
                raise PluginError(f"plugin {loaded}: pass {name!r} does not define `propose`.")
            for field, fits in _PASS_FIELDS.items():
                if not fits(getattr(cls, field)):
                    raise PluginError(
                        f"plugin {loaded}: pass {name!r} has {field} = {getattr(cls, field)!r}, "
                        f"which is not what `Pass` says of it."
                    )
        return found

    @cached_property
    def backends(self) -> dict[str, Backend]:
        return {k: v for k, (_, v) in self._backends.items()}

    @cached_property
    def _backends(self) -> dict[str, tuple[Loaded, Backend]]:
        from optcompiler.backend import Backend

        return self._named("optcompiler_backends", "backend", Backend)

    @cached_property
    def cost_models(self) -> dict[str, CostModel]:
        return {k: v for k, (_, v) in self._cost_models.items()}

    @cached_property
    def _cost_models(self) -> dict[str, tuple[Loaded, CostModel]]:
        from optcompiler.cost import CostModel, RooflineCostModel

        own = RooflineCostModel()
        found = self._named("optcompiler_cost_models", "cost model", CostModel)
        if own.name in found:
            raise PluginError(
                f"cost model {own.name!r} is built in, and claimed by {found[own.name][0]}; "
                f"uninstall it, or choose with {LOAD_VARIABLE}."
            )
        return {own.name: (OWN, own), **found}

    @cached_property
    def observers(self) -> dict[str, type[Observer]]:
        from optcompiler.guarding import guarded_observer
        from optcompiler.observers import Observer

        found = self._named("optcompiler_observers", "observer", Observer, classes=True)
        return {k: guarded_observer(v, o.owner) for k, (o, v) in found.items()}

    @cached_property
    def ops(self) -> OpTable:
        """Built-in operators and those of plugins."""
        from optcompiler.guarding import guarded_operator
        from optcompiler.ops import OpTable, builtin_specs

        owners = {spec.key: OWN for spec in builtin_specs()}
        specs: list[OpSpec] = [*builtin_specs()]
        for loaded, spec in self._specs():
            if spec.key in owners:
                raise PluginError(
                    f"operator {spec.domain}::{spec.op_type} is declared twice, by "
                    f"{owners[spec.key]} and {loaded}; uninstall one, or choose with "
                    f"{LOAD_VARIABLE}."
                )
            owners[spec.key] = loaded
            specs.append(guarded_operator(spec, loaded.owner))
        return OpTable(specs)

    @cached_property
    def domains(self) -> frozenset[str]:
        """Domains of the operators that plugins declare; asks no built-in one, so stays light."""
        return frozenset(spec.domain for _, spec in self._specs())

    def _specs(self) -> Iterator[tuple[Loaded, OpSpec]]:
        from optcompiler.ops import OpSpec

        for loaded, spec in self._call("optcompiler_ops"):
            if not isinstance(spec, OpSpec):
                raise PluginError(f"plugin {loaded}: optcompiler_ops gave {spec!r}, no OpSpec.")
            yield loaded, spec

    def owner_of_pass(self, pass_: str | Pass) -> str:
        """`distribution version` of the plugin with the pass; for one given in Python, where its
        class is defined, and "-" for a name that nobody has."""
        entry = self._passes.get(pass_ if isinstance(pass_, str) else pass_.name)
        if isinstance(pass_, str):
            return entry[0].owner if entry else "-"
        if entry and isinstance(pass_, entry[1]):
            return entry[0].owner
        return f"{type(pass_).__module__}.{type(pass_).__qualname__}"

    def backend(self, name: str) -> GuardedBackend:
        """The backend, its faults named."""
        from optcompiler.guarding import GuardedBackend

        return GuardedBackend(_find(self.backends, name, "target"), self._backends[name][0].owner)

    def pass_class(self, name: str) -> type[Pass]:
        return _find(self.passes, name, "pass")

    def cost_model(self, name: str) -> CostModel:
        """The cost model, its faults named."""
        from optcompiler.guarding import GuardedCostModel

        model = _find(self.cost_models, name, "cost model")
        return GuardedCostModel(model, self._cost_models[name][0].owner)

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


_PASS_FIELDS: dict[str, Callable[[Any], bool]] = {
    "summary": lambda v: isinstance(v, str),
    "default": lambda v: isinstance(v, bool),
    "after": lambda v: isinstance(v, tuple) and all(isinstance(n, str) for n in v),
    "time_limit_s": lambda v: isinstance(v, (int, float)) and v > 0,
}


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
    plugin = _watched(
        f"plugin {entry.name!r} of {name} {version} failed to import: it",
        entry.load,
        f"; update or uninstall {name}, or leave it out with {LOAD_VARIABLE}.",
    )
    return Loaded(entry.name, name, version, plugin)


def _watched(what: str, call: Callable[[], T], remedy: str = ".") -> T:
    """`call()` of a plugin; raises `PluginError` for what it raises and when it does not end."""
    return contained(
        call, lambda _, did: PluginError(f"{what} {did}{remedy}"),
        seconds=LIMIT_S, allowed=(PluginError,),
    )  # fmt: skip
