"""A graph that grows node by node, each value of it known in float64 on the graph's own inputs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from hypothesis import strategies as st

from optcompiler.ops import OpSpec, attributes_of, builtin_specs

FLOAT, DOUBLE, BOOL = ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.BOOL
INT64, INT32, INT8, UINT8 = (
    ir.DataType.INT64, ir.DataType.INT32, ir.DataType.INT8, ir.DataType.UINT8,
)  # fmt: skip
INTEGERS = (INT64, INT32, INT8, UINT8)
TYPES = (FLOAT, DOUBLE, *INTEGERS, BOOL)
SIZES = (1, 2, 3, 4, 5, 7, 8, 13)

LARGEST = 1e4
"""Results beyond it are refused: what follows would be rounding alone."""
ELEMENTS = 4096
MOST_INPUTS = 4

JITTER = 3e-6
STEADY = 1e-3
"""A node is refused when operands a JITTER away move its result by more than this, relatively: near
a step (a level, a tie, a pole) two right answers differ."""

_SPECS = {spec.op_type: spec for spec in builtin_specs() if not spec.domain}
_TORCH = {
    torch.float64: FLOAT, torch.float32: FLOAT, torch.bool: BOOL, torch.int64: INT64,
    torch.int32: INT32, torch.int8: INT8, torch.uint8: UINT8,
}  # fmt: skip


class Refused(Exception):
    """What was to be added has no good result here; the graph goes on without it."""


class Draw:
    """Choices of a Hypothesis test case; the first of alternatives is the simplest."""

    def __init__(self, draw: Any) -> None:
        self._draw = draw

    def integer(self, low: int, high: int) -> int:
        return self._draw(_integers(low, high)) if high > low else low

    def one_of(self, options: Sequence[Any]) -> Any:
        if len(options) > 64:
            # integers of wide ranges are drawn small for the most part
            row = 16 * self.integer(0, (len(options) - 1) // 16)
            options = options[row : row + 16]
        return options[self.integer(0, len(options) - 1)]

    def chance(self, percent: int) -> bool:
        return self.integer(0, 99) >= 100 - percent

    def size(self) -> int:
        return self.one_of(SIZES)

    def shape(self, low: int, high: int) -> tuple[int, ...]:
        sizes: list[int] = []
        for _ in range(self.integer(low, high)):
            size = self.size()
            sizes.append(size if prod(sizes) * size <= ELEMENTS // 2 else 1)
        return tuple(sizes)

    def axis(self, rank: int) -> int:
        """An axis of a tensor of this rank, counted from either end."""
        return self.integer(0, rank - 1) - (rank if self.chance(30) else 0)

    def permutation(self, count: int) -> list[int]:
        rest = list(range(count))
        return [rest.pop(self.integer(0, len(rest) - 1)) for _ in range(count)]

    def some(self, options: Sequence[Any]) -> list[Any]:
        """A subset, in order."""
        return [option for option in options if self.chance(50)]


@functools.cache
def _integers(low: int, high: int) -> st.SearchStrategy[int]:
    return st.integers(low, high)


@functools.cache
def schema_of(op_type: str, opset: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:
        return None


@functools.cache
def _kernels() -> dict[str, list[tuple[int, int, dict[str, frozenset[str]]]]]:
    """ONNX Runtime's own list: operator → (first version, last version, types by type variable)."""
    from onnxruntime.capi import onnxruntime_pybind11_state as runtime

    found: dict[str, list[tuple[int, int, dict[str, frozenset[str]]]]] = {}
    for kernel in runtime.get_all_opkernel_def():
        if kernel.domain == "" and kernel.provider == "CPUExecutionProvider":
            types = {k: frozenset(v) for k, v in kernel.type_constraints.items()}
            found.setdefault(kernel.op_name, []).append((*kernel.version_range, types))
    return found


@functools.cache
def runs(op_type: str, opset: int, types: tuple[tuple[str, str], ...]) -> bool:
    """Whether ONNX Runtime has a kernel of the operator for these types, or expands it."""
    schema = schema_of(op_type, opset)
    if schema is None or schema.deprecated:
        return False
    if schema.has_function or schema.has_context_dependent_function:
        return True
    wanted = dict(types)
    return any(
        low <= schema.since_version <= high
        and all(wanted[k] in v for k, v in constraints.items() if k in wanted)
        for low, high, constraints in _kernels().get(op_type, [])
    )


@dataclass
class Graph:
    """Values are `ir.Value`s; `known[value]` is what a value holds (floats in float64)."""

    opset: int
    rng: np.random.Generator
    nodes: list[ir.Node] = field(default_factory=list)
    inputs: list[ir.Value] = field(default_factory=list)
    weights: list[ir.Value] = field(default_factory=list)
    values: list[ir.Value] = field(default_factory=list)
    known: dict[ir.Value, torch.Tensor] = field(default_factory=dict)
    largest: dict[ir.Value, float] = field(default_factory=dict)
    near: dict[ir.Value, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    constant: bool = False
    """Whether every leaf is an initializer, so that the whole graph can be computed beforehand."""

    def shape(self, value: ir.Value) -> tuple[int, ...]:
        return tuple(self.known[value].shape)

    def rank(self, value: ir.Value) -> int:
        return self.known[value].dim()

    # -- leaves -----------------------------------------------------------------------------

    def array(self, shape: Sequence[int], dtype: ir.DataType = FLOAT) -> np.ndarray:
        if dtype == BOOL:
            return self.rng.integers(0, 2, shape).astype(bool)
        if dtype in INTEGERS:
            return self.rng.integers(0 if dtype == UINT8 else -3, 5, shape).astype(dtype.numpy())
        return self.rng.standard_normal(shape).astype(dtype.numpy())

    def input(self, shape: Sequence[int], dtype: ir.DataType = FLOAT) -> ir.Value:
        if np.prod(shape) > ELEMENTS:
            raise Refused("too large")
        if self.constant:
            return self.weight(self.array(shape, dtype), dtype)
        value = ir.val(f"x{len(self.inputs)}", dtype=dtype, shape=ir.Shape(shape))
        self.inputs.append(value)
        self.values.append(value)
        self.learn(value, torch.from_numpy(self.array(shape, dtype)))
        return value

    def weight(self, array: Any, dtype: ir.DataType = FLOAT, *, shared: bool = True) -> ir.Value:
        """An initializer; with `shared` later nodes may read it too."""
        held = np.ascontiguousarray(array, dtype.numpy()).reshape(np.shape(array))
        if held.size > 4 * ELEMENTS:
            raise Refused("too large")
        tensor = ir.tensor(held, name=f"w{len(self.weights)}")
        value = ir.val(
            tensor.name, dtype=dtype, shape=ir.Shape(held.shape), const_value=tensor
        )  # fmt: skip
        self.weights.append(value)
        if shared:
            self.values.append(value)
        self.learn(value, torch.from_numpy(held.copy()))
        return value

    def ints(self, values: Sequence[int] | int) -> ir.Value:
        return self.weight(np.asarray(values, np.int64), INT64, shared=False)

    def scaled(self, shape: Sequence[int], fan: int | None = None) -> ir.Value:
        """Weights that keep the size of what they are multiplied with."""
        fan = fan or max(1, int(np.prod(shape[1:])))
        return self.weight(self.array(shape) / np.sqrt(fan))

    def learn(self, value: ir.Value, tensor: torch.Tensor) -> None:
        wide = tensor.double() if tensor.is_floating_point() else tensor
        self.known[value] = wide
        numbers = wide.double().nan_to_num(0, 0, 0).abs()
        self.largest[value] = float(numbers.max()) if numbers.numel() else 0.0
        if wide.is_floating_point() and value.const_value is None:
            sign = 2.0 * ((torch.arange(wide.numel()) * 2654435761 >> 9) % 2).double() - 1
            step = sign.reshape(wide.shape) * (JITTER * wide.abs() + JITTER / 10)
            self.near[value] = (wide + step, wide - step)
        else:
            self.near[value] = (wide, wide)

    # -- nodes ------------------------------------------------------------------------------

    def attribute(self, op_type: str, name: str) -> bool:
        """Whether the operator has this attribute in the graph's opset."""
        schema = schema_of(op_type, self.opset)
        return schema is not None and name in schema.attributes

    def add(
        self, op_type: str, *operands: ir.Value | None, outputs: int = 1,
        dtype: ir.DataType | None = None, finite: bool = True, hidden: bool = False,
        **attributes: Any,
    ) -> Any:  # fmt: skip
        """The result of a new node, or a tuple of them; raises `Refused`."""
        inputs = list(operands)
        while inputs and inputs[-1] is None:
            inputs.pop()
        schema = schema_of(op_type, self.opset)
        types = self._types(op_type, inputs)
        if schema is None or not runs(op_type, self.opset, tuple(sorted(types.items()))):
            raise Refused(f"{op_type} is not in opset {self.opset}, or not for these types")
        names = [f"v{len(self.nodes)}_{i}" if outputs > 1 else f"v{len(self.nodes)}"
                 for i in range(outputs)]  # fmt: skip
        given = {k: v for k, v in attributes.items() if v is not None}
        node = ir.node(
            op_type, inputs, given, name=f"{op_type.lower()}{len(self.nodes)}",
            version=self.opset, outputs=[ir.val(n) for n in names],
        )  # fmt: skip
        tensors = self._evaluate(node, [None if v is None else self.known[v] for v in inputs])
        self._refuse_unsteady(node, inputs, tensors, finite)
        for value, tensor, formal in zip(node.outputs, tensors, _formals(schema, outputs),
                                         strict=True):  # fmt: skip
            value.dtype = dtype or _type_of(formal.type_str, types) or _TORCH[tensor.dtype]
            self.learn(value, tensor)
            self.largest[value] = max(
                self.largest[value], *(self.largest[v] for v in inputs if v is not None), 0.0
            )
            if not hidden:
                self.values.append(value)
        self.nodes.append(node)
        return node.outputs[0] if outputs == 1 else tuple(node.outputs)

    def evaluate(self, node: ir.Node) -> None:
        """Learn the results of a node of another graph, whose operands are known."""
        tensors = self._evaluate(node, [None if v is None else self.known[v] for v in node.inputs])
        for value, tensor in zip(node.outputs, tensors, strict=True):
            self.learn(value, tensor)
            read = [self.largest[v] for v in node.inputs if v is not None]
            self.largest[value] = max(self.largest[value], *read, 0.0)

    def _types(self, op_type: str, inputs: Sequence[ir.Value | None]) -> dict[str, str]:
        schema = schema_of(op_type, self.opset)
        if schema is None:
            return {}
        formals = _padded(schema.inputs, len(inputs))
        return {
            formal.type_str: f"tensor({_text(value.dtype)})"
            for formal, value in zip(formals, inputs, strict=False)
            if value is not None and value.dtype is not None
        }

    def _evaluate(
        self, node: ir.Node, tensors: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor]:
        spec = _SPECS[node.op_type]
        keywords = {**attributes_of(node), **_facts(spec, node)}
        for key in ("to", "dtype", "output_datatype"):
            if keywords.get(key) == FLOAT:
                keywords[key] = int(DOUBLE)
        arguments = [
            _plain(v, t, spec) if i in spec.static else t
            for i, (v, t) in enumerate(zip(node.inputs, tensors, strict=True))
        ]
        keywords = {k: v for k, v in keywords.items() if v is not None}
        try:
            made = spec.torch(*arguments, **keywords)
        except (RuntimeError, IndexError, ValueError, TypeError, AssertionError) as error:
            raise Refused(f"{node.op_type}: {error}") from error
        results = list(made) if isinstance(made, tuple) else [made]
        if node.op_type == "QuantizeLinear":
            results[0] = results[0].to(_torch_of(ir.DataType(keywords["target"])))
        return [r.double() if r.dtype == torch.float32 else r for r in results[: len(node.outputs)]]

    def _refuse_unsteady(
        self, node: ir.Node, inputs: Sequence[ir.Value | None], tensors: Sequence[torch.Tensor],
        finite: bool,
    ) -> None:  # fmt: skip
        for tensor in tensors:
            if tensor.numel() > ELEMENTS:
                raise Refused("too large")
            if tensor.dtype not in _TORCH:
                raise Refused(f"{tensor.dtype} is not followed")
            if finite and not _moderate(tensor):
                raise Refused("not finite, or too large a number")
        if not any(v is not None and self.known[v].is_floating_point() for v in inputs):
            return
        for side in (0, 1):
            moved = self._evaluate(
                node, [None if v is None else self.near[v][side] for v in inputs]
            )
            for tensor, other in zip(tensors, moved, strict=True):
                if tensor.shape != other.shape:
                    raise Refused("its shape hangs on rounding")
                if not tensor.is_floating_point():
                    if not torch.equal(tensor, other):
                        raise Refused("its result hangs on rounding")
                elif tensor.numel():
                    bound = STEADY * max(1.0, float(tensor.nan_to_num(0, 0, 0).abs().max()))
                    if not torch.allclose(tensor, other, rtol=0, atol=bound, equal_nan=not finite):
                        raise Refused("its result hangs on rounding")

    # -- operands ---------------------------------------------------------------------------

    def find(
        self, d: Draw, dtypes: Sequence[ir.DataType] = (FLOAT,), low: int = 0, high: int = 6,
        empty: bool = False,
    ) -> ir.Value:  # fmt: skip
        """An existing value of such a type and rank, or a fresh one."""
        fitting = [
            v for v in reversed(self.values)
            if v.dtype in dtypes and low <= self.rank(v) <= high
            and (empty or self.known[v].numel())
        ]  # fmt: skip
        if fitting and not d.chance(10):
            return d.one_of(fitting)
        return self.fresh(d, d.shape(low, min(high, 4)), d.one_of(dtypes))

    def fresh(self, d: Draw, shape: Sequence[int], dtype: ir.DataType = FLOAT) -> ir.Value:
        if len(self.inputs) < MOST_INPUTS and d.chance(40):
            return self.input(shape, dtype)
        return self.weight(self.array(shape, dtype), dtype)

    def like(self, d: Draw, shape: Sequence[int], dtype: ir.DataType = FLOAT) -> ir.Value:
        """A value of this very shape: one that exists (so that branches meet), or a fresh one."""
        fitting = [v for v in self.values if v.dtype == dtype and self.shape(v) == tuple(shape)]
        return d.one_of(fitting) if fitting and d.chance(70) else self.fresh(d, shape, dtype)

    def meeting(self, d: Draw, value: ir.Value, dtype: ir.DataType | None = None) -> ir.Value:
        """A value whose shape broadcasts with that of `value`, in either direction."""
        dtype, shape = dtype or value.dtype or FLOAT, self.shape(value)
        if d.chance(50):
            return self.like(d, shape, dtype)
        part = list(shape[d.integer(0, len(shape)) :])
        part = [1 if d.chance(30) else size for size in part]
        if len(part) == len(shape) and d.chance(20):
            part = [d.size() if size == 1 else size for size in part]
        return self.like(d, part, dtype)

    def image(self, d: Draw, spatial: int | None = None) -> ir.Value:
        """A float value [N, C, …] with at least one spatial axis, none of them empty."""
        rank = 2 + (spatial or d.one_of((2, 2, 2, 1, 3)))
        fitting = [v for v in reversed(self.values) if v.dtype == FLOAT and self.rank(v) == rank
                   and self.known[v].numel() and v.const_value is None]  # fmt: skip
        if fitting and not d.chance(10):
            return d.one_of(fitting)
        sizes = (5, 7, 4, 8, 1) if rank < 5 else (3, 4, 1)
        shape = (d.one_of((1, 2, 3)), d.size(), *(d.one_of(sizes) for _ in range(rank - 2)))
        if len(self.inputs) < MOST_INPUTS:
            return self.input(shape)
        return self.weight(self.array(shape))

    def into(self, value: ir.Value, low: float, high: float) -> ir.Value:
        """`value`, or a squashed copy of it, with all elements in [low, high]."""
        known = self.known[value]
        if known.numel() == 0 or (float(known.min()) >= low and float(known.max()) <= high):
            return value
        dtype = value.dtype or FLOAT
        unit = self.add("Sigmoid", value)
        wide = self.add(
            "Mul", unit, self.weight(np.float64(0.99 * (high - low)), dtype, shared=False)
        )
        return self.add(
            "Add", wide, self.weight(np.float64(low + 0.005 * (high - low)), dtype, shared=False)
        )

    def sizes(self, d: Draw, shape: Sequence[int]) -> ir.Value:
        """Int64 [rank] holding `shape`: a constant, or computed from other values' shapes."""
        same = [v for v in self.values if self.shape(v) == tuple(shape) and v.const_value is None]
        way = d.integer(0, 9)
        if way == 9 and same and shape:
            return self.add("Shape", d.one_of(same), hidden=True)
        if way >= 7 and len(shape) > 1:
            cut = d.integer(1, len(shape) - 1)
            parts = [self.ints(shape[:cut]), self.ints(shape[cut:])]
            holder = next(
                (v for v in self.values if self.rank(v) and self.shape(v)[0] == shape[0]), None
            )
            if cut == 1 and holder is not None:
                whole = self.add("Shape", holder, hidden=True)
                parts[0] = self.add("Gather", whole, self.ints([0]), axis=0, hidden=True)
            return self.add("Concat", *parts, axis=0, hidden=True)
        return self.ints(list(shape))

    def with_axes(
        self, op_type: str, value: ir.Value, axes: Sequence[int] | None, name: str = "axes",
        **attributes: Any,
    ) -> Any:  # fmt: skip
        """A node whose `axes` are an attribute or the second input, as the opset has it."""
        if self.attribute(op_type, name):
            return self.add(op_type, value, **{name: axes}, **attributes)
        return self.add(op_type, value, None if axes is None else self.ints(axes), **attributes)

    # -- whole ------------------------------------------------------------------------------

    def model(self, outputs: Sequence[ir.Value]) -> onnx.ModelProto:
        for value in outputs:
            value.shape = ir.Shape(self.shape(value))
        made = {v for n in self.nodes for v in n.outputs}
        used = {v for n in self.nodes for v in n.inputs if v is not None}
        for node in self.nodes:
            node.version = None
        graph = ir.Graph(
            [v for v in self.inputs if v in used] or self.inputs[:1], outputs, nodes=self.nodes,
            initializers=[v for v in self.weights if v in used], name="fuzz",
            opset_imports={"": self.opset},
        )  # fmt: skip
        assert all(v in made for v in outputs)
        return ir.to_proto(ir.Model(graph, ir_version=10 if self.opset < 23 else 11))


def _moderate(tensor: torch.Tensor) -> bool:
    if tensor.dtype == torch.bool or not tensor.numel():
        return True
    low, high = (float(end) for end in torch.aminmax(tensor))
    return low >= -LARGEST and high <= LARGEST


def _text(dtype: ir.DataType | None) -> str:
    return str(dtype.name).lower() if dtype is not None else ""


def _torch_of(dtype: ir.DataType) -> torch.dtype:
    return next(t for t, known in _TORCH.items() if known == dtype)


def _padded(formals: Sequence[Any], count: int) -> list[Any]:
    """Formal parameters, the last one repeated where it is variadic."""
    return [*formals, *[formals[-1]] * (count - len(formals))] if formals else []


def _formals(schema: onnx.defs.OpSchema, count: int) -> list[Any]:
    return _padded(schema.outputs, count)[:count]


def _type_of(type_str: str, types: dict[str, str]) -> ir.DataType | None:
    text = types.get(type_str, type_str)
    if not text.startswith("tensor("):
        return None
    return ir.DataType[text.removeprefix("tensor(").removesuffix(")").upper()]


def _facts(spec: OpSpec, node: ir.Node) -> dict[str, Any]:
    if spec.facts is None:
        return {}

    def type_of(value: ir.Value | None) -> ir.DataType | None:
        if value is None or value.dtype is None:
            return None
        return DOUBLE if value.dtype == FLOAT else value.dtype

    return {k: v for k, v in spec.facts(node, type_of).items() if v is not None}


def _plain(value: ir.Value | None, tensor: torch.Tensor | None, spec: OpSpec) -> Any:
    """What an operand that describes structure is given as: plain numbers where it is constant."""
    if value is None or tensor is None or value.const_value is None or tensor.dim() > 1:
        return tensor
    if not tensor.is_floating_point():
        return tensor.tolist()
    if tensor.numel() == 1:
        return tensor.item()
    return tensor if spec.pointwise else tensor.tolist()
