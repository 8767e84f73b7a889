"""PyTorch's operator samples come exactly as far as `torch_operators.toml` says."""

from __future__ import annotations

import pytest

pytest.importorskip("expecttest")

PARTS = 56


@pytest.mark.parametrize("part", range(PARTS))
def test_operators_come_as_far_as_expected(part: int) -> None:
    from tests.conformance import torch_operators as suite

    # neighbours cost alike, so every part gets some of each kind
    names = list(suite.operators())[part::PARTS]
    known = suite.expected()
    outcomes = suite.run_all({name: suite.operators()[name] for name in names}, known)
    surprises = {
        o.name: f"{o.stages} instead of {wanted.stages}: {o.reason}"
        for o in outcomes
        for wanted in [known.get(o.name, suite.all_right(o.name))]
        if o.stages != wanted.stages
    }
    assert {o.name for o in outcomes} == set(names)
    assert not surprises


def test_what_is_expected_to_stop_is_a_known_operator_with_a_reason() -> None:
    from tests.conformance import torch_operators as suite

    listed = [name for section in suite.expectations() for name in section.operators]
    assert len(listed) == len(set(listed))
    assert set(listed) <= set(suite.operators())
    for section in suite.expectations():
        assert section.outcome in (suite.REFUSED, suite.UNSUPPORTED)
        assert section.reason
