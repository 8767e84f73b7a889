"""Taking a quantised program through its units, one after the other."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from optcompiler.cache import Cache as Disk
from optcompiler.program import Program, shape_of
from optcompiler.rewriting import Batch, Declined, PassContext
from optcompiler_passes._boundaries import batch_free, module_of
from optcompiler_passes._devices import deterministic, device_named, device_of
from optcompiler_passes._kd import work_per_sample
from optcompiler_passes._reconstruction import (
    LEAST_WEIGHT,
    Cache,
    Learner,
    Lesson,
    NoSamples,
    State,
    Tensor,
    learn,
    loss_of,
)
from optcompiler_passes._samples import size_of
from optcompiler_passes._units import Unit, units_of

if TYPE_CHECKING:
    from optcompiler_passes.reconstruct import Reconstruct

MOST_BYTES = 1 << 30
"""Of values of all samples that are held between units."""
CHUNK = 64
JUDGED = 0.25
LABELLED = 128
"""Samples from which the weights of channels are taken."""


def reconstruct(
    student: Program, context: PassContext, options: Reconstruct
) -> list[dict[str, Any]]:
    """Train `student` in place; what each unit learnt, as plain values.

    Raises `Declined` when no unit came nearer to the teacher.
    """
    kept = context.choices.keep("reconstruct: device", lambda: device_of(options.device))
    with deterministic():
        try:
            states, told = _Work(student, context, options, device_named(kept)).done()
        except NoSamples as reason:
            raise Declined(f"{reason}.") from reason
    if not any(states):
        raise Declined("no block came nearer to the teacher on data held out.")
    _write(student, {name: array for state in states for name, array in state.items()})
    return told


def _write(program: Program, state: Mapping[str, np.ndarray]) -> None:
    values = program.graph.initializers
    for name, array in state.items():
        value = values[name]
        kind = value.const_value.dtype if value.const_value is not None else value.dtype
        assert kind is not None
        program.set_weight(value, array.astype(kind.numpy()))


class _Work:
    def __init__(
        self, student: Program, context: PassContext, options: Reconstruct, device: torch.device
    ) -> None:
        self.context = context
        self.options = options
        self.device = device
        self.start = student
        self.calibration, self.holdout = _alike(context.calibration, context.holdout)
        self.batches = [*self.calibration, *self.holdout]
        teacher = context.teacher
        sizes = {size_of(b) for b in self.batches}
        fixed = {p.shape[0] for p in teacher.inputs if p.shape and isinstance(p.shape[0], int)}
        if fixed:
            student, teacher = batch_free(student), batch_free(teacher)
        self.units = units_of(student, teacher, options.unit_weights)
        self.chunk = CHUNK if not fixed else max(sizes)
        self.shared = _shared(self.units)
        self.base = context.seed * 1000

    # -- data ---------------------------------------------------------------------------------

    def _given(self) -> tuple[Cache, Tensor, Tensor]:
        """Inputs by name, and which samples are for training and which for judging."""
        names = [p.name for p in self.start.inputs]
        each = max(self._bytes_per_sample(), 1)
        most = max(8, min(self.options.samples, MOST_BYTES // each))
        training, judging = _taken(self.calibration, self.holdout, most)
        arrays = {
            n: torch.from_numpy(np.concatenate([b[n] for b in (*training, *judging)]))
            for n in names
        }
        count, held = sum(map(size_of, training)), sum(map(size_of, judging))
        if not held:
            held = int(count * JUDGED)
            count -= held
        if not held:
            return Cache(arrays), torch.arange(count), torch.arange(count)
        return Cache(arrays), torch.arange(count), torch.arange(count, count + held)

    def _bytes_per_sample(self) -> int:
        """Of the largest values that are held at once: two programs' inputs and goals."""
        largest = 0
        for unit in self.units:
            values = (*unit.student.graph.inputs, *unit.student.graph.outputs)
            sizes = [
                4 * int(np.prod([d for d in shape_of(v)[1:] if isinstance(d, int)]))
                for v in values
                if shape_of(v)
            ]
            largest = max(largest, sum(sizes))
        return 2 * largest

    # -- the way through ----------------------------------------------------------------------

    def done(self) -> tuple[list[State], list[dict[str, Any]]]:
        options, ops = self.options, self.context.ops
        given, training, judging = self._given()
        student, teacher = given, Cache(dict(given.values))
        weights = self._weights() if options.weighting == "fisher" else {}
        steps = None
        states: list[State] = []
        told: list[dict[str, Any]] = []
        disk, key = Disk(), self._key()
        for index, unit in enumerate(
            self.context.progress.track(self.units, "reconstructing blocks")
        ):
            generator = torch.Generator().manual_seed(self.base + index)
            learner = Learner(unit, self.shared, options, ops, self.device, generator)
            if steps is None:
                bits = min((_bits(u) for u in self.units), default=8)
                each = work_per_sample(self.context) * options.batch_size
                steps = options.steps_for(bits, each)
            expected = teacher.run(unit.teacher, ops, self.chunk, self.device)
            facts = {**key, "unit": index, "steps": steps}
            known = _read(disk, facts)
            if known is None:
                lesson = Lesson(
                    student, teacher, expected, training, judging, unit.ends,
                    loss_of([expected[n][training] for n in unit.ends], weights, unit.ends),
                )  # fmt: skip
                found = learn(learner, lesson, options, steps, generator, self.device)
                known = (found.state or {}, found.before, found.after)
                _keep(disk, facts, known)
            state, before, after = known
            _write(unit.student, state)
            student.run(unit.student, ops, self.chunk, self.device)
            later = self.units[index + 1 :]
            read = {p.name for u in later for part in (u.student, u.teacher) for p in part.inputs}
            for cache in (student, teacher):
                cache.forget(frozenset(read))
            states.append(state)
            told.append({
                "ends": list(unit.ends), "before": _rounded(before), "after": _rounded(after)
            })  # fmt: skip
        return states, told

    def _weights(self) -> dict[str, Tensor]:
        """Weights of channels by value, broadcastable to it: mean squared gradients."""
        ends = [n for u in self.units[:-1] for n in u.ends]
        if not ends:
            return {}
        teacher = self.context.teacher
        module = module_of(teacher, self.context, ends, True, self.device)
        count = len(teacher.outputs)
        names = [p.name for p in teacher.inputs]
        generator = torch.Generator().manual_seed(self.base + 999)
        sums: dict[str, Tensor] = {}
        shapes: dict[str, list[int]] = {}
        seen = 0
        for batch in self.batches:
            inputs = [torch.from_numpy(np.array(batch[n])).to(self.device) for n in names]
            found = module(*inputs)
            likelihood = _likelihood(found[:count], generator)
            if not likelihood.requires_grad:
                return {}
            values = dict(zip(ends, found[count:], strict=True))
            values = {n: v for n, v in values.items() if v.requires_grad}
            found_gradients: Any = torch.autograd.grad(
                likelihood, list(values.values()), allow_unused=True
            )
            gradients: Sequence[Tensor | None] = found_gradients
            for name, gradient in zip(values, gradients, strict=True):
                if gradient is None:
                    continue
                axis = 1 if gradient.ndim != 3 else 2  # [N, C, …], but [N, tokens, C]
                others = [k for k in range(gradient.ndim) if k != axis]
                part = gradient.square().double().sum(others)
                sums[name] = sums.get(name, torch.zeros_like(part)) + part
                shapes[name] = [-1 if k == axis else 1 for k in range(gradient.ndim)]
            seen += size_of(batch)
            if seen >= LABELLED:
                break
        return {n: _normalised(s).reshape(shapes[n]) for n, s in sums.items()}

    def _key(self) -> dict[str, Any]:
        data = hashlib.sha256()
        for batch in self.batches:
            for name in sorted(batch):
                data.update(name.encode() + np.ascontiguousarray(batch[name]).tobytes())
        options = {k: v for k, v in asdict(self.options).items() if k != "device"}
        return {
            "made by": "reconstruct 1", "student": self.start.content_hash(),
            "teacher": self.context.teacher.content_hash(), "data": data.hexdigest(),
            "options": json.dumps(options, sort_keys=True), "seed": self.context.seed,
            "device": self.device.type, "threads": torch.get_num_threads(),
            "torch": torch.__version__, "held out": len(self.holdout),
        }  # fmt: skip


# -- samples --------------------------------------------------------------------------------


def _alike(
    calibration: Sequence[Batch], holdout: Sequence[Batch]
) -> tuple[list[Batch], list[Batch]]:
    """Those batches whose samples have the shape that most samples have.

    Raises `Declined` where inputs do not share their first axis.
    """
    counts: dict[tuple[tuple[int, ...], ...], int] = {}
    for batch in (*calibration, *holdout):
        sizes = {a.shape[0] if a.ndim else -1 for a in batch.values()}
        if len(sizes) != 1 or -1 in sizes:
            raise Declined("the inputs do not have samples along one first axis.")
        shape = tuple(a.shape[1:] for a in batch.values())
        counts[shape] = counts.get(shape, 0) + size_of(batch)
    most = max(counts, key=lambda s: counts[s])

    def kept(batches: Sequence[Batch]) -> list[Batch]:
        return [b for b in batches if tuple(a.shape[1:] for a in b.values()) == most]

    return kept(calibration), kept(holdout)


def _taken(
    calibration: Sequence[Batch], holdout: Sequence[Batch], most: int
) -> tuple[list[Batch], list[Batch]]:
    """Batches with at most so many samples together, the shares of both as they were."""
    total = sum(map(size_of, (*calibration, *holdout)))
    parts: list[list[Batch]] = []
    for batches in (calibration, holdout):
        left = max(1, most * sum(map(size_of, batches)) // max(total, 1)) if batches else 0
        kept: list[Batch] = []
        for batch in batches:
            if left <= 0:
                break
            kept.append({n: a[:left] for n, a in batch.items()})
            left -= size_of(batch)
        parts.append(kept)
    return parts[0], parts[1]


def _likelihood(outputs: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """The log-likelihood of outputs drawn from the model itself, summed over samples."""
    total = torch.zeros(())
    for output in outputs:
        if not output.is_floating_point() or not output.requires_grad:
            continue
        if output.ndim and output.shape[-1] > 1:
            scores = torch.log_softmax(output.float(), -1).flatten(0, -2)
            drawn = torch.multinomial(scores.detach().exp().cpu(), 1, generator=generator)
            total = total + scores.gather(1, drawn.to(scores.device)).sum()
        else:
            noise = torch.randn(output.shape, generator=generator)
            total = total + (output.float() * noise.to(output.device)).sum()
    return total


def _normalised(squares: Tensor) -> Tensor:
    mean = squares.mean()
    if not float(mean) > 0:
        return torch.ones_like(squares).float()
    weights = (squares / mean).clamp_min(LEAST_WEIGHT)
    return (weights / weights.mean()).float()


# -- units ----------------------------------------------------------------------------------


def _shared(units: Sequence[Unit]) -> frozenset[str]:
    """Initializers that several units read: none of them may change one."""
    seen: dict[str, int] = {}
    for unit in units:
        for name in unit.student.graph.initializers:
            seen[name] = seen.get(name, 0) + 1
    return frozenset(n for n, count in seen.items() if count > 1)


def _bits(unit: Unit) -> int:
    """The fewest bits of a quantised value."""
    kinds = [n.outputs[0].dtype for n in unit.student.graph if n.op_type == "QuantizeLinear"]
    return min((int(8 * k.itemsize) for k in kinds if k is not None), default=8)


# -- what is kept ---------------------------------------------------------------------------

_KIND = "reconstruct"


def _keep(disk: Disk, facts: Mapping[str, Any], known: tuple[State, float, float]) -> None:
    state, before, after = known
    content = io.BytesIO()
    losses = np.array([before, after], np.float64)
    arrays = {"losses": losses, **{f"w/{n}": a for n, a in state.items()}}
    np.savez(content, allow_pickle=False, **arrays)
    disk.put(_KIND, facts, content.getvalue())


def _read(disk: Disk, facts: Mapping[str, Any]) -> tuple[State, float, float] | None:
    content = disk.get(_KIND, facts)
    if content is None:
        return None
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        before, after = archive["losses"].tolist()
        state = {n.removeprefix("w/"): archive[n] for n in archive.files if n != "losses"}
    return state, before, after


def _rounded(loss: float) -> float:
    return float(f"{loss:.4g}")
