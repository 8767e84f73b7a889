"""The C source of an artifact, its header and the weights beside them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from optcompiler.errors import UnsupportedOperatorError
from optcompiler.lowering.extents import Symbol, largest
from optcompiler.lowering.extents import symbols as symbols_of
from optcompiler.lowering.ir import (
    Conv,
    CumSum,
    Gather,
    Loop,
    Lowered,
    MatMul,
    Normalization,
    Pooling,
    PortBuffer,
    Reduction,
    Scatter,
    Softmax,
    Step,
    TopK,
    product,
)
from optcompiler_cpu.attention import Attention, print_attention
from optcompiler_cpu.choosing import from_on
from optcompiler_cpu.code import KernelCode, Pointer, template
from optcompiler_cpu.contraction import prepared, print_contraction, print_tile, tile_name
from optcompiler_cpu.depthwise import is_direct, print_depthwise
from optcompiler_cpu.depthwise_bytes import is_bytes, print_depthwise_bytes
from optcompiler_cpu.dynamic import print_dynamic
from optcompiler_cpu.halo import Halo, print_halo
from optcompiler_cpu.indexed import print_scatter, print_top_k
from optcompiler_cpu.isa import Isa
from optcompiler_cpu.loops import print_cumsum, print_gather, print_loop
from optcompiler_cpu.rows import (
    print_normalization,
    print_pooling,
    print_reduction,
    print_softmax,
)
from optcompiler_cpu.scalars import C_TYPES, PACKED
from optcompiler_cpu.short import is_short, print_short
from optcompiler_cpu.sizes import size_texts
from optcompiler_cpu.variants import print_other
from optcompiler_cpu.weight_bytes import is_nibble_product, print_weight_bytes
from optcompiler_cpu.weights import is_compressed, print_weights
from optcompiler_cpu.winograd import is_winograd, least_tiles, print_winograd, tile_counts

ALIGNMENT = 64
SCALAR_HELPERS = re.compile(r"\boc_[a-z]+_[A-Z]")
"""Names of `runtime/scalar.h`."""

EMBEDDED_PATH = """
   NULL stands for the weights that are part of the library."""

EMBEDDED_CREATE = """\
  if (!weights_path) return @NAME@_create_from_memory(@NAME@_embedded, WEIGHTS_SIZE);
"""

HELPERS = {
    "amx": "amx_",
    "half": "vh_",
    "pack": "pack_",
    "weights": "weights_",
    "winograd": "winograd_",
}
"""Headers of `runtime` that kernels may need, and how the names in them begin."""

SCALING = """\
  .arena_scaling = (const int[]){{{0}}},
  .scaling_count = {1},
"""

UNIT_BYTES = 40_000
"""C text per translation unit, roughly."""


def _contraction(step: Conv | MatMul, isa: Isa) -> KernelCode:
    if step.name in isa.chosen:
        return print_other(step, isa, isa.chosen[step.name])
    if isinstance(step, Conv) and is_direct(step):
        return (
            print_depthwise_bytes(step, isa) if is_bytes(step, isa) else print_depthwise(step, isa)
        )
    if is_nibble_product(step) or (is_compressed(step) and step.a.quantization is not None):
        return print_weight_bytes(step, isa)
    if is_compressed(step):
        return print_weights(step, isa)
    if isinstance(step, Conv) and is_winograd(step, isa):
        least = least_tiles(step, isa)
        kernel = print_winograd(step, isa)
        if not least:
            return kernel
        return from_on(product(tile_counts(step)), least, kernel, _product(step, isa))
    return _product(step, isa)


def _product(step: Conv | MatMul, isa: Isa) -> KernelCode:
    if isinstance(step, MatMul) and not prepared(step):
        return print_dynamic(step, isa)
    return print_short(step, isa) if is_short(step, isa) else print_contraction(step, isa)


PRINTERS: Mapping[type[Step], Callable[[Any, Isa], KernelCode]] = {
    Loop: print_loop, Conv: _contraction, MatMul: _contraction, Gather: print_gather,
    CumSum: print_cumsum, Halo: print_halo, Softmax: print_softmax,
    Normalization: print_normalization, Reduction: print_reduction, Pooling: print_pooling,
    Scatter: print_scatter, TopK: print_top_k, Attention: print_attention,
}  # fmt: skip


@dataclass(frozen=True)
class Module:
    """Texts by path, the `weights` file's bytes in parts, and what is compiled: paths with the
    flags that each has beside those of all. `variants` are its parts for one instruction set."""

    name: str
    sources: Mapping[str, str]
    weights: Sequence[bytes]
    units: Mapping[str, tuple[str, ...]]
    variants: tuple[Variant, ...]


@dataclass(frozen=True)
class Variant:
    """Texts of `src` for one instruction set; `symbol` is its `struct variant` in C."""

    isa: Isa
    symbol: str
    texts: Mapping[str, str]
    step_names: tuple[str, ...]
    ref_count: int


class Blob:
    """The weights file: a header that identifies it, then aligned arrays, equal ones once."""

    def __init__(self) -> None:
        self.parts: list[bytes] = [bytes(ALIGNMENT)]
        self.size = ALIGNMENT
        self._known: dict[bytes, int] = {}

    def add(self, array: np.ndarray) -> int:
        data = np.ascontiguousarray(array).tobytes()
        # vectors may read past the end of an array
        data += bytes(ALIGNMENT + -len(data) % ALIGNMENT)
        key = hashlib.sha256(data).digest()
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self.size
            self.parts.append(data)
            self.size += len(data)
        return known

    def finish(self) -> tuple[list[bytes], bytes]:
        """(parts of the file in order, identification)."""
        digest = hashlib.sha256()
        for part in self.parts[1:]:
            digest.update(part)
        mark = b"OCWEIGHT" + digest.digest()[:24]
        return [mark.ljust(ALIGNMENT, b"\0"), *self.parts[1:]], mark


def print_module(
    variants: Sequence[tuple[Isa, Lowered]], name: str = "net", *, embedded: bool = False,
    symbols: Sequence[Symbol] = (),
) -> Module:  # fmt: skip
    """A library with code for each instruction set, best first, that picks one when it is used.
    `symbols` are the sizes that are read at run time.

    Every symbol of more than one file begins with `name` and an underscore. With `embedded` the
    weights file becomes part of the library.
    """
    blob = Blob()
    alone = len(variants) == 1
    printed = tuple(
        print_variant(
            lowered, isa, blob, name if alone else f"{name}_{isa.name}",
            "" if alone else f"{isa.name}_", symbols,
        )
        for isa, lowered in variants
    )  # fmt: skip
    weights, mark = blob.finish()
    lowered = variants[0][1]
    sized = size_texts(name, symbols, lowered, c_string)
    sources = {
        f"{name}.h": template(
            "net.h.in", SIZES=sized.header, NAME=name, EMBEDDED=EMBEDDED_PATH if embedded else ""
        ),
        "src/variant.h": template(
            "variant.h.in", SIZE_PLACE=sized.place, SIZE_SCALING=sized.scaling
        ),
        "src/processor.h": template("processor.h"),
    }
    units: dict[str, tuple[str, ...]] = {}
    for part in printed:
        for file, text in part.texts.items():
            sources[f"src/{file}"] = text
            if file.endswith(".c"):
                units[f"src/{file}"] = (f"-D{part.isa.macro}", *part.isa.flags)
    if any(p.dtype in PACKED for p in (*lowered.inputs, *lowered.outputs)):
        sources["src/scalar.h"] = template("scalar.h")
    most_steps = max(len(part.step_names) for part in printed)
    most_refs = max(1, *(part.ref_count for part in printed))
    tables = "\n".join(
        [
            *([sized.tables] if symbols else []),
            *(f"extern const struct variant {part.symbol};" for part in printed),
            f"static const struct variant *const variants[] = {{"
            f"{', '.join(f'&{part.symbol}' for part in printed)}}};",
            f"enum {{ VARIANTS = {len(printed)} }};",
            f"enum {{ STEPS = {most_steps}, REFS = {most_refs} }}; /* of the variant with most */",
            f"enum {{ INPUTS = {len(lowered.inputs)}, OUTPUTS = {len(lowered.outputs)} }};",
            f"#define WEIGHTS_SIZE {sum(map(len, weights))}",
            f"static const unsigned char weights_id[] = {{{', '.join(map(str, mark))}}};",
            _ports(name, "input", lowered.inputs),
            _ports(name, "output", lowered.outputs),
            *([f"extern const unsigned char {name}_embedded[];"] if embedded else []),
            "",
            "static int usable(int v) {",
            *(f"  if (v == {v}) return {part.isa.condition};" for v, part in enumerate(printed)),
            "  return 0;",
            "}",
        ]
    )
    created = EMBEDDED_CREATE.replace("@NAME@", name) if embedded else ""
    sources["src/net.c"] = template(
        "net.c.in", NAME=name, EMBEDDED=created, SIZE_FIELD=sized.field,
        SIZE_PLACING=sized.placing, SIZE_POINTERS=sized.pointers, SIZE_FUNCTIONS=sized.functions,
        TABLES=tables,
    )  # fmt: skip
    units["src/net.c"] = ()
    if embedded:
        sources["src/weights.c"] = template("weights.c.in", NAME=name)
        units["src/weights.c"] = ()
    return Module(name, sources, weights, units, printed)


def print_variant(
    lowered: Lowered, isa: Isa, blob: Blob, prefix: str, stem: str, symbols: Sequence[Symbol]
) -> Variant:
    """Print every step; steps of equal text share a function. Weights are added to `blob`.

    C names begin with `prefix` and files with `stem`.
    """
    names: dict[str, str] = {}
    tiles: set[tuple[str, int, int]] = set()
    refs: list[str] = []
    rows: list[str] = []
    scratch = ALIGNMENT
    places = {str(symbol): i for i, symbol in enumerate(symbols)}
    ports = {p.buffer.index: i for i, p in enumerate((*lowered.inputs, *lowered.outputs))}
    for step in lowered.steps:
        _check_types(step)
        code = _printed(step, isa)
        kernel = names.setdefault(code.text, f"{prefix}_kernel_{len(names)}")
        tiles |= code.tiles
        scratch = max(scratch, code.scratch_bytes)
        rows.append(
            f"{{{kernel}, {len(refs)}, {code.pieces if code.parallel else 0}}}, /* {step.name} */"
        )
        refs += [_ref(p, blob, ports, places) for p in code.pointers]
    kernels = f"{stem}kernels.h"
    texts = {
        "simd.h": template("simd.h"),
        kernels: _kernels_header(prefix, names, tiles, bool(symbols)),
    }
    if isa.processor == "aarch64":
        texts["neon.h"] = template("neon.h")
    for i, unit in enumerate(_units(names, tiles)):
        headers = [kernels, "simd.h"]
        if any(SCALAR_HELPERS.search(text) for text in unit):
            headers.append("scalar.h")
        headers += [
            f"{helper}.h"
            for helper, prefix in HELPERS.items()
            if any(prefix in text for text in unit)
        ]
        texts |= {header: template(header) for header in headers[1:]}
        if "weights.h" in headers:
            texts["half.h"] = template("half.h")
        included = "\n".join(f'#include "{header}"' for header in headers)
        texts[f"{stem}kernels_{i}.c"] = "\n".join([f"{included}\n", *unit])
    tables = [
        f"static const struct ref refs[] = {{{', '.join(refs) or '{0, 0}'}}};",
        "static const struct step steps[] = {",
        *(f"  {row}" for row in rows),
        "  {0, 0, 0},",
        "};",
        _string_list("step_names", [s.name for s in lowered.steps]),
    ]
    variant = f"{prefix}_variant"
    scaling = [symbols.index(symbol) for symbol in lowered.arena_scale]
    texts[f"{stem}steps.c"] = template(
        "steps.c.in", ISA=isa.name, SYMBOL=variant, KERNELS=kernels, STEPS=str(len(rows)),
        REFS=str(len(refs)), ARENA=str(_aligned(lowered.arena_bytes + 2 * ALIGNMENT)),
        SCRATCH=str(_aligned(scratch + ALIGNMENT)), TABLES="\n".join(tables),
        SCALING=SCALING.format(", ".join(map(str, scaling)), len(scaling)) if scaling else "",
    )  # fmt: skip
    return Variant(isa, variant, texts, tuple(s.name for s in lowered.steps), len(refs))


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT


def _printed(step: Step, isa: Isa) -> KernelCode:
    """The step in C. Raises `UnsupportedOperatorError` where that is not right at every size."""
    node = step.nodes[0] if step.nodes else step.name
    wanted = {str(s) for v in (step.out, *step.reads()) for n in v.shape for s in symbols_of(n)}
    try:
        code = PRINTERS[type(step)](step, isa)
    except TypeError as error:  # numpy raises its own when it is given an extent
        if not wanted:
            raise
        raise UnsupportedOperatorError(
            f"target cpu: node {node!r} has no kernel for a size that is known at run time "
            f"({error}); give a fixed size."
        ) from error
    missing = wanted - {p.name for p in code.pointers if p.is_size}
    if missing:
        raise UnsupportedOperatorError(
            f"target cpu: the kernel of node {node!r} does not read {min(missing)} at run time; "
            f"give a fixed size, and report it."
        )
    return code


def _check_types(step: Step) -> None:
    for view in (step.out, *step.reads()):
        if view.dtype not in C_TYPES:
            raise UnsupportedOperatorError(
                f"target cpu: node {step.nodes[0] if step.nodes else step.name!r} handles "
                f"{view.dtype} tensors, which have no C type; cast them to FLOAT."
            )


def _ref(pointer: Pointer, blob: Blob, ports: Mapping[int, int], sizes: Mapping[str, int]) -> str:
    if pointer.is_size:
        return f"{{SIZES, {sizes[pointer.name]}}}"
    if pointer.data is not None:
        return f"{{WEIGHTS, {blob.add(pointer.data)}}}"
    if pointer.params is not None:
        values = np.array(pointer.params.values, np.float64).astype(np.float32)
        return f"{{WEIGHTS, {blob.add(values)}}}"
    buffer = pointer.buffer
    assert buffer is not None
    if buffer.kind == "constant":
        assert buffer.array is not None
        return f"{{WEIGHTS, {blob.add(buffer.array)}}}"
    if buffer.kind == "temp":
        return f"{{ARENA, {buffer.offset}}}"
    return f"{{IO + {ports[buffer.index]}, 0}}"


def _kernels_header(
    prefix: str, names: Mapping[str, str], tiles: set[tuple[str, int, int]], sized: bool
) -> str:
    lines = [
        "/* Kernels of this network; each computes its share `part` of `parts`. */",
        "#ifndef OC_KERNELS_H",
        "#define OC_KERNELS_H",
        "#include <stdint.h>",
        "",
        "struct oc_block { int n, stop, vectors, rows, tiles; long init, a, w; };",
        "",
        *([template("blocks.h")] if sized else []),
        *(f"#define {tile_name(*t)} {prefix}_{tile_name(*t)}" for t in sorted(tiles)),
        "",
    ]
    for kind, vectors, rows in sorted(tiles):
        text = print_tile(kind, vectors, rows)
        lines.append(text[text.index("void ") : text.index("{")].strip() + ";")
    lines += [
        f"void {n}(int part, int parts, char *const *q, char *scratch);" for n in names.values()
    ]
    return "\n".join([*lines, "#endif", ""])


def _units(names: Mapping[str, str], tiles: set[tuple[str, int, int]]) -> list[list[str]]:
    """The text of each translation unit: tiles first, then kernels in order."""
    texts = [print_tile(kind, vectors, rows) for kind, vectors, rows in sorted(tiles)]
    texts += [text.replace("@", name) for text, name in names.items()]
    units: list[list[str]] = [[]]
    size = 0
    for text in texts:
        if size > UNIT_BYTES:
            units.append([])
            size = 0
        units[-1].append(text)
        size += len(text)
    return units


def c_string(text: str) -> str:
    """A C string literal of any text: every byte outside a safe set as an octal escape."""
    safe = set(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_ .,:;/-+=()[]<>")
    return '"' + "".join(
        chr(b) if b in safe else f"\\{b:03o}" for b in text.encode("utf-8", "surrogatepass")
    ) + '"'  # fmt: skip


def _string_list(name: str, texts: Sequence[str]) -> str:
    return f"static const char *const {name}[] = {{{', '.join(map(c_string, texts)) or '0'}}};"


def _ports(name: str, kind: str, ports: Sequence[PortBuffer]) -> str:
    lines: list[str] = []
    rows: list[str] = []
    for i, p in enumerate(ports):
        dims = ", ".join(str(largest(n)) for n in p.shape) or "0"
        lines.append(f"static const long {kind}_shape_{i}[] = {{{dims}}};")
        rows.append(
            f"{{{c_string(p.name)}, {c_string(p.dtype)}, {len(p.shape)}, {kind}_shape_{i}}}"
        )
    lines.append(
        f"static const {name}_port {kind}_ports[] = {{{', '.join(rows) or '{0, 0, 0, 0}'}}};"
    )
    return "\n".join(lines)


def describe(lowered: Lowered) -> dict[str, Any]:
    """Ports as JSON, for the manifest."""

    def rows(ports: Sequence[PortBuffer]) -> list[dict[str, Any]]:
        return [
            {"name": p.name, "dtype": p.dtype, "shape": [largest(n) for n in p.shape]}
            for p in ports
        ]

    result = {"inputs": rows(lowered.inputs), "outputs": rows(lowered.outputs)}
    return json.loads(json.dumps(result))
