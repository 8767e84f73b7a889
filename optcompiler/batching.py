"""Calling a model that has a fixed batch size with any number of samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


class Batched:
    """`call`, traced for batches of `size` samples, as a callable for any number of samples.

    Arrays and tensors among the arguments are cut along their first axis into pieces of `size`; the
    last piece is filled up to `least` samples (by default `size`) by repeating its last one, and
    the surplus results are dropped.
    Outputs (arrays or tensors, in tuples, lists or dicts) are joined along their first axis.
    """

    def __init__(self, call: Callable[..., Any], size: int, least: int | None = None) -> None:
        self.call = call
        self.size = size
        self.least = size if least is None else least

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves = [a for a in _arrays((args, kwargs)) if a.ndim]
        total = max((int(a.shape[0]) for a in leaves), default=self.size)
        if self.least <= total <= self.size:
            return self.call(*args, **kwargs)
        pieces = []
        for start in range(0, total, self.size):
            piece_args, piece_kwargs = _map(
                lambda a, start=start: self._piece(a, start, total), (args, kwargs)
            )
            keep = min(self.size, total - start)
            result = self.call(*piece_args, **piece_kwargs)
            pieces.append(_map(lambda a, keep=keep: a[:keep] if a.ndim else a, result))
        return _join(pieces)

    def _piece(self, array: Any, start: int, total: int) -> Any:
        if not array.ndim or array.shape[0] != total:
            return array
        piece = array[start : start + self.size]
        missing = max(self.least - piece.shape[0], 0)
        if not missing:
            return piece
        if isinstance(array, np.ndarray):
            return np.concatenate([piece, np.repeat(piece[-1:], missing, axis=0)])
        import torch

        return torch.cat([piece, piece[-1:].expand(missing, *piece.shape[1:])])


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "ndim")


def _arrays(tree: Any) -> list[Any]:
    found: list[Any] = []
    _map(lambda a: found.append(a) or a, tree)
    return found


def _map(function: Callable[[Any], Any], tree: Any) -> Any:
    if _is_array(tree):
        return function(tree)
    if isinstance(tree, Mapping):
        values = {k: _map(function, v) for k, v in tree.items()}
        return values if type(tree) is dict else _like(tree, values)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_map(function, v) for v in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(_map(function, v) for v in tree)
    return tree


def _like(tree: Any, values: dict[Any, Any]) -> Any:
    try:
        return type(tree)(values)
    except TypeError:
        return values


def _join(pieces: Sequence[Any]) -> Any:
    first = pieces[0]
    if _is_array(first):
        if not first.ndim:
            return first
        if isinstance(first, np.ndarray):
            return np.concatenate(pieces)
        import torch

        return torch.cat(list(pieces))
    if isinstance(first, Mapping):
        values = {k: _join([p[k] for p in pieces]) for k in first}
        return values if type(first) is dict else _like(first, values)
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        return type(first)(*(_join([p[i] for p in pieces]) for i in range(len(first))))
    if isinstance(first, (tuple, list)):
        return type(first)(_join([p[i] for p in pieces]) for i in range(len(first)))
    return first
