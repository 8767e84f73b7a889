"""The torch front door: a module is traced by torch.export and converted to ONNX in memory."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument
from torch.export.pt2_archive import PT2ArchiveReader
from torch.utils import _pytree as pytree

from optcompiler.archives import screen_archive, screen_members
from optcompiler.errors import InputError, UnsupportedOperatorError
from optcompiler.frontend import Ends, split_examples
from optcompiler.frontend_export import to_onnx
from optcompiler.frontend_trees import children, tree_from_spec
from optcompiler.importing import program_from_onnx, quiet
from optcompiler.program import Program
from optcompiler.signature import LEAVES, Parameter, Signature, Tree

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_SYMBOL = re.compile(r"[A-Za-z_]\w*")
_POSITIONAL = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.VAR_POSITIONAL,
)


Named = Mapping[str, Mapping[int, str]] | str | None


def program_from_module(
    model: torch.nn.Module, example_inputs: Any, dynamic: Named, bounds: Mapping[str, Ends]
) -> tuple[Program, Signature]:
    """Trace an nn.Module or GraphModule in eval mode and convert it; see `import_model`."""
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            f"{type(model).__name__}: a TorchScript module cannot be traced; "
            f"give the nn.Module it was made from."
        )
    # torch.compile wraps a module; its own is what is traced
    model = getattr(model, "_orig_mod", model)
    if example_inputs is None:
        raise InputError(
            f"{type(model).__name__}: tracing a module needs example inputs; "
            f"give a tuple of tensors, or a dict by argument name."
        )
    args, kwargs = split_examples(_distinct_tensors(example_inputs))
    forward = inspect.signature(model.forward)
    try:
        forward.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"{type(model).__name__}: the example inputs do not fit forward{forward}: {error}."
        ) from error
    args, kwargs, shapes, symbols = _dynamic_shapes(forward, args, kwargs, dynamic, bounds)
    with _evaluating(model), torch.no_grad(), quiet():
        try:
            exported = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
        except Exception as error:
            raise InputError(
                f"{type(model).__name__}: torch.export cannot trace it ({_reason(error)}); "
                f"check the example inputs, or make forward traceable."
            ) from error
        return program_from_exported(exported, forward=forward, symbols=symbols)


def load_exported(path: Path) -> ExportedProgram:
    """Read a .pt2 file without running anything pickled or written in it.

    The archive is looked through before torch gets it, and again as torch's own reader sees it.
    Raises `InputError` for a file that is missing, not a .pt2, or that holds more than a program.
    """
    screen_archive(path, str(path))
    with quiet(), no_pickle():
        try:
            screen_members(*_as_torch_reads(path), str(path))
            exported = torch.export.load(path)
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"{path}: not a .pt2 file that this torch ({torch.__version__}) can read "
                f"({_reason(error)}); save it again with torch.export.save."
            ) from error
    # source text that torch would run before calls; the compiled model checks its inputs itself
    exported._guards_code = []  # pyright: ignore[reportPrivateUsage]
    return exported


def _as_torch_reads(path: Path) -> tuple[dict[str, int], Callable[[str], bytes]]:
    reader = PT2ArchiveReader(str(path)).archive_file
    sizes = {name: reader.get_record_size(name) for name in reader.get_all_records()}
    return sizes, reader.get_record


def program_from_exported(
    exported: ExportedProgram,
    *,
    forward: inspect.Signature | None = None,
    symbols: Sequence[dict[int, str]] = (),
) -> tuple[Program, Signature]:
    """Convert an ExportedProgram through `torch.onnx` in memory; weights share its memory.

    `forward` is the signature of the traced method where it is known; `symbols` names the dynamic
    dimensions of each tensor input in order. Raises `InputError` for a program that keeps state
    between calls, `UnsupportedOperatorError` for an operator
    without an ONNX form.
    """
    if not any(isinstance(s.arg, TensorArgument) for s in exported.graph_signature.output_specs):
        raise InputError("forward returns no tensor; a compiled model computes at least one.")
    with torch.no_grad(), quiet(), _tensor_outputs(exported):
        try:
            converted: Any = to_onnx(exported)
        except Exception as error:
            raise _conversion_error(error) from error
    _check_stateless(converted.exported_program)
    model: ir.Model = converted.model
    _copy_returned_weights(model.graph)
    _share_weights(model.graph)
    _rename_symbols(model.graph, symbols)
    program = program_from_onnx(model)
    parameters = _parameters(exported, forward)
    result = _result(exported)
    _name_outputs(program, result)
    return program, Signature(parameters, result, program.inputs, program.outputs)


# -- tracing --------------------------------------------------------------------------------


def _distinct_tensors(example_inputs: Any) -> Any:
    """The examples with arrays as tensors, and a copy of any tensor that occurs twice.

    torch.export takes two inputs that are the same tensor object for one.
    """
    seen: set[int] = set()

    def distinct(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray):
            return torch.from_numpy(leaf.copy())
        if isinstance(leaf, torch.Tensor):
            if id(leaf) in seen:
                return leaf.clone()
            seen.add(id(leaf))
        return leaf

    return pytree.tree_map(distinct, example_inputs)


@contextlib.contextmanager
def _evaluating(module: torch.nn.Module) -> Generator[None]:
    """Eval mode for the duration; every submodule's own flag is put back."""
    flags = [(m, m.training) for m in module.modules()]
    try:
        # modules that torch.export made refuse eval(): they have one mode only
        with contextlib.suppress(NotImplementedError):
            module.eval()
        yield
    finally:
        for submodule, training in flags:
            submodule.training = training


@contextlib.contextmanager
def no_pickle() -> Generator[None]:
    """Make torch.load refuse anything but tensors, whatever its caller asks for."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@dataclass(frozen=True)
class _Leaf:
    """A leaf of the example inputs: its argument, the name of its own, and its value."""

    argument: str
    name: str
    value: Any


def _leaves(
    forward: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[_Leaf]:
    names = _positional_names(forward, len(args))
    found: list[_Leaf] = []
    for path, value in pytree.tree_flatten_with_path((args, kwargs))[0]:
        keys = [str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path]
        top = names[int(keys[1])] if keys[0] == "0" else keys[1]
        found.append(_Leaf(top, "_".join([top, *keys[2:]]), value))
    return found


def _positional_names(forward: inspect.Signature, count: int) -> list[str]:
    """Names of the first `count` positional arguments; those of `*args` are `args_0`, ..."""
    names: list[str] = []
    for parameter in forward.parameters.values():
        if parameter.kind == inspect.Parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{i}" for i in range(count - len(names))]
        elif parameter.kind in _POSITIONAL:
            names.append(parameter.name)
    return names[:count]


def _dynamic_shapes(
    forward: inspect.Signature,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic: Named,
    bounds: Mapping[str, Ends],
) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any] | None, list[dict[int, str]]]:
    """Example inputs fit for tracing, torch's `dynamic_shapes`, and the symbols of each tensor.

    torch.export takes a dimension of size 1 for a constant, so examples are doubled there.
    """
    if dynamic is None:
        return args, kwargs, None, []
    loose = [name for name in kwargs if name not in forward.parameters]
    if loose:
        raise InputError(
            f"argument {loose[0]!r} reaches forward{forward} as one of **kwargs, where "
            f"torch.export takes no dynamic dimensions; declare it by name."
        )
    leaves = _leaves(forward, args, kwargs)
    wanted = [_wanted(leaf, dynamic) for leaf in leaves]
    if not isinstance(dynamic, str):
        known = {n for leaf in leaves if isinstance(leaf.value, torch.Tensor) for n in
                 (leaf.argument, leaf.name)}  # fmt: skip
        unknown = [name for name in dynamic if name not in known]
        if unknown:
            raise InputError(
                f"dynamic names the input {unknown[0]!r}; the example inputs are "
                f"{', '.join(dict.fromkeys(leaf.name for leaf in leaves))}."
            )
    sizes = _sizes(leaves, wanted)
    dims: dict[str, Any] = {}
    for symbol, size in sizes.items():
        least, most = bounds.get(symbol, (1, None))
        if size < least or size > (most or size):
            raise InputError(
                f"the example inputs have {symbol} {size}, which is not from {least} to {most} as "
                f"dynamic says; give others."
            )
        dims[symbol] = Dim(symbol, min=least, max=most)
    values = [
        _doubled(leaf.value, [a for a, s in axes.items() if sizes[s] == 1])
        for leaf, axes in zip(leaves, wanted, strict=True)
    ]
    spec = pytree.tree_structure((args, kwargs))
    args, kwargs = pytree.tree_unflatten(values, spec)
    shapes_args, shapes_kwargs = pytree.tree_unflatten(
        [{a: dims[s] for a, s in axes.items()} or None for axes in wanted], spec
    )
    shapes = dict(forward.bind(*shapes_args, **shapes_kwargs).arguments)
    tensors = [w for l, w in zip(leaves, wanted, strict=True) if isinstance(l.value, torch.Tensor)]
    return args, kwargs, shapes, tensors


def _wanted(leaf: _Leaf, dynamic: Named) -> dict[int, str]:
    if not isinstance(leaf.value, torch.Tensor):
        return {}
    if isinstance(dynamic, str):
        axes = {0: dynamic} if leaf.value.ndim else {}
    else:
        assert dynamic is not None
        axes = dict(dynamic.get(leaf.name, dynamic.get(leaf.argument, {})))
    for axis, symbol in axes.items():
        if not 0 <= axis < leaf.value.ndim:
            raise InputError(
                f"dynamic names dimension {axis} of {leaf.name!r}, "
                f"which has {leaf.value.ndim} dimensions."
            )
        if not symbol.isidentifier():
            raise InputError(f"dynamic calls a dimension {symbol!r}; give it an identifier.")
    return axes


def _sizes(leaves: Sequence[_Leaf], wanted: Sequence[dict[int, str]]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for leaf, axes in zip(leaves, wanted, strict=True):
        for axis, symbol in axes.items():
            size = leaf.value.shape[axis]
            if sizes.setdefault(symbol, size) != size:
                raise InputError(
                    f"dimension {symbol!r} is {size} in {leaf.name!r} and {sizes[symbol]} in "
                    f"another example input; make them equal or name them apart."
                )
    return sizes


def _doubled(value: Any, axes: Sequence[int]) -> Any:
    for axis in axes:
        value = torch.cat([value, value], dim=axis)
    return value


# -- converting -----------------------------------------------------------------------------


@contextlib.contextmanager
def _tensor_outputs(exported: ExportedProgram) -> Generator[None]:
    """Hide constant outputs (ints, strings) for the duration: the ONNX exporter rejects them."""
    output = exported.graph.output_node()
    kept = output.args
    specs = exported.graph_signature.output_specs
    arguments = [spec.arg for spec in specs]
    output.args = (tuple(v if isinstance(v, torch.fx.Node) else None for v in kept[0]),)  # type: ignore[union-attr]
    for spec in specs:
        if isinstance(spec.arg, ConstantArgument):
            spec.arg = ConstantArgument(name="", value=None)
    try:
        yield
    finally:
        output.args = kept
        for spec, argument in zip(specs, arguments, strict=True):
            spec.arg = argument


def _check_stateless(exported: ExportedProgram) -> None:
    """Refuse buffers that a call changes and a later call's outputs depend on."""
    mutated = {
        s.target: s.arg.name
        for s in exported.graph_signature.output_specs
        if s.kind == OutputKind.BUFFER_MUTATION and isinstance(s.arg, TensorArgument)
    }
    if not mutated:
        return
    outputs = {
        s.arg.name
        for s in exported.graph_signature.output_specs
        if s.kind == OutputKind.USER_OUTPUT and isinstance(s.arg, TensorArgument)
    }
    for spec in exported.graph_signature.input_specs:
        if spec.target in mutated and outputs & _reached(exported.graph, spec.arg.name):
            raise InputError(
                f"forward changes the buffer {spec.target!r} and reads it in the next call, "
                f"which a compiled model cannot; pass it in and out as a tensor instead."
            )


def _reached(graph: torch.fx.Graph, name: str) -> set[str]:
    start = next((n for n in graph.nodes if n.name == name), None)
    seen: set[str] = set()
    stack = [start] if start is not None else []
    while stack:
        node = stack.pop()
        if node.name not in seen:
            seen.add(node.name)
            stack += [user for user in node.users if user.op != "output"]
    return seen


def _copy_returned_weights(graph: ir.Graph) -> None:
    """A buffer that is a result too gets an Identity, and so keeps its name in the state dict."""
    for index, value in enumerate(tuple(graph.outputs)):
        if value.is_initializer():
            identity = ir.Node("", "Identity", [value])
            output = identity.outputs[0]
            output.type, output.shape = value.type, value.shape
            graph.append(identity)
            graph.outputs[index] = output


def _share_weights(graph: ir.Graph) -> None:
    """Initializers over the same memory become one, under the name that comes first."""
    first: dict[tuple[Any, ...], ir.Value] = {}
    for name, value in tuple(graph.initializers.items()):
        raw = getattr(value.const_value, "raw", None)
        if not isinstance(raw, torch.Tensor) or raw.numel() == 0:
            continue
        key = (raw.device, raw.data_ptr(), raw.dtype, tuple(raw.shape), raw.stride())
        kept = first.setdefault(key, value)
        if kept is not value:
            value.replace_all_uses_with(kept)
            del graph.initializers[name]


def _rename_symbols(graph: ir.Graph, symbols: Sequence[dict[int, str]]) -> None:
    """Give the exporter's symbols (`s77`) the names that the caller gave the dimensions."""
    names: dict[str, str] = {}
    for value, axes in zip(graph.inputs, symbols, strict=bool(symbols)):
        for axis, name in axes.items():
            dim = value.shape[axis] if value.shape is not None else None
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                names[dim.value] = name
    if not names:
        return
    for value in (*graph.inputs, *(v for n in graph.all_nodes() for v in n.outputs)):
        if value.shape is not None and not value.shape.is_static():
            value.shape = ir.Shape(_renamed(d, names) for d in value.shape)


def _renamed(dim: Any, names: dict[str, str]) -> int | str | None:
    if isinstance(dim, int):
        return dim
    text = dim.value
    return None if text is None else _SYMBOL.sub(lambda m: names.get(m[0], m[0]), text)


# -- the signature --------------------------------------------------------------------------


def _parameters(
    exported: ExportedProgram, forward: inspect.Signature | None
) -> tuple[Parameter, ...]:
    counter = iter(range(1 << 30))
    leaves: list[Tree] = []
    for spec in exported.graph_signature.input_specs:
        if spec.kind != InputKind.USER_INPUT:
            continue
        if isinstance(spec.arg, ConstantArgument):
            leaves.append(Tree("constant", value=_scalar(spec.arg.value)))
        else:
            leaves.append(Tree(_kind(exported, spec.arg), next(counter)))
    stream = iter(leaves)
    args_spec, kwargs_spec = children(exported.call_spec.in_spec)
    args = [tree_from_spec(c, stream) for c in children(args_spec)]
    kwargs = [tree_from_spec(c, stream) for c in children(kwargs_spec)]
    signature = exported.module_call_graph[0].signature
    known = getattr(signature, "forward_arg_names", None) or ()
    names = list(known[: len(args)]) or [f"arg_{i}" for i in range(len(args))]
    found = [Parameter(n, t) for n, t in zip(names, args, strict=True)]
    found += [
        Parameter(n, t, positional=False)
        for n, t in zip(kwargs_spec.context or (), kwargs, strict=True)
    ]
    return tuple(_in_order(found, forward)) if forward is not None else tuple(found)


def _in_order(found: Sequence[Parameter], forward: inspect.Signature) -> Iterator[Parameter]:
    """Named arguments in the order of `forward`; those that follow no gap are positional too."""
    waiting = {p.name: p for p in found}
    gap = False
    for declared in forward.parameters.values():
        if declared.kind == inspect.Parameter.VAR_POSITIONAL:
            for name in [
                n for n in waiting if waiting[n].positional and n not in forward.parameters
            ]:
                yield waiting.pop(name)
            gap = True
        elif declared.name in waiting:
            parameter = waiting.pop(declared.name)
            positional = not gap and declared.kind in _POSITIONAL
            yield Parameter(parameter.name, parameter.tree, positional)
        else:
            gap = True
    yield from waiting.values()


def _result(exported: ExportedProgram) -> Tree:
    counter = iter(range(1 << 30))
    leaves: list[Tree] = []
    for spec in exported.graph_signature.output_specs:
        if spec.kind != OutputKind.USER_OUTPUT:
            continue
        if isinstance(spec.arg, ConstantArgument):
            leaves.append(Tree("constant", value=_scalar(spec.arg.value)))
        else:
            leaves.append(Tree(_kind(exported, spec.arg), next(counter)))
    return tree_from_spec(exported.call_spec.out_spec, iter(leaves))


def _kind(exported: ExportedProgram, argument: Any) -> str:
    """The kind of `Tree` that stands for one input or output of the traced graph."""
    if not isinstance(argument, TensorArgument):
        return "scalar"
    value = next(n.meta["val"] for n in exported.graph.nodes if n.name == argument.name)
    return "complex" if value.dtype.is_complex else "tensor"


def _scalar(value: Any) -> int | float | str | bool | None:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise InputError(
        f"an argument or result of forward is the {type(value).__name__} {value!r}; "
        f"only tensors, numbers, strings and None can pass."
    )


def _name_outputs(program: Program, result: Tree) -> None:
    """Name graph outputs after their place in the result, where the name is free."""
    for index, stem in _output_names(result, ""):
        value = program.graph.outputs[index]
        stem = stem or "output"
        if value.name != stem:
            value.name = program.fresh_name(
                stem if program.value(stem) is None else f"{stem}_output"
            )


def _output_names(tree: Tree, prefix: str) -> Iterator[tuple[int, str]]:
    if tree.kind in LEAVES:
        yield tree.index, prefix
        return
    for key, item in tree.children():
        if not prefix and tree.kind in ("tuple", "list"):
            key = f"output_{key}" if len(tree.items) > 1 else ""
        yield from _output_names(item, "_".join(filter(None, (prefix, key))))


# -- errors ---------------------------------------------------------------------------------


def _conversion_error(error: Exception) -> InputError | UnsupportedOperatorError:
    causes = [error]
    while isinstance(causes[-1].__cause__, Exception):
        causes.append(causes[-1].__cause__)
    for cause in causes:
        if type(cause).__name__ == "DispatchError":
            return UnsupportedOperatorError(
                f"torch.onnx has no ONNX form for an operator of the model ({_reason(cause)}); "
                f"write it with other operators."
            )
    return InputError(
        f"torch.onnx cannot convert the traced model ({_reason(causes[-1])}); "
        f"rewrite that part of forward, or export it to ONNX and give the file."
    )


def _reason(error: BaseException) -> str:
    """The first sentence of an error that says something."""
    lines = [line.strip() for line in _ANSI.sub("", str(error)).splitlines()]
    first = next((line for line in lines if any(c.isalpha() for c in line)), "")
    sentence = first.split(". ", 1)[0].rstrip(".")[:300]
    return f"{type(error).__name__}: {sentence}" if sentence else type(error).__name__
