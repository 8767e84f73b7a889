"""If, Loop and Scan over subgraphs that the executor has made into modules.

A body takes its formal inputs, then the values that it captures from outside, and returns a tuple.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Tensor = torch.Tensor
Body = Callable[..., tuple[Tensor, ...]]


def run_if(
    condition: Tensor, then: Body, other: Body, then_captured: Sequence[Tensor],
    other_captured: Sequence[Tensor],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The outputs of the branch that `condition` (one bool) selects."""
    return then(*then_captured) if bool(condition.item()) else other(*other_captured)


def run_loop(
    body: Body,
    trip_count: Tensor | None,
    condition: Tensor | None,
    carried: Sequence[Tensor],
    captured: Sequence[Tensor],
    *,
    empty: Sequence[tuple[torch.dtype, tuple[int, ...]]] = (),
) -> tuple[Tensor, ...]:
    """Final carried values, then each scan output stacked over the iterations.

    `empty` says what one iteration's scan outputs look like, for a loop that runs none.
    """
    limit = None if trip_count is None else int(trip_count.item())
    keep = True if condition is None else bool(condition.item())
    state = tuple(carried)
    scanned: list[tuple[Tensor, ...]] = []
    given = (trip_count, condition, *carried, *captured)
    anchor = next((t for t in given if isinstance(t, torch.Tensor)), None)
    where = None if anchor is None else anchor.device
    step = 0
    while keep and (limit is None or step < limit):
        flags = torch.tensor(step, device=where), torch.tensor(True, device=where)
        results = body(*flags, *state, *captured)
        keep = bool(results[0].item())
        state = tuple(results[1 : 1 + len(carried)])
        scanned.append(tuple(results[1 + len(carried) :]))
        step += 1
    if not scanned:
        return (*state, *(torch.empty((0, *dims), dtype=d, device=where) for d, dims in empty))
    return (*state, *(torch.stack(column) for column in zip(*scanned, strict=True)))


def run_scan(
    body: Body,
    initial: Sequence[Tensor],
    sequences: Sequence[Tensor],
    captured: Sequence[Tensor],
    *,
    input_axes: Sequence[int] | None = None,
    input_directions: Sequence[int] | None = None,
    output_axes: Sequence[int] | None = None,
    output_directions: Sequence[int] | None = None,
) -> tuple[Tensor, ...]:
    """Final states, then each scan output stacked along its axis. Directions: 1 is reverse."""
    in_axes = list(input_axes or [0] * len(sequences))
    backwards = list(input_directions or [0] * len(sequences))
    length = sequences[0].shape[in_axes[0]]
    state = tuple(initial)
    columns: list[tuple[Tensor, ...]] = []
    for step in range(length):
        slices = [
            x.select(axis, length - 1 - step if back else step)
            for x, axis, back in zip(sequences, in_axes, backwards, strict=True)
        ]
        results = body(*state, *slices, *captured)
        state = tuple(results[: len(initial)])
        columns.append(tuple(results[len(initial) :]))
    stacked: list[Any] = []
    for i, column in enumerate(zip(*columns, strict=True)):
        order = reversed(column) if output_directions and output_directions[i] else column
        stacked.append(torch.stack(list(order), output_axes[i] if output_axes else 0))
    return (*state, *stacked)
