"""Program → `Lowered`."""

from __future__ import annotations

from optcompiler.lowering import arena
from optcompiler.lowering.composites import COMPOSITES
from optcompiler.lowering.contractions import CONTRACTIONS
from optcompiler.lowering.core import Lowering
from optcompiler.lowering.decompose import DECOMPOSITIONS
from optcompiler.lowering.indexed import INDEXED
from optcompiler.lowering.ir import Lowered
from optcompiler.lowering.layout import LAYOUT
from optcompiler.lowering.reductions import REDUCTIONS
from optcompiler.program import Program

RULES = {**LAYOUT, **CONTRACTIONS, **REDUCTIONS, **COMPOSITES, **INDEXED}
"""What is not pointwise: operator → how it is lowered."""


def lower(
    program: Program, *, plan: bool = True, values: bool = True, computed_integers: bool = False,
    narrow: frozenset[str] = frozenset(), stored: frozenset[str] = frozenset(),
) -> Lowered:  # fmt: skip
    """Lower a program of static shapes.

    Pointwise operators that follow a contraction, reduction, pooling or another pointwise one are
    fused into its step, those that only these read among them (`regions`); functions of the program
    (fused regions) are expanded first, so a region is one step whether a pass drew it or not.
    Images are stored channels-last between steps. With `plan` False the arena is left to the caller
    (`arena.plan`), who may change steps first. With `values` False weights that need computing are
    left out: for `kernels_of` alone. With `computed_integers` a product of two quantised results,
    the second of them symmetric, sums integers; else only one with quantised weights does. `narrow`
    names types of less than 32 bits whose contractions keep operands of that type ("BFLOAT16");
    operands of others are widened to FLOAT in memory first.

    Raises `InputError` for dynamic shapes and `UnsupportedOperatorError` naming operator and node.
    """
    lowering = Lowering(program, RULES, values, DECOMPOSITIONS, computed_integers, narrow, stored)
    lowered = lowering.run()
    if plan:
        arena.plan(lowered)
    return lowered
