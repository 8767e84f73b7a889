"""Depthwise convolution of bytes by `vpdpbusd`: four taps of a channel are one 32-bit lane.

64 channels of four pixels become four vectors of four taps each by unpacking; what requantises
packs the results back in order. Four neighbouring pixels serve two outputs of a kernel three wide,
with weights (w0, w1, w2, 0) and (0, w0, w1, w2). Of 16 or 32 channels several pixels lie side by
side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from optcompiler.lowering.build import view_array
from optcompiler.lowering.extents import c_long
from optcompiler.lowering.ir import Const, Conv, Quantize, View, loads
from optcompiler_cpu.code import KernelCode, Pointers, indent, linear
from optcompiler_cpu.expressions import Place, VectorPrinter, is_packed
from optcompiler_cpu.isa import Isa
from optcompiler_cpu.loops import HEADER

GROUP, LANES = 64, 16


@dataclass(frozen=True)
class Quad:
    """Up to four taps that are multiplied at once.

    `offsets` says where each is read, from the pixel under the first tap of the first output.
    `outputs` gives for every output the kernel's tap at each place, or None.
    """

    offsets: tuple[int, int, int, int]
    outputs: tuple[tuple[int | None, ...], ...]


def is_bytes(step: Conv, isa: Isa) -> bool:
    """Whether the step, a direct depthwise one, has bytes in and out and fills its vectors."""
    rest = step.out.shape[1] % GROUP
    return _fits(step, isa) and (rest == 0 or rest > GROUP // 2 or _side_by_side(step) > 1)


def tail_of(step: Conv, isa: Isa) -> int:
    """Channels at the end that are better left to a kernel of their own."""
    channels = step.out.shape[1]
    rest = channels % GROUP
    return rest if channels > GROUP and rest <= GROUP // 2 and _fits(step, isa) else 0


def _fits(step: Conv, isa: Isa) -> bool:
    out = step.epilogue
    return (
        isa.lanes == LANES
        and step.a.view.dtype == "UINT8"
        and step.a.view.strides[1] == 1
        and step.out.strides[1] == 1
        and is_packed(out)
        and all(_along_channels(load.view) for load in loads(out))
    )


def _side_by_side(step: Conv) -> int:
    """Pixels whose channels are the lanes of one group."""
    channels = step.out.shape[1]
    dense = step.a.view.strides[3] == step.out.strides[3] == channels
    return GROUP // channels if channels in {16, 32} and dense and step.strides[1] == 1 else 1


def _along_channels(view: View) -> bool:
    moving = [
        d for d, (n, s) in enumerate(zip(view.shape, view.strides, strict=True)) if s and n > 1
    ]
    return view.dtype == "FLOAT" and view.buffer.array is not None and set(moving) <= {1}


def quads(step: Conv) -> list[Quad]:
    _, _, sh, sw = step.a.view.strides
    kh, kw = step.b.view.shape[2:]
    down, right = step.dilations
    where = [(t // kw) * down * sh + (t % kw) * right * sw for t in range(kh * kw)]
    pairs = kw == 3 and right == 1 and step.strides[1] == 1 and _side_by_side(step) == 1
    found: list[Quad] = []
    if pairs:
        for y in range(kh):
            first = y * kw
            at = where[first]
            outputs = ((first, first + 1, first + 2, None), (None, first, first + 1, first + 2))
            found.append(Quad((at, at + sw, at + 2 * sw, at + 3 * sw), outputs))
        return found
    for first in range(0, kh * kw, 4):
        taps = [t if t < kh * kw else None for t in range(first, first + 4)]
        a, b, c, d = (where[first if t is None else t] for t in taps)
        found.append(Quad((a, b, c, d), (tuple(taps),)))
    return found


def unpacked_order(values: np.ndarray) -> np.ndarray:
    """[..., 64 g] as [..., g, 4, 16]: vector q of a group holds its channels 16 l + 4 q + t."""
    *rest, count = values.shape
    grouped = values.reshape(*rest, count // GROUP, 4, 4, 4)
    return np.ascontiguousarray(grouped.swapaxes(-3, -2)).reshape(*rest, count // GROUP, 4, LANES)


def print_depthwise_bytes(step: Conv, isa: Isa) -> KernelCode:
    n, channels, oh, ow = step.out.shape
    sn, _, sh, sw = step.a.view.strides
    on, _, oy, ox = step.out.strides
    groups = -(-channels // GROUP)
    wide = groups * GROUP
    plan = quads(step)
    outputs, side = len(plan[0].outputs), _side_by_side(step)

    def padded(values: np.ndarray, kind: type) -> np.ndarray:
        spread = np.broadcast_to(values, (*values.shape[:-1], channels))
        full = np.zeros((*values.shape[:-1], wide), kind)
        full[..., : channels * side] = np.concatenate([spread] * side, axis=-1)
        return full

    assert step.a.quantization is not None
    assert step.b.quantization is not None
    taps = view_array(step.b.view).astype(np.int32).reshape(channels, -1).T
    start = -int(step.a.quantization.zero_point) * taps.sum(axis=0)
    if step.bias is not None:
        start = start + step.bias
    bytes_of = unpacked_order(padded(taps, np.int8))  # [taps, g, 4, 16]
    weights = np.zeros((groups, len(plan), outputs, 4, LANES, 4), np.int8)
    for k, quad in enumerate(plan):
        for o, places in enumerate(quad.outputs):
            for place_, tap in enumerate(places):
                if tap is not None:
                    weights[:, k, o, :, :, place_] = bytes_of[tap]
    scale = step.a.quantization.scale * step.b.quantization.scale
    pointers = Pointers()
    a = pointers.view(step.a.view)
    out = pointers.view(step.out, written=True)
    pointers.data("w", weights, "int8_t")
    pointers.data("init", unpacked_order(padded(start, np.int32)), "int32_t")
    pointers.data("scale", unpacked_order(padded(np.atleast_1d(scale), np.float32)), "float")
    named: dict[int, str] = {}

    def constant(view: View) -> str:
        """The name of a per-channel constant in the order of the vectors."""
        key = id(view)
        if key not in named:
            values = view_array(view.broadcast(step.out.shape))[0, :, 0, 0]
            named[key] = f"k{len(named)}"
            pointers.data(named[key], unpacked_order(padded(values, np.float32)), "float")
        return named[key]

    once: list[str] = []
    columns: list[str] = []
    pixel: list[str] = []
    results: list[str] = []
    assert isinstance(step.epilogue, Quantize)
    assert isinstance(step.epilogue.zero_point, Const)
    for v in range(4):

        def place(view: View, v: int = v) -> Place:
            if not any(s and n > 1 for n, s in zip(view.shape, view.strides, strict=True)):
                return Place(f"{pointers.view(view)} + {c_long(view.offset)}", 0, 0)
            return Place(f"{constant(view)} + g * {GROUP} + {v * LANES}", 1, 1)

        columns.append(f"const vf scales{v} = vf_load(scale + g * {GROUP} + {v * LANES});")
        printer = VectorPrinter(
            pointers.params, place, f"vf_mul(vi_float(SUM_{v}), scales{v})",
            factor=(f"vi_float(SUM_{v})", f"scales{v}"), prefix=f"t{v}_",
        )  # fmt: skip
        results.append(printer.unpacked(step.epilogue))
        for into, lines in zip((once, columns, pixel), printer.lines, strict=True):
            into += lines
    verb = "vi_join_lanes_u8" if step.epilogue.dtype == "UINT8" else "vi_join_lanes_s8"
    zero = f"(int){pointers.params.add(float(step.epilogue.zero_point.value))}"

    def tile(count: int) -> Iterator[str]:
        """Statements for `count` neighbouring outputs from column `x` on."""
        for o in range(count):
            yield from (
                f"vi c{o}_{v} = vi_load(init + g * {GROUP} + {v * LANES});" for v in range(4)
            )
        for k, quad in enumerate(plan):
            yield "{"
            yield "  vi x0, x1, x2, x3;"
            last = [p for p, t in enumerate(quad.outputs[count - 1]) if t is not None][-1]
            at = [quad.offsets[min(p, last)] for p in range(4)]
            ends = ", ".join(f"from + {offset}" for offset in at)
            yield f"  vi_unpack({ends}, live, &x0, &x1, &x2, &x3);"
            for o in range(count):
                for v in range(4):
                    offset = ((k * outputs + o) * 4 + v) * GROUP
                    yield (
                        f"  c{o}_{v} = vi_dot4(c{o}_{v}, x{v}, "
                        f"vi_load((const int32_t *)(const void *)(taps + {offset})));"
                    )
            yield "}"
        for o in range(count):
            yield "{"
            yield from (f"  {line}".replace("SUM", f"c{o}") for line in pixel)
            four = ", ".join(results)
            yield f"  {verb}(to + {c_long(o * ox)}, {four}, live, {zero});"
            yield "}"

    once_across = outputs * side
    whole = ow - ow % outputs if side == 1 else ow
    live = [
        f"const int left = {channels} - g * {GROUP};",
        f"const int live = left < {GROUP} ? left : {GROUP};",
    ]
    if side > 1:
        live = [
            f"const int left = ({ow} - x) * {channels};",
            f"const int live = left < {GROUP} ? left : {GROUP};",
        ]
    body = [
        "(void)scratch;",
        *once,
        f"const long first = (long)part * {n * oh} / parts;",
        f"const long last = (long)(part + 1) * {n * oh} / parts;",
        "for (long row = first; row < last; ++row) {",
        f"  const long i = row / {oh}, y = row % {oh};",
        "  (void)i;",
        f"  for (int g = 0; g < {groups}; ++g) {{",
        *(f"    {line}" for line in (live if side == 1 else [])),
        f"    const int8_t *const taps = w + (long)g * {weights[0].size};",
        *(f"    {line}" for line in columns),
        f"    const uint8_t *from = {a} + "
        f"{linear(['i', 'y', 'g'], (sn, sh * step.strides[0], GROUP), step.a.view.offset)};",
        f"    {'int8_t' if step.epilogue.dtype == 'INT8' else 'uint8_t'} *to = {out} + "
        f"{linear(['i', 'y', 'g'], (on, oy, GROUP), step.out.offset)};",
        f"    for (int x = 0; x < {whole}; x += {once_across}) {{",
        *(f"      {line}" for line in (live if side > 1 else [])),
        *(f"      {line}" for line in tile(outputs)),
        f"      from += {once_across * step.strides[1] * sw};",
        f"      to += {once_across * ox};",
        "    }",
    ]
    if whole < ow:
        body += ["    {", *(f"      {line}" for line in tile(ow - whole)), "    }"]
    body += ["  }", "}"]
    body = [*pointers.declarations(body), *body]
    return KernelCode(f"{HEADER} {{\n{indent(body)}\n}}\n", pointers.finish())
