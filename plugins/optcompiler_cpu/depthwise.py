"""Depthwise convolution over channels-last images: vectors of channels, a few pixels at a time.

Integer taps are multiplied as floats, which is exact: a sum of up to 518 products of 8-bit numbers
stays below 2^24, and larger kernels take the general path.
"""

from __future__ import annotations

import numpy as np

from optcompiler.lowering.build import view_array
from optcompiler.lowering.extents import c_long
from optcompiler.lowering.ir import Conv, View
from optcompiler_cpu.code import KernelCode, Pointers, indent, linear
from optcompiler_cpu.expressions import Place, VectorPrinter
from optcompiler_cpu.isa import Isa
from optcompiler_cpu.loops import HEADER
from optcompiler_cpu.nest import vector_loop

LARGEST = 518
"""Taps whose exact integer sum a float holds."""

PIXELS = {16: 8, 8: 6, 4: 4}
"""Accumulators by vector width."""


def is_direct(step: Conv) -> bool:
    taps = step.b.view.shape[2] * step.b.view.shape[3]
    return step.depthwise and step.groups == step.a.view.shape[1] and taps <= LARGEST


def print_depthwise(step: Conv, isa: Isa) -> KernelCode:
    n, channels, oh, ow = step.out.shape
    kh, kw = step.b.view.shape[2:]
    sn, _, sh, sw = step.a.view.strides
    quantization = step.a.quantization
    weights = view_array(step.b.view).astype(np.float32)[:, 0].transpose(1, 2, 0)
    wide = channels + isa.lanes
    taps = np.zeros((kh * kw, wide), np.float32)
    taps[:, :channels] = weights.reshape(-1, channels)
    init = np.zeros(wide, np.float32)
    if step.bias is not None:
        init[:channels] = step.bias
    if quantization is not None:
        init[:channels] -= float(quantization.zero_point) * taps.sum(axis=0)[:channels]
    pointers = Pointers()
    a = pointers.view(step.a.view)
    pointers.view(step.out, written=True)
    pointers.data("w", taps, "float")
    pointers.data("init", init, "float")
    if quantization is not None and step.b.quantization is not None:
        scale = np.zeros(wide, np.float32)
        scale[:channels] = quantization.scale * step.b.quantization.scale
        pointers.data("scale", scale, "float")
    pixels = -(-ow // -(-ow // PIXELS[isa.lanes]))

    def load(at: str, count: str | None) -> str:
        if quantization is None:
            prefix = "vb" if step.a.view.dtype == "BFLOAT16" else "vf"
            return f"{prefix}_load({at})" if count is None else f"{prefix}_loadn({at}, {count})"
        kind = "vi_u8" if step.a.view.dtype == "UINT8" else "vi_s8"
        return f"vi_float({kind}({at}))" if count is None else f"vi_float({kind}n({at}, {count}))"

    def place(view: View) -> Place:
        s = view.strides
        moving = any(
            stride and size > 1
            for stride, size in zip((s[0], s[2], s[3]), (n, oh, ow), strict=True)
        )
        text = linear(["i", "y", "at"], (s[0], s[2], s[3]), view.offset)
        lane = "" if not s[1] else " + j" if s[1] == 1 else f" + j * {c_long(s[1])}"
        level = 2 if moving else 1 if s[1] else 0
        return Place(
            f"{pointers.view(view)} + {text if moving else c_long(view.offset)}{lane}", s[1], level
        )

    once: list[str] = []

    def column(count: str | None) -> list[str]:
        raw = "vf_load(acc + r * VL)"
        spelled = raw if quantization is None else f"vf_mul({raw}, scales)"
        factor = None if quantization is None else (raw, "scales")
        printer = VectorPrinter(pointers.params, place, spelled, count, factor)
        target = place(step.out)
        printer.store(step.epilogue, target.pointer, target.stride)
        constant, middle, inner = printer.lines
        once.extend(line for line in constant if line not in once)
        pixel = linear(
            ["i", "y", "x"], (sn, sh * step.strides[0], sw * step.strides[1]), step.a.view.offset
        )
        item = pointers.items[0].ctype
        tile: list[str] = []
        for size in dict.fromkeys((pixels, ow % pixels or pixels)):
            work = [f"vf c{r} = start;" for r in range(size)]
            for t in range(kh * kw):
                y, x = divmod(t, kw)
                work.append(f"const vf w{t} = vf_load(w + {t * wide} + j);")
                for r in range(size):
                    shift = (
                        y * step.dilations[0] * sh
                        + (x * step.dilations[1] + r * step.strides[1]) * sw
                    )
                    work.append(f"c{r} = vf_fma({load(f'at0 + {shift}', count)}, w{t}, c{r});")
            work += [f"vf_store(acc + {r} * VL, c{r});" for r in range(size)]
            tile += [f"if (pixels == {size}) {{", *(f"  {x}" for x in work), "}"]
        return [
            "const vf start = vf_load(init + j);",
            *(["const vf scales = vf_load(scale + j);"] if quantization is not None else []),
            *middle,
            f"for (long x = 0; x < {ow}; x += {pixels}) {{",
            f"  const int pixels = x + {pixels} <= {ow} ? {pixels} : (int)({ow} - x);",
            f"  const {item} *at0 = {a} + {pixel} + j;",
            *(f"  {x}" for x in tile),
            "  for (int r = 0; r < pixels; ++r) {",
            "    const long at = x + r;",
            "    (void)at;",
            *(f"    {x}" for x in inner),
            "  }",
            "}",
        ]

    body = vector_loop(channels, isa.lanes, column)
    lines = [
        "(void)scratch;",
        f"float acc[{pixels} * VL] __attribute__((aligned(64)));",
        *once,
        f"const long first = (long)part * {n * oh} / parts;",
        f"const long last = (long)(part + 1) * {n * oh} / parts;",
        "for (long row = first; row < last; ++row) {",
        f"  const long i = row / {oh}, y = row % {oh};",
        "  (void)i;",
        *(f"  {x}" for x in body),
        "}",
    ]
    lines = [*pointers.declarations(lines), *lines]
    return KernelCode(f"{HEADER} {{\n{indent(lines)}\n}}\n", pointers.finish())
