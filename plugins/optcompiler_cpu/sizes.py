"""What a library has more where sizes are read at run time: their table and functions to set them.

Kernels read a size through their table of pointers, like anything else they are handed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from optcompiler.errors import InputError
from optcompiler.lowering.extents import Symbol, is_run_time
from optcompiler.lowering.ir import Lowered, PortBuffer
from optcompiler_cpu.code import template

PLACE = """\
/* Or to a size that is read at run time, by its number. */
enum { SIZES = -1 };
"""

SCALING = """\
  const int *arena_scaling; /* sizes by whose product places in the arena are multiplied */
  int scaling_count;
"""

FIELD = "  long sizes[SIZE_COUNT];\n"

POINTERS = """\
  for (int i = 0; i < SIZE_COUNT; ++i) net->sizes[i] = size_table[i].most;
  for (int i = 0; i < variant->ref_count; ++i) {
    const struct ref ref = variant->refs[i];
    if (ref.where == SIZES) net->pointers[i] = (char *)&net->sizes[ref.offset];
  }
  place(net);
"""


@dataclass(frozen=True)
class SizeTexts:
    """Pieces of `net.h`, `variant.h` and `net.c`; all are empty where there are no such sizes."""

    header: str = ""
    place: str = ""
    scaling: str = ""
    tables: str = ""
    field: str = ""
    placing: str = ""
    pointers: str = ""
    functions: str = ""


def size_texts(
    name: str, symbols: Sequence[Symbol], lowered: Lowered, quoted: Callable[[str], str]
) -> SizeTexts:
    """`quoted` spells a C string. Raises `InputError` for two symbols of one spelling."""
    if not symbols:
        return SizeTexts()
    for i, symbol in enumerate(symbols):
        twin = next((s for s in symbols[:i] if str(s) == str(symbol)), None)
        if twin is not None:
            raise InputError(
                f"target cpu: the dimensions {twin.name!r} and {symbol.name!r} are both spelled "
                f"{symbol} in C; rename one."
            )
    rows = ", ".join(f"{{{quoted(s.name)}, {s.least}, {s.most}}}" for s in symbols)
    tables = [
        f"enum {{ SIZE_COUNT = {len(symbols)} }};",
        f"static const {name}_size size_table[] = {{{rows}}};\n",
    ]
    lengths = [
        *_length(name, "input", lowered.inputs, symbols),
        *_length(name, "output", lowered.outputs, symbols),
    ]
    return SizeTexts(
        template("sizes.h.in", NAME=name), PLACE, SCALING, "\n".join(tables), FIELD,
        template("sizes_place.c.in", NAME=name), POINTERS,
        template("sizes.c.in", NAME=name) + "\n".join(lengths) + "\n",
    )  # fmt: skip


def _length(
    name: str, kind: str, ports: Sequence[PortBuffer], symbols: Sequence[Symbol]
) -> list[str]:
    """The function that says how long an axis of a port is."""
    cases = [
        f"  if ({kind} == {i} && axis == {axis}) return {size};"
        for i, port in enumerate(ports)
        for axis, size in enumerate(port.shape)
        if is_run_time(size)
    ]
    return [
        f"long {name}_{kind}_length(const {name}_handle *net, int {kind}, int axis) {{",
        *(
            f"  const long {symbol} = net->sizes[{i}];\n  (void){symbol};"
            for i, symbol in enumerate(symbols)
        ),
        f"  if ({kind} < 0 || {kind} >= {kind.upper()}S || axis < 0) return -1;",
        f"  if (axis >= {kind}_ports[{kind}].rank) return -1;",
        *cases,
        f"  return {kind}_ports[{kind}].shape[axis];",
        "}",
    ]
