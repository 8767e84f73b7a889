"""Where a rule takes some forms of its operator alone; the others are expanded."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir

from optcompiler.lowering.expand import Facts
from optcompiler.lowering.expressions import SMALL
from optcompiler.ops.spec import attributes_of
from optcompiler.program import static_shape

FLOATS = frozenset({"FLOAT", *SMALL})


def _computed_in_floats(node: ir.Node, facts: Facts) -> bool:
    x = node.inputs[0]
    used = any(v.uses() or v.is_graph_output() for v in node.outputs[1:])
    return x is not None and x.dtype is not None and x.dtype.name in FLOATS and not used


def _known_parameters(node: ir.Node, facts: Facts) -> bool:
    x = node.inputs[0]
    return (
        not attributes_of(node).get("training_mode")
        and all(facts.array(node, i) is not None for i in range(1, 5))
        and x is not None
        and x.dtype == ir.DataType.FLOAT
    )


def repeats_elements(node: ir.Node, facts: Facts) -> bool:
    """Whether a Resize enlarges by whole factors and repeats each element."""
    x = node.inputs[0]
    shape = static_shape(node.outputs[0])
    if x is None or shape is None:
        return False
    attributes = attributes_of(node)
    mode = (attributes.get("mode"), attributes.get("coordinate_transformation_mode"))
    rounding = attributes.get("nearest_mode")
    same = (mode == ("nearest", "asymmetric") and rounding == "floor") or (
        mode == ("nearest", "half_pixel") and rounding == "round_prefer_floor"
    )
    before, scales = facts.shapes[x], facts.array(node, 2)
    whole = all(b and s % b == 0 for s, b in zip(shape, before, strict=True))
    if scales is not None and scales.size and scales.size == len(before):
        whole = whole and all(s * b == n for s, b, n in zip(scales, before, shape, strict=True))
    unknown = len(node.inputs) > 2 and node.inputs[2] is not None and scales is None
    policy = attributes.get("keep_aspect_ratio_policy", "stretch")
    partial = scales is not None and scales.size not in (0, len(before))
    return same and whole and not unknown and not partial and policy == "stretch"


def _one_batch(node: ir.Node, facts: Facts) -> bool:
    return not attributes_of(node).get("batch_dims")


def _constant_border(node: ir.Node, facts: Facts) -> bool:
    return str(attributes_of(node).get("mode") or "constant") == "constant"


COVERED: Mapping[str, Callable[[ir.Node, Facts], bool]] = {
    "LayerNormalization": _computed_in_floats, "RMSNormalization": _computed_in_floats,
    "InstanceNormalization": _computed_in_floats, "Softmax": _computed_in_floats,
    "LogSoftmax": _computed_in_floats, "BatchNormalization": _known_parameters,
    "Resize": repeats_elements, "Pad": _constant_border, "GatherND": _one_batch,
}  # fmt: skip
