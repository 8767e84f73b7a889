"""More calibration samples from few, by changes that the user says leave them plausible."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from optcompiler.calibration_sources import (
    CHUNK,
    CalibrationSource,
    Given,
    batch_dimension,
    sample_count,
)
from optcompiler.errors import InputError

if TYPE_CHECKING:
    from optcompiler.program import Port
    from optcompiler.rewriting import Batch

Kind = Literal["auto", "image", "floats", "tokens", "keep"]
KINDS = ("auto", "image", "floats", "tokens", "keep")

MOST_ORIGINALS = 512
"""Samples of the source that are kept to make others from."""

OWN_SHARE = 0.7
"""The least share that a mixed sample has of its first original."""


@dataclass(frozen=True)
class Augment(CalibrationSource):
    """What `augment` makes."""

    name: ClassVar[str] = "augment"

    source: Any
    count: int = 512
    kind: Kind | Mapping[str, Kind] = "auto"
    shift: int = 2
    flip: bool = False
    noise: float = 0.02
    mix: float = 0.5
    crop: float = 1.0
    drop: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        kinds = self.kind.values() if isinstance(self.kind, Mapping) else [self.kind]
        wrong = [k for k in kinds if k not in KINDS]
        if wrong:
            raise InputError(f"augment: kind {wrong[0]!r}; give one of {', '.join(KINDS)}.")
        for name, least, most in (
            ("count", 1, None), ("shift", 0, None), ("noise", 0, None), ("mix", 0, 1),
            ("crop", 0.05, 1), ("drop", 0, 0.95),
        ):  # fmt: skip
            value = getattr(self, name)
            if not least <= value <= (value if most is None else most):
                raise InputError(f"augment: {name} is {value}; give one from {least} to {most}.")

    def batches(self, given: Given) -> Iterator[Batch]:
        """The originals, then changed ones a chunk at a time, in turn from all originals."""
        from optcompiler.calibration import load_calibration

        if batch_dimension(given.ports) is None:
            raise InputError(
                "augment: the model's inputs share no batch dimension; give the samples themselves."
            )
        kinds = self._kinds(given)
        most = min(self.count, MOST_ORIGINALS)
        read = load_calibration(self.source, given.signature, max_samples=most, given=given)
        yield from read
        made = sum(map(sample_count, read))
        rng = given.rng(self.seed)
        groups = _alike(read)
        turn = 0
        while made < self.count:
            group = groups[turn % len(groups)]
            size = min(CHUNK, self.count - made)
            start = turn // len(groups) * CHUNK
            yield self._changed(group, (start + np.arange(size)) % sample_count(group), kinds, rng)
            made += size
            turn += 1

    def _kinds(self, given: Given) -> dict[str, Kind]:
        named = self.kind if isinstance(self.kind, Mapping) else {}
        known = [p.name for p in given.ports]
        unknown = [n for n in named if n not in known]
        if unknown:
            raise InputError(
                f"augment: kind names input {unknown[0]!r}; the model's are {', '.join(known)}."
            )
        common: Kind = "auto" if isinstance(self.kind, Mapping) else self.kind
        return {p.name: _kind_of(p, named.get(p.name, common)) for p in given.ports}

    def _changed(
        self,
        group: Batch,
        rows: np.ndarray,
        kinds: Mapping[str, Kind],
        rng: np.random.Generator,
    ) -> Batch:
        count = len(rows)
        others = rng.integers(0, sample_count(group), count)
        mixed = rng.random(count) < self.mix
        shares = np.where(mixed, rng.uniform(OWN_SHARE, 1, count), 1)
        places: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        made: dict[str, np.ndarray] = {}
        for name, array in group.items():
            kind, own = kinds[name], array[rows]
            if kind == "tokens" and array.ndim > 1:
                # One drawing for all inputs of that length: ids and masks stay together.
                length = array.shape[1]
                if length not in places:
                    places[length] = self._splices(rows, others, length, rng)
                made[name] = array[places[length]]
            elif kind in ("image", "floats"):
                factors = shares.reshape(-1, *[1] * (array.ndim - 1))
                values = factors * own + (1 - factors) * array[others]
                if kind == "image":
                    values = np.stack([self._moved(v, rng) for v in values])
                spread = array.std(dtype=np.float64)
                values = values + self.noise * spread * rng.standard_normal(values.shape)
                values = np.clip(values, array.min(), array.max())
                made[name] = values.astype(array.dtype)
            else:
                made[name] = own
        return made

    def _moved(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """[..., H, W] cropped and stretched, shifted with edges repeated, mirrored."""
        height, width = image.shape[-2:]
        if self.crop < 1:
            scale = rng.uniform(self.crop, 1)
            rows, columns = (max(1, round(scale * n)) for n in (height, width))
            top, left = (rng.integers(0, n - k + 1) for n, k in ((height, rows), (width, columns)))
            ys = top + np.arange(height) * rows // height
            xs = left + np.arange(width) * columns // width
            image = image[..., ys[:, None], xs]
        if self.shift:
            down, right = rng.integers(-self.shift, self.shift + 1, 2)
            ys = np.clip(np.arange(height) - down, 0, height - 1)
            xs = np.clip(np.arange(width) - right, 0, width - 1)
            image = image[..., ys[:, None], xs]
        if self.flip and rng.random() < 0.5:
            image = image[..., ::-1]
        return image

    def _splices(
        self, rows: np.ndarray, others: np.ndarray, length: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where each token comes from: a span of its own sample with some tokens left out, then
        tokens of another to the end. The first token stays, which many encoders treat apart."""
        samples = np.repeat(rows[:, None], length, 1)
        positions = np.empty((len(rows), length), np.int64)
        for row in range(len(rows)):
            span = max(1, round(length * rng.uniform(min(self.crop, 1 - self.drop), 1)))
            start = rng.integers(0, length - span + 1)
            kept = start + np.flatnonzero(rng.random(span) >= self.drop)
            kept = np.concatenate([[0], kept[kept > 0]])
            positions[row, : len(kept)] = kept
            samples[row, len(kept) :] = others[row]
            positions[row, len(kept) :] = np.arange(len(kept), length)
        return samples, positions


def augment(
    source: Any,
    *,
    count: int = 512,
    kind: Kind | Mapping[str, Kind] = "auto",
    shift: int = 2,
    flip: bool = False,
    noise: float = 0.02,
    mix: float = 0.5,
    crop: float = 1.0,
    drop: float = 0.1,
    seed: int = 0,
) -> Augment:
    """`count` calibration samples from few: those of `source`, then changed ones, made lazily.

    `source` is whatever `calibration=` takes; at most 512 of its samples are kept. `kind` says how
    inputs may be changed, for all or by name: "image" ([N, ..., H, W] floats), "floats", "tokens"
    (integers [N, T, ...]), "keep" (not at all), or "auto": floats of rank 4 are images, other
    floats are floats, integers and booleans of one shape [N, T] are tokens, the rest is kept.

    Images are shifted by up to `shift` pixels, cropped to a share of at least `crop` of either side
    and stretched again, and mirrored where `flip` allows it. With probability `mix` images and
    floats are mixed with another sample (Zhang et al., "mixup", 2018; the first one's share is at
    least 0.7). Noise of `noise` standard deviations of the input is added, inside the range of what
    was given. Tokens are spans of at least `crop`, tokens left out with probability `drop`,
    filled up with the end of another sample, in all token inputs of that length alike.

    Raises `InputError` for options out of range; when it is used, for a model whose inputs share no
    batch dimension.
    """
    return Augment(source, count, kind, shift, flip, noise, mix, crop, drop, seed)


def _kind_of(port: Port, kind: Kind) -> Kind:
    floats = port.dtype in ("FLOAT", "FLOAT16", "DOUBLE", "BFLOAT16")
    if kind == "auto":
        if floats:
            return "image" if len(port.shape) == 4 else "floats"
        return "tokens" if len(port.shape) == 2 else "keep"
    if kind in ("image", "floats") and not floats:
        raise InputError(f"augment: input {port} holds no floats; its kind cannot be {kind!r}.")
    if kind == "image" and len(port.shape) < 3:
        raise InputError(f"augment: input {port} is no image; give its kind as 'floats'.")
    if kind == "tokens" and floats:
        raise InputError(f"augment: input {port} holds floats; its kind cannot be 'tokens'.")
    return kind


def _alike(batches: list[Batch]) -> list[dict[str, np.ndarray]]:
    """The samples by shape, each shape as one batch."""
    groups: dict[tuple[tuple[int, ...], ...], list[Batch]] = {}
    for batch in batches:
        groups.setdefault(tuple(a.shape[1:] for a in batch.values()), []).append(batch)
    return [
        {name: np.concatenate([b[name] for b in group]) for name in group[0]}
        for group in groups.values()
    ]
