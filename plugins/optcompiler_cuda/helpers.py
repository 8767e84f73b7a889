"""Triton functions that kernels call; a file holds those that it needs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

HELPERS: Mapping[str, str] = {
    "NEAREST": """\
# Adding and subtracting 1.5 * 2**23 leaves the nearest integer, halves to even, below 2**22.
NEAREST = tl.constexpr(12582912.0)
""",
    "nearest": """\
@triton.jit
def nearest(x):
    return tl.where(tl.abs(x) < 4194304.0, (x + NEAREST) - NEAREST, x)
""",
    "nearest64": """\
@triton.jit
def nearest64(x):
    low = tl.floor(x)
    rest = x - low
    odd = low - 2.0 * tl.floor(low * 0.5)
    return tl.where((rest > 0.5) | ((rest == 0.5) & (odd == 1.0)), low + 1.0, low)
""",
    "quantize": """\
@triton.jit
def quantize(x, per_scale, zero_point, LOW: tl.constexpr, HIGH: tl.constexpr):
    x = tl.minimum(tl.maximum(x * per_scale, LOW - zero_point), HIGH - zero_point)
    return (x + NEAREST) - NEAREST + zero_point
""",
    "power": """\
@triton.jit
def power(x, y):
    size = tl.exp2(y * tl.log2(tl.abs(x)))
    whole = tl.floor(y) == y
    odd = whole & (tl.floor(y * 0.5) * 2.0 != y)
    signed = tl.where(odd, -size, tl.where(whole, size, float("nan")))
    return tl.where(y == 0.0, 1.0, tl.where(x < 0.0, signed, size))
""",
    "floor_mod": """\
@triton.jit
def floor_mod(x, y):
    rest = x % y
    return tl.where((rest != 0) & ((rest < 0) != (y < 0)), rest + y, rest)
""",
    "smaller": """\
@triton.jit
def smaller(x, y):
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)
""",
    "larger": """\
@triton.jit
def larger(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
""",
    "multiply": """\
@triton.jit
def multiply(x, y):
    return x * y
""",
}
"""Source by name, in the order of the file; a helper uses those before it."""


def helpers_for(sources: Sequence[str]) -> list[str]:
    """The helpers that `sources` use, and those that these use, in order."""
    text = "\n".join(sources)
    chosen: list[str] = []
    for name, source in reversed(list(HELPERS.items())):
        if re.search(rf"\b{name}\b", text):
            chosen.append(source)
            text += source
    return chosen[::-1]
