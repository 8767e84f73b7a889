"""Layers: pooling, resizing, recurrence, attention, losses and signals."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.fuzz.families.contraction import window
from tests.fuzz.graph import FLOAT, INT64, Draw, Graph


def pool(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.image(d)
    kernel, given = window(d, g.shape(x)[2:], dilated=g.attribute(op_type, "dilations"))
    # before opset 22 ONNX counted windows that begin behind the end
    if g.attribute(op_type, "ceil_mode") and "auto_pad" not in given and g.opset >= 22:
        given["ceil_mode"] = d.one_of((None, 1))
    if op_type == "AveragePool":
        given["count_include_pad"] = d.one_of((None, 1))
    if op_type == "LpPool":
        given["p"] = d.one_of((None, 1, 3))
    if op_type == "MaxPool" and d.chance(20):
        return g.add("MaxPool", x, outputs=2, kernel_shape=kernel, **given)
    return g.add(op_type, x, kernel_shape=kernel, **given)


def global_pool(g: Graph, d: Draw, op_type: str) -> Any:
    return g.add(op_type, g.image(d), p=d.one_of((None, 1)) if op_type == "GlobalLpPool" else None)


def max_unpool(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.like(d, (d.one_of((1, 2)), d.size(), d.one_of((4, 2)), d.one_of((6, 2))))
    values, places = g.add("MaxPool", x, outputs=2, kernel_shape=[2, 2], strides=[2, 2])
    return g.add("MaxUnpool", values, places, kernel_shape=[2, 2], strides=[2, 2])


def resize(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.image(d, d.one_of((2, 2, 1)))
    shape = g.shape(x)
    mode = (
        d.one_of(("nearest", "linear", "cubic"))
        if len(shape) == 4
        else d.one_of(("nearest", "linear"))
    )
    kinds_of_place = ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
    given: dict[str, Any] = {
        "mode": mode,
        "coordinate_transformation_mode": d.one_of(kinds_of_place),
    }
    if mode == "nearest":
        kinds = ("round_prefer_floor", "floor", "ceil", "round_prefer_ceil")
        given["nearest_mode"] = d.one_of(kinds)
    if g.attribute("Resize", "antialias") and mode != "nearest" and d.chance(10):
        given["antialias"] = 1
    if mode == "cubic":
        given |= {"cubic_coeff_a": d.one_of((None, -0.5)), "exclude_outside": d.one_of((None, 1))}
    places = given["coordinate_transformation_mode"]
    if places != "align_corners" and d.chance(50):  # ONNX does not say what is aligned with what
        scales = np.array([1, 1, *(d.one_of((2.0, 1.0, 0.5, 1.5)) for _ in shape[2:])])
        return g.add("Resize", x, None, g.weight(scales, shared=False), **given)
    sizes = [*shape[:2], *(d.integer(1, 2 * s) for s in shape[2:])]
    return g.add("Resize", x, None, None, g.sizes(d, sizes), **given)


def grid_sample(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.image(d, 2)
    grid = g.like(d, (g.shape(x)[0], d.one_of((3, 1, 4)), d.one_of((2, 5)), 2))
    kinds = ("linear", "nearest", "cubic") if g.opset >= 20 else ("bilinear", "nearest", "bicubic")
    return g.add("GridSample", x, g.into(grid, -1.1, 1.1), mode=d.one_of(kinds),
                 padding_mode=d.one_of((None, "border", "reflection")),
                 align_corners=d.one_of((None, 1)))  # fmt: skip


def affine_grid(g: Graph, d: Draw, op_type: str) -> Any:
    n = d.one_of((1, 2))
    return g.add("AffineGrid", g.like(d, (n, 2, 3)), g.ints([n, 1, d.one_of((3, 2)), 4]),
                 align_corners=d.one_of((None, 1)))  # fmt: skip


def deform_conv(g: Graph, d: Draw, op_type: str) -> Any:
    n, c, m = d.one_of((1, 2)), d.one_of((2, 4)), d.one_of((2, 3))
    group, offsets = d.one_of((1, c if m % c == 0 else 1)), d.one_of((1, 2))
    x = g.like(d, (n, c, d.one_of((5, 4)), d.one_of((6, 4))))
    kernel = (d.one_of((1, 2, 3)), d.one_of((2, 3)))
    taps = kernel[0] * kernel[1]
    strides, pads = [d.one_of((1, 2)), 1], [d.one_of((0, 1))] * 4
    out = tuple(
        (size + 2 * pads[0] - k) // s + 1
        for size, k, s in zip(g.shape(x)[2:], kernel, strides, strict=True)
    )
    moves = g.into(g.like(d, (n, offsets * taps * 2, *out)), -1.5, 1.5)
    mask = g.like(d, (n, offsets * taps, *out)) if d.chance(50) else None
    bias = g.weight(g.array((m,))) if mask is not None or d.chance(50) else None
    weight = g.scaled((m, c // group, *kernel), taps * c // group)
    return g.add("DeformConv", x, weight, moves, bias, mask, group=group, offset_group=offsets,
                 kernel_shape=list(kernel), strides=strides, pads=pads)  # fmt: skip


def roi_align(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.image(d, 2)
    n, _, height, width = g.shape(x)
    count = d.one_of((2, 1, 3))
    low = g.rng.uniform(0, 0.5, (count, 2))
    corners = np.concatenate([low, low + g.rng.uniform(0.2, 0.5, (count, 2))], 1)
    regions = g.weight(corners * [width, height, width, height], shared=False)
    images = g.weight(g.rng.integers(0, n, count), INT64, shared=False)
    return g.add("RoiAlign", x, regions, images, output_height=d.one_of((2, 1)),
                 output_width=d.one_of((2, 3)), sampling_ratio=d.one_of((1, 2)))  # fmt: skip


def recurrent(g: Graph, d: Draw, op_type: str) -> Any:
    time, batch, width, hidden = (
        d.one_of((3, 1, 4)),
        d.one_of((2, 1)),
        d.one_of((3, 1)),
        d.one_of((2, 3, 1)),
    )
    gates = {"RNN": 1, "GRU": 3, "LSTM": 4}[op_type]
    direction = d.one_of((None, "reverse", "bidirectional"))
    count = 2 if direction == "bidirectional" else 1
    x = g.like(d, (time, batch, width))
    w, r = (
        g.scaled((count, gates * hidden, width), width),
        g.scaled((count, gates * hidden, hidden), hidden),
    )
    bias = g.weight(0.2 * g.array((count, 2 * gates * hidden))) if d.chance(60) else None
    state = (count, batch, hidden)
    begin = g.like(d, state) if d.chance(40) else None
    given = [x, w, r, bias, None, begin]
    outputs = 2
    options: dict[str, Any] = {}
    if op_type == "LSTM":
        given.append(g.like(d, state) if begin is not None else None)
        given.append(g.scaled((count, 3 * hidden), hidden) if d.chance(20) else None)
        outputs = 3
    if op_type == "GRU":
        options["linear_before_reset"] = d.one_of((None, 1))
    return g.add(
        op_type, *given, outputs=outputs, hidden_size=hidden, direction=direction, **options
    )


def attention(g: Graph, d: Draw, op_type: str) -> Any:
    batch, heads, rows, columns, width = (
        d.one_of((1, 2)),
        d.one_of((1, 2)),
        d.one_of((3, 1, 4)),
        d.one_of((3, 4)),
        d.one_of((2, 4)),
    )
    q = g.like(d, (batch, heads, rows, width))
    k, v = (g.like(d, (batch, heads, columns, width)) for _ in range(2))
    mask = g.like(d, (rows, columns)) if d.chance(40) else None
    causal = d.one_of((None, 1)) if mask is None else None
    return g.add("Attention", q, k, v, mask, is_causal=causal,
                 scale=d.one_of((None, 0.5)), softcap=d.one_of((None, 2.0)))  # fmt: skip


def rotary(g: Graph, d: Draw, op_type: str) -> Any:
    batch, heads, time, width = (
        d.one_of((1, 2)),
        d.one_of((1, 2)),
        d.one_of((3, 1)),
        d.one_of((2, 4)),
    )
    x = g.like(d, (batch, heads, time, width))
    tables = [g.like(d, (5, width // 2)) for _ in range(2)]
    places = g.weight(g.rng.integers(0, 5, (batch, time)), INT64, shared=False)
    return g.add("RotaryEmbedding", x, *tables, places, interleaved=d.one_of((None, 1)))


def loss(g: Graph, d: Draw, op_type: str) -> Any:
    n, classes = d.one_of((2, 3, 1)), d.one_of((3, 5))
    scores = g.like(d, (n, classes, *d.one_of(((), (2,)))))
    shape = (n, *g.shape(scores)[2:])
    labels = g.weight(g.rng.integers(0, classes, shape), INT64, shared=False)
    weight = g.weight(np.abs(g.array((classes,))) + 0.1) if d.chance(40) else None
    reduction = d.one_of((None, "sum", "none"))
    if op_type == "SoftmaxCrossEntropyLoss" and d.chance(30):
        return g.add(op_type, scores, labels, weight, outputs=2, reduction=reduction)
    return g.add(op_type, scores, labels, weight, reduction=reduction)


def dft(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.like(d, (d.one_of((1, 2)), d.one_of((4, 5, 8)), d.one_of((1, 2))))
    onesided = d.one_of((None, 1)) if g.shape(x)[-1] == 1 else None
    if g.attribute("DFT", "axis"):
        return g.add("DFT", x, axis=1, onesided=onesided)
    axis = g.weight(np.asarray(1), INT64, shared=False)
    return g.add("DFT", x, None, axis, onesided=onesided)


def stft(g: Graph, d: Draw, op_type: str) -> Any:
    length = d.one_of((4, 8))
    x = g.like(d, (d.one_of((1, 2)), 16, 1))
    step = g.weight(np.asarray(d.one_of((4, 2))), INT64, shared=False)
    size = g.weight(np.asarray(length), INT64, shared=False)
    frame = (
        g.add("HannWindow", size) if d.chance(50) else g.weight(np.abs(g.array((length,))), FLOAT)
    )
    return g.add("STFT", x, step, frame, size, onesided=1)


FAMILIES = {
    "MaxPool": pool, "AveragePool": pool, "LpPool": pool, "GlobalAveragePool": global_pool,
    "GlobalMaxPool": global_pool, "GlobalLpPool": global_pool, "MaxUnpool": max_unpool,
    "Resize": resize, "GridSample": grid_sample, "AffineGrid": affine_grid, "RNN": recurrent,
    "GRU": recurrent, "LSTM": recurrent, "Attention": attention, "RotaryEmbedding": rotary,
    "NegativeLogLikelihoodLoss": loss, "SoftmaxCrossEntropyLoss": loss, "DFT": dft, "STFT": stft,
    "DeformConv": deform_conv, "RoiAlign": roi_align,
}  # fmt: skip
