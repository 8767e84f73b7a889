"""Depthwise convolution of bytes by `vpdpbusd`: four taps of a channel are one 32-bit lane.

64 channels of four pixels become four vectors of four taps each by unpacking; what requantises
packs the results back in order. Shuffles and loads, not products, are what there is too much of, so
a tile of neighbouring outputs shares them: four pixels one below the other serve two rows of
outputs of a kernel three high, with weights (w0, w1, w2, 0) and (0, w0, w1, w2), and every column
of outputs whose kernel reaches them. Of 16 or 32 channels several pixels lie side by side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from optcompiler.lowering.build import view_array
from optcompiler.lowering.extents import c_long, symbols
from optcompiler.lowering.ir import Const, Conv, Quantize, View, loads
from optcompiler_cpu.code import KernelCode, Pointers, indent, linear
from optcompiler_cpu.contraction import largest_sum
from optcompiler_cpu.expressions import Place, VectorPrinter, is_packed
from optcompiler_cpu.isa import Isa
from optcompiler_cpu.loops import HEADER

GROUP, LANES = 64, 16

MOST_OUTPUTS = 4
"""Outputs of a tile: of each are four vectors of sums."""

UNPACKS, VECTORS = 8, 4
"""Instructions that unpack four pixels, and that multiply them for one output."""

FLAT, DOWN, RIGHT = "flat", "down", "right"


@dataclass(frozen=True)
class Quad:
    """Up to four pixels that are unpacked at once.

    `offsets` says where each is read, from the pixel under the first tap of the first output.
    `outputs` gives for outputs of the tile, numbered along rows, the kernel's tap at each pixel.
    """

    offsets: tuple[int, ...]
    outputs: tuple[tuple[int, tuple[int | None, ...]], ...]


@dataclass(frozen=True)
class Tile:
    """`rows` x `columns` outputs made at once; `order` says which way pixels are taken by fours."""

    rows: int
    columns: int
    order: str


def is_bytes(step: Conv, isa: Isa) -> bool:
    """Whether the step, a direct depthwise one, has bytes in and out and fills its vectors."""
    _, channels, _, ow = step.out.shape
    rest = channels % GROUP
    full = rest == 0 or rest > GROUP // 2 or _side_by_side(step) > 1
    # of a width that is known at run time alone there is no other kernel
    return _fits(step, isa) and (full or bool(symbols(ow)))


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
    _, channels, _, ow = step.out.shape
    return 1 if symbols(ow) or channels not in {16, 32} else min(GROUP // channels, ow)


def _along_channels(view: View) -> bool:
    moving = [
        d for d, (n, s) in enumerate(zip(view.shape, view.strides, strict=True)) if s and n > 1
    ]
    return view.dtype == "FLOAT" and view.buffer.array is not None and set(moving) <= {1}


def best_tile(step: Conv) -> Tile:
    """The tile of fewest instructions an output; of one where a size is known at run time alone."""
    _, _, oh, ow = step.out.shape
    side = _side_by_side(step)
    most_rows = 1 if symbols(oh) else min(oh, 2)
    most_columns = 1 if symbols(ow) else -(-ow // side)
    tiles = [Tile(1, 1, FLAT)]
    for order in (DOWN, RIGHT):
        for rows in range(1, most_rows + 1):
            for columns in range(1, min(most_columns, MOST_OUTPUTS // rows) + 1):
                tiles.append(Tile(rows, columns, order))

    def cost(tile: Tile) -> float:
        found = quads(step, tile)
        count = sum(UNPACKS + VECTORS * len(quad.outputs) for quad in found)
        again = 1 if tile.rows == 1 else -(-oh // tile.rows) * tile.rows / oh
        return count * again / (tile.rows * tile.columns) if found else math.inf

    return min(tiles, key=cost)


def quads(step: Conv, tile: Tile) -> list[Quad]:
    """What a tile unpacks; empty where outputs in the order of the tile share no pixels."""
    _, _, sh, sw = step.a.view.strides
    kh, kw = step.b.view.shape[2:]
    down, right = step.dilations
    if tile.order == FLAT:
        found: list[Quad] = []
        for first in range(0, kh * kw, 4):
            taps = [*range(first, min(first + 4, kh * kw))]
            at = [(t // kw) * down * sh + (t % kw) * right * sw for t in taps]
            lacking = 4 - len(taps)
            found.append(Quad((*at, *at[:1] * lacking), ((0, (*taps, *[None] * lacking)),)))
        return found
    rows = _Axis(tile.rows, step.strides[0], down, kh, sh, kw, tile.columns)
    columns = _Axis(
        tile.columns, step.strides[1] * _side_by_side(step), right, kw, sw, tap_step=1, number=1
    )
    return _shared(rows, columns) if tile.order == DOWN else _shared(columns, rows)


@dataclass(frozen=True)
class _Axis:
    """`outputs` of a tile that lie `shift` pixels apart, under a kernel of `taps` with a `gap`.

    A pixel is `pixel` elements from the next, a tap's number `tap_step` from the next tap's and an
    output's `number` from the next output's.
    """

    outputs: int
    shift: int
    gap: int
    taps: int
    pixel: int
    tap_step: int
    number: int

    def tap(self, output: int, pixel: int) -> int | None:
        """The tap of an output that is over a pixel."""
        tap, beside = divmod(pixel - output * self.shift, self.gap)
        return None if beside or not 0 <= tap < self.taps else tap * self.tap_step

    def reached(self) -> list[int]:
        """The pixels that some output reads."""
        starts = range(0, self.outputs * self.shift, self.shift)
        return sorted({s + t * self.gap for s in starts for t in range(self.taps)})


def _shared(along: _Axis, across: _Axis) -> list[Quad]:
    """Pixels by fours along an axis, at every place across that some output reads."""
    if along.outputs > 1 and along.shift % along.gap:
        return []
    found: list[Quad] = []
    for place in across.reached():
        for first in range(0, along.reached()[-1] + 1, 4 * along.gap):
            pixels = [first + i * along.gap for i in range(4)]
            outputs: dict[int, tuple[int | None, ...]] = {}
            for c in range(across.outputs):
                beside = across.tap(c, place)
                for a in range(along.outputs):
                    taps = [along.tap(a, pixel) for pixel in pixels]
                    if beside is not None and taps != [None] * 4:
                        number = a * along.number + c * across.number
                        outputs[number] = tuple(None if t is None else t + beside for t in taps)
            if outputs:
                read = [
                    p
                    for p, *o in zip(pixels, *outputs.values(), strict=True)
                    if any(t is not None for t in o)
                ]
                at = [p if p in read else read[0] for p in pixels]
                offsets = tuple(p * along.pixel + place * across.pixel for p in at)
                found.append(Quad(offsets, tuple(outputs.items())))
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
    tile, side = best_tile(step), _side_by_side(step)

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
    kinds = list(dict.fromkeys(t for quad in quads(step, tile) for _, t in quad.outputs))
    weights = np.zeros((groups, len(kinds), 4, LANES, 4), np.int8)
    for k, kind in enumerate(kinds):
        for place_, tap in enumerate(kind):
            if tap is not None:
                weights[:, k, :, :, place_] = bytes_of[tap]
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
            for axis in (0, 2, 3):
                view = view.slice(axis, 0, 1)
            values = view_array(view.broadcast((1, channels, 1, 1))).reshape(channels)
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
            largest=largest_sum(step),
        )  # fmt: skip
        results.append(printer.unpacked(step.epilogue))
        for into, lines in zip((once, columns, pixel), printer.lines, strict=True):
            into += lines
    verb = "vi_join_lanes_u8" if step.epilogue.dtype == "UINT8" else "vi_join_lanes_s8"
    zero = pointers.params.whole(int(step.epilogue.zero_point.value))
    pixel_in, pixel_out = step.strides[1] * sw, ox
    dense = side == 1 or pixel_in == pixel_out == channels

    def bytes_at(text: str, count: str, pixel: int) -> str:
        """`count` bytes of a group: those of one pixel, or of several side by side."""
        return f"{text}, {count}" if dense else f"{text}, {c_long(pixel)}, {channels}, {count}"

    def printed(columns: int, pixels: int) -> Iterator[str]:
        """Statements for a tile from column `x` on, which holds so many pixels of a row."""
        if side > 1:
            live = [str(min(side, pixels - side * c) * channels) for c in range(columns)]
        else:
            live = ["live" if channels % GROUP else str(GROUP)] * columns
        outputs = range(tile.rows * columns)
        for v in range(4):
            yield f"const vi start{v} = vi_load(init + g * {GROUP} + {v * LANES});"
        yield from (f"vi c{o}_{v} = start{v};" for o in outputs for v in range(4))
        for quad in quads(step, replace(tile, columns=columns)):
            first = min(o % columns for o, _ in quad.outputs)
            load = "vi_bytes" if dense else "vi_pixels"
            yield "{"
            yield "  vi x0, x1, x2, x3;"
            four = ", ".join(
                f"{load}({bytes_at(f'from + {c_long(at)}', live[first], pixel_in)})"
                for at in quad.offsets
            )
            yield f"  vi_unpack({four}, &x0, &x1, &x2, &x3);"
            for o, taps in quad.outputs:
                for v in range(4):
                    at = (kinds.index(taps) * 4 + v) * GROUP
                    yield (
                        f"  c{o}_{v} = vi_dot4(c{o}_{v}, x{v}, "
                        f"vi_load((const int32_t *)(const void *)(taps + {at})));"
                    )
            yield "}"
        for o in outputs:
            y, x = divmod(o, columns)
            yield "if (fresh) {" if odd and y == 0 else "{"
            yield from (f"  {line}".replace("SUM", f"c{o}") for line in pixel)
            four = ", ".join(results)
            to = f"to + {c_long(y * oy + x * side * ox)}"
            store = "vi_bytes_to" if dense else "vi_pixels_to"
            yield f"  {store}({bytes_at(to, live[x], pixel_out)}, {verb}({four}, {zero}));"
            yield "}"

    across = tile.columns * side
    rest = 0 if across == 1 else ow % across
    odd = tile.rows > 1 and oh % tile.rows != 0
    down = oh if tile.rows == 1 else -(-oh // tile.rows)
    top = f"unit % {down} * {tile.rows}"
    if odd:  # the last two rows, of which the first was made before
        top = f"unit % {down} < {down - 1} ? {top} : {oh - tile.rows}"
    body = [
        "(void)scratch;",
        *once,
        f"const long first = (long)part * {n * down} / parts;",
        f"const long last = (long)(part + 1) * {n * down} / parts;",
        "for (long unit = first; unit < last; ++unit) {",
        f"  const long i = unit / {down}, y = {top};",
        "  (void)i;",
        *([f"  const int fresh = y % {tile.rows} == 0;"] if odd else []),
        f"  for (int g = 0; g < {groups}; ++g) {{",
        *(
            [
                f"    const int left = {channels} - g * {GROUP};",
                f"    const int live = left < {GROUP} ? left : {GROUP};",
            ]
            if channels % GROUP and side == 1
            else []
        ),
        f"    const int8_t *const taps = w + (long)g * {weights[0].size};",
        *(f"    {line}" for line in columns),
        f"    const uint8_t *from = {a} + "
        f"{linear(['i', 'y', 'g'], (sn, sh * step.strides[0], GROUP), step.a.view.offset)};",
        f"    {'int8_t' if step.epilogue.dtype == 'INT8' else 'uint8_t'} *to = {out} + "
        f"{linear(['i', 'y', 'g'], (on, oy, GROUP), step.out.offset)};",
    ]
    if across == 1 or ow > rest:
        body += [
            f"    for (int x = 0; x < {ow - rest}; x += {across}) {{",
            *(f"      {line}" for line in printed(tile.columns, across)),
            f"      from += {across * pixel_in};",
            f"      to += {across * ox};",
            "    }",
        ]
    if rest:
        body += ["    {", *(f"      {line}" for line in printed(-(-rest // side), rest)), "    }"]
    body += ["  }", "}"]
    body = [*pointers.declarations(body), *body]
    return KernelCode(f"{HEADER} {{\n{indent(body)}\n}}\n", pointers.finish())
