"""Sequences, which are Python lists while a program runs, and optionals, which are None or full."""

from __future__ import annotations

from typing import Any

import torch

from optcompiler.ops.costs import free_cost, movement_cost
from optcompiler.ops.declare import op
from optcompiler.ops.spec import OpSpec
from optcompiler.ops.types import first, whole_list

Tensor = torch.Tensor
Items = list[Tensor]


def sequence_empty(*, dtype: int | None = None) -> Items:
    return []


def sequence_construct(*items: Tensor) -> Items:
    return list(items)


def sequence_at(sequence: Items, position: Any) -> Tensor:
    return sequence[int(first(position))]


def sequence_insert(sequence: Items, item: Tensor, position: Any = None) -> Items:
    """`item` put before `position`, which may count from the end; at the end by default."""
    index = len(sequence) if position is None else int(first(position))
    return [*sequence[:index], item, *sequence[index:]]


def sequence_erase(sequence: Items, position: Any = None) -> Items:
    index = range(len(sequence))[-1 if position is None else int(first(position))]
    return [*sequence[:index], *sequence[index + 1 :]]


def sequence_length(sequence: Items) -> Tensor:
    return torch.tensor(len(sequence), dtype=torch.int64)


def split_to_sequence(x: Tensor, split: Any = None, *, axis: int = 0, keepdims: int = 1) -> Items:
    """Parts along `axis`: single slices, parts of one size (the last may be less), or by sizes."""
    if split is None:
        parts = x.split(1, axis)
        return list(parts) if keepdims else [part.squeeze(axis) for part in parts]
    whole = isinstance(split, int) or (isinstance(split, Tensor) and split.ndim == 0)
    return list(x.split(int(first(split)) if whole else whole_list(split), axis))


def concat_from_sequence(sequence: Items, *, axis: int, new_axis: int = 0) -> Tensor:
    return torch.stack(sequence, axis) if new_axis else torch.cat(sequence, axis)


def optional(value: Any = None) -> Any:
    return value


def optional_has_element(value: Any = None) -> Tensor:
    return torch.tensor(value is not None)


def optional_get_element(value: Any) -> Any:
    """What an optional holds. Raises `ValueError` when it is empty, which has no meaning."""
    if value is None:
        raise ValueError("OptionalGetElement of an optional that is empty")
    return value


SPECS: tuple[OpSpec, ...] = (
    op("SequenceEmpty", sequence_empty, free_cost),
    op("SequenceConstruct", sequence_construct, free_cost),
    op("SequenceAt", sequence_at, free_cost, static=(1,)),
    op("SequenceInsert", sequence_insert, free_cost, static=(2,)),
    op("SequenceErase", sequence_erase, free_cost, static=(1,)),
    op("SequenceLength", sequence_length, free_cost),
    op("SplitToSequence", split_to_sequence, movement_cost, static=(1,)),
    op("ConcatFromSequence", concat_from_sequence, movement_cost),
    op("Optional", optional, free_cost),
    op("OptionalHasElement", optional_has_element, free_cost),
    op("OptionalGetElement", optional_get_element, free_cost),
)
