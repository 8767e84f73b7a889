"""The public `compile` on a sample of the ONNX suite: what the exact passes alone do not cover."""

from __future__ import annotations

import pytest

import optcompiler as oc
from optcompiler.errors import InputError, UnsupportedOperatorError
from tests.conformance.cases import Case, cases
from tests.conformance.optimizer import baseline
from tests.conformance.runner import compare

EVERY = 97
NAMED = (
    "test_if_opt", "test_loop13_seq", "test_scan9_sum", "test_sequence_insert_at_back",
    "test_split_to_sequence_1", "test_string_concat", "test_strnormalizer_nostopwords_nochangecase",
    "test_loop11",
)  # fmt: skip


def sample() -> list[Case]:
    known = cases("node")
    found = [c for i, c in enumerate(known) if i % EVERY == 0 or c.name in NAMED]
    return [c for c in found if baseline(c) is not None]


def test_models_compile_and_run_as_they_did() -> None:
    chosen = sample()
    assert set(NAMED) <= {case.name for case in chosen}
    for case in chosen:
        expected = baseline(case)
        assert expected is not None
        inputs = dict(case.data[0][0])
        with oc.compile(case.model, inputs, precision="fp32") as compiled:
            compare(compiled.run(inputs), expected[0], case)


def named(name: str) -> Case:
    return next(case for case in cases("node") if case.name == name)


def test_what_is_no_tensor_needs_an_example_and_cannot_be_calibrated() -> None:
    case = named("test_sequence_insert_at_back")
    inputs = dict(case.data[0][0])
    with pytest.raises(InputError, match="no example can be made"):
        oc.compile(case.model, precision="fp32")
    with pytest.raises(InputError, match="sequence of int64 is no tensor"):
        oc.compile(case.model, inputs, calibration=[inputs])


def test_a_target_of_tensors_alone_says_so() -> None:
    case = named("test_sequence_insert_at_back")
    with pytest.raises(UnsupportedOperatorError, match=r"SequenceInsert of node .* sequence"):
        oc.compile(case.model, dict(case.data[0][0]), target="cpu", precision="fp32")
