"""One FX graph out of one ONNX graph: what `optcompiler.executor` builds modules with."""

from __future__ import annotations

import keyword
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import torch
from torch import fx, nn

from optcompiler.errors import InputError, UnsupportedOperatorError
from optcompiler.ops.controlflow import run_if, run_loop, run_scan
from optcompiler.ops.functions import schema_function
from optcompiler.ops.spec import OpTable, attributes_of
from optcompiler.ops.types import (
    TORCH_TYPES,
    carrier_type,
    from_carrier,
    tensor_from_ir,
    to_carrier,
    torch_type,
)

WEIGHTS_KEY = "onnx_weights"
NODE_KEY = "onnx_node"
VALUE_KEY = "onnx_value"
TYPE_KEY = "onnx_type"
Functions = Mapping[tuple[str, str, str], ir.Function]


class _Slot:
    """What stands for one ONNX value: an FX node, or a constant not yet registered."""

    __slots__ = ("constant", "dtype", "levels", "name", "node", "weight")

    def __init__(
        self,
        name: str,
        *,
        node: fx.Node | None = None,
        constant: ir.TensorProtocol | None = None,
        dtype: ir.DataType | None = None,
        levels: bool = False,
        weight: bool = False,
    ) -> None:
        self.name = name
        self.node = node
        self.constant = constant
        self.dtype = dtype
        self.levels = levels
        self.weight = weight


_Scope = dict[ir.Value, _Slot]


class GraphBuilder:
    """Makes one GraphModule; subgraphs get a builder of their own."""

    def __init__(self, functions: Functions, ops: OpTable, trainable: bool) -> None:
        self.functions = functions
        self.ops = ops
        self.trainable = trainable
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.weights: dict[str, str] = {}

    # -- whole graphs -----------------------------------------------------------------------

    def module(
        self,
        graph: ir.Graph,
        outputs: Sequence[ir.Value],
        outer: _Scope | None = None,
        attributes: Mapping[str, Any] | None = None,
    ) -> fx.GraphModule:
        """The module of `graph`. `outer` holds captured values: each non-constant one becomes a
        placeholder after the formal inputs."""
        scope: _Scope = {}
        for value in graph.inputs:
            if value.name not in graph.initializers:
                scope[value] = self.placeholder(value.name or "input", value.dtype)
        for value, slot in (outer or {}).items():
            scope[value] = _Slot(slot.name, constant=slot.constant, dtype=slot.dtype)
            if slot.constant is None or slot.weight:
                scope[value] = self.placeholder(slot.name, slot.dtype, convert=False)
                scope[value].constant = slot.constant  # still readable where structure is wanted
        for value in graph.initializers.values():
            scope[value] = _Slot(
                value.name or "weight",
                constant=value.const_value,
                dtype=value.dtype,
                weight=outer is None,
            )
        self.nodes(list(graph), scope, attributes or {}, "")
        self.graph.output(tuple(self.result(scope[value]) for value in outputs))
        self.graph.eliminate_dead_code()
        self.graph.lint()
        built = fx.GraphModule(self.root, self.graph)
        built.meta[WEIGHTS_KEY] = dict(self.weights)
        return built

    def placeholder(self, name: str, dtype: ir.DataType | None, convert: bool = True) -> _Slot:
        node = self.graph.create_node("placeholder", identifier(name), name=identifier(name))
        node.target = node.name  # unique where two names become one identifier
        node.meta |= {NODE_KEY: name, VALUE_KEY: name, TYPE_KEY: dtype}
        last = node
        known = dtype if dtype in TORCH_TYPES else None  # not strings, which nothing may read
        if convert and known is not None and carrier_type(known) != torch_type(known):
            del node.meta[VALUE_KEY]
            last = self.graph.call_function(to_carrier, (node,))
            last.meta |= {VALUE_KEY: name, TYPE_KEY: dtype}
        return _Slot(name, node=last, dtype=dtype)

    def result(self, slot: _Slot) -> fx.Node:
        """An output in its declared type."""
        node = self.read(slot)
        if slot.dtype is None or slot.dtype not in TORCH_TYPES:
            return node
        declared = torch_type(slot.dtype)
        if slot.levels or declared != carrier_type(slot.dtype):
            return self.graph.call_function(from_carrier, (node, declared))
        return node

    # -- nodes ------------------------------------------------------------------------------

    def nodes(
        self, nodes: Sequence[ir.Node], scope: _Scope, attributes: Mapping[str, Any], prefix: str
    ) -> None:
        for node in nodes:
            self.one(node, scope, attributes, prefix)

    def one(self, node: ir.Node, scope: _Scope, outer: Mapping[str, Any], prefix: str) -> None:
        attributes = _resolved(node, outer)
        label = prefix + (node.name or node.op_type)
        if node.op_type == "Constant" and node.domain == "":
            scope[node.outputs[0]] = _constant(node, attributes, label)
            return
        function = self.functions.get((node.domain, node.op_type, node.overload))
        if function is not None:
            self.call(node, function, scope, attributes, label)
            return
        if node.domain == "" and node.op_type in ("If", "Loop", "Scan"):
            self.control(node, scope, outer, attributes, label)
            return
        version = _version(node)

        def type_of(value: ir.Value | None) -> ir.DataType | None:
            if value is None:
                return None
            known = scope.get(value)
            return known.dtype if known is not None and known.dtype else value.dtype

        if any(type_of(v) == ir.DataType.STRING for v in (*node.inputs, *node.outputs)):
            raise UnsupportedOperatorError(
                f"operator {node.op_type} of node {label!r} works on strings, which torch has no "
                f"type for; keep them out of the program."
            )
        if self.ops.get(node) is None and not any(map(_captures, _subgraphs(node))):
            function = schema_function(node, version, type_of)
            if function is not None:
                self.call(node, function, scope, attributes, label)
                return
        spec = self.ops.require(node)
        if version is not None and version < spec.since:
            raise UnsupportedOperatorError(
                f"operator {node.op_type} of node {label!r} is that of opset {version}, whose "
                f"meaning changed in opset {spec.since}; convert the model to that or a later one."
            )
        # An input that the caller of a function left out has no slot.
        slots = [None if v is None else scope.get(v) for v in node.inputs]
        facts: Mapping[str, Any] = {}
        if spec.facts is not None:
            facts = spec.facts(node, type_of)
        moved = False
        arguments: list[Any] = []
        for position, slot in enumerate(slots):
            if slot is None:
                arguments.append(None)
                continue
            plain = _python(slot, spec.pointwise) if position in spec.static else None
            if plain is not None:
                arguments.append(plain)
                continue
            moved = moved or slot.levels
            arguments.append(self.read(slot, integers=spec.levels == "integers"))
        while arguments and arguments[-1] is None:
            arguments.pop()
        given = attributes | dict(facts)
        keywords = {k: given[k] for k in sorted(given) if given[k] is not None}
        made = self.create(spec.torch, tuple(arguments), keywords, label)
        self.bind(node, made, scope, prefix, moved and spec.levels == "moves", slots)
        if node.op_type == "QuantizeLinear" and node.domain == "":
            slot = scope[node.outputs[0]]
            slot.levels = True
            if facts.get("target") is not None:
                slot.dtype = ir.DataType(facts["target"])
                self.read(slot).meta[TYPE_KEY] = slot.dtype

    def create(
        self, target: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], label: str
    ) -> fx.Node:
        made = self.graph.create_node(
            "call_function", target, arguments, keywords, name=identifier(label)
        )
        made.meta[NODE_KEY] = label
        return made

    def bind(
        self,
        node: ir.Node,
        made: fx.Node,
        scope: _Scope,
        prefix: str,
        levels: bool,
        slots: Sequence[_Slot | None],
    ) -> None:
        """Give the node's outputs their slots; a tuple is taken apart."""
        for position, value in enumerate(node.outputs):
            if not value.name and not list(value.uses()):
                continue
            part = made
            if len(node.outputs) > 1:
                part = self.graph.call_function(operator.getitem, (made, position))
                part.meta[NODE_KEY] = made.meta[NODE_KEY]
            holds = levels and (position == 0 or node.op_type == "Split")
            dtype = value.dtype
            if holds:
                dtype = next(s.dtype for s in slots if s is not None and s.levels)
            name = prefix + (value.name or "")
            part.meta |= {VALUE_KEY: name, TYPE_KEY: dtype}
            scope[value] = _Slot(name, node=part, dtype=dtype, levels=holds)

    def call(
        self,
        node: ir.Node,
        function: ir.Function,
        scope: _Scope,
        attributes: Mapping[str, Any],
        label: str,
    ) -> None:
        """Expand a call of a model-local function."""
        inner: _Scope = {}
        given = [*node.inputs, *[None] * (len(function.inputs) - len(node.inputs))]
        for formal, value in zip(function.inputs, given, strict=True):
            if value is not None and value in scope:
                inner[formal] = scope[value]
        defaults = {k: a.value for k, a in function.attributes.items() if a.value is not None}
        self.nodes(list(function), inner, {**defaults, **attributes}, f"{label}/")
        for value, formal in zip(node.outputs, function.outputs, strict=False):
            if not value.name:
                continue
            slot = inner[formal]
            made = self.read(slot)
            if made.op != "call_function" or not str(made.meta.get(VALUE_KEY)).startswith(label):
                made = self.create(_same, (made,), {}, f"{label}/{formal.name}")
            dtype = slot.dtype or value.dtype
            made.meta |= {VALUE_KEY: value.name, TYPE_KEY: dtype}
            scope[value] = _Slot(value.name or "", node=made, dtype=dtype, levels=slot.levels)

    def control(
        self,
        node: ir.Node,
        scope: _Scope,
        outer: Mapping[str, Any],
        attributes: dict[str, Any],
        label: str,
    ) -> None:
        """If, Loop and Scan: each subgraph becomes a submodule."""
        if node.op_type == "Scan" and (_version(node) or 9) < 9:
            raise UnsupportedOperatorError(
                f"operator Scan of node {label!r} is that of opset 8, which has a batch dimension; "
                f"export the model with a later opset."
            )
        inputs = [None if v is None else self.read(scope[v], integers=True) for v in node.inputs]
        if node.op_type == "If":
            then, then_captured = self.submodule(node, "then_branch", scope, outer, label)
            other, other_captured = self.submodule(node, "else_branch", scope, outer, label)
            arguments = (inputs[0], then, other, then_captured, other_captured)
            made = self.create(run_if, arguments, {}, label)
        elif node.op_type == "Loop":
            body, captured = self.submodule(node, "body", scope, outer, label)
            trip, keep = (*inputs, None, None)[:2]
            scanned = node.attributes["body"].as_graph().outputs[len(inputs) - 1 :]
            keywords: dict[str, Any] = {"empty": [_look(value) for value in scanned]}
            arguments = (body, trip, keep, inputs[2:], captured)
            made = self.create(run_loop, arguments, keywords if scanned else {}, label)
        else:
            body, captured = self.submodule(node, "body", scope, outer, label)
            count = int(attributes["num_scan_inputs"])
            states, sequences = inputs[: len(inputs) - count], inputs[len(inputs) - count :]
            keywords = {
                key.removeprefix("scan_"): value
                for key, value in attributes.items()
                if key.startswith(("scan_input_", "scan_output_")) and value is not None
            }
            made = self.create(run_scan, (body, states, sequences, captured), keywords, label)
        for position, value in enumerate(node.outputs):
            part = self.graph.call_function(operator.getitem, (made, position))
            part.meta |= {NODE_KEY: label, VALUE_KEY: value.name, TYPE_KEY: value.dtype}
            scope[value] = _Slot(value.name or "", node=part, dtype=value.dtype)

    def submodule(
        self,
        node: ir.Node,
        attribute: str,
        scope: _Scope,
        outer: Mapping[str, Any],
        label: str,
    ) -> tuple[fx.Node, list[fx.Node]]:
        """A subgraph as a submodule, and the FX nodes of what it captures."""
        graph = node.attributes[attribute].as_graph()
        captured = {v: scope[v] for v in _captures(graph) if v in scope}
        builder = GraphBuilder(self.functions, self.ops, trainable=False)
        moved: list[fx.Node] = []
        handed: _Scope = {}
        for value, slot in captured.items():
            if slot.constant is None or slot.weight:
                moved.append(self.read(slot, integers=True))
            handed[value] = slot
        module = builder.module(graph, list(graph.outputs), handed, outer)
        name = self.fresh(f"{label}_{attribute}")
        self.root.add_module(name, module)
        return self.graph.get_attr(name), moved

    # -- values -----------------------------------------------------------------------------

    def read(self, slot: _Slot, integers: bool = False) -> fx.Node:
        """The FX node of a value; with `integers`, levels are cast to their declared type."""
        if slot.node is None:
            slot.node = self.register(slot)
        if integers and slot.levels and slot.dtype is not None:
            return self.graph.call_function(from_carrier, (slot.node, carrier_type(slot.dtype)))
        return slot.node

    def register(self, slot: _Slot) -> fx.Node:
        """Put a constant on the module as a parameter or buffer."""
        if slot.constant is None:
            raise InputError(f"initializer {slot.name!r} holds no data; load its external data.")
        tensor = tensor_from_ir(slot.constant)
        if self.trainable:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        attribute = self.fresh(slot.name)
        if slot.weight and tensor.is_floating_point() and tensor.dtype.itemsize > 1:
            self.root.register_parameter(attribute, nn.Parameter(tensor, self.trainable))
        else:
            self.root.register_buffer(attribute, tensor)
        if slot.weight:
            self.weights[attribute] = slot.name
        node = self.graph.get_attr(attribute)
        node.meta |= {VALUE_KEY: slot.name, TYPE_KEY: slot.dtype}
        return node

    def fresh(self, name: str) -> str:
        """An attribute name that no module has yet."""
        stem = identifier(name)
        stem = f"{stem}_" if hasattr(fx.GraphModule, stem) else stem
        found, count = stem, 0
        while hasattr(self.root, found):
            count += 1
            found = f"{stem}_{count}"
        return found


def identifier(name: str) -> str:
    """`name` as a Python identifier that is no keyword: ASCII letters, digits, underscores."""
    text = re.sub(r"[^0-9A-Za-z_]+", "_", name).strip("_") or "value"
    if keyword.iskeyword(text) or text in ("self", "torch"):
        return f"{text}_"
    return f"v_{text}" if text[0].isdigit() else text


_NO_ARGUMENTS = frozenset(
    {
        ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS, ir.AttributeType.TYPE_PROTO,
        ir.AttributeType.TYPE_PROTOS,
    }
)  # fmt: skip
"""Attributes that a torch meaning is not called with."""


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


def _version(node: ir.Node) -> int | None:
    """The opset that a node belongs to."""
    if node.version is not None or node.graph is None:
        return node.version
    return node.graph.opset_imports.get(node.domain)


def _resolved(node: ir.Node, outer: Mapping[str, Any]) -> dict[str, Any]:
    """The node's attributes; references to the attributes of the calling node looked up."""
    attributes = dict(attributes_of(node))
    for name, attribute in node.attributes.items():
        if attribute.is_ref():
            found = outer.get(attribute.ref_attr_name or "")
            if found is not None:
                attributes[name] = found
            else:
                attributes.pop(name, None)
        elif attribute.type in _NO_ARGUMENTS:
            attributes.pop(name)
    return attributes


def _constant(node: ir.Node, attributes: Mapping[str, Any], label: str) -> _Slot:
    """The tensor of a Constant node, whichever attribute holds it."""
    for key, value in attributes.items():
        if value is None:
            continue
        if key == "value":
            tensor = cast("ir.TensorProtocol", value)
        elif key in ("value_float", "value_floats"):
            tensor = ir.tensor(np.asarray(value, np.float32))
        elif key in ("value_int", "value_ints"):
            tensor = ir.tensor(np.asarray(value, np.int64))
        else:
            break
        return _Slot(label, constant=tensor, dtype=ir.DataType(tensor.dtype))
    raise UnsupportedOperatorError(
        f"operator Constant of node {label!r} holds a string or a sparse tensor; "
        f"replace it by a dense number."
    )


def _python(slot: _Slot, scalar: bool) -> Any:
    """A structural constant as Python numbers; None when the value is no such constant.

    With `scalar` only single floats count: a vector of exponents is a weight.
    """
    if slot.constant is None:
        return None
    array = slot.constant.numpy()
    if array.dtype.kind in "iub" and array.ndim <= 1:
        return array.tolist()
    if array.dtype.kind != "f":
        return None
    if array.size == 1:
        return array.reshape(()).item()
    return None if scalar or array.ndim > 1 else array.tolist()


def _subgraphs(node: ir.Node) -> list[ir.Graph]:
    graphs = [a for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
    return [a.as_graph() for a in graphs if not a.is_ref()]


def _look(value: ir.Value) -> tuple[torch.dtype, tuple[int, ...]]:
    """Carrier type and shape of a value, unknown dimensions as 0."""
    dtype = torch.float32 if value.dtype is None else carrier_type(value.dtype)
    return dtype, tuple(d if isinstance(d, int) else 0 for d in value.shape or ())


def _captures(graph: ir.Graph) -> list[ir.Value]:
    """Values that a subgraph, or one inside it, reads from outside."""
    own: set[ir.Value] = {*graph.inputs, *graph.initializers.values()}
    read: dict[ir.Value, None] = {}
    for node in graph.all_nodes():
        own.update(node.outputs)
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
                inner = attribute.as_graph()
                own.update(inner.inputs, inner.initializers.values())
                read |= dict.fromkeys(inner.outputs)
        read |= dict.fromkeys(v for v in node.inputs if v is not None)
    read |= dict.fromkeys(graph.outputs)
    return [value for value in read if value not in own]
