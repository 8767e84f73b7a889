"""Two kernels for one step, where the better one depends on a number that is known at run time."""

from __future__ import annotations

from optcompiler_cpu.code import KernelCode, declared_sizes, indent
from optcompiler_cpu.loops import HEADER


def from_on(number: int, least: int, many: KernelCode, few: KernelCode) -> KernelCode:
    """`many` where `number` is `least` or more at run time, else `few`."""
    pointers = [*many.pointers, *few.pointers]
    choice = [
        f"if ({number} >= {least}) @_many(part, parts, q, scratch);",
        f"else @_few(part, parts, q + {len(many.pointers)}, scratch);",
    ]
    body = [*declared_sizes(choice, pointers), *choice]
    parts = [_renamed(many.text, "many"), _renamed(few.text, "few")]
    return KernelCode(
        "\n".join([*parts, f"{HEADER} {{\n{indent(body)}\n}}\n"]),
        pointers,
        parallel=many.parallel or few.parallel,
        pieces=min(many.pieces, few.pieces),
        scratch_bytes=max(many.scratch_bytes, few.scratch_bytes),
        tiles=many.tiles | few.tiles,
    )


def _renamed(text: str, name: str) -> str:
    return text.replace("void @(", f"static void @_{name}(").replace("@_", f"@_{name}_").replace(
        f"@_{name}_{name}(", f"@_{name}("
    )  # fmt: skip
