"""Integer inputs without data: what the teacher writes itself, or rows of the tables it reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import onnx_ir as ir
import torch

from optcompiler.calibration_sources import CHUNK, Given, Watched, affordable, sample_shape
from optcompiler.program import Program, static_shape

if TYPE_CHECKING:
    from optcompiler.rewriting import Batch
    from optcompiler.synthesizing import Synthetic

LENGTH = 32
"""Of a symbolic dimension of tokens."""

LEAST_SWEEPS, MOST_SWEEPS = 8, 64
MOST_MACS = 2e12
"""Multiply-accumulates of all sweeps, which decide their number between those two."""

MOST_NOISE = 1 << 24
"""Elements of the noise for one chunk of sequences."""

FEW_ROWS = 4
"""Of a table of kinds of tokens, as of first and second sentence."""

PADDED = 0.5
"""Share of samples that end before the others, where there is a mask."""

_KEEPS_IDS = frozenset({"Cast", "Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Unsqueeze"})

Role = Literal["tokens", "kinds", "positions", "rows", "mask"]


@dataclass(frozen=True)
class Integers:
    """What an integer input is: `rows` are those of the table it picks from, 0 without one."""

    role: Role
    rows: int = 0


def token_batches(options: Synthetic, given: Given) -> Iterator[Batch]:
    """Batches of at most `CHUNK` samples."""
    roles = roles_of(given)
    writer = Writer.of(given, roles)
    sweeps = options.steps
    if sweeps is None:
        sweeps = affordable(given, options.count, LEAST_SWEEPS, MOST_SWEEPS, MOST_MACS)
    starts = range(0, options.count, CHUNK)
    for index, start in enumerate(given.progress.track(starts, "synthetic calibration samples")):
        size = min(CHUNK, options.count - start)
        rng = given.rng(options.seed + 1 + index)
        batch = integer_inputs(given, size, options, rng)
        if writer is not None:
            batch = writer.written(batch, sweeps, rng)
        yield batch


def integer_inputs(
    given: Given, count: int, options: Synthetic, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """`count` samples of all inputs that are no floats, by their roles."""
    roles = roles_of(given)
    default = options.length or LENGTH
    shapes = {p.name: (count, *sample_shape(p, given, default)) for p in given.ports}
    masked = [n for n, r in roles.items() if r.role == "mask" and len(shapes[n]) == 2]
    lengths: dict[int, np.ndarray] = {}
    for name in masked:
        full = shapes[name][1]
        short = rng.random(count) < PADDED
        drawn = rng.integers(max(1, full // 4), full + 1, count)
        lengths.setdefault(full, np.where(short, drawn, full))
    made: dict[str, np.ndarray] = {}
    for port in given.ports:
        if port.name not in roles:
            continue
        integers, shape = roles[port.name], shapes[port.name]
        dtype = ir.DataType[port.dtype].numpy()
        if integers.role in ("tokens", "rows"):
            array = rng.integers(0, integers.rows, shape)
        elif integers.role == "kinds":
            array = np.zeros(shape, np.int64)
        elif integers.role == "positions":
            array = np.broadcast_to(np.arange(shape[-1]) % integers.rows, shape)
        else:
            array = np.ones(shape, np.int64)
        if len(shape) == 2 and shape[1] in lengths and integers.role in ("tokens", "mask"):
            array = np.where(np.arange(shape[1]) < lengths[shape[1]][:, None], array, 0)
        made[port.name] = np.ascontiguousarray(array.astype(dtype))
    return made


# -- roles ------------------------------------------------------------------------------------


def roles_of(given: Given) -> dict[str, Integers]:
    """What each input that holds no floats is, by what reads it.

    One that a Gather picks rows of a constant table by is "tokens" where that table is the largest;
    others are "kinds" for a table of few rows, "positions" for one at least as long as a sample of
    the tokens' shape, and else "rows". What no table is picked by is a "mask".
    """
    rows = {p.name: table_rows(given.teacher, p.name) for p in given.ports
            if p.dtype.startswith(("INT", "UINT", "BOOL"))}  # fmt: skip
    most = max(rows.values(), default=0)
    shapes = {p.name: p.shape for p in given.ports}
    largest = next((n for n, r in rows.items() if r == most), "")
    found: dict[str, Integers] = {}
    for name, count in rows.items():
        if not count:
            found[name] = Integers("mask")
        elif count == most:
            found[name] = Integers("tokens", count)
        elif count <= FEW_ROWS:
            found[name] = Integers("kinds", count)
        elif shapes[name] == shapes[largest] and _as_long(shapes[name], count):
            found[name] = Integers("positions", count)
        else:
            found[name] = Integers("rows", count)
    return found


def table_rows(program: Program, name: str) -> int:
    """Rows of the smallest constant table that a Gather picks from by the input `name`."""
    start = next((v for v in program.graph.inputs if v.name == name), None)
    waiting, seen, found = [start] if start is not None else [], {name}, list[int]()
    while waiting:
        value = waiting.pop()
        for node, operand in value.uses():
            if node.op_type == "Gather" and operand == 1 and not node.domain:
                table = node.inputs[0]
                axis = node.attributes.get_int("axis", 0)
                shape = static_shape(table) if table is not None else None
                if table is not None and shape and _is_stored(table):
                    found.append(shape[axis])
            elif node.op_type in _KEEPS_IDS and operand == 0 and not node.domain:
                (result,) = node.outputs
                if str(result.name) not in seen:
                    seen.add(str(result.name))
                    waiting.append(result)
    return min(found, default=0)


def _is_stored(value: ir.Value) -> bool:
    node = value.producer()
    if node is None:
        return value.const_value is not None
    return node.op_type in ("Cast", "DequantizeLinear", "Identity") and all(
        v is None or _is_stored(v) for v in node.inputs
    )


def _as_long(shape: tuple[int | str, ...], rows: int) -> bool:
    last = shape[-1]
    return len(shape) == 2 and (not isinstance(last, int) or 1 < last <= rows)


# -- a teacher that writes --------------------------------------------------------------------


@dataclass(frozen=True)
class Writer:
    """A causal language model: which input are its tokens, how many there are, and which output
    scores the next one."""

    watched: Watched
    tokens: str
    rows: int
    output: int

    @classmethod
    def of(cls, given: Given, roles: Mapping[str, Integers]) -> Writer | None:
        """The teacher as a writer, where it is one: an output [N, T, V] over the rows of the table
        that its only tokens [N, T] pick from, of which no element depends on later tokens."""
        tokens = [n for n, r in roles.items() if r.role == "tokens"]
        if len(tokens) != 1 or len(roles) != len(given.ports):
            return None
        rows = roles[tokens[0]].rows
        for index, value in enumerate(given.teacher.graph.outputs):
            shape = value.shape
            floats = value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
            if floats and shape is not None and len(shape) == 3 and shape[2] == rows:
                made = cls(Watched(given), tokens[0], rows, index)
                return made if made._causal(given) else None
        return None

    def _scores(self, batch: Batch) -> torch.Tensor:
        return self.watched.arrays(batch)[self.output].float()

    def _causal(self, given: Given) -> bool:
        from optcompiler.synthesizing import Synthetic

        batch = integer_inputs(given, 2, Synthetic(), np.random.default_rng(0))
        ids = batch[self.tokens]
        length = ids.shape[1]
        if length < 2:
            return False
        changed = ids.copy()
        changed[:, length // 2 :] = (changed[:, length // 2 :] + 1) % self.rows
        one, other = (self._scores({**batch, self.tokens: i}) for i in (ids, changed))
        if one.shape[:2] != ids.shape:
            return False
        before = slice(0, length // 2)
        return torch.allclose(one[:, before], other[:, before], atol=1e-4, rtol=1e-3)

    def written(
        self, batch: dict[str, np.ndarray], sweeps: int, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """The batch with tokens sampled by the teacher after the first ones, at temperature 1.

        All positions are drawn at once from what precedes them, again and again with the same noise
        (Gumbel's, so that the greatest is a sample), as in Jacobi iteration (Song et al.,
        "Accelerating feedforward computation", 2021): a sweep settles at least one more position of
        every sequence, and at most `sweeps` are made.
        """
        ids = batch[self.tokens]
        count, length = ids.shape
        size = max(1, MOST_NOISE // (length * self.rows))
        done: list[np.ndarray] = []
        for start in range(0, count, size):
            part = {n: a[start : start + size].copy() for n, a in batch.items()}
            generator = torch.Generator().manual_seed(int(rng.integers(0, 1 << 31)))
            current = torch.from_numpy(part[self.tokens].astype(np.int64))
            uniform = torch.rand(len(current), length - 1, self.rows, generator=generator)
            noise = uniform.clamp_(1e-20, 1 - 1e-7).log_().neg_().log_().neg_()
            for _ in range(min(sweeps, length - 1)):
                part[self.tokens] = current.numpy().astype(ids.dtype)
                drawn = (self._scores(part)[:, :-1] + noise).argmax(2)
                if torch.equal(drawn, current[:, 1:]):
                    break
                current[:, 1:] = drawn
            done.append(current.numpy().astype(ids.dtype))
        return {**batch, self.tokens: np.concatenate(done)}
