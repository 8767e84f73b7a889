"""Parts of programs, and the smallest that still shows something."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from optcompiler.program import Program
from optcompiler.shrinking import extract, fewest, put_back, shrink, weights_as_inputs
from tests.support import MLP, assert_close, filled_program, op_types, random_inputs, run_onnx

NET = """
<ir_version: 10, opset_import: ["" : 20]>
net (float[2,8] x, bool c) => (float[2,8] y, float[2,8] z)
<float[8,8] w>
{
  [a] a1 = MatMul (x, w)
  [b] b1 = Relu (a1)
  [c] c1 = If (c) <then_branch = t () => (float[2,8] t1) { [t] t1 = Tanh (b1) },
                   else_branch = e () => (float[2,8] e1) { [e] e1 = Add (a1, b1) }>
  [d] y = Add (c1, b1)
  [e2] z = Sigmoid (y)
}
"""


def test_a_part_reads_inputs_and_gives_outputs_under_the_names_they_had() -> None:
    part = extract(filled_program(NET), ["b", "c"])
    part.verify()
    assert [p.name for p in part.inputs] == ["c", "a1"]
    assert [p.name for p in part.outputs] == ["b1", "c1"]
    assert [n.name for n in part.graph] == ["b", "c"]
    assert part.weights() == {}


def test_every_part_of_a_chain_computes_what_the_whole_does() -> None:
    program = filled_program(NET)
    names = [str(n.name) for n in program.graph]
    inputs = random_inputs(program)
    whole = dict(zip(["y", "z"], run_onnx(program, inputs), strict=True))
    known = dict(inputs)
    for name in names:
        part = extract(program, [name])
        part.verify()
        got = run_onnx(part, {p.name: known[p.name] for p in part.inputs})
        known |= dict(zip([p.name for p in part.outputs], got, strict=True))
    for name, value in whole.items():
        np.testing.assert_array_equal(known[name], value)


def test_the_whole_is_a_part_of_itself_and_is_left_alone() -> None:
    program = filled_program(NET)
    before = program.content_hash()
    assert extract(program, [str(n.name) for n in program.graph]).content_hash() == before
    extract(program, ["d"])
    assert program.content_hash() == before


@pytest.mark.parametrize("names", [["a"], ["b", "c"], ["c"], ["d", "e2"], ["a", "b", "c", "d"]])
def test_a_part_is_put_back_where_it_was(names: list[str]) -> None:
    program = filled_program(NET)
    whole = put_back(program, names, extract(program, names))
    whole.verify(like=program)
    assert set(whole.weights()) == set(program.weights())
    inputs = random_inputs(program)
    assert_close(run_onnx(whole, inputs), run_onnx(program, inputs), 0)


def test_a_part_comes_back_rewritten() -> None:
    program = filled_program(NET)
    part = extract(program, ["a", "b"])
    part.set_weight(part.graph.initializers["w"], np.zeros((8, 8), np.float32))
    part.node("b").op_type = "Neg"
    whole = put_back(program, ["a", "b"], part)
    whole.verify(like=program)
    assert op_types(program)[:2] == ["MatMul", "Relu"]
    assert whole.node("b").op_type == "Neg"
    (weight,) = whole.weights().values()
    assert not weight.numpy().any()
    assert program.weights()["w"].numpy().any()


def test_the_fewest_are_found_and_none_can_be_left_out() -> None:
    items = [str(i) for i in range(64)]
    tries: list[int] = []

    def shows(kept: Sequence[str]) -> bool:
        tries.append(len(kept))
        return {"3", "40", "41"} <= set(kept)

    assert fewest(items, shows) == ["3", "40", "41"]
    assert len(tries) < 50
    assert fewest(items, shows, over=lambda: True) == items


def chain(length: int) -> Program:
    steps = "\n".join(f"[n{i}] v{i + 1} = Relu (v{i})" for i in range(length))
    text = (
        f'<ir_version: 10, opset_import: ["" : 20]>\n'
        f"g (float[2] v0) => (float[2] y) {{ {steps}\n[last] y = Identity (v{length}) }}"
    )
    return Program.from_text(text)


def test_a_pair_is_found_in_a_long_chain() -> None:
    program = chain(200)

    def shows(part: Program) -> bool:
        names = {n.name for n in part.graph}
        return {"n17", "n150"} <= names

    least, tests = shrink(program, shows)
    assert [n.name for n in least.graph] == ["n17", "n150"]
    assert tests < 100


def test_the_focus_makes_it_quick() -> None:
    program = chain(200)
    least, tests = shrink(program, lambda p: p.node("n90") is not None, focus=["n91"])
    assert [n.name for n in least.graph] == ["n90"]
    assert tests < 12


def test_outputs_and_weights_that_do_not_matter_leave() -> None:
    program = filled_program(NET)
    least, _ = shrink(program, lambda p: {"a", "b"} <= {n.name for n in p.graph})
    assert op_types(least) == ["MatMul", "Relu"]
    assert len(least.outputs) == 1
    least.verify()


def test_it_stops_when_tests_are_spent_and_takes_errors_for_no() -> None:
    program = chain(50)
    calls = 0

    def shows(part: Program) -> bool:
        nonlocal calls
        calls += 1
        part.verify()
        raise RuntimeError("nothing can be said")

    least, tests = shrink(program, shows, tests=7)
    assert (calls, tests) == (7, 7)
    assert len(least.graph) == 51


def test_weights_become_inputs() -> None:
    program = Program.from_text(MLP)
    open_ = weights_as_inputs(program, ["w"])
    open_.verify()
    assert [p.name for p in open_.inputs] == ["x", "w"]
    assert list(open_.weights()) == ["b"]
    assert list(program.weights()) == ["w", "b"]
