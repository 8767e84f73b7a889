"""Operators replaced by others before they are lowered: schema functions, branches, decompositions.

An expansion is the nodes that take a node's place, which read its inputs themselves, and the values
that stand for its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common as ir_passes

from optcompiler.errors import UnsupportedOperatorError

BODY_DOMAIN = "optcompiler.body"

LONGEST = 1024
"""Turns of a Loop that are written out."""


@dataclass(frozen=True, eq=False)
class Facts:
    """What is known about the values of a node: shapes always, contents of constants."""

    shapes: Mapping[ir.Value, tuple[int, ...]]
    constants: Mapping[ir.Value, np.ndarray]

    def array(self, node: ir.Node, place: int) -> np.ndarray | None:
        """The contents of an input that is present and constant."""
        value = node.inputs[place] if place < len(node.inputs) else None
        return None if value is None else self.constants.get(value)


Expansion = tuple[Sequence[ir.Node], Sequence[ir.Value]]
Decomposition = Callable[[ir.Node, Facts], Expansion | None]


def expansion(
    node: ir.Node, facts: Facts, decompositions: Mapping[str, Decomposition]
) -> Expansion | None:
    """What `node` is made of, or None for an operator that is its own."""
    if node.domain == "" and node.op_type == "If":
        return _branch(node, facts)
    if node.domain == "" and node.op_type == "Loop":
        return _first_turn(node, facts)
    own = decompositions.get(node.op_type) if node.domain == "" else None
    if own is not None and (made := own(node, facts)) is not None:
        return made
    return _schema_function(node, facts)


def splice(node: ir.Node, made: Expansion) -> list[ir.Node]:
    """Put an expansion in the place of `node`; the nodes, in order."""
    nodes, results = made
    graph = node.graph
    assert graph is not None
    assert isinstance(graph, ir.Graph)
    inside = {value for n in nodes for value in n.outputs}
    extra: list[ir.Node] = []
    ends: list[ir.Value] = []
    for old, value in zip(node.outputs, results, strict=True):
        if value not in inside or value in ends:
            alias = ir.Node("", "Identity", [value])
            extra.append(alias)
            value = alias.outputs[0]
        ends.append(value)
        value.type = value.type or old.type
        value.shape = value.shape if value.shape is not None else old.shape
    graph.insert_before(node, [*nodes, *extra])
    for old, value in zip(node.outputs, ends, strict=True):
        ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
        value.name = old.name
    graph.remove(node, safe=True)
    done = [*nodes, *extra]
    for new in done:
        new.metadata_props.update(
            {k: v for k, v in node.metadata_props.items() if k not in new.metadata_props}
        )
    return done


def _branch(node: ir.Node, facts: Facts) -> Expansion | None:
    condition = facts.array(node, 0)
    if condition is None:
        return None
    taken = node.attributes["then_branch" if condition.reshape(-1)[0] else "else_branch"]
    return _released(taken.as_graph())


def _first_turn(node: ir.Node, facts: Facts) -> Expansion | None:
    """A Loop as its first turn and a Loop of the rest; None where the number of turns is open."""
    trips, condition = facts.array(node, 0), facts.array(node, 1)
    if len(node.inputs) > 1 and node.inputs[1] is not None and condition is None:
        return None
    if trips is None:
        return None
    body = node.attributes["body"].as_graph()
    states = [v for v in node.inputs[2:] if v is not None]
    if len(body.outputs) != 1 + len(states):
        return None
    left = int(trips.reshape(-1)[0])
    if left > LONGEST:
        return None
    if left <= 0 or (condition is not None and not condition.reshape(-1)[0]):
        return [], states
    turn = body.clone(allow_outer_scope_values=True)
    number = int(node.metadata_props.get("turn", "0"))
    heads = [_constant(np.array(number, np.int64)), _constant(np.array(True))]
    for formal, actual in zip(turn.inputs, [*(n.outputs[0] for n in heads), *states], strict=True):
        ir.convenience.replace_all_uses_with(formal, actual, replace_graph_outputs=True)
    nodes, (again, *after) = _released(turn)
    rest = _constant(np.array(left - 1, np.int64))
    loop = ir.Node(
        "", "Loop", [rest.outputs[0], again, *after],
        [ir.AttrGraph("body", body.clone(allow_outer_scope_values=True))],
        num_outputs=len(after), metadata_props={"turn": str(number + 1)},
    )  # fmt: skip
    for old, new in zip(states, loop.outputs, strict=True):
        new.type = old.type
    return [*heads, *nodes, rest, loop], loop.outputs


def _released(graph: ir.Graph) -> Expansion:
    """The nodes of a subgraph, its initializers as constants, free to be put elsewhere."""
    results = list(graph.outputs)
    heads: list[ir.Node] = []
    for value in list(graph.initializers.values()):
        if value.const_value is not None:
            head = ir.Node("", "Constant", [], [ir.AttrTensor("value", value.const_value)])
            ir.convenience.replace_all_uses_with(value, head.outputs[0])
            results = [head.outputs[0] if v is value else v for v in results]
            heads.append(head)
    nodes = list(graph)
    graph.outputs.clear()
    graph.remove(nodes)
    return [*heads, *nodes], results


def _constant(array: np.ndarray) -> ir.Node:
    return ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor(array))])


def _schema_function(node: ir.Node, facts: Facts) -> Expansion | None:
    """The body that the operator's schema gives, for the operator set in use."""
    graph = node.graph
    imports = dict(graph.opset_imports) if graph is not None else {}
    version = node.version or imports.get(node.domain)
    try:
        schema: Any = onnx.defs.get_schema(
            node.op_type, version or onnx.defs.onnx_opset_version(), node.domain
        )
    except onnx.defs.SchemaError:
        return None
    types = [_type(v, facts) for v in node.inputs]
    names = ["" if v is None else f"in{i}" for i, v in enumerate(node.inputs)]
    outputs = [f"out{i}" for i in range(len(node.outputs))]
    call = onnx.helper.make_node(node.op_type, names, outputs, domain=node.domain)
    given = {a.name for a in node.attributes.values()}
    call.attribute.extend(ir.to_proto(a) for a in node.attributes.values())
    call.attribute.extend(
        a.default_value
        for name, a in schema.attributes.items()
        if name not in given and a.default_value.type
    )
    body = _body(schema, call, types, version if version else 1, imports)
    if body is None:
        return None
    call.input.extend([""] * (len(body.input) - len(names)))
    del body.output[len(outputs) :]
    body.domain, body.name = BODY_DOMAIN, node.op_type
    call.domain = BODY_DOMAIN
    for attribute in [a for a in call.attribute if a.HasField("g") or a.graphs]:
        call.attribute.remove(attribute)  # the body holds what it needs of them
    operators = {o.domain: o.version for o in body.opset_import}
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            [call], "body",
            [onnx.ValueInfoProto(name=n, type=t) for n, t in zip(names, types, strict=True) if n],
            [onnx.ValueInfoProto(name=o) for o in outputs],
        ),
        functions=[body],
        opset_imports=[
            onnx.helper.make_opsetid(d, v) for d, v in {**operators, BODY_DOMAIN: 1}.items()
        ],
    )  # fmt: skip
    inner = ir.from_proto(model)
    ir_passes.InlinePass()(inner)
    ends = list(inner.graph.outputs)
    actual = [v for v in node.inputs if v is not None]
    for formal, value in zip(list(inner.graph.inputs), actual, strict=True):
        ends = [value if e is formal else e for e in ends]
        ir.convenience.replace_all_uses_with(formal, value, replace_graph_outputs=False)
    nodes = list(inner.graph)
    inner.graph.outputs.clear()
    inner.graph.remove(nodes)
    for made in nodes:
        made.version = operators.get(made.domain)
    for place, value in enumerate(node.outputs):
        # a body's constants may have an axis (Celu's has), which makes one of a scalar's result
        if value.shape is not None and len(value.shape) == 0 and ends[place].producer() in nodes:
            none = _constant(np.zeros(0, np.int64))
            flat = ir.Node("", "Reshape", [ends[place], none.outputs[0]])
            nodes += [none, flat]
            ends[place] = flat.outputs[0]
    return nodes, ends


def _body(
    schema: Any, call: onnx.NodeProto, types: list[onnx.TypeProto], version: int, imports: Any
) -> onnx.FunctionProto | None:
    standard = int(imports.get("") or onnx.defs.onnx_opset_version())
    if schema.has_function:
        usable = [v for v in schema.function_opset_versions if v <= standard]
        if usable:
            data = schema.get_function_with_opset_version(max(usable))
            return onnx.FunctionProto.FromString(data)
    if schema.has_context_dependent_function:
        usable = [v for v in schema.context_dependent_function_opset_versions if v <= standard]
        if usable:
            data = schema.get_context_dependent_function_with_opset_version(
                max(usable), call.SerializeToString(), [t.SerializeToString() for t in types]
            )
            return onnx.FunctionProto.FromString(data) if data else None
    return None


def _type(value: ir.Value | None, facts: Facts) -> onnx.TypeProto:
    if value is None or value.dtype is None:
        return onnx.TypeProto()
    return onnx.helper.make_tensor_type_proto(int(value.dtype), facts.shapes.get(value))


def infer(node: ir.Node, facts: Facts) -> None:
    """Give the node's outputs the types and shapes that follow from what is known."""
    imports = dict(node.graph.opset_imports) if node.graph is not None else {}
    version = node.version or imports.get(node.domain) or onnx.defs.onnx_opset_version()
    names = {v: f"v{i}" for i, v in enumerate(v for v in node.inputs if v is not None)}
    proto = onnx.helper.make_node(
        node.op_type, ["" if v is None else names[v] for v in node.inputs],
        [f"o{i}" for i in range(len(node.outputs))], domain=node.domain,
    )  # fmt: skip
    proto.attribute.extend(ir.to_proto(a) for a in node.attributes.values())
    try:
        found = onnx.shape_inference.infer_node_outputs(
            onnx.defs.get_schema(node.op_type, version, node.domain),
            proto,
            {name: _type(value, facts) for value, name in names.items()},
            {
                name: onnx.numpy_helper.from_array(array, name)
                for value, name in names.items()
                if (array := facts.constants.get(value)) is not None and array.size <= 1 << 12
            },
            opset_imports=[onnx.helper.make_opsetid(d, v) for d, v in imports.items()],
        )
    except (onnx.defs.SchemaError, onnx.shape_inference.InferenceError):
        return
    except onnx.checker.ValidationError as error:  # of a body, for types its operators lack
        raise UnsupportedOperatorError(
            f"{node.op_type} {node.name!r} is defined by operators that do not take its types: "
            f"{' '.join(str(error).split())}; cast its operands to FLOAT."
        ) from error
    for value, name in zip(node.outputs, proto.output, strict=True):
        info = found.get(name)
        if info is None or not info.HasField("tensor_type"):
            continue
        value.type = ir.serde.deserialize_type_proto_for_type(info) or value.type
        shape = ir.serde.deserialize_type_proto_for_shape(info)
        if shape is not None and (value.shape is None or not value.shape.is_static()):
            value.shape = shape
