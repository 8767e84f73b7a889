"""From a planned program to a measured artifact that is not slower than what it replaces."""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from optcompiler import scratch
from optcompiler.backend import Runner
from optcompiler.binding import bind, fit
from optcompiler.damage import as_tensors, largest_error, nmse, run_batches
from optcompiler.device import interleaved_us
from optcompiler.errors import OptcompilerError, UnsupportedOperatorError, VerificationError
from optcompiler.lock import arithmetic_threads
from optcompiler.program import Program

if TYPE_CHECKING:
    from optcompiler.backend import Kernel
    from optcompiler.ops import OpTable
    from optcompiler.session import Session

NOISE = 1.03
"""An artifact that measures slower by more than this ratio is slower."""

EXACT_ERROR = 1e-3
"""Largest error, relative to the largest output, between an artifact in float and the executor."""

INTEGER_ERROR = 0.05
"""Largest mean squared error, relative to the output's variance, between an artifact with integer
kernels and the executor's simulation of it. Rounding may differ by one level here and there."""


REFERENCE_VALUES = 1021
"""How many elements of an output are kept at most: a prime, so that they lie in every lane."""


CREDIBLE = (0.75, 1.15)
"""A run over the sum of its profiled kernels: outside this range the profile is not believed."""


class StandIn(Runner):
    """The FX executor in place of an artifact for another machine; its time means nothing."""

    timed = False

    def __init__(self, program: Program, ops: OpTable) -> None:
        self._program = program
        self._ops = ops

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return [t.numpy() for t in run_batches(self._program, [inputs], self._ops)[0]]


@dataclass
class Built:
    """A program lowered, loaded and checked, in a scratch directory of its own."""

    label: str
    program: Program
    code: Path
    info: Mapping[str, Any]
    runner: Runner
    kernels: Sequence[Kernel]
    kernel_us: Sequence[float]
    """Predicted time of each kernel, before this artifact taught the cost model anything."""
    predicted_us: float
    measured_us: float | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of everything that the backend wrote."""
        return sum(f.stat().st_size for f in self.code.rglob("*") if f.is_file())

    def close(self) -> None:
        self.runner.close()
        scratch.remove(self.code)


def build(session: Session, program: Program, label: str, *, check: bool = True) -> Built:
    """Lower and load `program`, and compare its outputs with the FX executor's on the check batch.

    Raises `VerificationError` when they disagree or hold NaN where the executor's do not.
    """
    code = scratch.new()
    program = session.bound(program)
    try:
        info = session.backend.lower(program, session.target, code, session.choices)
        if session.backend.runs_here(session.target):
            runner = session.backend.load(code, info, threads=session.target.threads)
        else:
            runner = StandIn(program, session.context.ops)
    except BaseException:
        scratch.remove(code)
        raise
    largest = bind(program, session.target.most)
    kernels = session.backend.kernels(largest, session.target)
    each = [session.cost_model.kernel_us(k, session.profile) for k in kernels]
    total = session.cost_model.program_us(kernels, session.profile)
    built = Built(label, program, code, info, runner, kernels, each, total)
    if check:
        try:
            compare(session, built)
        except BaseException:
            built.close()
            raise
    return built


def compare(session: Session, built: Built) -> None:
    """Raise `VerificationError` when the artifact's outputs are not the executor's.

    Where the executor lacks an operator, they are compared with the model as imported, run by the
    backend. Sizes that have bounds are compared at these and between.
    """
    for sizes in compared_sizes(session.target.bounds):
        _compare_at(session, built, sample_of(session, sizes))


def compared_sizes(bounds: Mapping[str, tuple[int, int]]) -> list[dict[str, int]]:
    """The greatest sizes, the least, and some between that are no multiples of what kernels take at
    a time."""
    most = {dim: high for dim, (_, high) in bounds.items()}
    least = {dim: low for dim, (low, _) in bounds.items()}
    between = {dim: _odd(low, high) for dim, (low, high) in bounds.items()}
    found = [most, least, between]
    return [sizes for i, sizes in enumerate(found) if sizes not in found[:i]]


def _odd(low: int, high: int) -> int:
    """A size between, a third up or more, with no small divisors where there is one."""
    start = low + (high - low) // 3
    inside = range(start, high)
    return next((n for n in inside if all(n % d for d in (2, 3, 5))), start)


def _compare_at(session: Session, built: Built, sample: Mapping[str, np.ndarray]) -> None:
    expected = session.run(built.program, sample)
    if not session.simulated:
        expected = session.run(session.teacher, sample)
    tensors = as_tensors(built.runner.run(sample))
    if len(tensors) != len(expected):
        raise VerificationError(
            f"{session.target}: the artifact gives {len(tensors)} outputs, the program "
            f"{len(expected)}; this is a fault of {session.backend}, report it."
        )
    if not is_integer(built.kernels):
        error = largest_error([expected], [tensors])
        if not error <= EXACT_ERROR:
            raise VerificationError(
                f"{session.target}: the artifact's outputs differ from the program's by "
                f"{error:.1e} of the largest; this is a fault of {session.backend}, report it."
            )
        return
    names = [p.name for p in built.program.outputs]
    plain = len(names) == len(tensors)
    for index, (e, g) in enumerate(zip(expected, tensors, strict=True)):
        name = names[index] if plain else f"part {index}"
        if e.shape != g.shape or e.dtype != g.dtype:
            raise VerificationError(
                f"{session.target}: output {name!r} is {g.dtype}{list(g.shape)}, the program says "
                f"{e.dtype}{list(e.shape)}; this is a fault of {session.backend}, report it."
            )
        if not e.is_floating_point() or not e.numel():
            continue
        error = nmse(e, g)
        if not error <= INTEGER_ERROR:
            raise VerificationError(
                f"{session.target}: output {name!r} differs from the program's by {error:.1e} of "
                f"its variance; this is a fault of {session.backend}, report it."
            )


def is_integer(kernels: Sequence[Kernel]) -> bool:
    """Whether some kernel's arithmetic is not that of floats, so that rounding may differ."""
    return any(k.dtype not in ("fp32", "fp64") for k in kernels)


def reference(session: Session, built: Built) -> bytes:
    """One run on the check batch, to check the code by where there is no Python.

    All little-endian: b"OCREFER1"; the limit (float64) of 1 the largest difference, relative to the
    largest magnitude, or 2 the mean squared difference, relative to the variance (int64); how many
    inputs and outputs there are (int64); for each input its size in bytes (int64) and its data,
    filled up to 8 bytes; for each output its number of elements n, how many c of them are kept
    (int64), and these (float64): the i-th is element i n / c.
    """
    sample = sample_of(session)
    values = session.choices.keep("reference", lambda: _reference_values(session, built, sample))
    integer = is_integer(built.kernels)
    limit, measure = (INTEGER_ERROR, 2) if integer else (EXACT_ERROR, 1)
    inputs = [np.ascontiguousarray(sample[p.name]).tobytes() for p in built.program.inputs]
    parts = [b"OCREFER1", struct.pack("<dqqq", limit, measure, len(inputs), len(values))]
    for data in inputs:
        parts += [struct.pack("<q", len(data)), data, bytes(-len(data) % 8)]
    for size, text in values:
        data = base64.b64decode(text)
        parts += [struct.pack("<qq", size, len(data) // 8), data]
    return b"".join(parts)


def _reference_values(
    session: Session, built: Built, sample: Mapping[str, np.ndarray]
) -> list[tuple[int, str]]:
    """Of each output the number of elements, and those that are kept as base64 of float64."""
    program = built.program if session.simulated else session.teacher
    with arithmetic_threads(1):
        outputs = session.run(program, sample)
    kept: list[tuple[int, str]] = []
    for tensor in outputs:
        flat = tensor.detach().reshape(-1).double().numpy()
        judged = tensor.is_floating_point() or not is_integer(built.kernels)
        count = min(len(flat), REFERENCE_VALUES) if judged else 0
        picked = flat[np.arange(count) * len(flat) // max(count, 1)]
        kept.append((len(flat), base64.b64encode(picked.astype("<f8").tobytes()).decode()))
    return kept


def contiguous(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The batch as C-contiguous arrays."""
    return {
        k: np.asarray(v, order="C") if isinstance(v, np.ndarray) else v  # pyright: ignore[reportUnnecessaryIsInstance]
        for k, v in batch.items()
    }


def sample_of(session: Session, sizes: Mapping[str, int] | None = None) -> dict[str, np.ndarray]:
    """The check batch cut to the target's sizes, contiguous.

    `sizes` are those of dimensions that have bounds, the greatest by default.
    """
    sizes = session.target.most if sizes is None else sizes
    return fit(session.check, session.teacher.inputs, {**session.target.sizes, **sizes})


def timed(session: Session, built: Built) -> bool:
    """Whether the time of a run says something about the target."""
    return session.choices.choose("timed", lambda: built.runner.timed, False)


def measure(session: Session, built: Sequence[Built]) -> None:
    """Time all in turn and store the medians; nothing where time says nothing (an interpreter)."""
    inputs = sample_of(session)

    def times() -> list[float] | None:
        if not all(b.runner.timed for b in built):
            return None
        return interleaved_us([lambda b=b: b.runner.run(inputs) for b in built])

    key = session.choices.numbered(f"microseconds: {', '.join(b.label for b in built)}")
    found = session.choices.choose(key, times, None)
    for b, microseconds in zip(built, found or [], strict=bool(found)):
        b.measured_us = microseconds


def learn_kernels(session: Session, built: Built) -> dict[str, float]:
    """Per-kernel times of one artifact in microseconds by kernel name, {} where it cannot tell.

    Profiling costs time of its own: the times are scaled to add up to what a run takes, and enter
    the session's profile when that scale is near one, since else they say little.
    """
    return session.choices.choose("microseconds: kernels", lambda: _profiled(session, built), {})


def _profiled(session: Session, built: Built) -> dict[str, float]:
    if not built.runner.timed or built.measured_us is None:
        return {}
    times = built.runner.kernel_times_us(sample_of(session))
    if not times:
        return {}
    scale = max(built.measured_us - session.profile.overhead_us, 0.0) / sum(times.values())
    times = {name: scale * t for name, t in times.items()}
    if CREDIBLE[0] <= scale <= CREDIBLE[1]:
        by_name = {k.name: k for k in built.kernels}
        session.learned({by_name[n].signature: t for n, t in times.items() if n in by_name})
    return times


def slower(candidate: Built, reference: Built) -> bool:
    """Whether `candidate` measured slower than `reference` beyond the noise."""
    if candidate.measured_us is None or reference.measured_us is None:
        return False
    return candidate.measured_us > NOISE * reference.measured_us


def try_build(session: Session, program: Program, label: str) -> Built | None:
    """Like `build`, or None where the backend has no way to run this program."""
    try:
        return build(session, program, label, check=False)
    except UnsupportedOperatorError:
        return None
    except OptcompilerError as error:
        session.progress.note(f"{label}: {error}")
        return None
