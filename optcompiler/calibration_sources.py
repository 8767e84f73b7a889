"""Calibration data that is made, not read: the protocol, and the teacher as its sources run it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from optcompiler.errors import InputError
from optcompiler.pipeline import parse_options, parse_value

if TYPE_CHECKING:
    import torch

    from optcompiler.ops import OpTable
    from optcompiler.program import Port, Program
    from optcompiler.rewriting import Batch, Progress
    from optcompiler.signature import Signature

CHUNK = 32
"""Samples that are run at once."""


@dataclass(frozen=True)
class Given:
    """What a source may use: the program as imported, the interface of the model, the operators,
    the seed of the compile, and where to report."""

    teacher: Program
    signature: Signature
    ops: OpTable
    seed: int
    progress: Progress

    @property
    def ports(self) -> tuple[Port, ...]:
        return self.signature.inputs

    def rng(self, seed: int) -> np.random.Generator:
        """Random numbers for a source of that seed in a compile of this one."""
        return np.random.default_rng([self.seed, seed])


class CalibrationSource(ABC):
    """Makes batches once the model is imported. Subclasses are frozen dataclasses whose fields are
    their options; a field `source` is what they take samples from, in any form that
    `calibration=` takes.

    The same options, model, data and seed must give the same batches: a locked compile makes them
    again and compares their hash.
    """

    name: ClassVar[str]
    """How the command line and the manifest call it."""

    count: int
    """How many samples there will be, at most."""

    @abstractmethod
    def batches(self, given: Given) -> Iterable[Batch]:
        """Inputs by name, each with the batch dimension first, of any size that suits."""

    def options(self) -> dict[str, Any]:
        """The fields as JSON takes them, for the manifest: data of the user's is only "data"."""
        described: dict[str, Any] = {"made_by": self.name}
        for field in fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, field.name)
            if isinstance(value, CalibrationSource):
                value = value.options()
            elif field.name == "source":
                value = "data"
            described[field.name] = value
        return described

    @classmethod
    def from_text(cls, text: str, **values: Any) -> Self:
        """A source of options as the command line has them: "count=64,seed=1"."""
        import typing

        what = f"calibration {cls.name}"
        hints = typing.get_type_hints(cls)
        known = [f.name for f in fields(cls) if f.name != "source"]  # pyright: ignore[reportArgumentType]
        for key, value in parse_options(text, what).items():
            if key not in known:
                raise InputError(f"{what}: no option {key!r}; it has {', '.join(known)}.")
            try:
                values[key] = parse_value(value, hints[key])
            except ValueError as error:
                raise InputError(f"{what}: {key}={value!r}: {error}.") from error
        return cls(**values)


def batch_dimension(ports: Sequence[Port]) -> int | str | None:
    """The dimension that every input begins with, when there is one."""
    first = {p.shape[0] if p.shape else None for p in ports}
    return first.pop() if len(first) == 1 and first != {"?"} else None


def sample_shape(port: Port, given: Given, symbolic: int) -> tuple[int, ...]:
    """The shape of one sample; symbolic dimensions have that size, or the nearest allowed."""
    bounds = {name: (least, most) for name, least, most in given.signature.bounds}
    found: list[int] = []
    for size in port.shape[1:]:
        least, most = bounds.get(str(size), (1, symbolic))
        found.append(size if isinstance(size, int) else min(max(symbolic, least), most))
    return tuple(found)


def affordable(given: Given, count: int, least: int, most: int, macs: float) -> int:
    """How many times `count` samples may go through the teacher for that many multiply-accumulates,
    from `least` to `most`: a bound on time that is the same on every machine."""
    from optcompiler.binding import resolved

    one = 0
    for node in resolved(given.teacher).graph:
        spec = given.ops.get(node)
        one += spec.cost(node).macs if spec else 0
    first = given.ports[0].shape[0]
    whole = count * one / (first if isinstance(first, int) else 1)
    return round(min(max(macs / max(whole, 1), least), most))


def sample_count(batch: Batch) -> int:
    return next(iter(batch.values())).shape[0]


def part(batch: Batch, start: int, stop: int) -> dict[str, np.ndarray]:
    return {name: array[start:stop] for name, array in batch.items()}


class Watched:
    """The teacher as a torch module that gives its outputs and then the values `names`, all with
    the batch first, for any number of samples; differentiable in its inputs."""

    def __init__(self, given: Given, names: Sequence[str] = ()) -> None:
        from optcompiler.executor import to_torch

        self._module = to_torch(given.teacher, given.ops, extra_outputs=names, trainable=False)
        self._inputs = [p.name for p in given.teacher.inputs]
        dimension = batch_dimension(given.ports)
        self._size = dimension if isinstance(dimension, int) else None
        self.count = len(given.teacher.outputs)

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        import torch

        ordered = [inputs[name] for name in self._inputs]
        samples, size = ordered[0].shape[0] if ordered[0].ndim else 1, self._size
        if size is None or samples == size:
            return list(self._module(*ordered))
        short = -samples % size
        if short:
            again = torch.arange(samples + short) % samples
            ordered = [t[again] for t in ordered]
        parts = zip(*(t.split(size) for t in ordered), strict=True)
        made = zip(*(self._module(*p) for p in parts), strict=True)
        return [torch.cat(list(pieces))[:samples] for pieces in made]

    def arrays(self, batch: Batch) -> list[torch.Tensor]:
        """The same for arrays, without gradients."""
        import torch

        from optcompiler.executor import argument_of

        with torch.no_grad():
            return self({name: argument_of(array.copy()) for name, array in batch.items()})
