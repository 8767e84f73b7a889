"""Giving symbolic dimensions fixed sizes: those of example inputs, or those of a target."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from optcompiler.errors import InputError, UnsupportedOperatorError
from optcompiler.importing import infer_outputs, quiet
from optcompiler.program import Program, shape_of

if TYPE_CHECKING:
    from optcompiler.program import Port


def symbols(program: Program) -> list[str]:
    """Names of the symbolic dimensions of the inputs, in order of appearance."""
    found = [d for p in program.inputs for d in p.shape if isinstance(d, str)]
    return list(dict.fromkeys(found))


def refuse_unknown_sizes(program: Program, sizes: Iterable[str]) -> None:
    """Raise `InputError` for a size of a dimension that no input of the imported model has."""
    have = symbols(program)
    for name in sizes:
        if name not in have:
            raise InputError(
                f"size.{name}: the inputs have no symbolic dimension {name!r}, there is "
                f"{', '.join(have) or 'none'}; leave it out, or keep a dimension symbolic with "
                f"dynamic."
            )


def bind(program: Program, sizes: Mapping[str, int]) -> Program:
    """`program` with the named dimensions fixed: shapes inferred anew, shape arithmetic folded.

    The program itself is returned when none of its dimensions is named. Names of surviving nodes
    and values stay. Raises `InputError` for a name that no input has.
    """
    if not sizes:
        return program
    have = symbols(program)
    missing = [s for s in sizes if s not in have]
    if missing and (have or not all(p.static for p in program.inputs)):
        raise InputError(
            f"sizes: no input has a dimension {missing[0]!r}; there is {', '.join(have) or 'none'}."
        )
    if not have:
        return program
    copy = _sized(
        program,
        {
            (port.name, axis): sizes[dim]
            for port in program.inputs
            for axis, dim in enumerate(port.shape)
            if isinstance(dim, str) and dim in sizes
        },
    )
    for value in copy.graph.outputs:
        value.shape = None
    _infer(copy)
    _fold_shape_arithmetic(copy)
    _infer(copy)
    return copy


def fix_dimensions(program: Program, sizes: Mapping[tuple[str, int], int]) -> Program:
    """A copy of `program` with the given dimensions (input name, axis) of its inputs fixed.

    A symbol is fixed everywhere unless another input keeps it. Shape arithmetic stays, so the copy
    has the program's nodes. Raises `VerificationError` when it is not valid at these sizes.
    """
    copy = _sized(program, sizes)
    before = [d for p in program.inputs for d in p.shape]
    after = [d for p in copy.inputs for d in p.shape]
    fixed: dict[int | str, int] = {
        old: new
        for old, new in zip(before, after, strict=True)
        if isinstance(old, str) and isinstance(new, int) and old not in {*after, "?"}
    }
    for value in copy.graph.outputs:
        value.shape = ir.Shape(_unnamed(fixed.get(dim, dim)) for dim in shape_of(value))
    copy.infer_shapes()
    infer_outputs(copy)
    copy.infer_shapes()
    copy.verify()
    return copy


def _sized(program: Program, sizes: Mapping[tuple[str, int], int]) -> Program:
    """A copy whose inputs have these sizes; nothing else is adapted yet."""
    copy = program.clone()
    for value in copy.graph.inputs:
        value.shape = ir.Shape(
            sizes.get((value.name or "", axis), _unnamed(dim))
            for axis, dim in enumerate(shape_of(value))
        )
    return copy


def _unnamed(dim: int | str) -> int | str | None:
    return None if dim == "?" else dim


def _infer(program: Program) -> None:
    outputs = list(program.graph.outputs)
    program.infer_shapes()
    for value in outputs:
        if value.shape is None:
            node = value.producer()
            where = "the model" if node is None else f"{node.op_type} {node.name!r}"
            raise UnsupportedOperatorError(
                f"{where}: the shape of output {value.name!r} cannot be inferred at these sizes; "
                f"rewrite the model so that shapes do not depend on data."
            )


def resolved(program: Program) -> Program:
    """A copy with functions expanded, shape arithmetic folded and all shapes that follow known."""
    copy = program.inlined()
    copy.infer_shapes()
    _fold_shape_arithmetic(copy)
    copy.infer_shapes()
    return copy


def _fold_shape_arithmetic(program: Program) -> None:
    from onnxscript import optimizer

    def should_fold(node: ir.Node) -> bool | None:
        return None if all(_is_index(v) for v in node.outputs) else False

    folded = program.model.clone()
    try:
        with quiet():
            optimizer.optimize_ir(folded, num_iterations=2, inline=False, should_fold=should_fold)
    except RuntimeError as error:  # its evaluators of single operators have faults of their own
        logging.getLogger(__name__).debug("shape arithmetic kept: %s", error)
    else:
        program.model = folded


def _is_index(value: ir.Value) -> bool:
    return value.dtype in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)


def fit(
    batch: Mapping[str, np.ndarray], ports: Sequence[Port], sizes: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """The batch cut (or repeated) along its symbolic dimensions to the given sizes."""
    fitted: dict[str, np.ndarray] = {}
    for port in ports:
        array = batch[port.name]
        if port.kind != "tensor":
            fitted[port.name] = array
            continue
        for axis, dim in enumerate(port.shape):
            if isinstance(dim, str) and dim in sizes:
                index = np.arange(sizes[dim]) % max(array.shape[axis], 1)
                array = np.take(array, index, axis=axis)
        fitted[port.name] = np.asarray(array, order="C")
    return fitted
