"""How channels pass through operators that move elements: joins, reshapes, slices, resizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from optcompiler.ops.axes import (
    Extents,
    Repair,
    aligned,
    along,
    dims,
    integers,
    is_weight,
    operand,
    opset_of,
    put_integers,
    row_major,
    spread,
)
from optcompiler.ops.spec import Axis, ChannelRule, Channels, Coupling, attributes_of

if TYPE_CHECKING:
    from optcompiler.program import Program

RESHAPES = ("Flatten", "Squeeze", "Unsqueeze")


def concat(node: ir.Node) -> Channels | None:
    y = node.outputs[0]
    return _pieces(node, y, [v for v in node.inputs if v is not None], None)


def split(node: ir.Node) -> Channels | None:
    x = node.inputs[0]
    if x is None or (operand(node, 1) is not None and integers(node, 1, "split") is None):
        return None
    return _pieces(node, x, list(node.outputs), _split_sizes)


def _pieces(
    node: ir.Node, whole: ir.Value, pieces: list[ir.Value], repair: Repair | None
) -> Channels | None:
    shape = dims(whole)
    if shape is None:
        return None
    axis = along(int(attributes_of(node)["axis"]), len(shape))
    couplings: list[Coupling] = []
    offset: int | None = 0
    for piece in pieces:
        extent = dims(piece)
        if extent is None:
            return None
        couplings += [
            Coupling(Axis(piece, k), Axis(whole, k)) for k in range(len(shape)) if k != axis
        ]
        size = extent[axis]
        if offset is None or not isinstance(size, int):
            offset = None
            continue
        couplings.append(Coupling(Axis(piece, axis), Axis(whole, axis), target_offset=offset))
        offset += size
    if offset is None:
        couplings = [c for c in couplings if c.target.axis != axis]
    return Channels(tuple(couplings), repair=repair)


def _split_sizes(program: Program, node: ir.Node, extents: Extents) -> None:
    shape = dims(node.outputs[0])
    assert shape is not None
    axis = along(int(attributes_of(node)["axis"]), len(shape))
    if not any(k.axis == axis for k in extents):
        return
    sizes: list[int] = []
    for out in node.outputs:
        old = (dims(out) or ())[axis]
        assert isinstance(old, int)
        sizes.append(extents.get(Axis(out, axis), old))
    if operand(node, 1) is not None:
        put_integers(program, node, 1, np.array(sizes, np.int64))
    elif opset_of(node) < 13:
        node.attributes["split"] = ir.AttrInt64s("split", sizes)
    else:
        node.attributes.pop("num_outputs", None)
        node.resize_inputs(2)
        stated = program.add_weight(f"{node.name}.split", np.array(sizes, np.int64))
        node.replace_input_with(1, stated)


def reshape_like(node: ir.Node) -> Channels | None:
    """Row-major relabelling: the outermost axis of each run carries the channels."""
    x, y = node.inputs[0], node.outputs[0]
    old, new = dims(x), dims(y)
    if x is None or old is None or new is None:
        return None
    couplings: list[Coupling] = []
    for ins, outs in row_major(old, new):
        if not ins or not outs:
            continue
        source, target = Axis(x, min(ins)), Axis(y, min(outs))
        few, many = old[source.axis], new[target.axis]
        if not isinstance(few, int) or not isinstance(many, int):
            continue
        if few > many:
            source, target, few, many = target, source, many, few
        if many % few == 0:
            couplings.append(Coupling(source, target, repeat=many // few))
    return Channels(tuple(couplings))


def reshape(node: ir.Node) -> Channels | None:
    rule = reshape_like(node)
    if rule is None or integers(node, 1, "shape") is None:
        return None
    return Channels(rule.couplings, repair=_reshape_target)


def _reshape_target(program: Program, node: ir.Node, extents: Extents) -> None:
    x, y = node.inputs[0], node.outputs[0]
    stated = integers(node, 1, "shape")
    assert x is not None
    assert stated is not None
    target = list(stated)
    shape = dims(y) or ()
    for axis, entry in enumerate(stated):
        extent = shape[axis]
        if entry != -1 and Axis(y, axis) in extents:
            target[axis] = extents[Axis(y, axis)]
        elif entry == 0 and Axis(x, axis) in extents and isinstance(extent, int):
            target[axis] = extent
    if tuple(target) != stated:
        put_integers(program, node, 1, np.array(target, np.int64))


def expand(node: ir.Node) -> Channels | None:
    x, y = node.inputs[0], node.outputs[0]
    couplings = aligned(x, y) if x is not None else None
    if couplings is None or integers(node, 1, "") is None:
        return None
    return Channels(couplings, repair=_expand_target)


def _expand_target(program: Program, node: ir.Node, extents: Extents) -> None:
    stated = integers(node, 1, "")
    y = node.outputs[0]
    assert stated is not None
    lead = len(dims(y) or ()) - len(stated)
    target = [
        extents.get(Axis(y, lead + k), entry) if entry != 1 else 1 for k, entry in enumerate(stated)
    ]
    if tuple(target) != stated:
        put_integers(program, node, 1, np.array(target, np.int64))


def transpose(node: ir.Node) -> Channels | None:
    x, y = node.inputs[0], node.outputs[0]
    shape = dims(x)
    if x is None or shape is None:
        return None
    perm = attributes_of(node)["perm"] or range(len(shape))[::-1]
    return Channels(tuple(Coupling(Axis(x, int(p)), Axis(y, k)) for k, p in enumerate(perm)))


def slice_(node: ir.Node) -> Channels | None:
    """Axes that are not sliced pass through."""
    x = node.inputs[0]
    shape = dims(x)
    starts = integers(node, 1, "starts")
    axes = integers(node, 3, "axes")
    if shape is None or starts is None or axes is None:
        return None
    cut = {along(a, len(shape)) for a in axes or range(len(starts))}
    return _except(node, cut)


def pad(node: ir.Node) -> Channels | None:
    """Axes without padding pass through."""
    shape = dims(node.inputs[0])
    pads = integers(node, 1, "pads")
    axes = integers(node, 3, "axes")
    if shape is None or pads is None or axes is None:
        return None
    half = len(pads) // 2
    named = [along(a, len(shape)) for a in axes] or list(range(len(shape)))
    return _except(node, {k for i, k in enumerate(named) if pads[i] or pads[half + i]})


def tile(node: ir.Node) -> Channels | None:
    repeats = integers(node, 1, "")
    if repeats is None:
        return None
    return _except(node, {k for k, r in enumerate(repeats) if r != 1})


def _except(node: ir.Node, cut: set[int]) -> Channels | None:
    x = node.inputs[0]
    couplings = aligned(x, node.outputs[0]) if x is not None else None
    if couplings is None:
        return None
    return Channels(tuple(c for c in couplings if c.target.axis not in cut))


def resize(node: ir.Node) -> Channels | None:
    """Axes whose scale is exactly one pass through."""
    x = node.inputs[0]
    old, new = dims(x), dims(node.outputs[0])
    attributes = attributes_of(node)
    if old is None or new is None or "crop" in str(attributes["coordinate_transformation_mode"]):
        return None
    named = [along(a, len(old)) for a in attributes.get("axes") or range(len(old))]
    scales, sizes = operand(node, 2), operand(node, 3)
    if sizes is not None:
        changed = {k for k in named if old[k] != new[k]}
        constant = sizes.const_value is not None
    else:
        constant = scales is not None and scales.const_value is not None
        factors = scales.const_value.numpy() if scales and scales.const_value else ()
        changed = {k for k, f in zip(named, factors, strict=False) if f != 1}
    rule = _except(node, changed) if constant else None
    return Channels(rule.couplings, repair=_resize_sizes) if rule is not None else None


def _resize_sizes(program: Program, node: ir.Node, extents: Extents) -> None:
    y = node.outputs[0]
    rank = len(dims(y) or ())
    stated = integers(node, 3, "") if operand(node, 3) is not None else None
    if stated is None:
        return
    named = [along(a, rank) for a in attributes_of(node).get("axes") or range(rank)]
    sizes = [extents.get(Axis(y, k), s) for k, s in zip(named, stated, strict=True)]
    if tuple(sizes) != stated:
        put_integers(program, node, 3, np.array(sizes, np.int64))


def gather(node: ir.Node) -> Channels | None:
    """Rows picked from a table: its other axes pass through; a weight's are made here."""
    table, indices, y = node.inputs[0], node.inputs[1], node.outputs[0]
    shape, picked = dims(table), dims(indices)
    if table is None or indices is None or shape is None or picked is None:
        return None
    axis = along(int(attributes_of(node)["axis"]), len(shape))
    kept = [k for k in range(len(shape)) if k != axis]
    passed = [
        Coupling(Axis(table, k), Axis(y, k if k < axis else k + len(picked) - 1)) for k in kept
    ]
    passed += [Coupling(Axis(indices, k), Axis(y, axis + k)) for k in range(len(picked))]
    produced = tuple(Axis(table, k) for k in kept) if is_weight(table) else ()
    return Channels(tuple(passed), produced=produced)


def shape_of_tensor(node: ir.Node) -> Channels | None:
    """Axes outside `start` to `end` do not show in the result."""
    x = node.inputs[0]
    shape = dims(x)
    if x is None or shape is None:
        return None
    attributes = attributes_of(node)
    end = attributes.get("end")
    seen = range(len(shape))[attributes.get("start") or 0 : end]
    return Channels(
        tuple(Coupling(Axis(x, k), Axis(x, k)) for k in range(len(shape)) if k not in seen)
    )


def depth_to_space(node: ir.Node) -> Channels | None:
    attributes = attributes_of(node)
    squared = int(attributes["blocksize"]) ** 2
    return _blocks(node, node.outputs[0], node.inputs[0], squared, attributes["mode"] == "CRD")


def space_to_depth(node: ir.Node) -> Channels | None:
    squared = int(attributes_of(node)["blocksize"]) ** 2
    return _blocks(node, node.inputs[0], node.outputs[0], squared, False)


def _blocks(
    node: ir.Node, few: ir.Value | None, many: ir.Value | None, squared: int, inner: bool
) -> Channels | None:
    shape = dims(few)
    if few is None or many is None or shape is None or not isinstance(shape[1], int):
        return None
    batch = Coupling(Axis(few, 0), Axis(many, 0))
    if inner:
        return Channels((batch, Coupling(Axis(few, 1), Axis(many, 1), repeat=squared)))
    return Channels((batch, *spread(Axis(few, 1), Axis(many, 1), squared, shape[1])))


LAYOUT_RULES: dict[str, ChannelRule] = {
    **dict.fromkeys(RESHAPES, reshape_like),
    "Concat": concat,
    "DepthToSpace": depth_to_space,
    "Expand": expand,
    "Gather": gather,
    "Pad": pad,
    "Reshape": reshape,
    "Resize": resize,
    "Shape": shape_of_tensor,
    "Slice": slice_,
    "SpaceToDepth": space_to_depth,
    "Split": split,
    "Tile": tile,
    "Transpose": transpose,
}
"""Channel rule by operator type of the default domain."""
