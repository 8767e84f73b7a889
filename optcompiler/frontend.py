"""One door for every kind of model: `import_model` gives a program and how to call it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import onnx
import onnx_ir as ir

from optcompiler.binding import fix_dimensions
from optcompiler.errors import InputError, VerificationError
from optcompiler.importing import program_from_onnx
from optcompiler.program import Port, Program
from optcompiler.signature import Signature, is_torch

Ends = tuple[int, int]
Named = Mapping[str, Mapping[int, str]] | Sequence[str] | None
Dynamic = Mapping[str, Mapping[int, str] | Ends] | Sequence[str] | None


@dataclass(frozen=True)
class Imported:
    """A model as the compiler sees it, and the way its user calls it."""

    program: Program
    signature: Signature


def import_model(model: Any, example_inputs: Any = None, *, dynamic: Dynamic = None) -> Imported:
    """Import a torch or ONNX model; the argument is left as it is.

    `model`: an nn.Module (traced in eval mode), torch.fx.GraphModule, ExportedProgram, the path
    of a .pt2 or .onnx file, an onnx.ModelProto, onnx_ir.Model or Program. `example_inputs`: a tuple
    of positional arguments, a dict of arguments by name, or one tensor; tracing a module needs
    them, and an ONNX model with symbolic dimensions gets the sizes of the examples.

    `dynamic` keeps dimensions symbolic: `{"x": {0: "batch"}}` by input and dimension, or "batch"
    for dimension 0 of every input; `{"batch": (1, 32)}` the same within bounds, or names what the
    model calls so already. Everything else becomes static where examples are given; a
    model that was traced or exported before has no more symbolic dimensions than it came with.

    Weights share the memory of a torch module: training it further changes the program too.

    Raises `InputError` for a model that cannot be read or traced, examples that do not fit it and
    NaN weights; `UnsupportedOperatorError` for an operator that has no ONNX form.
    """
    names, bounds = split_bounds(dynamic)
    if isinstance(model, (str, os.PathLike)):
        path = Path(cast("str | os.PathLike[str]", model))
        if path.suffix == ".pt2":
            from optcompiler.frontend_torch import load_exported

            model = load_exported(path)
        else:
            model = program_from_onnx(path)
    if isinstance(model, (onnx.ModelProto, ir.Model)):
        model = program_from_onnx(model)
    if isinstance(model, Program):
        return _sized(Imported(model, Signature.of_program(model)), example_inputs, names)
    if "torch" in sys.modules:
        import torch

        from optcompiler import frontend_torch

        if isinstance(model, torch.export.ExportedProgram):
            imported = Imported(*frontend_torch.program_from_exported(model))
            return _sized(imported, example_inputs, names)
        if isinstance(model, torch.nn.Module):
            return Imported(
                *frontend_torch.program_from_module(
                    model, example_inputs, _of_module(names), bounds
                )
            )
    raise InputError(
        f"a {type(model).__name__} is not a model; give an nn.Module, an ExportedProgram, "
        f"the path of a .pt2 or .onnx file, an onnx.ModelProto or an onnx_ir.Model."
    )


def split_bounds(
    dynamic: Dynamic,
) -> tuple[Named, dict[str, Ends]]:
    """The names of dimensions in `dynamic`, and the bounds of such, as in `{"batch": (1, 32)}`.

    Bounds of a single symbol, whose dimensions nothing names, keep dimension 0 of every input.
    """
    if not isinstance(dynamic, Mapping):
        return dynamic, {}
    named: dict[str, Mapping[int, str]] = {}
    bounds: dict[str, Ends] = {}
    for name, value in dynamic.items():
        if isinstance(value, Mapping):
            named[name] = value
            continue
        if type(value) not in (tuple, list) or [type(n) for n in value] != [int, int]:
            raise InputError(
                f"dynamic gives {name!r} the value {value!r}; give the least and the greatest size "
                f"of a dimension, as (1, 32), or the names of an input's dimensions, as "
                f"{{0: 'batch'}}."
            )
        bounds[name] = (value[0], value[1])
    return named or list(bounds) or None, bounds


def import_like(
    model: Any, example_inputs: Any, inputs: Sequence[Port],
    bounds: Mapping[str, Ends] = MappingProxyType({}),
) -> Program:  # fmt: skip
    """Import `model` with the dimensions symbolic that are in `inputs`, the ports of an earlier
    import of it, and the others fixed as there. `bounds` are those that symbols had.

    Raises as `import_model` does, also for a model without such inputs.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(model, torch.nn.Module):
        named = [(p.name, axis, d) for p in inputs for axis, d in enumerate(p.shape)]
        dynamic: dict[str, dict[int, str]] = {}
        for name, axis, dim in named:
            if isinstance(dim, str):
                dynamic.setdefault(name, {})[axis] = dim
        kept: Dynamic = {**dynamic, **bounds}
        return import_model(model, example_inputs, dynamic=kept or None).program
    program = import_model(model).program
    fixed = {(p.name, axis): d for p in inputs for axis, d in enumerate(p.shape)}
    return _fixed(
        program,
        {
            (p.name, axis): size
            for p in program.inputs
            for axis, dim in enumerate(p.shape)
            if not isinstance(dim, int) and isinstance(size := fixed.get((p.name, axis)), int)
        },
    )


def split_examples(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named arguments of `example_inputs`: a tuple, a list, a dict or one tensor."""
    if isinstance(example_inputs, Mapping):
        named = cast(Mapping[Any, Any], example_inputs)
        wrong = [k for k in named if not isinstance(k, str)]
        if wrong:
            raise InputError(f"example inputs are named by {wrong[0]!r}; name them by strings.")
        return (), dict(named)
    if is_torch(example_inputs) or not isinstance(example_inputs, (tuple, list)):
        return (example_inputs,), {}
    return tuple(cast(Sequence[Any], example_inputs)), {}


def _of_module(dynamic: Named) -> Mapping[str, Mapping[int, str]] | str | None:
    """`dynamic` for a module, whose dimensions have no names yet."""
    if dynamic is None or isinstance(dynamic, (str, Mapping)):
        return dynamic
    if len(dynamic) != 1:
        raise InputError(
            f"dynamic does not say which dimensions {', '.join(dynamic)} are; name them by input, "
            f"as {{'x': {{1: {dynamic[-1]!r}}}}}."
        )
    return dynamic[0]


def _sized(imported: Imported, example_inputs: Any, dynamic: Named) -> Imported:
    """Fix the symbolic dimensions that `dynamic` does not keep to the sizes of the examples."""
    program, signature = imported.program, imported.signature
    kept = _kept(signature, dynamic)
    if example_inputs is None:
        return imported
    args, kwargs = split_examples(example_inputs)
    arrays = signature.bind(args, kwargs)
    sizes = {
        (p.name, axis): arrays[p.name].shape[axis]
        for p in program.inputs
        for axis, dim in enumerate(p.shape)
        if not isinstance(dim, int) and (p.name, axis) not in kept
    }
    program = _fixed(program, sizes)
    return Imported(program, signature.with_ports(program))


def _fixed(program: Program, sizes: Mapping[tuple[str, int], int]) -> Program:
    if not sizes:
        return program
    try:
        return fix_dimensions(program, sizes)
    except VerificationError as error:
        raise InputError(
            f"the model is not valid at the sizes of the example inputs ({error}); give others."
        ) from error


def _kept(signature: Signature, dynamic: Named) -> set[tuple[str, int]]:
    if dynamic is None:
        return set()
    if not isinstance(dynamic, Mapping):
        symbols = [dynamic] if isinstance(dynamic, str) else dynamic
        named = {
            (p.name, axis)
            for p in signature.inputs
            for axis, dim in enumerate(p.shape)
            if dim in symbols
        }
        firsts = {(p.name, 0) for p in signature.inputs if p.shape}
        return named or firsts
    kept: set[tuple[str, int]] = set()
    ports = {p.name: p for p in signature.inputs}
    for name, axes in dynamic.items():
        for axis in axes:
            if name not in ports or axis >= len(ports[name].shape):
                raise InputError(
                    f"dynamic names dimension {axis} of {name!r}, which the model does not have; "
                    f"its inputs are {', '.join(map(str, signature.inputs))}."
                )
            if isinstance(ports[name].shape[axis], int):
                raise InputError(
                    f"dynamic names dimension {axis} of {ports[name]}, which the model fixes; "
                    f"export it again with that dimension symbolic."
                )
            kept.add((name, axis))
    return kept
