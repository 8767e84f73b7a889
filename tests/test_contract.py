"""What a pass may propose and leave behind, and what it cannot write to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from optcompiler import contract
from optcompiler.contract import (
    blaming,
    patch_of,
    private,
    proposals,
    protected,
    protected_array,
    protected_batch,
)
from optcompiler.errors import INVALID, NONSENSE, OVERTIME, RAISED, Declined, InputError, PassFault
from optcompiler.program import Program
from optcompiler.rewriting import Candidate, Decline, Pass, Stage
from tests.paper import operators, paper_pass, side_by_side, swap
from tests.support import make_context


def offered(items: Any, stage: Stage = Stage.REDUCE) -> list[Any]:
    """What the core takes from a pass that proposes `items`: a list, or a function of a program."""
    program = side_by_side(a="Relu")
    pass_ = paper_pass(items if callable(items) else lambda p: items, "odd", stage)
    return proposals(pass_, program, make_context(program, calibration=[], holdout=[]), 5.0)


def refused(items: Any, stage: Stage = Stage.REDUCE) -> str:
    """What is said of a pass that proposes nonsense."""
    with pytest.raises(PassFault) as caught:
        offered(items, stage)
    assert caught.value.kind == NONSENSE
    assert caught.value.pass_ is not None
    assert caught.value.pass_.name == "odd"
    assert caught.value.candidate is None
    return str(caught.value)


def good(**changes: Any) -> Candidate:
    return replace(swap("a", "Abs"), **changes)


# -- proposals --------------------------------------------------------------------------------


def test_candidates_and_declines_come_in_order() -> None:
    items = [Decline("b", "no", ("b",)), good(), good(choice="Neg"), Decline("b", "no")]
    assert offered(items) == items
    assert offered(iter(items)) == items
    assert offered([]) == []


@pytest.mark.parametrize(
    ("items", "said"),
    [
        (None, "propose gave NoneType; yield Candidate or Decline."),
        (7, "propose gave int; yield Candidate or Decline."),
        ([1], "propose gave int; yield Candidate or Decline."),
        ([good(), "a"], "propose gave str; yield Candidate or Decline."),
        ([good(site="")], "propose gave a Candidate whose site is '', no text."),
        ([good(site=3)], "propose gave a Candidate whose site is 3, no text."),
        ([good(choice="")], "propose gave a Candidate whose choice is '', no text."),
        ([good(choice=None)], "propose gave a Candidate whose choice is None, no text."),
        ([Decline("", "no")], "propose gave a Decline whose site is '', no text."),
        ([Decline("a", "")], "propose gave a Decline whose reason is '', no text."),
        ([Decline("a", b"no")], "propose gave a Decline whose reason is b'no', no text."),
        ([good(nodes=["a"])],
         "propose gave a Candidate at 'a' whose nodes are ['a'], no tuple of names."),
        ([good(nodes=(1,))],
         "propose gave a Candidate at 'a' whose nodes are (1,), no tuple of names."),
        ([Decline("a", "no", "a")],
         "propose gave a Decline at 'a' whose nodes are 'a', no tuple of names."),
        ([good(rewrite="x")],
         "propose gave a Candidate at 'a' whose rewrite is 'x', no function."),
        ([good(exact=1)],
         "propose gave a Candidate at 'a' whose exact and typical are (1, False), "
         "not true or false."),
        ([good(typical=None)],
         "propose gave a Candidate at 'a' whose exact and typical are (False, None), "
         "not true or false."),
        ([good(rtol="1")],
         "propose gave a Candidate at 'a' with rtol '1', not between 0 and 0.1."),
        ([good(rtol=-0.01)],
         "propose gave a Candidate at 'a' with rtol -0.01, not between 0 and 0.1."),
        ([good(rtol=0.11)],
         "propose gave a Candidate at 'a' with rtol 0.11, not between 0 and 0.1."),
        ([good(rtol=float("nan"))],
         "propose gave a Candidate at 'a' with rtol nan, not between 0 and 0.1."),
        ([good(details=[1])],
         "propose gave a Candidate at 'a' whose details are no mapping or whose note is no text."),
        ([good(note=None)],
         "propose gave a Candidate at 'a' whose details are no mapping or whose note is no text."),
        ([good(), good()],
         "propose gave site 'a' with choice 'Abs' twice; make choices of one site distinct."),
    ],
)  # fmt: skip
def test_nonsense_is_named(items: Any, said: str) -> None:
    assert refused(items) == f"odd: {said}"


@pytest.mark.parametrize(
    "changes",
    [
        {"rtol": 0}, {"rtol": 0.1}, {"exact": np.bool_(True)}, {"typical": True}, {"nodes": ()},
        {"details": {"a": 1}, "note": "fine"}, {"exact": True},
    ],
)  # fmt: skip
def test_what_is_allowed_is_let_pass(changes: dict[str, Any]) -> None:
    item = good(**changes)
    assert offered([item]) == [item]


def test_other_choices_and_other_sites_are_no_repetition() -> None:
    items = [good(), good(choice="Neg"), good(site="b"), Decline("a", "no"), Decline("a", "no")]
    assert offered(items) == items


@pytest.mark.parametrize("stage", Stage)
def test_only_exact_candidates_clean_and_fuse(stage: Stage) -> None:
    assert offered([good(exact=True), Decline("b", "no")], stage)
    if stage in (Stage.CLEAN, Stage.FUSE):
        assert refused([good()], stage) == (
            f"odd: propose gave a Candidate at 'a' that is not exact, which stage {stage.name} has "
            f"no room for."
        )
    else:
        assert len(offered([good()], stage)) == 1


def test_a_pass_may_not_go_on_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """One node: 3 + 2 × 1 items at most."""
    monkeypatch.setattr(contract, "MOST_OFFERS", (3, 2))
    assert len(offered([Decline("a", "no")] * 5)) == 5

    def endless(program: Program) -> Iterable[Any]:
        while True:
            yield Decline("a", "no")

    assert refused(endless) == "odd: propose gave more than 5 items."


def test_what_proposing_raises_is_a_fault() -> None:
    def fails(program: Program) -> Iterable[Any]:
        yield good()
        raise ZeroDivisionError("oops")

    with pytest.raises(PassFault, match="odd: propose raised ZeroDivisionError: oops") as caught:
        offered(fails)
    assert caught.value.kind == RAISED


def test_what_the_user_must_change_goes_through() -> None:
    def asks(program: Program) -> Iterable[Any]:
        raise InputError("give calibration data")

    with pytest.raises(InputError, match="give calibration data"):
        offered(asks)


def test_proposing_may_change_nothing_of_ours() -> None:
    program = side_by_side(a="Relu")
    batch = {"x": np.zeros(2, np.float32)}
    context = make_context(program, calibration=[batch], holdout=[dict(batch)])
    seen: list[Any] = []

    class Vandal(Pass):
        name = "vandal"
        stage = Stage.REDUCE

        def propose(self, program: Program, context: Any) -> Iterable[Any]:
            seen.append(program)
            program.node("a").op_type = "Neg"  # type: ignore[union-attr]
            context.teacher.node("a").op_type = "Exp"
            context.calibration.append({})
            context.calibration[0]["y"] = 1
            context.holdout[0].clear()
            context.observers["mine"] = object
            return []

    assert proposals(Vandal(), program, context, 5.0) == []
    assert seen[0] is not program
    assert operators(program) == operators(context.teacher) == {"a": "Relu"}
    assert [list(b) for b in context.calibration] == [["x"]]
    assert [list(b) for b in context.holdout] == [["x"]]
    assert "mine" not in context.observers


def test_private_contexts_share_arrays() -> None:
    program = side_by_side(a="Relu")
    batch = {"x": np.zeros(2, np.float32)}
    context = make_context(
        program, calibration=[batch], holdout=[dict(batch)], observers={"o": int}
    )
    own = private(context)
    assert own.calibration[0]["x"] is batch["x"]
    assert own.holdout[0]["x"] is batch["x"]
    assert own.observers == {"o": int}
    assert (own.target, own.ops, own.seed) == (context.target, context.ops, context.seed)
    assert operators(own.teacher) == operators(program)


# -- patches ----------------------------------------------------------------------------------


def patched(rewrite: Callable[[Program], None], seconds: float = 5.0) -> Any:
    program = side_by_side(a="Relu")
    return patch_of(paper_pass([], "odd"), Candidate("a", "x", rewrite, False), program, seconds,
                    program)  # fmt: skip


def faulty(rewrite: Callable[[Program], None], kind: str, seconds: float = 5.0) -> str:
    """What is said of a rewrite that breaks the contract."""
    with pytest.raises(PassFault) as caught:
        patched(rewrite, seconds)
    fault = caught.value
    assert fault.kind == kind
    assert fault.pass_ is not None
    assert fault.candidate is not None
    assert (fault.pass_.name, fault.candidate.site) == ("odd", "a")
    assert fault.program is not None
    assert operators(fault.program) == {"a": "Relu"}
    return str(fault)


def test_a_patch_describes_what_changed() -> None:
    patch = patched(lambda p: setattr(p.node("a"), "op_type", "Abs"))
    assert (patch.label, patch.added, patch.removed) == ("odd[a=x]", ("a",), ())
    assert operators(patch.after) == {"a": "Abs"}
    assert not patch.empty


def test_an_empty_patch_is_not_verified() -> None:
    def untyped(program: Program) -> None:
        program.graph.doc_string = "nothing that counts"

    assert patched(untyped).empty


def test_rewrites_are_held_to_valid_programs() -> None:
    def nonsense(program: Program) -> None:
        program.node("a").op_type = "Nonsense"  # type: ignore[union-attr]

    def renames(program: Program) -> None:
        program.graph.inputs[0].name = "z"

    def holds_no_tensor(program: Program) -> None:
        value, node = program.add_weight("k", np.zeros(2, np.float32)), program.node("a")
        assert node is not None
        node.op_type = "Add"
        node.resize_inputs(2)
        node.replace_input_with(1, value)
        value._const_value = "zeros"  # type: ignore[assignment]

    assert faulty(nonsense, INVALID).startswith("odd[a=x]: not valid ONNX: ")
    assert "odd[a=x]: the interface changed" in faulty(renames, INVALID)
    assert faulty(holds_no_tensor, INVALID).startswith("odd[a=x]: no program: AttributeError: ")


def test_rewrites_that_raise_or_hang() -> None:
    def fails(program: Program) -> None:
        raise ZeroDivisionError("oops")

    def hangs(program: Program) -> None:
        while True:
            pass

    assert faulty(fails, RAISED) == "odd[a=x]: the rewrite raised ZeroDivisionError: oops."
    assert "had not ended after 0.05 s" in faulty(hangs, OVERTIME, 0.05)


def test_declining_is_no_fault() -> None:
    def declines(program: Program) -> None:
        raise Declined("on second thoughts")

    with pytest.raises(Declined, match="on second thoughts"):
        patched(declines)


def test_blame_is_for_faults_alone() -> None:
    program, pass_, item = side_by_side(a="Relu"), paper_pass([], "odd"), good()
    with pytest.raises(PassFault) as caught, blaming(pass_, program, item):
        raise PassFault(INVALID, "bad")
    fault = caught.value
    assert (fault.pass_, fault.program, fault.candidate) == (pass_, program, item)
    with pytest.raises(ValueError, match="mine"), blaming(pass_, program):
        raise ValueError("mine")


# -- read-only --------------------------------------------------------------------------------


def weighted() -> tuple[Program, np.ndarray]:
    program = Program.from_text(
        '<ir_version: 10, opset_import: ["" : 20]>\n'
        "net (float[2] x) => (float[2] y) <float[2] k = {1, 2}> { [a] y = Mul (x, k) }"
    )
    array = np.array([3.0, 4.0], np.float32)
    value = program.value("k")
    assert value is not None
    program.set_weight(value, array)
    assert value.const_value is not None
    value.const_value.meta["kept"] = "yes"
    return program, array


def test_protected_weights_share_memory_and_cannot_be_written() -> None:
    program, array = weighted()
    twin = protected(program)
    tensor = twin.weights()["k"]
    held = tensor.numpy()
    assert np.shares_memory(held, array)
    assert not held.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        held[0] = 9
    assert (tensor.name, tensor.dtype, tuple(tensor.shape)) == ("k", ir.DataType.FLOAT, (2,))
    assert tensor.meta["kept"] == "yes"
    assert array.flags.writeable
    assert program.weights()["k"].numpy().flags.writeable
    assert twin.content_hash() == program.content_hash()


def test_protecting_twice_shares_the_tensors() -> None:
    program, _ = weighted()
    once = protected(program)
    assert protected(once).weights()["k"] is once.weights()["k"]


def test_weights_that_are_no_arrays_of_ours_are_left() -> None:
    program, _ = weighted()
    value = program.value("k")
    assert value is not None
    lazy = ir.LazyTensor(
        lambda: ir.tensor(np.ones(2, np.float32)), dtype=ir.DataType.FLOAT, shape=ir.Shape([2]),
        name="k",
    )  # fmt: skip
    value.const_value = lazy
    array = np.array([1.0, 2.0], np.float32)
    other = ir.val("z", const_value=ir.tensor(array, name="z"))
    program.graph.register_initializer(other)
    twin = protected(program)
    assert twin.weights()["k"] is lazy
    assert not twin.weights()["z"].numpy().flags.writeable


def test_protected_arrays_and_batches() -> None:
    array = np.zeros(2)
    view = protected_array(array)
    assert np.shares_memory(view, array)
    assert not view.flags.writeable
    assert array.flags.writeable
    items = [1, 2]
    batch = protected_batch({"x": array, "s": items})  # type: ignore[dict-item]
    assert list(batch) == ["x", "s"]
    assert not batch["x"].flags.writeable
    assert np.shares_memory(batch["x"], array)
    assert batch["s"] is items
