"""The calibration samples that say most about a pool, chosen by what the teacher makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from optcompiler.calibration_sources import (
    CHUNK,
    CalibrationSource,
    Given,
    Watched,
    batch_dimension,
    part,
    sample_count,
)
from optcompiler.errors import InputError

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from optcompiler.program import Program
    from optcompiler.rewriting import Batch

Method = Literal["herding", "k-center", "k-means", "random"]

FEATURES = 32
"""Numbers kept of the outputs, and as many of the last inner value, for each sample of the pool."""

RESERVOIR = 4
"""Samples kept, for each one wanted, of a source that can be read only once."""

_CONTRACTIONS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class Select(CalibrationSource):
    """What `select` makes."""

    name: ClassVar[str] = "select"

    source: Any
    count: int = 64
    pool: int = 10_000
    method: Method = "k-center"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.count <= self.pool:
            raise InputError(
                f"select: {self.count} samples of a pool of {self.pool}; "
                f"give a count from 1 to the pool."
            )
        if self.method not in METHODS:
            raise InputError(f"select: method {self.method!r}; give one of {', '.join(METHODS)}.")

    def batches(self, given: Given) -> Iterator[Batch]:
        if batch_dimension(given.ports) is None:
            raise InputError(
                "select: the model's inputs share no batch dimension; give the samples themselves."
            )
        features = Features(given, self.seed)
        rng = given.rng(self.seed)
        if is_read_once(self.source):
            kept, found = self._reservoir(given, features, rng)
        else:
            kept = None
            found = np.concatenate([features(b) for b in self._pool(given)] or [np.empty((0, 1))])
        if not len(found):
            return
        wanted = min(self.count, len(found))
        chosen = METHODS[self.method](_standardised(found), wanted, rng)
        if kept is not None:
            for index in sorted(chosen):
                yield kept[index]
            return
        rows, start = np.sort(chosen), 0
        for batch in self._pool(given):
            inside = rows[(rows >= start) & (rows < start + sample_count(batch))] - start
            start += sample_count(batch)
            if len(inside):
                yield {name: array[inside] for name, array in batch.items()}

    def _pool(self, given: Given) -> Iterator[Batch]:
        """The first `pool` samples, a few at a time."""
        from optcompiler.calibration import read_batches

        left = self.pool
        for batch in read_batches(self.source, given.signature, given):
            stop = min(sample_count(batch), left)
            for start in range(0, stop, CHUNK):
                yield part(batch, start, min(start + CHUNK, stop))
            left -= stop
            if not left:
                return

    def _reservoir(
        self, given: Given, features: Features, rng: np.random.Generator
    ) -> tuple[list[Batch], np.ndarray]:
        """Samples drawn from the pool as it passes, each as likely as any other (Vitter, "Random
        sampling with a reservoir", 1985, algorithm R), with their features."""
        most = RESERVOIR * self.count
        kept: list[Batch] = []
        vectors: list[np.ndarray] = []
        seen = 0
        for batch in self._pool(given):
            places = [
                seen + i if seen + i < most else int(rng.integers(0, seen + i + 1))
                for i in range(sample_count(batch))
            ]
            seen += len(places)
            if min(places) >= most:
                continue
            found = features(batch)
            for row, place in enumerate(places):
                if place >= most:
                    continue
                one = {name: array[row : row + 1].copy() for name, array in batch.items()}
                if place < len(kept):
                    kept[place], vectors[place] = one, found[row]
                else:
                    kept.append(one)
                    vectors.append(found[row])
        return kept, np.stack(vectors) if vectors else np.empty((0, 1))


def select(
    source: Any,
    *,
    count: int = 64,
    pool: int = 10_000,
    method: Method = "k-center",
    seed: int = 0,
) -> Select:
    """The `count` samples among the first `pool` of `source` whose features stand best for all.

    `source` is whatever `calibration=` takes. Features are random projections of the teacher's
    first float output and of what its last layer with weights reads, 32 numbers of each. `method`:
    "herding" takes samples whose mean stays nearest to the pool's (Welling, "Herding dynamical
    weights to learn", 2009), "k-center" always the one farthest from those taken (Sener & Savarese,
    "Active learning for convolutional neural networks", 2018), "k-means" those nearest to the
    centres of k-means++ (Arthur & Vassilvitskii, 2007), "random" any. For the ranges of an 8-bit
    network with depthwise convolutions "k-center" and "random" were alike within the spread of
    seeds, of 640 images, and "k-means" was worse.

    What can be iterated again (a list, a folder, a function) is read twice and never held whole; of
    a generator, four times `count` samples are drawn at random and chosen from.

    Raises `InputError` for options out of range; when it is used, for a model whose inputs share no
    batch dimension.
    """
    return Select(source, count, pool, method, seed)


def is_read_once(source: Any) -> bool:
    """Whether iterating over `source` uses it up."""
    if isinstance(source, CalibrationSource):
        return is_read_once(getattr(source, "source", None))
    return isinstance(source, Iterator)


# -- features ---------------------------------------------------------------------------------


class Features:
    """Batches to vectors, float32 [N, at most 2 · `FEATURES`]."""

    def __init__(self, given: Given, seed: int) -> None:
        inner = last_read(given.teacher)
        self._watched = Watched(given, [inner] if inner else [])
        self._seed = given.seed + seed
        self._projections: dict[tuple[int, int], torch.Tensor] = {}

    def __call__(self, batch: Batch) -> np.ndarray:
        import torch

        values = self._watched.arrays(batch)
        outputs = [v for v in values[: self._watched.count] if v.is_floating_point()][:1]
        parts = [
            self._projected(i, v)
            for i, v in enumerate([*outputs, *values[self._watched.count :]])
            if v.ndim and v.shape[0] == sample_count(batch)
        ]
        if not parts:
            raise InputError("select: the model has no float output with a batch dimension.")
        return torch.cat(parts, 1).numpy()

    def _projected(self, index: int, value: torch.Tensor) -> torch.Tensor:
        """A fixed random projection (Johnson & Lindenstrauss) of what is more than that; values of
        any length, as of texts, by their mean and extremes along it."""
        import torch

        if value.ndim == 3:
            value = torch.cat([value.mean(1), value.amax(1), value.amin(1)], 1)
        value = value.flatten(1).float()
        if value.shape[1] <= FEATURES:
            return value
        key = (index, value.shape[1])
        if key not in self._projections:
            generator = torch.Generator().manual_seed(self._seed + index)
            drawn = torch.randn(value.shape[1], FEATURES, generator=generator)
            self._projections[key] = drawn / value.shape[1] ** 0.5
        return value @ self._projections[key]


def last_read(program: Program) -> str | None:
    """The value that the last node with weights of its own reads, where it is a computed float."""
    import onnx_ir as ir

    for node in reversed(list(program.graph)):
        if node.domain or node.op_type not in _CONTRACTIONS:
            continue
        data, weight = node.inputs[:2]
        if data is None or weight is None or data.dtype != ir.DataType.FLOAT:
            continue
        if _is_constant(weight) and data.producer() is not None:
            return data.name
    return None


def _is_constant(value: ir.Value) -> bool:
    """Whether it is an initializer, or arranged or dequantised from initializers alone."""
    node = value.producer()
    if node is None:
        return value.const_value is not None
    return node.op_type in ("Transpose", "DequantizeLinear", "Identity", "Cast") and all(
        v is None or _is_constant(v) for v in node.inputs
    )


def _standardised(features: np.ndarray) -> np.ndarray:
    features = features.astype(np.float64)
    spread = features.std(0)
    return (features - features.mean(0)) / np.where(spread > 1e-12, spread, 1)


# -- methods ----------------------------------------------------------------------------------


def _herding(features: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Standardised features have mean 0, so that each choice is to bring the sum back to 0; squares
    are among them, or samples near the centre would be all that is taken."""
    both = np.concatenate([features, _standardised(features**2)], 1)
    norms = (both**2).sum(1)
    total = np.zeros(both.shape[1])
    free = np.ones(len(both), bool)
    chosen: list[int] = []
    for _ in range(count):
        cost = np.where(free, norms + 2 * (both @ total), np.inf)
        best = int(cost.argmin())
        chosen.append(best)
        free[best] = False
        total += both[best]
    return np.array(chosen)


def _k_center(features: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    chosen = [int((features**2).sum(1).argmin())]
    distance = ((features - features[chosen[0]]) ** 2).sum(1)
    while len(chosen) < count:
        distance[chosen] = -1
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, ((features - features[chosen[-1]]) ** 2).sum(1))
    return np.array(chosen)


def _k_means(features: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    centres = features[[int(rng.integers(len(features)))]]
    distance = ((features - centres[0]) ** 2).sum(1)
    for _ in range(count - 1):
        total = distance.sum()
        odds = distance / total if total > 0 else None
        centres = np.concatenate([centres, features[[int(rng.choice(len(features), p=odds))]]])
        distance = np.minimum(distance, ((features - centres[-1]) ** 2).sum(1))
    for _ in range(10):
        owner = _distances(features, centres).argmin(1)
        for index in np.unique(owner):
            centres[index] = features[owner == index].mean(0)
    free = np.ones(len(features), bool)
    chosen: list[int] = []
    for column in _distances(features, centres).T:
        chosen.append(int(np.where(free, column, np.inf).argmin()))
        free[chosen[-1]] = False
    return np.array(chosen)


def _distances(features: np.ndarray, centres: np.ndarray) -> np.ndarray:
    return (features**2).sum(1)[:, None] - 2 * features @ centres.T + (centres**2).sum(1)


def _random(features: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    return rng.permutation(len(features))[:count]


METHODS: dict[str, Callable[[np.ndarray, int, np.random.Generator], np.ndarray]] = {
    "herding": _herding, "k-center": _k_center, "k-means": _k_means, "random": _random,
}  # fmt: skip
