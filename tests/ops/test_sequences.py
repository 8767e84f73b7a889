"""Sequences, optionals and operators defined by others, against ONNX Runtime."""

import numpy as np
import onnx_ir as ir
import pytest
import torch

from optcompiler.errors import UnsupportedOperatorError
from optcompiler.executor import to_torch
from optcompiler.program import Program
from tests.ops.comparing import check


def program(body: str) -> Program:
    return Program.from_text(f'<ir_version: 10, opset_import: ["" : 20]> {body}')


@pytest.mark.parametrize(
    "steps",
    [
        "s = SequenceConstruct (a, b, c)",
        "e = SequenceEmpty ()  s = SequenceInsert (e, b)",
        "p = SequenceConstruct (a, b)  s = SequenceInsert (p, c, zero)",
        "p = SequenceConstruct (a, b)  s = SequenceInsert (p, c, last)",
        "p = SequenceConstruct (a, b, c)  s = SequenceErase (p, zero)",
        "p = SequenceConstruct (a, b, c)  s = SequenceErase (p, last)",
        "p = SequenceConstruct (a, b, c)  s = SequenceErase (p)",
        "s = SplitToSequence <axis = 1> (a)",
        "s = SplitToSequence <axis = 1> (a, two)",
        "s = SplitToSequence <axis = 1> (a, sizes)",
        "o = SequenceConstruct (a)  q = Optional (o)  s = OptionalGetElement (q)",
    ],
)
def test_sequences(steps: str) -> None:
    check(
        program(f"""
            g (float[2,3] a, float[2,3] b, float[2,3] c) => (float[2,K] y, float[M,N] f, int64 n)
            <int64 zero = {{0}}, int64 last = {{-1}}, int64 two = {{2}}, int64[2] sizes = {{1, 2}}>
            {{
                {steps}
                y = ConcatFromSequence <axis = 1> (s)
                f = SequenceAt (s, last)
                n = SequenceLength (s)
            }}
        """),
        {name: np.random.default_rng(i).random((2, 3), np.float32) for i, name in enumerate("abc")},
    )


def test_sequences_without_the_axis_and_with_a_new_one() -> None:
    check(
        program("""
            g (float[2,3] a) => (float[2,3,1] y) {
                s = SplitToSequence <axis = 0, keepdims = 0> (a)
                t = ConcatFromSequence <axis = 0, new_axis = 1> (s)
                d = Constant <value_ints = [2]> ()
                y = Unsqueeze (t, d)
            }
        """)
    )


def test_an_optional_says_whether_it_is_full() -> None:
    module = to_torch(
        program("""
            g (optional(float[2]) x) => (bool y) { y = OptionalHasElement (x) }
        """)
    )
    assert module(torch.ones(2))[0].item() is True
    assert module(None)[0].item() is False


def test_an_operator_that_others_define_is_expanded() -> None:
    mapped = program("""
        g (float[2] a, float[2] b) => (float[2] y) {
            s = SequenceConstruct (a, b)
            m = SequenceMap (s) <body = body (float[2] i) => (float[2] o) { o = Neg (i) }>
            z = Constant <value_int = 1> ()
            y = SequenceAt (m, z)
        }
    """)
    module = to_torch(mapped)
    [got] = module(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    assert got.tolist() == [-3.0, -4.0]


def test_a_mapped_body_that_captures_is_refused() -> None:
    capturing = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[2] a) => (float[2] y) {
            s = SequenceConstruct (a, a)
            [map] m = SequenceMap (s) <body = body (float[2] i) => (float[2] o) { o = Add (i, a) }>
            z = Constant <value_int = 1> ()
            y = SequenceAt (m, z)
        }
    """)
    with pytest.raises(UnsupportedOperatorError, match="SequenceMap of node 'map'"):
        to_torch(Program(capturing))
