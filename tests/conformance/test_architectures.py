"""Architectures of `transformers` compile for ONNX Runtime and compute what eager does."""

from __future__ import annotations

import pytest

from optcompiler.errors import OptcompilerError

pytest.importorskip("transformers")

from tests.conformance import architectures as suite

KINDS = {
    "vision", "text encoder", "decoder", "encoder-decoder", "audio", "detection", "segmentation",
}  # fmt: skip


@pytest.mark.parametrize("name", suite.QUICK)
def test_an_architecture_compiles_and_computes_the_same(name: str) -> None:
    assert suite.compile_and_compare(suite.ARCHITECTURES[name]) <= suite.TOLERANCE


@pytest.mark.parametrize("name", suite.FAILING)
def test_what_fails_still_fails_for_its_reason(name: str) -> None:
    with pytest.raises(OptcompilerError) as caught:
        suite.compile_and_compare(suite.ARCHITECTURES[name])
    assert suite.FAILING[name].error in str(caught.value)


def test_every_kind_is_there() -> None:
    assert {suite.ARCHITECTURES[name].kind for name in suite.QUICK} >= KINDS
    assert not set(suite.QUICK) & set(suite.FAILING)
