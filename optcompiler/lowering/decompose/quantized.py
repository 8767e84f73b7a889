"""Operators on integers that stand for reals, and on integers alone."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from optcompiler.lowering.decompose.tape import Tape, ints
from optcompiler.lowering.expand import Decomposition, Expansion, Facts
from optcompiler.ops.spec import attributes_of


def _in(node: ir.Node, place: int) -> ir.Value | None:
    return node.inputs[place] if place < len(node.inputs) else None


def q_linear_matmul(node: ir.Node, facts: Facts) -> Expansion | None:
    a, scale_a, zero_a, b, scale_b, zero_b, scale, zero = node.inputs
    tape = Tape()
    assert a is not None
    assert b is not None
    left = tape("DequantizeLinear", a, scale_a, zero_a, axis=len(facts.shapes[a]) - 2)
    right = tape("DequantizeLinear", b, scale_b, zero_b, axis=len(facts.shapes[b]) - 1)
    return tape.done(tape("QuantizeLinear", tape("MatMul", left, right), scale, zero))


def q_linear_conv(node: ir.Node, facts: Facts) -> Expansion | None:
    x, scale_x, zero_x, w, scale_w, zero_w, scale, zero, *rest = node.inputs
    tape = Tape()
    left = tape("DequantizeLinear", x, scale_x, zero_x)
    right = tape("DequantizeLinear", w, scale_w, zero_w, axis=0)
    bias = None
    if rest and rest[0] is not None:
        bias = tape("DequantizeLinear", rest[0], tape("Mul", scale_x, scale_w), axis=0)
    y = tape("Conv", left, right, bias, **_given(node))
    return tape.done(tape("QuantizeLinear", y, scale, zero))


def _given(node: ir.Node) -> dict[str, object]:
    known = attributes_of(node)
    return {name: known[name] for name in node.attributes}


def integer_product(node: ir.Node, facts: Facts) -> Expansion | None:
    """MatMulInteger and ConvInteger: INT32 arithmetic on what is left of the zero points."""
    tape = Tape()
    sides: list[ir.Value] = []
    conv = node.op_type == "ConvInteger"
    for i in (0, 1):
        x, zero = node.inputs[i], _in(node, 2 + i)
        assert x is not None
        wide = tape("Cast", x, to=ir.DataType.INT32)
        if zero is not None:
            shift = tape("Cast", zero, to=ir.DataType.INT32)
            shape = facts.shapes[zero]
            if len(shape) == 1 and shape[0] > 1:
                last = len(facts.shapes[x]) - 1
                tall = [-1] + [1] * last if conv else [-1, 1] if i == 0 else [-1]
                shift = tape("Reshape", shift, ints(*tall))
            wide = tape("Sub", wide, shift)
        sides.append(wide)
    if conv:
        return tape.done(tape("Conv", *sides, **_given(node)))
    return tape.done(tape("MatMul", *sides))


QUANTIZED: Mapping[str, Decomposition] = {
    "QLinearMatMul": q_linear_matmul, "QLinearConv": q_linear_conv,
    "MatMulInteger": integer_product, "ConvInteger": integer_product,
}  # fmt: skip
