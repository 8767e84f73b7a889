"""One lowered form for every size: numbers that are polynomials of it, all else the same."""

from __future__ import annotations

import numpy as np
import pytest

from optcompiler.binding import bind
from optcompiler.errors import UnsupportedOperatorError
from optcompiler.lowering import lower, lower_sized
from optcompiler.lowering.extents import Symbol, at
from optcompiler.lowering.ir import Lowered
from optcompiler.lowering.sized import sample_sizes
from tests.backends.test_cpu import program
from tests.support import filled_program

HEAD = '<ir_version: 10, opset_import: ["": 21]> n '
NET = (
    HEAD
    + """(float[batch, 3, 8, 8] x) => (float[batch, 5] y) <float[6,3,3,3] w, float[6,5] v> {
    c = Conv<pads = [1, 1, 1, 1]>(x, w)
    r = Relu(c)
    g = GlobalAveragePool(r)
    f = Flatten(g)
    y = MatMul(f, v)
}"""
)


def numbers(lowered: Lowered, sizes: dict[str, int]) -> list[object]:
    """Shapes, strides and places of all views, at these sizes."""
    found: list[object] = []
    for step in lowered.steps:
        for view in (step.out, *step.reads()):
            found.append([at(n, sizes) for n in (*view.shape, *view.strides, view.offset)])
    return [*found, [at(b.elements, sizes) for b in lowered.buffers]]


@pytest.mark.parametrize("ends", [(1, 32), (1, 2), (3, 4)])
def test_it_is_what_lowering_at_each_size_gives(ends: tuple[int, int]) -> None:
    source = filled_program(NET)
    lowered, symbols = lower_sized(source, {"batch": ends}, lower)
    assert symbols == (Symbol("batch", *ends),)
    for n in {max(ends[0], 2), 5, 16, ends[1]}:  # at 1, strides of what does not repeat are 0
        fixed = lower(bind(source, {"batch": n}))
        assert numbers(lowered, {"batch": n}) == numbers(fixed, {})
    assert str(lowered.outputs[0].shape) == "(n_batch, 5)"


def test_two_sizes() -> None:
    source = filled_program(
        HEAD + "(float[batch, tokens, 6] x) => (float[batch, tokens, tokens] y) "
        "{ t = Transpose<perm = [0, 2, 1]>(x) m = MatMul(x, t) y = Softmax(m) }"
    )
    bounds = {"batch": (1, 8), "tokens": (4, 64)}
    lowered, _ = lower_sized(source, bounds, lower)
    for b, t in ((2, 4), (8, 64), (3, 17)):
        sizes = {"batch": b, "tokens": t}
        assert numbers(lowered, sizes) == numbers(lower(bind(source, sizes)), {})


@pytest.mark.parametrize("count", [1, 2, 3])
def test_samples_tell_polynomials_apart_and_are_never_one(count: int) -> None:
    symbols = [Symbol(f"s{i}", 1, 4 + i) for i in range(count)]
    sizes = sample_sizes(symbols)
    assert sizes[0] == {s.name: s.most for s in symbols}
    assert all(n > 1 for s in sizes for n in s.values())
    assert len({tuple(s.values()) for s in sizes}) == len(sizes)


def test_a_table_that_grows_is_that_of_the_largest() -> None:
    source = program(
        """(float[tokens, 4] x) => (float[tokens, 4] y) {
            shape = Shape<start = 0, end = 1>(x)
            part = Slice(table, zero, shape)
            y = Add(x, part)
        }""".replace("tokens", "t"),
        table=(32, 4), zero=np.array([0], np.int64),
    )  # fmt: skip
    lowered, _ = lower_sized(source, {"t": (2, 32)}, lower)
    assert [b.elements for b in lowered.buffers if b.kind == "constant"] == [128]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        # every second token
        ("(float[t, 4] x) => (float[u, 4] y) { y = Slice(x, zero, far, zero, two) }", "polynomial"),
        # the end of a table, which smaller sizes do not begin as
        (
            """(float[t, 4] x) => (float[t, 4] y) {
                shape = Shape<start = 0, end = 1>(x)
                from = Neg(shape)
                part = Slice(table, from, far)
                y = Add(x, part)
            }""",
            "beginning",
        ),
        # a kernel more where it is long
        (
            """(float[t, 4] x) => (float[t, 4] y) {
                one = Slice(x, zero, ten)
                other = Slice(x, ten, far)
                r = Relu(other)
                y = Concat<axis = 0>(one, r)
            }""",
            "another kernel|polynomial",
        ),
    ],
)  # fmt: skip
def test_what_is_not_one_form_is_refused(body: str, reason: str) -> None:
    def array(n: int) -> np.ndarray:
        return np.array([n], np.int64)

    constants = {"zero": array(0), "two": array(2), "ten": array(10), "far": array(1 << 40)}
    used = {k: v for k, v in constants.items() if k in body}
    source = program(body, **used, **({"table": (32, 4)} if "table" in body else {}))
    with pytest.raises(UnsupportedOperatorError, match=rf"({reason}).*size\.t="):
        lower_sized(source, {"t": (2, 32)}, lower)
