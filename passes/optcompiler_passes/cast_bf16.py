"""Compute contractions in bfloat16 where the target multiplies it: casts around them."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optcompiler.program import SOURCE_KEY, Program, constant
from optcompiler.rewriting import Candidate, Decline, Declined, Pass, PassContext, Stage
from optcompiler.spilling import spilled

CONTRACTIONS = frozenset({"Conv", "Gemm", "MatMul"})

PASSES_ON = frozenset({
    "Flatten", "Identity", "MaxPool", "Relu", "Reshape", "Squeeze", "Transpose", "Unsqueeze",
})  # fmt: skip
"""Operators that give the same numbers whether their first input is rounded before or after."""

SINCE = {"Conv": 22, "MaxPool": 22}
"""Operator sets from which on an operator takes bfloat16; the others do in the oldest we have."""

LIKE_NOW = 20
"""The operator set from which on a program means the same in those it is raised to."""

_FLOAT, _NARROW = ir.DataType.FLOAT, ir.DataType.BFLOAT16


@dataclass(frozen=True)
class CastBf16(Pass):
    """Cast the operands of a contraction to bfloat16 and its result back.

    Before:
        y = Conv (x, w, b)
        z = Relu (y)

    After (`w_bf16` and `b_bf16` are initializers):
        x_bf16 = Cast <to = BFLOAT16> (x)
        y_bf16 = Conv (x_bf16, w_bf16, b_bf16)
        y = Cast <to = FLOAT> (y_bf16)
        z = Relu (y)

    Rules:
    1. A site is a Conv, Gemm or MatMul of floats. The weight of a Conv or Gemm is a constant.
    2. A value is cast once, whoever asks for it. The cast is placed before the Relu, MaxPool,
       reshapes and transposes that lead to the contraction alone, which then work on bfloat16.
    3. A value that is bfloat16 cast to float is not cast again: between two sites it stays as it
       is.
    4. A Conv needs operator set 22. The program is raised to it from 20 on, which changes the
       meaning of no operator.

    `skip` holds globs of node names or source paths that stay float.
    """

    name: ClassVar[str] = "cast-bf16"
    stage: ClassVar[Stage] = Stage.QUANTIZE
    summary: ClassVar[str] = "bfloat16 contractions where the target multiplies bfloat16"
    time_limit_s: ClassVar[float] = math.inf

    skip: tuple[str, ...] = ()

    def propose(self, program: Program, context: PassContext) -> Iterable[Candidate | Decline]:
        refusal = _refusal(context)
        if refusal is not None:
            yield Decline("program", refusal)
            return
        for node in program.graph:
            if node.domain != "" or node.op_type not in CONTRACTIONS:
                continue
            name = str(node.name)
            reason = self._skipped(node) or _reason(program, node)
            if reason:
                yield Decline(name, reason, (name,))
            else:
                yield Candidate(name, "bf16", Narrow(name), exact=False, nodes=(name,))

    def _skipped(self, node: ir.Node) -> str:
        names = (str(node.name), node.metadata_props.get(SOURCE_KEY, ""))
        for pattern in self.skip:
            if any(name and fnmatch.fnmatchcase(name, pattern) for name in names):
                return f"skipped by {pattern!r}"
        return ""


def _refusal(context: PassContext) -> str | None:
    if "bf16" not in context.capabilities.precisions:
        return f"target {context.target.backend} has no bfloat16 kernels"
    if "bf16" not in context.precisions:
        return f"precision bf16 is not among those allowed: {', '.join(sorted(context.precisions))}"
    if not context.calibration:
        return "no calibration data to measure damage on; pass calibration=batches"
    return None


def _reason(program: Program, node: ir.Node) -> str:
    """Why the node is no site; "" for one."""
    for value in (*node.inputs, *node.outputs):
        if value is not None and value.dtype != _FLOAT:
            kind = value.dtype.name.lower() if value.dtype is not None else "unknown"
            return f"{value.name!r} is {kind}, not float"
    for value in node.inputs[:2]:
        made = value.producer() if value is not None else None
        if made is not None and made.op_type == "DequantizeLinear":
            return "already quantised"
    first, weight = node.inputs[0], node.inputs[1]
    if constant(first) is not None:
        return f"its operand {_name(first)} is a constant where data is expected"
    if node.op_type != "MatMul" and constant(weight) is None:
        return f"its weight {_name(weight)} is not a constant"
    if program.opset < min(LIKE_NOW, SINCE.get(node.op_type, 0)):
        return (
            f"a {node.op_type} of bfloat16 needs operator set {SINCE[node.op_type]}, and the "
            f"program is of {program.opset}"
        )
    for value in node.inputs[1:]:
        tensor = value.const_value if value is not None else None
        if tensor is not None:
            bad = int((~np.isfinite(_narrowed(tensor))).sum())
            if bad:
                return f"{bad} values of {_name(value)} are NaN or infinite in bfloat16"
    return ""


def _name(value: ir.Value | None) -> str:
    return repr(value.name) if value is not None else "an absent operand"


def _narrowed(tensor: ir.TensorProtocol) -> np.ndarray:
    """A constant in bfloat16, kept on its tensor: rewrites run many times in a search."""
    key = "optcompiler.bf16"
    known = tensor.meta.get(key)
    if known is None:
        with np.errstate(over="ignore"):
            known = spilled(tensor.numpy().astype(_NARROW.numpy()))
        tensor.meta[key] = known
    return known


@dataclass(frozen=True)
class Narrow:
    """The rewrite of one site."""

    site: str

    def __call__(self, program: Program) -> None:
        node = program.node(self.site)
        if node is None:
            raise Declined(f"{self.site!r} is gone.")
        reason = _reason(program, node)
        if reason:
            raise Declined(f"{self.site!r}: {reason}.")
        raise_opset(program, SINCE.get(node.op_type, 0))
        before = [v for v in node.inputs if v is not None]
        for index, value in enumerate(node.inputs):
            if value is not None:
                node.replace_input_with(index, _as_narrow(program, value, node))
        for value in before:
            _drop(program, value)
        _widen(program, node)


def raise_opset(program: Program, version: int) -> None:
    """Let the program be of an operator set that means the same: both are from `LIKE_NOW` on."""
    for held in (program.graph, *program.functions.values()):
        if held.opset_imports.get("", version) < version:
            held.opset_imports[""] = version


def _as_narrow(program: Program, value: ir.Value, reader: ir.Node) -> ir.Value:
    """`value` in bfloat16 for `reader`."""
    if value.const_value is not None:
        return _weight(program, value)
    made = value.producer()
    if _casts(made, _FLOAT) and made is not None:
        source = made.inputs[0]
        if source is not None and source.dtype == _NARROW:
            return source
    for other in value.consumers():
        if _casts(other, _NARROW) and other.graph is value.graph:
            return other.outputs[0]
    if made is not None and _passes_on(program, value, made):
        source = made.inputs[0]
        assert source is not None
        made.replace_input_with(0, _as_narrow(program, source, made))
        _drop(program, source)
        value.name = program.fresh_name(f"{value.name}_bf16")
        value.type = ir.TensorType(_NARROW)
        return value
    cast, result = _cast(program, value, f"{value.name}_bf16", _NARROW)
    if made is not None:
        program.graph.insert_after(made, cast)
    else:
        readers = set(value.consumers())
        first = next((n for n in program.graph if n in readers), reader)
        program.graph.insert_before(first, cast)
    return result


def _passes_on(program: Program, value: ir.Value, made: ir.Node) -> bool:
    """Whether the operator that makes `value` may work on bfloat16: nobody else reads it."""
    source = made.inputs[0] if made.inputs else None
    return (
        made.domain == ""
        and made.op_type in PASSES_ON
        and SINCE.get(made.op_type, 0) <= program.opset
        and len(made.outputs) == 1
        and len(value.uses()) == 1
        and not value.is_graph_output()
        and source is not None
        and source.const_value is None
        and source.dtype == _FLOAT
    )


def _widen(program: Program, node: ir.Node) -> None:
    """Give the node a result in bfloat16; the float of the old name is cast from it."""
    narrow = node.outputs[0]
    name = narrow.name
    narrow.name = program.fresh_name(f"{name}_bf16")
    narrow.type = ir.TensorType(_NARROW)
    cast = ir.node("Cast", [narrow], {"to": int(_FLOAT)}, name=program.fresh_name(f"{name}_float"))
    wide = cast.outputs[0]
    wide.type, wide.shape = ir.TensorType(_FLOAT), narrow.shape
    for use in tuple(narrow.uses()):
        if use.node is cast:
            continue
        if _casts(use.node, _NARROW):
            ir.convenience.replace_all_uses_with(
                use.node.outputs[0], narrow, replace_graph_outputs=False
            )
        use.node.replace_input_with(use.idx, wide)
    outputs = program.graph.outputs
    for index, value in enumerate(outputs):
        if value is narrow:
            outputs[index] = wide
    wide.name = name
    program.graph.insert_after(node, cast)
    for other in tuple(wide.consumers()):
        if _casts(other, _NARROW):
            program.discard(other)
    program.discard(cast)


def _weight(program: Program, value: ir.Value) -> ir.Value:
    """The initializer that holds a constant in bfloat16; there is one, whoever asks for it."""
    assert value.const_value is not None
    array, name = _narrowed(value.const_value), f"{value.name}_bf16"
    known = program.graph.initializers.get(name)
    held = constant(known)
    if known is not None and held is not None and np.may_share_memory(held, array):
        return known
    return program.add_weight(name, ir.Tensor(array, dtype=_NARROW, name=name))


def _cast(
    program: Program, value: ir.Value, name: str, to: ir.DataType
) -> tuple[ir.Node, ir.Value]:
    cast = ir.node("Cast", [value], {"to": int(to)}, name=program.fresh_name(f"{name}_cast"))
    result = cast.outputs[0]
    result.name = program.fresh_name(name)
    result.type, result.shape = ir.TensorType(to), value.shape
    return cast, result


def _casts(node: ir.Node | None, to: ir.DataType) -> bool:
    return (
        node is not None
        and node.domain == ""
        and node.op_type == "Cast"
        and node.attributes.get_int("to", 0) == int(to)
    )


def _drop(program: Program, value: ir.Value) -> None:
    """Remove what nothing reads any more: a cast, a float weight."""
    made = value.producer()
    if made is not None:
        program.discard(made)
    elif value.is_initializer() and not value.is_graph_input():
        program.forget(value)
