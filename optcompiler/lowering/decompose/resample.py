"""Resize and grid sampling as weighted sums of gathered elements."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from optcompiler.lowering.decompose.tape import Tape, ints, typed
from optcompiler.lowering.expand import Decomposition, Expansion, Facts
from optcompiler.ops.spec import attributes_of
from optcompiler.ops.taps import Resampling, taps_of
from optcompiler.program import static_shape


def resize(node: ir.Node, facts: Facts) -> Expansion | None:
    """Each axis on its own: a few gathers by known places, times known weights."""
    x = node.inputs[0]
    assert x is not None
    given = attributes_of(node)
    old = node.op_type == "Upsample"
    roi, scales, sizes = (
        (None, given.get("scales") or facts.array(node, 1), None)
        if old
        else (facts.array(node, i) for i in (1, 2, 3))
    )
    shape, target = facts.shapes[x], static_shape(node.outputs[0])
    crops = given.get("coordinate_transformation_mode") == "tf_crop_and_resize"
    for place, known in ((1, roi), (2, scales)):
        unknown = place < len(node.inputs) and node.inputs[place] is not None and known is None
        if unknown and not old and (place == 2 or crops):
            return None
    scales = None if scales is None or not len(scales) else scales
    if scales is None and sizes is None:
        policy = given.get("keep_aspect_ratio_policy") or "stretch"
        if target is None or policy != "stretch":
            return None
        sizes = np.array([target[a] for a in given.get("axes") or range(len(shape))])
    if old:
        given = {
            "mode": given.get("mode"), "coordinate_transformation_mode": "asymmetric",
            "nearest_mode": "floor",
        }  # fmt: skip
    tape = Tape()
    y = x
    real = x.dtype is not None and x.dtype.is_floating_point()
    if not real and given.get("mode") != "nearest":
        y = tape("Cast", y, to=ir.DataType.DOUBLE)
    like = y
    box, factors, targets = (
        None if a is None else np.asarray(a).tolist() for a in (roi, scales, sizes)
    )
    for axis, plan in Resampling.of(shape, box, factors, targets, given):
        index, weight, outside = taps_of(plan)
        total: ir.Value | None = None
        wide = [-1] + [1] * (len(shape) - axis - 1)
        for k in range(index.shape[1]):
            if not weight[:, k].any():
                continue
            part = tape("Gather", y, index[:, k].astype(np.int64), axis=axis)
            if not (weight[:, k] == 1).all():
                part = tape("Mul", part, typed(weight[:, k].reshape(wide), like))
            total = part if total is None else tape("Add", total, part)
        assert total is not None
        if outside is not None:
            fill = typed(given.get("extrapolation_value") or 0.0, like)
            total = tape("Where", outside.reshape(wide), fill, total)
        y = total
    if like is not x:
        y = tape("Cast", tape("Round", y), to=x.dtype)
    return tape.done(tape("Identity", y))


class _Grid:
    """The sampled places of one GridSample: [N, 1, points] along every spatial axis."""

    def __init__(self, node: ir.Node, facts: Facts) -> None:
        self.tape = Tape()
        given = attributes_of(node)
        x, grid = node.inputs[0], node.inputs[1]
        assert x is not None
        assert grid is not None
        self.x, self.align = x, bool(given.get("align_corners"))
        self.mode, self.padding = str(given.get("mode")), str(given.get("padding_mode"))
        self.shape, self.places = facts.shapes[x], facts.shapes[grid]
        self.size = self.shape[2:]
        self.points = int(np.prod(self.places[1:-1]))
        flat = self.tape.reshape(grid, [self.places[0], 1, self.points, len(self.size)])
        if grid.dtype != x.dtype:
            flat = self.tape("Cast", flat, to=x.dtype)
        self.at = [self._unnormalised(flat, axis) for axis in range(len(self.size))]

    def _unnormalised(self, grid: ir.Value, axis: int) -> ir.Value:
        tape, n = self.tape, self.size[axis]
        place = len(self.size) - 1 - axis
        g = tape("Gather", grid, np.array(place, np.int64), axis=3)
        scale, shift = ((n - 1) / 2, (n - 1) / 2) if self.align else (n / 2, (n - 1) / 2)
        return tape("Add", tape("Mul", g, typed(scale, self.x)), typed(shift, self.x))

    def index(self, place: ir.Value, axis: int) -> tuple[ir.Value, ir.Value | None]:
        """A whole place as an index into the axis, and where it is inside."""
        tape, n = self.tape, self.size[axis]
        where = tape("Cast", place, to=ir.DataType.INT64)
        if self.padding == "reflection":
            where = self._reflected(where, n)
        inside = None
        if self.padding == "zeros":
            above = tape("GreaterOrEqual", where, ints(0))
            inside = tape("And", above, tape("Less", where, ints(n)))
        return tape("Min", tape("Max", where, ints(0)), ints(n - 1)), inside

    def _reflected(self, where: ir.Value, n: int) -> ir.Value:
        tape = self.tape
        if self.align:
            period = max(2 * (n - 1), 1)
            t = tape("Mod", where, ints(period))
            return tape("Min", t, tape("Sub", ints(period), t)) if n > 1 else t
        t = tape("Mod", where, ints(2 * n))
        return tape("Min", t, tape("Sub", ints(2 * n - 1), t))

    def sample(self, places: Sequence[ir.Value]) -> ir.Value:
        """Elements [N, C, points] at whole places, 0 outside where that is the padding."""
        tape = self.tape
        n, c = self.shape[:2]
        total: ir.Value | None = None
        keep: ir.Value | None = None
        for axis, place in enumerate(places):
            index, inside = self.index(place, axis)
            step = tape("Mul", index, ints(int(np.prod(self.size[axis + 1 :]))))
            total = step if total is None else tape("Add", total, step)
            if inside is not None:
                keep = inside if keep is None else tape("And", keep, inside)
        assert total is not None
        every = tape("Expand", total, ints(n, c, self.points))
        flat = tape.reshape(self.x, [n, c, int(np.prod(self.size))])
        found = tape("GatherElements", flat, every, axis=2)
        return found if keep is None else tape("Where", keep, found, typed(0, self.x))

    def offsets(self, axis: int) -> list[tuple[ir.Value, ir.Value]]:
        """Whole places around the point along an axis, and their weights."""
        tape, x = self.tape, self.x
        at = self.at[axis]
        base = tape("Floor", at)
        t = tape("Sub", at, base)
        one = typed(1, x)
        if self.mode in {"linear", "bilinear"}:
            return [(base, tape("Sub", one, t)), (tape("Add", base, one), t)]
        found: list[tuple[ir.Value, ir.Value]] = []
        for k in (-1, 0, 1, 2):
            distance = tape("Abs", tape("Sub", t, typed(k, x)))
            place = tape("Add", base, typed(k, x))
            found.append((place, self._cubic(distance, near=k in (0, 1))))
        return found

    def _cubic(self, d: ir.Value, near: bool) -> ir.Value:
        """Keys' kernel (1981), equation 15, with a = -0.75."""
        a = -0.75
        terms = [a + 2, -(a + 3), 0, 1] if near else [a, -5 * a, 8 * a, -4 * a]
        y = self.tape.constant(typed(terms[0], self.x))
        for term in terms[1:]:
            y = self.tape("Add", self.tape("Mul", y, d), typed(term, self.x))
        return y


def grid_sample(node: ir.Node, facts: Facts) -> Expansion | None:
    grid = _Grid(node, facts)
    tape = grid.tape
    if grid.mode == "nearest":
        total = grid.sample([tape("Round", at) for at in grid.at])
    else:
        corners = [grid.offsets(axis) for axis in range(len(grid.size))]
        sums: list[ir.Value] = []
        for corner in itertools.product(*corners):
            value = grid.sample([place for place, _ in corner])
            for _, weight in corner:
                value = tape("Mul", value, weight)
            sums.append(value)
        total = sums[0]
        for more in sums[1:]:
            total = tape("Add", total, more)
    return tape.done(tape.reshape(total, (*grid.shape[:2], *grid.places[1:-1])))


RESAMPLE: Mapping[str, Decomposition] = {
    "Resize": resize, "Upsample": resize, "GridSample": grid_sample,
}  # fmt: skip
