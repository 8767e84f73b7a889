"""Which passes run, with which options, in which order."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, cast

import networkx as nx

from optcompiler.errors import InputError, PluginError
from optcompiler.foreign import contained

if TYPE_CHECKING:
    from optcompiler.plugins import Registry
    from optcompiler.rewriting import Pass

DEFAULT = "default"
"""Stands for the default pipeline inside a list of passes."""


def resolve(
    wanted: Iterable[str | Pass | type[Pass]] | None, registry: Registry, *, lossy: bool = True
) -> list[Pass]:
    """Passes in the order in which they run.

    None or the word "default" means every registered pass whose class says `default`, without
    `lossy` less those that reduce or quantise. An item is a
    name, a name with options (`"prune-channels:keep_ratio=0.5"`), a pass, or a pass class; an
    explicit item replaces a default one of the same name. Passes run by stage; within a stage as
    their `after` demands, and else in the order given (by name for the default ones).
    """
    from optcompiler.rewriting import Pass, Stage

    chosen: dict[str, Pass] = {}
    given: set[str] = set()
    for item in [DEFAULT] if wanted is None else wanted:
        if item == DEFAULT:
            for name, cls in sorted(registry.passes.items()):
                loses = cls.stage in (Stage.REDUCE, Stage.QUANTIZE)
                if cls.default and (lossy or not loses) and name not in chosen:
                    chosen[name] = _construct(cls, {}, registry)
            continue
        if isinstance(item, str):
            name, _, options = item.partition(":")
            made = _construct(registry.pass_class(name), parse_options(options, name), registry)
        elif isinstance(item, Pass):
            made = item
        elif isinstance(item, type) and issubclass(item, Pass):  # pyright: ignore[reportUnnecessaryIsInstance]
            made = _construct(item, {}, registry)
        else:
            raise InputError(f"passes: {item!r} is neither a name nor a Pass.")
        if made.name in given:
            raise InputError(f"passes: {made.name!r} is given twice.")
        given.add(made.name)
        chosen[made.name] = made
    return _ordered(list(chosen.values()))


def _ordered(passes: Sequence[Pass]) -> list[Pass]:
    position = {p.name: i for i, p in enumerate(passes)}
    by_name = {p.name: p for p in passes}
    order = nx.DiGraph()
    order.add_nodes_from(by_name)
    for p in passes:
        for earlier in p.after:
            if earlier in by_name and by_name[earlier].stage == p.stage:
                order.add_edge(earlier, p.name)
    try:
        names = list(
            nx.lexicographical_topological_sort(
                order, key=lambda n: (int(by_name[n].stage), position[n])
            )
        )
    except nx.NetworkXUnfeasible as error:
        raise PluginError(f"passes ask to run after each other: {error}.") from error
    return sorted((by_name[n] for n in names), key=lambda p: int(p.stage))


def parse_options(text: str, name: str) -> dict[str, str]:
    """`"keep_ratio=0.5,importance=taylor"` as a dictionary of strings."""
    options: dict[str, str] = {}
    for item in filter(None, text.split(",")):
        key, sep, value = item.partition("=")
        if not sep:
            raise InputError(f"pass {name}: option {item!r} is not key=value.")
        options[key] = value
    return options


def _construct(cls: type[Pass], options: dict[str, str], registry: Registry) -> Pass:
    known = {f.name for f in fields(cls)}  # pyright: ignore[reportArgumentType]
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, text in options.items():
        if key not in known:
            raise InputError(
                f"pass {cls.name}: no option {key!r}; it has {', '.join(sorted(known)) or 'none'}."
            )
        try:
            values[key] = parse_value(text, hints[key])
        except ValueError as error:
            raise InputError(f"pass {cls.name}: {key}={text!r}: {error}.") from error
    return contained(
        lambda: cls(**values),
        lambda _, did: PluginError(
            f"pass {cls.name} of {registry.owner_of_pass(cls.name)}: constructing it {did}; update "
            f"or uninstall it."
        ),
        allowed=(InputError,),
    )


def options_of(pass_: Pass, owner: str) -> dict[str, Any]:
    """What `Pass.options` says. Raises `PluginError` naming the owner when it cannot."""
    return contained(
        lambda: dict(pass_.options()),
        lambda _, did: PluginError(f"pass {pass_.name} of {owner}: options {did}."),
    )


def from_options(cls: type[Pass], options: Mapping[str, Any]) -> Pass:
    """A pass with the options that `Pass.options` gave, read back from JSON.

    Raises `InputError` for one that this version of the pass does not have, or that was a function.
    """
    known = {f.name for f in fields(cls)}  # pyright: ignore[reportArgumentType]
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in options.items():
        if key not in known:
            raise InputError(f"pass {cls.name}: it has no option {key!r} in this version.")
        if typing.get_origin(hints[key]) is tuple and isinstance(value, list):
            value = tuple(cast("list[Any]", value))
        values[key] = value
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise InputError(f"pass {cls.name}: options {values} do not fit: {error}.") from error


def parse_value(text: str, hint: Any) -> Any:
    """Read `text` as the annotated type: bool, int, float, str, a tuple (split at "+"), or a union
    of those (the first that reads it). Raises `ValueError` naming the type."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        for option in typing.get_args(hint):
            if option is type(None):
                if text.lower() == "none":
                    return None
                continue
            try:
                return parse_value(text, option)
            except ValueError:
                continue
        raise ValueError(f"not {hint}")
    if origin is tuple:
        inner = typing.get_args(hint)[0]
        return tuple(parse_value(part, inner) for part in text.split("+") if part)
    if hint is bool:
        if text.lower() in ("true", "yes", "1"):
            return True
        if text.lower() in ("false", "no", "0"):
            return False
        raise ValueError("not true or false")
    if hint in (int, float, str):
        return hint(text)
    if origin is typing.Literal:
        if text in typing.get_args(hint):
            return text
        raise ValueError(f"not one of {', '.join(map(str, typing.get_args(hint)))}")
    raise ValueError(f"options of type {hint} cannot be given as text")
