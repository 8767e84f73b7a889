"""Reductions, softmax, normalisation and pooling."""

from __future__ import annotations

from optcompiler.errors import UnsupportedOperatorError
from optcompiler.lowering.build import reshaped
from optcompiler.lowering.extents import c_long, is_run_time, largest
from optcompiler.lowering.ir import (
    Normalization,
    Pooling,
    Reduction,
    Softmax,
    product,
)
from optcompiler_cpu.code import KernelCode, Pointers, coordinates, indent, linear
from optcompiler_cpu.expressions import VectorPrinter, vectorisable
from optcompiler_cpu.isa import Isa
from optcompiler_cpu.loops import function, scalar_printer
from optcompiler_cpu.nest import (
    SERIAL_ELEMENTS,
    Nest,
    expression_views,
    nest_of,
    outer_loops,
    placer,
    shared_loop,
    vector_loop,
)
from optcompiler_cpu.scalars import REAL, c_type, stored

BLOCK_ROWS, BLOCK_BYTES = 4, 24 * 1024
"""Rows that are worked on side by side, and what they may take of the first-level cache."""


def _flat(printer: VectorPrinter) -> list[str]:
    return [line for level in printer.lines for line in level]


def real(count: int) -> str:
    """A number of elements as a float in C."""
    return f"(float){count}" if is_run_time(count) else f"{count}.0f"


def _require_vectors(step: Softmax | Normalization | Reduction | Pooling) -> None:
    if not vectorisable(*step.expressions()):
        raise UnsupportedOperatorError(
            f"target cpu: {step.nodes[0] if step.nodes else step.name!r} mixes types that its "
            f"kernel cannot; cast its operands to FLOAT."
        )


def print_softmax(step: Softmax, isa: Isa) -> KernelCode:
    _require_vectors(step)
    pointers = Pointers()
    phases, nest = _softmax_phases(step, isa, pointers)
    parallel = step.out.elements * 4 >= SERIAL_ELEMENTS
    lines, scratch = _blocks_of_rows(
        nest, step.axis, step.out.shape[step.axis], phases, parallel, isa
    )
    return function(pointers, lines, parallel, scratch=scratch)


def softmax_of_rows(step: Softmax, isa: Isa) -> KernelCode:
    """`@_rows(unit, low, high, q, scratch)`: rows `low` to `high` of matrix `unit` of a softmax
    along the last axis."""
    pointers = Pointers()
    phases, _ = _softmax_phases(step, isa, pointers)
    *units, count, length = step.out.shape
    names = [f"i{d}" for d in range(len(units))]
    places = [f"const long i{len(units)} = block + r;", f"(void)i{len(units)};"]
    lines, scratch = rows_in_blocks(phases, length, places, count, ("low", "high"), isa)
    lines = [*coordinates("unit", units, names), *lines]
    lines = [*pointers.declarations(lines), "(void)unit;", *lines]
    text = (
        "static void @_rows(long unit, int low, int high, char *const *q, char *scratch) {\n"
        f"{indent(lines)}\n}}\n"
    )
    return KernelCode(text, pointers.finish(), scratch_bytes=scratch)


def _softmax_phases(step: Softmax, isa: Isa, pointers: Pointers) -> tuple[list[list[str]], Nest]:
    """For `rows_in_blocks`: the greatest, exponentials and their sum, quotients."""
    shape = step.out.shape
    nest = nest_of(shape, [step.out], step.out, keep=True)
    lane, length = step.axis, shape[step.axis]
    pointers.view(step.out, written=True)
    place = placer(pointers, nest, lane)

    def read(count: str | None) -> list[str]:
        printer = VectorPrinter(pointers.params, place, "", count)
        name = printer.print(step.value)
        if count is None:
            return [*_flat(printer), f"vf_store(v + j, {name});", f"top = vf_max(top, {name});"]
        keep = f"vf_keep({name}, left, -INFINITY)"
        return [*_flat(printer), f"const vf last = {keep};", "vf_store(v + j, last);",
                "top = vf_max(top, last);"]  # fmt: skip

    spelled = (
        "vf_sub(vf_sub(vf_load(v + j), peak), vf_set(second[r]))"
        if step.log
        else "vf_mul(vf_load(v + j), vf_set(second[r]))"
    )

    def write(count: str | None) -> list[str]:
        printer = VectorPrinter(pointers.params, place, spelled, count)
        target = place(step.out)
        printer.store(step.epilogue, target.pointer, target.stride)
        return _flat(printer)

    peak = "const vf peak = vf_set(first[r]);"
    phases = [
        [
            "vf top = vf_set(-INFINITY);",
            *_scoped(vector_loop(length, isa.lanes, read)),
            "first[r] = vf_hmax(top);",
        ],
        [
            peak,
            "vf total = vf_set(0.0f);",
            f"for (long j = 0; j < {length}; j += VL) {{",
            "  const vf e = vf_exp_below(vf_sub(vf_load(v + j), peak));",
            *([] if step.log else ["  vf_store(v + j, e);"]),
            "  total = vf_add(total, e);",
            "}",
            f"second[r] = {'logf(vf_sum(total))' if step.log else '1.0f / vf_sum(total)'};",
        ],
        [
            *([peak] if step.log else []),
            *_scoped(vector_loop(length, isa.lanes, write)),
        ],
    ]
    return phases, nest


def _blocks_of_rows(
    nest: Nest, lane: int, length: int, phases: list[list[str]], parallel: bool, isa: Isa
) -> tuple[list[str], int]:
    """Every row of the nest, as `rows_in_blocks`, divided among threads where `parallel`."""
    outer = [d for d in range(len(nest.sizes)) if d != lane]
    sizes = tuple(nest.sizes[d] for d in outer)
    size = product(sizes)
    bounds = (
        (f"(long)part * {size} / parts", f"(long)(part + 1) * {size} / parts")
        if parallel
        else ("0L", c_long(size))
    )
    places = coordinates("(block + r)", sizes, [f"i{d}" for d in outer])
    return rows_in_blocks(phases, length, places, size, bounds, isa)


def rows_in_blocks(
    phases: list[list[str]], length: int, places: list[str], count: int,
    bounds: tuple[str, str], isa: Isa,
) -> tuple[list[str], int]:  # fmt: skip
    """Loops over rows of `length` floats, some at a time, and the bytes of scratch they take.

    What one phase finds out about a row the next one waits for: every phase goes over all rows of
    a block, so that the processor has others to work on. Of row `block + r`, whose coordinates
    `places` declares, `v` is the place in scratch, `first[r]` and `second[r]` are numbers that
    phases leave for later ones. There are at most `count` rows.
    """
    room = -(-(largest(length) + isa.lanes) // isa.lanes) * isa.lanes
    rows = max(min(BLOCK_ROWS, largest(count), BLOCK_BYTES // (room * 4)), 1)
    body = [
        f"const long end = {bounds[1]};",
        f"for (long block = {bounds[0]}; block < end; block += {rows}) {{",
        f"  const int rows = block + {rows} <= end ? {rows} : (int)(end - block);",
        f"  float first[{rows}], second[{rows}];",
        "  (void)first;",
    ]
    for phase in phases:
        body += [
            "  for (int r = 0; r < rows; ++r) {",
            *(f"    {line}" for line in places),
            f"    float *const v = (float *)scratch + (long)r * {room};",
            *(f"    {line}" for line in phase),
            "  }",
        ]
    return [*body, "}"], rows * room * 4


def _rows(nest: Nest, skip: list[int], body: list[str], parallel: bool) -> list[str]:
    """Loops over rows, the longest outer loop divided among threads."""
    outer = [d for d in range(len(nest.sizes)) if d not in skip]
    if not parallel or not outer:
        return outer_loops(nest, skip, body, parallel)
    widest = max(outer, key=lambda d: (nest.sizes[d], -d))
    size = nest.sizes[widest]
    if is_run_time(size) and len(outer) > 1:
        second = max((d for d in outer if d != widest), key=lambda d: (nest.sizes[d], -d))
        return outer_loops(
            nest, [*skip, widest, second], shared_loop(nest, [widest, second], body), False
        )
    inner = [
        f"for (long i{widest} = (long)part * {size} / parts; "
        f"i{widest} < (long)(part + 1) * {size} / parts; ++i{widest}) {{",
        *(f"  {x}" for x in body),
        "}",
    ]
    return outer_loops(nest, [*skip, widest], inner, False)


def _scoped(lines: list[str]) -> list[str]:
    return ["{", *(f"  {x}" for x in lines), "}"]


def print_normalization(step: Normalization, isa: Isa) -> KernelCode:
    _require_vectors(step)
    shape = step.out.shape
    length = product(shape[step.axis :])
    flat = (*shape[: step.axis], length)
    out, value = step.out.reshape(flat), reshaped(step.value, flat)
    epilogue = reshaped(step.epilogue, flat)
    if out is None or value is None or epilogue is None:
        raise UnsupportedOperatorError(
            f"target cpu: {step.nodes[0] if step.nodes else step.name!r} normalises axes that are "
            f"not adjacent in memory; transpose before it."
        )
    nest = nest_of(flat, [out], out, keep=True)
    lane = len(flat) - 1
    pointers = Pointers()
    pointers.view(out, written=True)
    place = placer(pointers, nest, lane)

    def read(count: str | None) -> list[str]:
        printer = VectorPrinter(pointers.params, place, "", count)
        name = printer.print(value)
        if count is not None:
            name = f"vf_keep({name}, left, 0.0f)"
        return [*_flat(printer), f"const vf x = {name};", "vf_store(v + j, x);",
                *([] if step.rms else ["total = vf_add(total, x);"])]  # fmt: skip

    def square(count: str | None) -> list[str]:
        x = "vf_load(v + j)" if step.rms else "vf_sub(vf_load(v + j), mean)"
        kept = x if count is None else f"vf_keep({x}, left, 0.0f)"
        return [f"const vf x = {kept};", "squares = vf_fma(x, x, squares);"]

    def write(count: str | None) -> list[str]:
        x = "vf_load(v + j)" if step.rms else "vf_sub(vf_load(v + j), mean)"
        printer = VectorPrinter(pointers.params, place, f"vf_mul({x}, norm)", count)
        target = place(out)
        printer.store(epilogue, target.pointer, target.stride)
        return _flat(printer)

    mean = [] if step.rms else ["const vf mean = vf_set(first[r]);"]
    phases = [
        [
            *([] if step.rms else ["vf total = vf_set(0.0f);"]),
            *_scoped(vector_loop(length, isa.lanes, read)),
            *([] if step.rms else [f"first[r] = vf_sum(total) / {real(length)};"]),
        ],
        [
            *mean,
            "vf squares = vf_set(0.0f);",
            *_scoped(vector_loop(length, isa.lanes, square)),
            f"second[r] = 1.0f / sqrtf(vf_sum(squares) / {real(length)} + "
            f"{pointers.params.add(step.epsilon)});",
        ],
        [
            *mean,
            "const vf norm = vf_set(second[r]);",
            *_scoped(vector_loop(length, isa.lanes, write)),
        ],
    ]
    parallel = step.out.elements * 2 >= SERIAL_ELEMENTS
    lines, scratch = _blocks_of_rows(nest, lane, length, phases, parallel, isa)
    return function(pointers, lines, parallel, scratch=scratch)


STARTS = {"sum": "0", "mean": "0", "sumsq": "0", "prod": "1", "max": "-INFINITY", "min": "INFINITY"}
FOLDS = {
    "sum": "vf_add(acc, {0})", "mean": "vf_add(acc, {0})", "sumsq": "vf_fma({0}, {0}, acc)",
    "prod": "vf_mul(acc, {0})", "max": "vf_max_nan(acc, {0})", "min": "vf_min_nan(acc, {0})",
}  # fmt: skip
ACROSS = {
    "sum": "vf_sum", "mean": "vf_sum", "sumsq": "vf_sum", "prod": "vf_hprod", "max": "vf_hmax_nan",
    "min": "vf_hmin_nan",
}  # fmt: skip


def print_reduction(step: Reduction, isa: Isa) -> KernelCode:
    parallel = product(step.space) >= SERIAL_ELEMENTS
    if not vectorisable(*step.expressions()) or step.value.dtype != "FLOAT":
        return _scalar_reduction(step)
    views = expression_views(step.value)
    rank = len(step.space)
    near = [d for d in range(rank) if step.space[d] > 1 and any(v.strides[d] == 1 for v in views)]
    kept = [d for d in near if d not in step.axes]
    lane = kept[0] if kept else near[-1] if near else rank - 1
    pointers = Pointers()
    pointers.view(step.out, written=True)
    full = Nest(tuple((d,) for d in range(rank)), step.space)
    small = Nest(full.axes, step.out.shape)
    count_all = product(tuple(step.space[a] for a in step.axes))
    start = STARTS[step.op] if "INF" in STARTS[step.op] else f"{STARTS[step.op]}.0f"
    place = placer(pointers, full, lane)
    factor = f"vf_mul({{}}, vf_set({_share(count_all)}))" if step.op == "mean" else "{}"

    def fold(count: str | None) -> list[str]:
        printer = VectorPrinter(pointers.params, place, "", count)
        name = printer.print(step.value)
        if count is not None and lane in step.axes:
            name = f"vf_keep({name}, {count}, {start})"
        return [*_flat(printer), f"const vf x = {name};", f"acc = {FOLDS[step.op].format('x')};"]

    def finish(acc: str, count: str | None, at: int) -> list[str]:
        where = placer(pointers, small, at, "j" if at == lane and lane not in step.axes else "0")
        printer = VectorPrinter(pointers.params, where, factor.format(acc), count)
        target = where(step.out)
        printer.store(step.epilogue, target.pointer, target.stride or 1)
        return _flat(printer)

    reduced = [d for d in step.axes if d != lane]

    def over_reduced(body: list[str]) -> list[str]:
        others = [d for d in range(rank) if d not in reduced]
        return outer_loops(full, others, body, False)

    if lane not in step.axes:

        def emit(count: str | None) -> list[str]:
            return [
                f"vf acc = vf_set({start});",
                *_scoped(over_reduced(fold(count))),
                *finish("acc", count, lane),
            ]

        body = vector_loop(step.space[lane], isa.lanes, emit)
    else:
        body = [f"vf acc = vf_set({start});",
                *_scoped(over_reduced(vector_loop(step.space[lane], isa.lanes, fold))),
                f"const float total = {ACROSS[step.op]}(acc);",
                *(f"const long i{d} = 0; (void)i{d};" for d in reduced),
                *finish("vf_set(total)", "1", lane)]  # fmt: skip
    lines = _rows(full, [lane, *reduced], body, parallel)
    if lane not in step.axes:
        lines = [*(f"const long i{d} = 0; (void)i{d};" for d in reduced), *lines]
    return function(pointers, lines, parallel)


def _share(count: int) -> str:
    """What a sum of so many is multiplied by for their mean: of none it is 0 times infinity."""
    if is_run_time(count):
        return f"1.0f / {real(count)}"
    return f"{(1 / count).hex()}f" if count else "INFINITY"


def identity(op: str, dtype: str) -> str:
    """What a reduction of nothing is."""
    if op not in {"max", "min"}:
        return "1" if op == "prod" else "0"
    if dtype in REAL:
        return "-INFINITY" if op == "max" else "INFINITY"
    low, high = (0, 1) if dtype == "BOOL" else (f"{dtype}_MIN", f"{dtype}_MAX")
    return str(low if op == "max" else high) if not dtype.startswith("U") or op == "min" else "0"


def _scalar_reduction(step: Reduction) -> KernelCode:
    rank = len(step.space)
    full = Nest(tuple((d,) for d in range(rank)), step.space)
    pointers = Pointers()
    target = f"{pointers.view(step.out, written=True)}"
    names = [f"i{d}" for d in range(rank)]
    kind = c_type(step.value.dtype)
    value = scalar_printer(pointers, full)
    name = value.print(step.value)
    nan = f" || {name} != {name}" if step.value.dtype in REAL else ""
    update = {
        "sum": f"acc += {name};", "mean": f"acc += {name};", "sumsq": f"acc += {name} * {name};",
        "prod": f"acc *= {name};",
        "max": f"if ({name} > acc{nan}) acc = {name};",
        "min": f"if ({name} < acc{nan}) acc = {name};",
    }[step.op]  # fmt: skip
    small = Nest(full.axes, step.out.shape)
    count = product(tuple(step.space[a] for a in step.axes))
    accumulator = f"acc / {count}" if step.op == "mean" else "acc"
    after = scalar_printer(pointers, small, accumulator)
    result = after.print(step.epilogue)
    where = linear(names, small.strides(step.out), step.out.offset)
    inner = outer_loops(full, [d for d in range(rank) if d not in step.axes],
                        [*value.lines, update], False)  # fmt: skip
    body = [
        f"{kind} acc = {identity(step.op, step.value.dtype)};",
        *_scoped(inner),
        *(f"const long i{d} = 0; (void)i{d};" for d in step.axes),
        *after.lines,
        f"{target}[{where}] = {stored(step.out.dtype, result)};",
    ]
    return function(pointers, outer_loops(full, list(step.axes), body, False), False)


def print_pooling(step: Pooling, isa: Isa) -> KernelCode:
    _require_vectors(step)
    n, c, h, w = step.source.shape
    _, _, oh, ow = step.out.shape
    kh, kw = step.kernel
    top, left, bottom, right = step.pads
    pointers = Pointers()
    pointers.view(step.out, written=True)
    source = pointers.view(step.source)
    nest = Nest(((0,), (1,), (2,), (3,)), (n, c, oh, ow))
    place = placer(pointers, nest, 1)
    sn, sc, sh, sw = step.source.strides
    integer = step.source.dtype in {"UINT8", "INT8"}
    mean = step.op == "mean"
    kind, start = ("vi", "-255") if integer else ("vf", "-INFINITY")
    if mean:
        start = "0" if integer else "0.0f"
    dy, dx = step.dilations

    def emit(count: str | None) -> list[str]:
        lanes = count or "VL"
        short = {"UINT8": "vi_u8", "INT8": "vi_s8"}.get(step.source.dtype)
        prefix = "vb" if step.source.dtype == "BFLOAT16" else "vf"
        at = f"{source} + {linear(['i0', 'y', 'x', 'j'], (sn, sh, sw, sc), step.source.offset)}"
        if sc == 1:
            load = f"{short}n({at}, {lanes})" if short else f"{prefix}_loadn({at}, {lanes})"
            if count is None:
                load = f"{short}({at})" if short else f"{prefix}_load({at})"
        else:
            load = (
                f"{short}s({at}, {sc}, {lanes})"
                if short
                else f"{prefix}_loads({at}, {sc}, {lanes})"
            )
        verb = "add" if mean else "max"
        acc = "acc"
        if mean:
            acc = "vi_float(acc)" if integer else "acc"
            if step.quantization is not None:
                zero = pointers.params.add(float(step.quantization.zero_point))
                scale = pointers.params.add(float(step.quantization.scale))
                acc = f"vf_mul(vf_sub({acc}, vf_set({zero} * (float)inside)), vf_set({scale}))"
            acc = f"vf_mul({acc}, vf_set(1.0f / (float)count))"
        printer = VectorPrinter(pointers.params, place, acc, count)
        target = place(step.out)
        printer.store(step.epilogue, target.pointer, target.stride)
        return [
            f"{kind} acc = {kind}_set({start});",
            f"for (long y = y0; y < y1; y += {dy})",
            f"  for (long x = x0; x < x1; x += {dx})",
            f"    acc = {kind}_{verb}(acc, {load});",
            *_flat(printer),
        ]

    def bounds(
        name: str, out: str, stride: int, pad: int, extent: int, step_: int, size: int
    ) -> list[str]:
        first = f"{out} * {stride} - {pad}"
        lines = [
            f"long {name}0 = {first}, {name}1 = {name}0 + {(extent - 1) * step_ + 1};",
        ]
        if mean and step.count_padding:
            after = bottom if name == "y" else right
            lines.append(
                f"const long {name}n = (({name}1 > {size + after} ? {size + after} : {name}1) - "
                f"{name}0 + {step_ - 1}) / {step_};"
            )
        lines.append(f"while ({name}0 < 0) {name}0 += {step_};")
        lines.append(f"if ({name}1 > {size}) {name}1 = {size};")
        return lines

    body = [
        *bounds("y", "i2", step.strides[0], top, kh, dy, h),
        *bounds("x", "i3", step.strides[1], left, kw, dx, w),
    ]
    if mean:
        body.append(
            f"const long inside = (y1 - y0 + {dy - 1}) / {dy} * ((x1 - x0 + {dx - 1}) / {dx});"
        )
        body.append(f"const long count = {'yn * xn' if step.count_padding else 'inside'};")
        body.append("(void)inside;")
    body += vector_loop(c, isa.lanes, emit)
    parallel = step.out.elements * kh * kw >= SERIAL_ELEMENTS
    return function(pointers, _rows(nest, [1], body, parallel), parallel)
