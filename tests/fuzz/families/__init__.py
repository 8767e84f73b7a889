"""What may be added to a graph: one function per family of operators.

Each takes the graph, the draw and the operator's name, finds or makes operands of valid shapes and
adds a node. `FAMILIES` maps every operator of the table to its function; those that need no rule of
their own (pointwise ones) are read off the operator's schema.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from optcompiler.ops import builtin_specs
from tests.fuzz.families import (
    contraction,
    indexing,
    movement,
    networks,
    pointwise,
    quantized,
    reduction,
)
from tests.fuzz.graph import Draw, Graph, schema_of

Family = Callable[[Graph, Draw, str], Any]

_OWN: Mapping[str, Family] = {
    **pointwise.FAMILIES, **movement.FAMILIES, **reduction.FAMILIES, **contraction.FAMILIES,
    **indexing.FAMILIES, **networks.FAMILIES, **quantized.FAMILIES,
}  # fmt: skip

FAMILIES: Mapping[str, Family] = {
    spec.op_type: _OWN.get(spec.op_type, pointwise.generic)
    for spec in builtin_specs()
    if not spec.domain and (spec.op_type in _OWN or spec.pointwise)
}
"""How to add each operator; `tests.fuzz.test_fuzz` holds it complete."""

_REPLACED = "ONNX replaced it before the opsets that graphs are drawn in"
_NO_TENSOR = "sequences and optionals are no tensors; the conformance suite has them"

WITHOUT: Mapping[str, str] = {
    "Scatter": _REPLACED,
    "Upsample": _REPLACED,
    "ConcatFromSequence": _NO_TENSOR,
    "Optional": _NO_TENSOR,
    "OptionalGetElement": _NO_TENSOR,
    "OptionalHasElement": _NO_TENSOR,
    "SequenceAt": _NO_TENSOR,
    "SequenceConstruct": _NO_TENSOR,
    "SequenceEmpty": _NO_TENSOR,
    "SequenceErase": _NO_TENSOR,
    "SequenceInsert": _NO_TENSOR,
    "SequenceLength": _NO_TENSOR,
    "SplitToSequence": _NO_TENSOR,
    "MelWeightMatrix": "it rounds frequencies to bins, so that a last bit moves whole bins",
    "NonMaxSuppression": "a last bit of a score changes which boxes there are, and how many",
}
"""Operators that are not drawn, and why."""


@functools.cache
def available(opset: int) -> tuple[str, ...]:
    """Operators with a family that exist in this opset."""
    return tuple(
        name for name in FAMILIES
        if (schema := schema_of(name, opset)) is not None and not schema.deprecated
    )  # fmt: skip
