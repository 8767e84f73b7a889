"""Fourier transforms as products with known cosines and sines; transposed convolution."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from optcompiler.lowering.decompose.tape import Tape, ints, typed
from optcompiler.lowering.expand import Decomposition, Expansion, Facts
from optcompiler.ops.spec import attributes_of


def _spectrum(
    tape: Tape, x: ir.Value, n: int, parts: int, size: int, inverse: bool, onesided: bool
) -> ir.Value:
    """Transform [..., n, parts] into [..., bins, 1 or 2]."""
    used = min(n, size)
    real = inverse and onesided
    bins = size if real or not onesided else size // 2 + 1
    angle = 2 * np.pi * np.outer(np.arange(used), np.arange(bins)) / size
    weight = np.ones((used, 1))
    if real:
        weight[1 : (size + 1) // 2] = 2
    if inverse:
        weight /= size
    cosine, sine = (typed(f(angle) * weight, x) for f in (np.cos, np.sin))
    sign = -1 if inverse else 1

    def part(place: int) -> ir.Value:
        one = tape("Gather", x, np.array(place, np.int64), axis=-1)
        return one if used == n else tape("Slice", one, ints(0), ints(used), ints(-1))

    a = part(0)
    b = part(1) if parts == 2 else None
    first = tape("MatMul", a, cosine)
    if b is not None:
        first = tape("Add", first, tape("MatMul", b, sine * sign))
    first = tape("Unsqueeze", first, ints(-1))
    if real:
        return first
    second = tape("MatMul", a, sine * -sign)
    if b is not None:
        second = tape("Add", second, tape("MatMul", b, cosine))
    return tape("Concat", first, tape("Unsqueeze", second, ints(-1)), axis=-1)


def dft(node: ir.Node, facts: Facts) -> Expansion | None:
    x, tape = node.inputs[0], Tape()
    assert x is not None
    given, shape = attributes_of(node), facts.shapes[x]
    along, length = facts.array(node, 2), facts.array(node, 1)
    for place, known in ((1, length), (2, along)):
        if place < len(node.inputs) and node.inputs[place] is not None and known is None:
            return None
    stated = given.get("axis")
    axis = -2 if stated is None else int(stated)
    axis = (axis if along is None else int(along.reshape(-1)[0])) % len(shape)
    inverse, onesided = bool(given.get("inverse")), bool(given.get("onesided"))
    n = shape[axis]
    size = int(length.reshape(-1)[0]) if length is not None else n
    if length is None and inverse and onesided:
        size = 2 * (n - 1)
    last = len(shape) - 2
    order = [i for i in range(last + 1) if i != axis]
    turned = tape("Transpose", x, perm=[*order, axis, last + 1])
    turned.type = x.type
    y = _spectrum(tape, turned, n, shape[-1], size, inverse, onesided)
    back = [0] * (last + 2)
    for place, i in enumerate([*order, axis, last + 1]):
        back[i] = place
    return tape.done(tape("Transpose", y, perm=back))


def stft(node: ir.Node, facts: Facts) -> Expansion | None:
    x, tape = node.inputs[0], Tape()
    assert x is not None
    step, length = facts.array(node, 1), facts.array(node, 3)
    window = node.inputs[2] if len(node.inputs) > 2 else None
    shape = facts.shapes[x]
    if step is None or (len(node.inputs) > 3 and node.inputs[3] is not None and length is None):
        return None
    size = shape[1] if window is None else facts.shapes[window][0]
    if length is not None:
        size = int(length.reshape(-1)[0])
    every = int(step.reshape(-1)[0])
    if not 0 < size <= shape[1] or every < 1:
        return None
    first = np.arange((shape[1] - size) // every + 1)[:, None] * every
    frames = tape("Gather", x, (first + np.arange(size)).astype(np.int64), axis=1)
    parts = shape[2] if len(shape) > 2 else 1
    if len(shape) == 2:
        frames = tape("Unsqueeze", frames, ints(-1))
    if window is not None:
        frames = tape("Mul", frames, tape("Unsqueeze", window, ints(-1)))
    frames.type = x.type
    onesided = bool(attributes_of(node).get("onesided", 1))
    return tape.done(_spectrum(tape, frames, size, parts, size, False, onesided))


def conv_transpose(node: ir.Node, facts: Facts) -> Expansion | None:
    """Conv of the input with zeros between its elements, by the weights turned around."""
    x, w = node.inputs[0], node.inputs[1]
    assert x is not None
    assert w is not None
    given, shape, weights = attributes_of(node), facts.shapes[x], facts.shapes[w]
    rank = len(shape) - 2
    groups = int(given.get("group") or 1)
    strides = list(given.get("strides") or [1] * rank)
    dilations = list(given.get("dilations") or [1] * rank)
    extra = list(given.get("output_padding") or [0] * rank)
    reach = [d * (k - 1) for d, k in zip(dilations, weights[2:], strict=True)]
    begin, end = _transposed_pads(given, shape[2:], strides, extra, reach)
    tape = Tape()
    y = x
    if any(s > 1 for s in strides):
        apart = [n for size in shape[2:] for n in (size, 1)]
        spread = [n for size, s in zip(shape[2:], strides, strict=True) for n in (size, s)]
        gaps = [b - a for a, b in zip(apart, spread, strict=True)]
        y = tape.reshape(y, [*shape[:2], *apart])
        y = tape("Pad", y, ints(*[0] * (2 + 2 * rank), 0, 0, *gaps))
        y = tape.reshape(y, [*shape[:2], *(n * s for n, s in zip(shape[2:], strides, strict=True))])
    low = [r - b for r, b in zip(reach, begin, strict=True)]
    high = [
        r - e + o - (s - 1) for r, e, o, s in zip(reach, end, extra, strides, strict=True)
    ]  # fmt: skip
    y = tape("Pad", y, ints(0, 0, *low, 0, 0, *high))
    far = np.iinfo(np.int64).min
    kernel = tape(
        "Slice", w, ints(*[-1] * rank), ints(*[far] * rank), ints(*range(2, 2 + rank)),
        ints(*[-1] * rank),
    )  # fmt: skip
    each, out = shape[1] // groups, weights[1]
    kernel = tape.reshape(kernel, [groups, each, out, *weights[2:]])
    kernel = tape("Transpose", kernel, perm=[0, 2, 1, *range(3, 3 + rank)])
    kernel = tape.reshape(kernel, [groups * out, each, *weights[2:]])
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return tape.done(tape("Conv", y, kernel, bias, group=groups, dilations=dilations))


def _transposed_pads(
    given: Mapping[str, object], size: tuple[int, ...], strides: list[int], extra: list[int],
    reach: list[int],
) -> tuple[list[int], list[int]]:  # fmt: skip
    rank = len(size)
    mode = str(given.get("auto_pad") or "NOTSET")
    wanted = given.get("output_shape")
    if wanted is None and mode in {"NOTSET", "VALID"}:
        pads = [0] * (2 * rank) if mode == "VALID" else list(given.get("pads") or [0] * (2 * rank))  # type: ignore[reportArgumentType]
        return pads[:rank], pads[rank:]
    begin, end = [0] * rank, [0] * rank
    shape = list(wanted)[-rank:] if wanted else [n * s for n, s in zip(size, strides, strict=True)]  # type: ignore[reportArgumentType]
    for i in range(rank):
        total = strides[i] * (size[i] - 1) + extra[i] + reach[i] + 1 - shape[i]
        half = total // 2
        begin[i] = half if mode == "SAME_UPPER" else total - half
        end[i] = total - begin[i]
    return begin, end


SIGNAL: Mapping[str, Decomposition] = {
    "DFT": dft, "STFT": stft, "ConvTranspose": conv_transpose,
}  # fmt: skip
