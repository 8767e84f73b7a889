from __future__ import annotations

import pytest
from optcompiler_hardswish.hard_activations import HardActivations

from optcompiler import Candidate, Decline, Declined, Program


def program(nodes: str, outputs: str = "float[2, 3] y", opset: int = 20) -> Program:
    return Program.from_text(
        f"""<ir_version: 10, opset_import: ["": {opset}]>
agraph (float[2, 3] x) => ({outputs}) {{ {nodes} }}"""
    )


def proposed(before: Program, pass_: HardActivations | None = None):
    found = list((pass_ or HardActivations()).propose(before, None))  # type: ignore[arg-type]
    return (
        [c for c in found if isinstance(c, Candidate)],
        [d for d in found if isinstance(d, Decline)],
    )


@pytest.mark.parametrize(
    ("nodes", "site", "choice", "after"),
    [
        ("[g] s = Sigmoid (x) y = Neg (s)", "g", "HardSigmoid", ["HardSigmoid", "Neg"]),
        ("s = Sigmoid (x) [m] y = Mul (x, s)", "m", "HardSwish", ["HardSwish"]),
        ("s = Sigmoid (x) [m] y = Mul (s, x)", "m", "HardSwish", ["HardSwish"]),
        ("[g] y = Gelu (x)", "g", "HardSwish", ["HardSwish"]),
    ],
)
def test_replaces(nodes: str, site: str, choice: str, after: list[str]):
    before = program(nodes)
    [candidate], declines = proposed(before)
    assert (candidate.site, candidate.choice, candidate.exact) == (site, choice, False)
    assert not declines
    copy = before.clone()
    candidate.rewrite(copy)
    copy.verify(like=before)
    assert [n.op_type for n in copy.graph] == after
    assert copy.node(site) is not None
    with pytest.raises(Declined, match="no longer"):
        candidate.rewrite(copy)


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        (program("y = Sigmoid (x)"),
         "it makes the output 'y'; probabilities would saturate at 0 and 1."),
        (program("s = Sigmoid (x) y = Mul (x, s) z = Neg (s)", "float[2, 3] y, float[2, 3] z"),
         "its sigmoid 's' is also read elsewhere."),
    ],
)  # fmt: skip
def test_declines(before: Program, reason: str):
    candidates, declines = proposed(before)
    assert not candidates
    assert [d.reason for d in declines] == [reason]


def test_kinds_narrow_the_search():
    before = program("a = Gelu (x) s = Sigmoid (a) y = Mul (a, s)")
    candidates, _ = proposed(before, HardActivations(kinds=("gelu",)))
    assert [c.choice for c in candidates] == ["HardSwish"]
