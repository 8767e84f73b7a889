"""Tables of few values for weights: two that are given, one that is fitted, and their indices."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

BINS = 512
"""Between which the borders of a fitted table are first searched."""

LLOYD_STEPS = 12
FACTORS = tuple(np.arange(1.0, 0.55, -0.05))
"""Of a block's largest magnitude, tried as its scale."""

_CHUNK = 1 << 20
_HALF = np.finfo(np.float16)


def uniform_table(bits: int) -> np.ndarray:
    """Levels of a signed integer of `bits`, the largest at 1: float64 [2^bits], ascending."""
    half = 1 << (bits - 1)
    return np.arange(-half, half) / (half - 1)


def normal_table(bits: int) -> np.ndarray:
    """Quantiles of a normal distribution with an exact zero: float64 [2^bits], from -1 to 1.

    With 4 bits this is NF4 (Dettmers et al., "QLoRA", 2023, section 3 and appendix E).
    """
    count = 1 << bits
    most = 1 - (1 / (2 * count) + 1 / (2 * (count - 1))) / 2

    def tail(values: int) -> np.ndarray:
        places = np.linspace(most, 0.5, values + 1)[:-1]
        return np.array([NormalDist().inv_cdf(float(p)) for p in places])

    table = np.concatenate([-tail(count // 2 - 1), [0.0], tail(count // 2)])
    return np.sort(table / np.abs(table).max())


def fitted_table(values: np.ndarray, importance: np.ndarray, bits: int) -> np.ndarray:
    """The 2^bits values of least weighted squared error: float64, ascending.

    K-means in one dimension: optimal over `BINS` bins of equal width by dynamic programming (Wang
    and Song, "Ckmeans.1d.dp", 2011), then Lloyd's steps on the values themselves.
    """
    flat = np.asarray(values, np.float64).reshape(-1)
    weight = np.asarray(importance, np.float64).reshape(-1)
    table = _optimal_over_bins(flat, weight, 1 << bits)
    for _ in range(LLOYD_STEPS):
        nearest = nearest_in(table, flat)
        mass = np.bincount(nearest, weight, len(table))
        total = np.bincount(nearest, weight * flat, len(table))
        moved = np.sort(np.where(mass > 0, total / np.where(mass > 0, mass, 1), table))
        if np.array_equal(moved, table):
            break
        table = moved
    return table


def nearest_in(table: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The index of the nearest entry of an ascending table, for each value."""
    return np.searchsorted((table[1:] + table[:-1]) / 2, values)


def encoded(
    blocks: np.ndarray, importance: np.ndarray, table: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Indices uint8 [B, b] and scales float32 [B] for `blocks` [B, b], scale · table[index].

    A block's scale is, of the largest magnitude times `FACTORS`, the one of least weighted error,
    then that of least squares for the indices found, if it is better. Scales are half floats.
    """
    indices = np.empty(blocks.shape, np.uint8)
    scales = np.empty(len(blocks), np.float32)
    step = max(1, _CHUNK // max(1, blocks.shape[1]))
    for start in range(0, len(blocks), step):
        part = slice(start, start + step)
        found = _encoded(blocks[part].astype(np.float64), importance[part], table)
        indices[part], scales[part] = found
    return indices, scales


def fitted(
    blocks: np.ndarray, importance: np.ndarray, bits: int, rounds: int = 3
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Table, indices and scales, with table and scales fitted in turn; the best of all rounds.

    The first scales are those for the normal table. Behind a block's largest magnitude the table
    would spend values on the one weight of each block that is at 1, and stay there.
    """
    table = normal_table(bits)
    best = table, *encoded(blocks, importance, table)
    least, scales = _left(blocks, importance, *best), best[2]
    for _ in range(rounds):
        wide = importance * np.square(scales.astype(np.float64))[:, None]
        table = fitted_table(blocks / scales[:, None], wide, bits)
        table = table.astype(np.float32).astype(np.float64)
        found = table, *encoded(blocks, importance, table)
        left, scales = _left(blocks, importance, *found), found[2]
        if left < least:
            best, least = found, left
    return best


def _left(
    blocks: np.ndarray,
    importance: np.ndarray,
    table: np.ndarray,
    indices: np.ndarray,
    scales: np.ndarray,
) -> float:
    return float((importance * np.square(blocks - table[indices] * scales[:, None])).sum())


def half(scales: np.ndarray) -> np.ndarray:
    """Scales rounded to half floats, 1 in place of 0, as float32."""
    held = np.clip(scales, _HALF.tiny, _HALF.max)
    return np.where(scales > 0, held, 1).astype(np.float16).astype(np.float32)


def _encoded(
    blocks: np.ndarray, importance: np.ndarray, table: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    largest = np.abs(blocks).max(axis=1)
    best: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    def attempt(scales: np.ndarray) -> None:
        nonlocal best
        indices = nearest_in(table, blocks / scales[:, None]).astype(np.uint8)
        left = blocks - table[indices] * scales[:, None]
        error = (importance * np.square(left)).sum(axis=1)
        if best is None:
            best = indices, scales, error
            return
        wins = error < best[2]
        best = (
            np.where(wins[:, None], indices, best[0]),
            np.where(wins, scales, best[1]),
            np.where(wins, error, best[2]),
        )

    for factor in FACTORS:
        attempt(half(largest * factor))
    assert best is not None
    for _ in range(2):
        values = table[best[0]]
        energy = (importance * np.square(values)).sum(axis=1)
        along = (importance * values * blocks).sum(axis=1)
        attempt(half(np.where(energy > 0, along / np.where(energy > 0, energy, 1), best[1])))
    return best[0], best[1]


def _optimal_over_bins(values: np.ndarray, weight: np.ndarray, count: int) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if not high > low:
        return low + np.zeros(count)
    place = np.minimum(((values - low) / (high - low) * BINS).astype(np.int64), BINS - 1)
    mass, first, second = (
        np.concatenate([[0.0], np.cumsum(np.bincount(place, weight * values**n, BINS))])
        for n in range(3)
    )
    m, f, s = (a[None, 1:] - a[:-1, None] for a in (mass, first, second))
    spread = s - np.square(f) / np.where(m > 0, m, 1)
    cost = np.where(np.tri(BINS, k=-1, dtype=bool), np.inf, np.maximum(spread, 0))
    best, starts = cost[0], []
    for _ in range(count - 1):
        joined = np.concatenate([[np.inf], best[:-1]])[:, None] + cost
        starts.append(joined.argmin(axis=0))
        best = joined.min(axis=0)
    borders = [BINS]
    for start in reversed(starts):
        borders.append(int(start[borders[-1] - 1]))
    edges = np.array([0, *reversed(borders)])
    held, total = np.diff(mass[edges]), np.diff(first[edges])
    middle = low + (edges[1:] + edges[:-1]) / 2 * (high - low) / BINS
    return np.sort(np.where(held > 0, total / np.where(held > 0, held, 1), middle))
