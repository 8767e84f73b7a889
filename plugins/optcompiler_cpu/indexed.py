"""Writing at computed places, and the places of the largest elements."""

from __future__ import annotations

from optcompiler.lowering.extents import c_long
from optcompiler.lowering.ir import Scatter, TopK
from optcompiler_cpu.code import KernelCode, Pointers
from optcompiler_cpu.isa import Isa
from optcompiler_cpu.loops import element, function, scalar_printer
from optcompiler_cpu.nest import SERIAL_ELEMENTS, nest_of, outer_loops
from optcompiler_cpu.scalars import REAL, c_type, loaded, stored


def print_scatter(step: Scatter, isa: Isa) -> KernelCode:
    """One thread, in order: later writes win."""
    nest = nest_of(step.space, [], step.out, keep=True)
    pointers = Pointers()
    out = pointers.view(step.out, written=True)
    printer = scalar_printer(pointers, nest)
    place = printer.print(step.place)
    value = printer.print(step.value)
    target = f"{out}[{c_long(step.out.offset)} + at]"
    kind = c_type(step.value.dtype)
    nan = " || x != x" if step.value.dtype in REAL else ""
    combined = {
        "none": "x", "add": "old + x", "mul": "old * x", "min": f"x < old{nan} ? x : old",
        "max": f"x > old{nan} ? x : old",
    }[step.op]  # fmt: skip
    after = scalar_printer(pointers, nest, "result")
    result = after.print(step.epilogue)
    body = [
        *printer.lines,
        f"const int64_t at = {place};",
        f"if (at < 0 || at >= {step.out.elements}) continue;",
        f"const {kind} x = {value};",
        *([] if step.op == "none" else [f"const {kind} old = {loaded(step.out.dtype, target)};"]),
        f"const {kind} result = ({kind})({combined});",
        "{",
        *(f"  {line}" for line in after.lines),
        f"  {target} = {stored(step.out.dtype, result)};",
        "}",
    ]
    if not step.space:
        body = ["do {", *(f"  {x}" for x in body), "} while (0);"]
    return function(pointers, outer_loops(nest, [], body, False), False)


def print_top_k(step: TopK, isa: Isa) -> KernelCode:
    """Rows in order; each keeps its best in a sorted list in scratch memory."""
    nest = nest_of(step.space, [], step.out, keep=True)
    pointers = Pointers()
    out = element(pointers, nest, step.out, written=True)
    axis, size, count = step.axis, step.space[step.axis], step.out.shape[step.axis]
    printer = scalar_printer(pointers, nest)
    value = printer.print(step.value)
    kind = c_type(step.value.dtype)
    sign = ">" if step.largest else "<"
    better = f"x {sign} best[k - 1]"
    if kind in {"float", "double"}:
        better = f"({better} || (x != x && best[k - 1] == best[k - 1]))" if step.largest else better
    body = [
        f"{kind} *const best = ({kind} *)scratch;",
        f"int64_t *const place = (int64_t *)(scratch + {-(-count // 8) * 64});",
        "long have = 0;",
        f"for (long i{axis} = 0; i{axis} < {size}; ++i{axis}) {{",
        *(f"  {line}" for line in printer.lines),
        f"  const {kind} x = {value};",
        "  long k = have;",
        f"  if (have < {count}) ++have; else if (k && {better}) --k; else continue;",
        f"  for (; k > 0 && {better}; --k) {{ best[k] = best[k - 1]; place[k] = place[k - 1]; }}",
        f"  best[k] = x; place[k] = i{axis};",
        "}",
        f"for (long i{axis} = 0; i{axis} < {count}; ++i{axis}) {{",
        f"  {out} = place[i{axis}];",
        "}",
    ]
    rows = step.out.elements // max(count, 1)
    parallel = rows > 1 and rows * size >= SERIAL_ELEMENTS
    lines = outer_loops(nest, [axis], body, parallel)
    return function(pointers, lines, parallel, scratch=-(-count // 8) * 128 + 128)
