"""torch's pytree specifications as trees of our own, which need no torch to read."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from typing import Any

from optcompiler.errors import InputError
from optcompiler.signature import Tree, is_struct_sequence


def tree_from_spec(spec: Any, leaves: Iterator[Tree]) -> Tree:
    """The structure of a `torch.utils._pytree.TreeSpec`, its leaves taken from `leaves` in order.

    Raises `InputError` for a container class that does not name its children.
    """
    if spec.is_leaf():
        return next(leaves)
    items = tuple(tree_from_spec(child, leaves) for child in children(spec))
    kind, context = spec.type, spec.context
    if kind is tuple or kind is list:
        return Tree(kind.__name__, items=items)
    if kind is dict or kind is OrderedDict:
        return Tree("dict", items=items, keys=_keys(context, kind))
    if kind is defaultdict:
        return Tree("dict", items=items, keys=_keys(context[1], kind))
    if _namedtuple(spec):
        kind = context
        return Tree("namedtuple", items=items, keys=tuple(kind._fields), type=reference(kind))
    if is_struct_sequence(kind):
        names = kind.__match_args__[: len(items)]
        return Tree("namedtuple", items=items, keys=names, type=reference(kind))
    names, absent = _field_names(kind, context)
    if len(names) != len(items):
        raise InputError(
            f"arguments or results of class {kind.__qualname__} cannot be taken apart; "
            f"use tuples, lists, dicts, namedtuples or dataclasses of tensors."
        )
    items += tuple(Tree("constant") for _ in absent)
    return Tree("object", items=items, keys=names + absent, type=reference(kind))


def children(spec: Any) -> list[Any]:
    """Direct children of a TreeSpec, under either name that torch versions give them."""
    return list(spec.children() if hasattr(spec, "children") else spec.children_specs)


def reference(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _namedtuple(spec: Any) -> bool:
    return isinstance(spec.context, type) and hasattr(spec.context, "_fields")


def _keys(context: Any, kind: type) -> tuple[str | int, ...]:
    wrong = [k for k in context if not isinstance(k, (str, int))]
    if wrong:
        raise InputError(
            f"a {kind.__name__} has the key {wrong[0]!r}; only strings and integers can be keys."
        )
    return tuple(context)


def _field_names(kind: type, context: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the flattened fields of a registered class, and of those that were None."""
    if dataclasses.is_dataclass(kind) and isinstance(context, (list, tuple)) and len(context) == 2:
        present, absent = context
        if isinstance(present, (list, tuple)) and isinstance(absent, (list, tuple)):
            return tuple(map(str, present)), tuple(map(str, absent))
    if isinstance(context, (list, tuple)) and all(isinstance(k, str) for k in context):
        return tuple(context), ()
    return (), ()
