"""How the arguments of a call become named arrays, and outputs the structure the model returned."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import onnx_ir as ir

from optcompiler.errors import InputError
from optcompiler.program import Port

if TYPE_CHECKING:
    from optcompiler.program import Program

Scalar = int | float | str | bool | None

LEAVES = ("tensor", "complex", "scalar")
"""Kinds of `Tree` that stand for one input or output of the program."""

_CONTAINERS = {"tuple", "list", "dict", "namedtuple", "object"}


@dataclass(frozen=True)
class Tree:
    """The structure of an argument or a result, without the arrays in it.

    `kind` is "tensor" (`index` counts the program's inputs or outputs), "complex" (the same, its
    real and imaginary parts the program's last axis), "scalar" (the same, a Python number on the
    caller's side), "constant" (`value`), or a container: "tuple", "list",
    "dict" and "object" with `keys`, "namedtuple" with `keys` as its fields. `type` says which class
    a namedtuple or object is, as "module:name".
    """

    kind: str
    index: int = -1
    value: Scalar = None
    items: tuple[Tree, ...] = ()
    keys: tuple[str | int, ...] = ()
    type: str = ""

    def to_json(self) -> dict[str, Any]:
        if self.kind == "constant":
            return {"kind": self.kind, "value": self.value}
        if self.kind not in _CONTAINERS:
            return {"kind": self.kind, "index": self.index}
        json: dict[str, Any] = {"kind": self.kind, "items": [i.to_json() for i in self.items]}
        if self.keys:
            json["keys"] = list(self.keys)
        if self.type:
            json["type"] = self.type
        return json

    @classmethod
    def from_json(cls, json: Mapping[str, Any]) -> Tree:
        """Read what `to_json` gave. Raises `ValueError` for a tree of another form."""
        tree = cls(
            kind=json["kind"],
            index=json.get("index", -1),
            value=json.get("value"),
            items=tuple(cls.from_json(i) for i in json.get("items", ())),
            keys=tuple(json.get("keys", ())),
            type=json.get("type", ""),
        )
        keyed = tree.kind in ("dict", "object", "namedtuple")
        fits = (
            tree.kind in (*LEAVES, *_CONTAINERS, "constant")
            and (tree.kind not in LEAVES or (type(tree.index) is int and tree.index >= 0))
            and isinstance(json.get("value"), (bool, int, float, str, type(None)))
            and (not keyed or len(tree.keys) == len(tree.items))
            and all(isinstance(k, (str, int)) for k in json.get("keys", ()))
            and isinstance(json.get("type", ""), str)
        )
        if not fits:
            raise ValueError(f"a tree of kind {str(tree.kind)[:50]!r} that holds something else")
        return tree

    def children(self) -> list[tuple[str, Tree]]:
        """The items with the key, field or position of each."""
        keys = self.keys or tuple(range(len(self.items)))
        return [(str(k), item) for k, item in zip(keys, self.items, strict=True)]


@dataclass(frozen=True)
class Parameter:
    """One argument of a call; `positional` tells whether it may be given without its name."""

    name: str
    tree: Tree
    positional: bool = True

    @property
    def constant(self) -> bool:
        """Whether it holds no tensor: then it was fixed at tracing and may be left out."""
        return not _indices(self.tree)


@dataclass(frozen=True)
class Signature:
    """How a program is called: its parameters, its result, and the arrays behind both.

    `bounds` are the least and the greatest size of symbolic dimensions that have such, by name.
    """

    parameters: tuple[Parameter, ...]
    result: Tree
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    bounds: tuple[tuple[str, int, int], ...] = ()

    @classmethod
    def of_program(cls, program: Program) -> Signature:
        """Inputs by position or name, a tuple of all outputs in graph order as the result."""
        inputs, outputs = program.inputs, program.outputs
        return cls(
            parameters=tuple(Parameter(p.name, Tree("tensor", i)) for i, p in enumerate(inputs)),
            result=Tree("tuple", items=tuple(Tree("tensor", i) for i in range(len(outputs)))),
            inputs=inputs,
            outputs=outputs,
        )

    def with_ports(self, program: Program) -> Signature:
        """This structure over the ports that `program` has now (their shapes may have changed)."""
        return replace(self, inputs=program.inputs, outputs=program.outputs)

    # -- JSON -------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars; `from_json` gives an equal signature back."""
        json: dict[str, Any] = {
            "parameters": [
                {"name": p.name, "positional": p.positional, "tree": p.tree.to_json()}
                for p in self.parameters
            ],
            "result": self.result.to_json(),
            "inputs": [_port_json(p) for p in self.inputs],
            "outputs": [_port_json(p) for p in self.outputs],
        }
        return json | ({"bounds": [list(b) for b in self.bounds]} if self.bounds else {})

    @classmethod
    def from_json(cls, json: Mapping[str, Any]) -> Signature:
        """Read what `to_json` gave. Raises `InputError` for anything else."""
        try:
            signature = cls(
                parameters=tuple(
                    Parameter(p["name"], Tree.from_json(p["tree"]), p["positional"])
                    for p in json["parameters"]
                ),
                result=Tree.from_json(json["result"]),
                inputs=tuple(_port_from_json(p) for p in json["inputs"]),
                outputs=tuple(_port_from_json(p) for p in json["outputs"]),
                bounds=tuple((str(n), int(a), int(b)) for n, a, b in json.get("bounds", ())),
            )
            given = {i for p in signature.parameters for i in _indices(p.tree)}
            if given != set(range(len(signature.inputs))):
                raise ValueError(f"arguments for inputs {sorted(given)} of {len(signature.inputs)}")
            if max(_indices(signature.result), default=-1) >= len(signature.outputs):
                raise ValueError("a result that is no output")
            return signature
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise InputError(
                f"not a signature ({type(error).__name__}: {error}); compile the model again."
            ) from error

    # -- calling ----------------------------------------------------------------------------

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Arrays by input name, checked and C-contiguous; torch CPU tensors are not copied.

        Raises `InputError` naming the argument, what it got and what it expected: for a missing or
        unknown argument, another structure, dtype or shape, or one symbolic dimension with two
        sizes.
        """
        leaves: dict[int, Any] = {}
        for parameter, value in self._arguments(args, kwargs):
            _flatten(parameter.tree, value, parameter.name, leaves)
        arrays = {
            port.name: as_array(leaves[i], port)
            for i, port in enumerate(self.inputs)
            if i in leaves
        }
        return self.check(arrays)

    def check(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """`arrays` by input name, in graph order, checked as `bind` does."""
        unknown = [name for name in arrays if name not in {p.name for p in self.inputs}]
        missing = [p.name for p in self.inputs if p.name not in arrays]
        if unknown or missing:
            raise InputError(
                f"inputs {sorted(arrays)} given, {[p.name for p in self.inputs]} expected; "
                f"{_difference(missing, unknown)}."
            )
        sizes: dict[str, tuple[int, str]] = {}
        checked: dict[str, np.ndarray] = {}
        for port in self.inputs:
            array = as_array(arrays[port.name], port)
            if port.kind == "tensor":
                _check_shape(array.shape, port, sizes)
            if not isinstance(array, np.ndarray) or array.flags.c_contiguous:  # pyright: ignore[reportUnnecessaryIsInstance]
                checked[port.name] = array
            else:
                checked[port.name] = array.copy(order="C")
        for name, least, most in self.bounds:
            size, where = sizes.get(name, (least, ""))
            if not least <= size <= most:
                raise InputError(
                    f"input {where!r} has {name} {size}, {least} to {most} expected; compile again "
                    f"with other bounds, or cut the input."
                )
        return checked

    def restore(self, outputs: Sequence[np.ndarray], like_torch: bool) -> Any:
        """The result as the model returned it, around `outputs` (in graph order).

        With `like_torch` arrays become torch tensors over the same memory. A namedtuple or
        dataclass is made when its module is loaded already; otherwise a dict of its fields is.
        """
        return _unflatten(self.result, outputs, like_torch)

    def _arguments(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> list[tuple[Parameter, Any]]:
        positional = [p for p in self.parameters if p.positional]
        if len(args) > len(positional):
            raise InputError(
                f"{len(args)} positional arguments given, at most {len(positional)} expected "
                f"({_names(positional)}); leave the others out or give them by name."
            )
        given: dict[str, Any] = {p.name: a for p, a in zip(positional, args, strict=False)}
        known = {p.name: p for p in self.parameters}
        for name, value in kwargs.items():
            if name not in known:
                raise InputError(
                    f"unknown argument {name!r}; the model was traced with "
                    f"{_names(self.parameters)}."
                )
            if name in given:
                raise InputError(f"argument {name!r} is given twice; give it once.")
            given[name] = value
        missing = [p for p in self.parameters if p.name not in given and not p.constant]
        if missing:
            raise InputError(
                f"argument {missing[0].name!r} is missing; the model takes "
                f"{_names(self.parameters)}."
            )
        return [(known[name], value) for name, value in given.items()]


# -- arrays ---------------------------------------------------------------------------------


def is_torch(value: Any) -> bool:
    """Whether `value` is a torch tensor, asked without importing torch."""
    return _is_torch_type(type(value))


@functools.cache
def _is_torch_type(kind: type) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and issubclass(kind, torch.Tensor)


def as_array(value: Any, port: Port) -> np.ndarray:
    """`value` as an array of the port's dtype, sharing memory where it is a CPU tensor or array.

    Python numbers are taken for ports of rank 0, and complex numbers for ports that hold their
    real and imaginary parts on a last axis of length 2. Raises `InputError` for another dtype.
    """
    if port.kind.endswith("sequence") or (port.kind.startswith("optional") and value is None):
        return cast("np.ndarray", value)  # a list of arrays, or None: handed on as it is
    expected = _dtype(port.dtype)
    if type(value) is np.ndarray and value.dtype is expected:
        return value
    if is_torch(value):
        array = _from_torch(value)
    elif isinstance(value, (np.ndarray, np.generic)):
        array = np.asarray(value)
    elif isinstance(value, (bool, int, float)) and not port.shape:
        array = np.asarray(value)
        if np.can_cast(array.dtype, expected, casting="same_kind"):
            array = array.astype(expected)
    else:
        raise InputError(
            f"input {port.name!r} is a {type(value).__name__}, {port} expected; "
            f"give a torch tensor or a numpy array."
        )
    if array.dtype.kind == "c" and expected.kind == "f":
        array = np.ascontiguousarray(array)[..., None].view(f"f{array.dtype.itemsize // 2}")
    if array.dtype != expected and array.dtype.newbyteorder("=") != expected:
        if expected == np.dtype(object) and array.dtype.kind in "US":
            return array.astype(object)
        raise InputError(
            f"input {port.name!r} has dtype {array.dtype}, {expected} expected ({port}); "
            f"convert it first."
        )
    return array.astype(expected, copy=False)


@functools.cache
def _dtype(name: str) -> np.dtype[Any]:
    return np.dtype(ir.DataType[name].numpy())


def _from_torch(value: Any) -> np.ndarray:
    import torch

    tensor = value.detach()
    tensor = tensor.resolve_conj().resolve_neg().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ir.DataType.BFLOAT16.numpy())
    try:
        return tensor.numpy()
    except (TypeError, RuntimeError) as error:
        raise InputError(
            f"a {tensor.layout} tensor of {tensor.dtype} has no numpy form ({error}); "
            f"convert it first."
        ) from error


def _from_pairs(array: np.ndarray) -> np.ndarray:
    """Complex numbers of pairs (real, imaginary) on the last axis."""
    wide = array if array.dtype.itemsize >= 4 else array.astype(np.float32)
    return np.ascontiguousarray(wide).view(f"c{2 * wide.dtype.itemsize}")[..., 0]


def _to_torch(array: np.ndarray) -> Any:
    import torch

    if array.dtype == ir.DataType.BFLOAT16.numpy():
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    if not array.flags.writeable:
        array = array.copy()
    return torch.from_numpy(array)


def _check_shape(shape: tuple[int, ...], port: Port, sizes: dict[str, tuple[int, str]]) -> None:
    if len(shape) != len(port.shape):
        raise InputError(
            f"input {port.name!r} has shape {list(shape)} ({len(shape)} dimensions), "
            f"{port} expected."
        )
    for axis, (got, expected) in enumerate(zip(shape, port.shape, strict=True)):
        if isinstance(expected, int):
            if got != expected:
                raise InputError(
                    f"input {port.name!r} has shape {list(shape)}, {port} expected: "
                    f"dimension {axis} is {got}, not {expected}."
                )
        elif expected.isidentifier():
            first, where = sizes.setdefault(expected, (got, port.name))
            if first != got:
                raise InputError(
                    f"input {port.name!r} has shape {list(shape)}, {port} expected: dimension "
                    f"{expected!r} is {got} here and {first} in {where!r}; make them equal."
                )


# -- trees ----------------------------------------------------------------------------------


def _indices(tree: Tree) -> list[int]:
    if tree.kind in LEAVES:
        return [tree.index]
    return [i for item in tree.items for i in _indices(item)]


def _flatten(tree: Tree, value: Any, where: str, leaves: dict[int, Any]) -> None:
    if tree.kind in LEAVES:
        leaves[tree.index] = value
    elif tree.kind == "constant":
        if is_torch(value) or isinstance(value, np.ndarray) or value != tree.value:
            raise InputError(
                f"argument {where!r} was fixed to {tree.value!r} when the model was traced, "
                f"{_describe(value)} given; compile again with that value."
            )
    elif tree.kind == "dict":
        if not isinstance(value, Mapping):
            raise InputError(f"argument {where!r} is {_describe(value)}, a dict expected.")
        found = cast(Mapping[Any, Any], value)
        missing = [str(k) for k in tree.keys if k not in found]
        unknown = [str(k) for k in found if k not in tree.keys]
        if missing or unknown:
            raise InputError(
                f"argument {where!r} has keys {list(found)}, {list(tree.keys)} expected; "
                f"{_difference(missing, unknown)}."
            )
        for key, item in zip(tree.keys, tree.items, strict=True):
            _flatten(item, found[key], f"{where}[{key}]", leaves)
    elif tree.kind == "object":
        for key, item in zip(tree.keys, tree.items, strict=True):
            _flatten(item, _field(value, str(key), where), f"{where}.{key}", leaves)
    else:
        if not isinstance(value, (tuple, list)):
            raise InputError(f"argument {where!r} is {_describe(value)}, a {tree.kind} expected.")
        items = cast(Sequence[Any], value)
        if len(items) != len(tree.items):
            raise InputError(
                f"argument {where!r} has {len(items)} items, {len(tree.items)} expected."
            )
        for i, (item, child) in enumerate(zip(tree.items, items, strict=True)):
            _flatten(item, child, f"{where}[{i}]", leaves)


def _field(value: Any, key: str, where: str) -> Any:
    if isinstance(value, Mapping) and key in value:
        return cast(Mapping[str, Any], value)[key]
    if hasattr(value, key):
        return getattr(value, key)
    raise InputError(f"argument {where!r} is {_describe(value)} without the field {key!r}.")


def _unflatten(tree: Tree, outputs: Sequence[np.ndarray], like_torch: bool) -> Any:
    if tree.kind == "constant":
        return tree.value
    if tree.kind == "scalar":
        return outputs[tree.index].item()
    if tree.kind in ("tensor", "complex"):
        array = outputs[tree.index]
        if tree.kind == "complex":
            array = _from_pairs(array)
        return _to_torch(array) if like_torch else array
    items = [_unflatten(item, outputs, like_torch) for item in tree.items]
    if tree.kind == "tuple":
        return tuple(items)
    if tree.kind == "list":
        return items
    fields = dict(zip(tree.keys, items, strict=True))
    made = _loaded_class(tree.type) if tree.type else None
    if made is None or tree.kind == "dict":
        return fields
    if is_struct_sequence(made) and made.__module__ == "torch.return_types":
        return made(items)
    # the name may come from an artifact of somebody else: of the classes that are loaded, none
    # but plain records are called
    if not is_dataclass(made) and not (issubclass(made, tuple) and hasattr(made, "_fields")):
        return fields
    try:
        return made(**{str(k): v for k, v in fields.items()})
    except (TypeError, ValueError):
        return fields


def is_struct_sequence(kind: type) -> bool:
    """Whether instances are named tuples made in C, as what `torch.max(x, dim)` returns."""
    return issubclass(kind, tuple) and hasattr(kind, "n_sequence_fields")


def _loaded_class(reference: str) -> type | None:
    """The class "module:name" when its module is loaded already; importing it could be heavy."""
    module, _, name = reference.partition(":")
    if module not in sys.modules:
        return None
    found: Any = sys.modules[module]
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) else None


# -- words ----------------------------------------------------------------------------------


def _port_json(port: Port) -> dict[str, Any]:
    plain = {"name": port.name, "dtype": port.dtype, "shape": list(port.shape)}
    return plain if port.kind == "tensor" else plain | {"kind": port.kind}


def _port_from_json(json: Mapping[str, Any]) -> Port:
    return Port(json["name"], json["dtype"], tuple(json["shape"]), json.get("kind", "tensor"))


def _names(parameters: Sequence[Parameter]) -> str:
    return ", ".join(p.name for p in parameters) or "no arguments"


def _difference(missing: Sequence[str], unknown: Sequence[str]) -> str:
    parts = [f"add {', '.join(missing)}"] if missing else []
    return " and ".join(parts + ([f"leave out {', '.join(unknown)}"] if unknown else []))


def _describe(value: Any) -> str:
    if is_torch(value) or isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, (bool, int, float, str)) or value is None:
        return repr(value)
    return f"a {type(value).__name__}"
