"""Sizes of symbolic dimensions: by name for a target, by place for example inputs."""

from __future__ import annotations

import numpy as np
import pytest

from optcompiler.binding import bind, fit, fix_dimensions, resolved, symbols
from optcompiler.errors import InputError, VerificationError
from optcompiler.program import Program
from tests.support import assert_close, op_types, random_inputs, run_onnx

FLATTENED = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[n, t, 4] x, float[n] b) => (float[n, m] y, float[n] z) {
    [shape] s = Shape <start = 0, end = 1> (x)
    rest = Constant <value_ints = [-1]> ()
    [target] to = Concat <axis = 0> (s, rest)
    [flat] r = Reshape (x, to)
    [act] y = Relu (r)
    [same] z = Identity (b)
}
"""


@pytest.fixture
def program() -> Program:
    return Program.from_text(FLATTENED)


def shapes(program: Program) -> list[str]:
    return [str(p) for p in (*program.inputs, *program.outputs)]


def test_symbols_come_once_in_order_of_appearance(program: Program) -> None:
    assert symbols(program) == ["n", "t"]
    assert symbols(bind(program, {"n": 2, "t": 3})) == []


def test_bind_fixes_every_use_and_folds_shape_arithmetic(program: Program) -> None:
    bound = bind(program, {"n": 2, "t": 3})
    assert shapes(bound) == ["x: float[2, 3, 4]", "b: float[2]", "y: float[2, 12]", "z: float[2]"]
    bound.verify()
    bound.sweep()
    assert op_types(bound) == ["Reshape", "Relu", "Identity"]
    assert {n.name for n in bound.graph} == {"flat", "act", "same"}
    inputs = random_inputs(bound)
    assert_close(run_onnx(bound, inputs), run_onnx(program, inputs))
    assert symbols(program) == ["n", "t"]


def test_bind_of_one_symbol_leaves_the_other(program: Program) -> None:
    bound = bind(program, {"n": 2})
    assert symbols(bound) == ["t"]
    assert shapes(bound)[:2] == ["x: float[2, t, 4]", "b: float[2]"]
    assert bound.outputs[1].shape == (2,)


def test_bind_without_sizes_or_symbols_is_the_program_itself(program: Program) -> None:
    assert bind(program, {}) is program
    static = bind(program, {"n": 2, "t": 3})
    assert bind(static, {"n": 5}) is static


def test_bind_refuses_a_name_that_no_input_has(program: Program) -> None:
    with pytest.raises(InputError, match=r"no input has a dimension 'batch'; there is n, t"):
        bind(program, {"batch": 1})


def test_places_are_fixed_and_nodes_stay(program: Program) -> None:
    sizes = {("x", 0): 2, ("x", 1): 3, ("b", 0): 2}
    fixed = fix_dimensions(program, sizes)
    assert shapes(fixed) == shapes(bind(program, {"n": 2, "t": 3}))
    assert op_types(fixed) == op_types(program)


def test_a_symbol_that_another_input_keeps_stays_in_the_outputs(program: Program) -> None:
    fixed = fix_dimensions(program, {("x", 0): 2, ("x", 1): 3})
    assert shapes(fixed) == ["x: float[2, 3, 4]", "b: float[n]", "y: float[2, 12]", "z: float[n]"]


def test_sizes_that_the_program_cannot_have() -> None:
    product = Program.from_text("""
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[2, k] x, float[k, 3] w) => (float[2, 3] y) { y = MatMul (x, w) }
    """)
    with pytest.raises(VerificationError):
        fix_dimensions(product, {("x", 1): 4, ("w", 0): 5})


def test_resolving_expands_functions_and_folds_shape_arithmetic() -> None:
    program = Program.from_text("""
        <ir_version: 10, opset_import: ["" : 20, "optcompiler.fused" : 1]>
        g (float[2, 3, 4] x) => (float[2, 12] y) {
            [shape] s = Shape <start = 0, end = 1> (x)
            rest = Constant <value_ints = [-1]> ()
            [target] to = Concat <axis = 0> (s, rest)
            [flat] r = Reshape (x, to)
            [region] y = optcompiler.fused.act (r)
        }
        <domain: "optcompiler.fused", opset_import: ["" : 20]>
        act (a) => (c) { b = Neg (a)
            c = Relu (b) }
    """)
    got = resolved(program)
    assert not got.functions
    got.sweep()
    assert op_types(got) == ["Reshape", "Neg", "Relu"]
    assert [v.shape for n in got.graph for v in n.outputs] == [[2, 12]] * 3
    inputs = random_inputs(program)
    assert_close(run_onnx(got, inputs), run_onnx(program, inputs))
    assert len(program.functions) == 1


def test_fit_cuts_and_repeats_samples(program: Program) -> None:
    x = np.arange(3 * 5 * 4, dtype=np.float32).reshape(3, 5, 4)
    b = np.arange(3, dtype=np.float32)
    fitted = fit({"b": b, "x": x}, program.inputs, {"n": 4, "t": 2})
    assert list(fitted) == ["x", "b"]
    np.testing.assert_array_equal(fitted["x"], x[[0, 1, 2, 0]][:, :2])
    np.testing.assert_array_equal(fitted["b"], [0, 1, 2, 0])
    assert all(a.flags.c_contiguous for a in fitted.values())
    assert fit({"b": b, "x": x}, program.inputs, {})["x"].shape == x.shape
