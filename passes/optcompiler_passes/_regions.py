"""Regions for code generation: finding them, and moving one into a model-local function.

A region is a set of nodes with exactly one result that is used outside of it. Such a set is convex
by construction: a path that left it and came back would have to leave through that result, whose
producer comes after every other node of the region, and the graph has no cycles.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from optcompiler.errors import Declined
from optcompiler.program import FUSED_DOMAIN, SOURCE_KEY, Program, node_fingerprint, tensor_hash

KIND_KEY = "optcompiler.kind"
"""Metadata key of a fused function: the kind of region it stands for."""

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"

WINDOW = 24
"""How many pointwise nodes a chain may take before it closes to a single value."""

PARAMETERS: dict[str, tuple[int, ...]] = {
    "Clip": (1, 2),
    "Pow": (1,),
    "Reshape": (1,),
    "Expand": (1,),
    "Squeeze": (1,),
    "Unsqueeze": (1,),
    **{
        f"Reduce{name}": (1,)
        for name in ("Mean", "Sum", "Max", "Min", "Prod", "L1", "L2", "LogSum", "SumSquare")
    },
}
"""Inputs that say what an operator does rather than what it works on; they move into the body."""


@dataclass(frozen=True)
class Region:
    """Nodes to fuse, by name, in graph order.

    `prologue` are DequantizeLinear nodes that feed the region; each region gets copies of them, so
    that tensors cross its boundary quantised. `output` is the one value used outside. `note` says
    why the region ends where it does.
    """

    kind: str
    anchor: str
    nodes: tuple[str, ...]
    prologue: tuple[str, ...]
    output: str
    operators: tuple[str, ...]
    note: str = ""

    @property
    def choice(self) -> str:
        return f"{self.kind}: {'+'.join(self.operators)}"


@dataclass
class Chain:
    """Nodes grown from a value, the value they end in, and why growing stopped."""

    nodes: list[ir.Node]
    end: ir.Value
    stop: str


def is_op(node: ir.Node | None, *op_types: str) -> bool:
    return node is not None and node.domain == "" and node.op_type in op_types


def is_constant(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and not value.is_graph_input()


def is_scalar(value: ir.Value | None) -> bool:
    return (
        value is not None
        and is_constant(value)
        and value.const_value is not None
        and value.const_value.size == 1
    )


def same_shape(a: ir.Value, b: ir.Value) -> bool:
    """Whether both shapes are known and equal, symbolic dimensions by name."""
    if a.shape is None or b.shape is None or len(a.shape) != len(b.shape):
        return False
    return all(
        x == y and (isinstance(x, int) or x.value is not None)
        for x, y in zip(a.shape, b.shape, strict=True)
    )


def sole_consumer(value: ir.Value) -> ir.Node | None:
    """The one node that reads `value`, or None when there are several, none, or it is an output."""
    if value.is_graph_output():
        return None
    found: ir.Node | None = None
    for node, _ in value.uses():
        if found is not None and node is not found:
            return None
        found = node
    return found


class Finder:
    """Grows regions over one graph; remembers which nodes are taken."""

    def __init__(self, program: Program, pointwise: Callable[[ir.Node], bool]) -> None:
        self.graph = program.graph
        self.order = {node: i for i, node in enumerate(self.graph)}
        self.taken: dict[ir.Node, str] = {}
        self._pointwise = pointwise

    def pointwise(self, node: ir.Node) -> bool:
        """Whether `node` computes each element of its one output from elements of its inputs."""
        return (
            not is_op(node, QUANTIZE, DEQUANTIZE)
            and len(node.outputs) == 1
            and not any(
                a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
                for a in node.attributes.values()
            )
            and self._pointwise(node)
        )

    def free(self, node: ir.Node | None) -> bool:
        return node is not None and node in self.order and node not in self.taken

    def grow(self, start: ir.Value, *, through: bool = False) -> Chain:
        """Take pointwise nodes after `start` for as long as they close to a single value.

        Nodes are taken in graph order, so a branch that joins again (`x * sigmoid(x)`) is one
        chain. A QuantizeLinear ends the chain, unless `through`, when it and the DequantizeLinear
        after it may stand inside.
        """
        chosen: list[ir.Node] = []
        inside = [start]
        closed, end = 0, start
        while True:
            stop = self._step(start, inside, chosen, through)
            if stop:
                others = sorted({str(n.name) for n, _ in end.uses() if n not in chosen})
                if len(chosen) > closed and others:
                    stop = f"{end.name!r} is also read by {', '.join(map(repr, others))}"
                return Chain(chosen[:closed], end, stop)
            result = chosen[-1].outputs[0]
            inside.append(result)
            taken = set(chosen)
            still_open = [v for v in inside if any(n not in taken for n, _ in v.uses())]
            if result.is_graph_output() or not result.uses():
                still_open.append(result)
            if set(still_open) == {result}:
                closed, end = len(chosen), result

    def _step(
        self, start: ir.Value, inside: list[ir.Value], chosen: list[ir.Node], through: bool
    ) -> str:
        """Add the next node to `chosen`, or say why there is none."""
        if chosen and is_op(chosen[-1], QUANTIZE) and not through:
            return "it ends in QuantizeLinear"
        if len(chosen) >= WINDOW:
            return f"{WINDOW} pointwise nodes are taken"
        for value in inside:
            if value.is_graph_output():
                return f"{value.name!r} is an output of the program"
        taken = set(chosen)
        readers = {n for v in inside for n, _ in v.uses()} - taken
        if not readers:
            return "nothing reads its result"
        if any(n not in self.order for n in readers):
            return f"{inside[-1].name!r} is read by a subgraph"
        node = min(readers, key=self.order.__getitem__)
        if is_op(node, QUANTIZE, DEQUANTIZE):
            if is_op(node, DEQUANTIZE) and not through:
                return f"{node.name!r} is DequantizeLinear"
            if len(readers) > 1 or node.inputs[0] is not inside[-1]:
                others = sorted(str(n.name) for n in readers if n is not node)
                return f"{inside[-1].name!r} is also read by {', '.join(map(repr, others))}"
            if not all(is_constant(v) for v in node.inputs[1:] if v is not None):
                return f"the scale of {node.name!r} is not constant"
        elif not self.pointwise(node):
            return f"{node.name!r} is {node.op_type}"
        if node in self.taken:
            return f"{node.name!r} belongs to region {self.taken[node]!r}"
        if not same_shape(node.outputs[0], start):
            return f"{node.name!r} changes the shape"
        chosen.append(node)
        return ""

    def absorb(self, nodes: list[ir.Node], shape: ir.Value) -> None:
        """Add pointwise producers that only these nodes read, and theirs, in place."""
        members = set(nodes)
        queue = list(nodes)
        while queue:
            for value in queue.pop().inputs:
                producer = value.producer() if value is not None else None
                if (
                    value is None
                    or producer is None
                    or producer in members
                    or not self.free(producer)
                    or not self.pointwise(producer)
                    or value.is_graph_output()
                    or not same_shape(value, shape)
                    or any(n not in members for n, _ in value.uses())
                ):
                    continue
                members.add(producer)
                nodes.append(producer)
                queue.append(producer)

    def prologue(self, nodes: Iterable[ir.Node]) -> list[ir.Node]:
        """DequantizeLinear nodes with constant scales that feed `nodes`, in graph order."""
        nodes = list(nodes)
        found: dict[ir.Node, None] = {}
        for node in nodes:
            for value in node.inputs:
                producer = value.producer() if value is not None else None
                if (
                    producer is not None
                    and is_op(producer, DEQUANTIZE)
                    and producer in self.order
                    and producer not in nodes
                    and all(is_constant(v) for v in producer.inputs[1:] if v is not None)
                ):
                    found[producer] = None
        return sorted(found, key=self.order.__getitem__)

    def region(self, kind: str, anchor: ir.Node, nodes: Sequence[ir.Node], note: str) -> Region:
        """Claim `nodes` for a region of `kind`; the last in graph order makes its result."""
        ordered = sorted(set(nodes), key=self.order.__getitem__)
        for node in ordered:
            self.taken[node] = str(anchor.name)
        return Region(
            kind,
            str(anchor.name),
            tuple(str(n.name) for n in ordered),
            tuple(str(n.name) for n in self.prologue(ordered)),
            str(ordered[-1].outputs[0].name),
            tuple(n.op_type for n in ordered),
            note,
        )


def fuse(program: Program, region: Region) -> None:
    """Replace a region by one call of a model-local function that computes the same.

    Raises `Declined` when a node of the region is gone or one of its inner values is used outside.
    """
    nodes: list[ir.Node] = []
    for name in region.nodes:
        found = program.node(name)
        if found is None:
            raise Declined(f"node {name!r} is gone; another rewrite took it.")
        nodes.append(found)
    members = set(nodes)
    for node in nodes:
        for value in node.outputs:
            if value.name == region.output:
                continue
            outside = [n.name for n, _ in value.uses() if n not in members]
            if outside or value.is_graph_output():
                where = f"read by {outside[0]!r}" if outside else "an output of the program"
                raise Declined(f"inner value {value.name!r} is also {where}.")
    copied = {node for name in region.prologue if (node := program.node(name)) is not None}
    body = _Body(program, nodes, copied)
    function = body.function(region)
    program.model.functions.setdefault(function.identifier(), function)
    program.graph.opset_imports.setdefault(FUSED_DOMAIN, 1)
    _call(program, region, nodes, function, list(body.outer))
    for node in sorted(copied, key=lambda n: str(n.name)):
        if not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
            program.graph.remove(node, safe=True)
    for value in body.constants:
        program.forget(value)


def _call(
    program: Program,
    region: Region,
    nodes: Sequence[ir.Node],
    function: ir.Function,
    inputs: Sequence[ir.Value],
) -> None:
    anchor = next(n for n in nodes if n.name == region.anchor)
    last = nodes[-1]
    result = last.outputs[0]
    source = anchor.metadata_props.get(SOURCE_KEY)
    output = ir.Value(name=result.name, type=result.type, shape=result.shape)
    call = ir.Node(
        function.domain,
        function.name,
        inputs,
        outputs=[output],
        name=region.anchor,
        metadata_props={SOURCE_KEY: source} if source else None,
    )
    ir.convenience.replace_nodes_and_values(
        program.graph, last, list(nodes), [call], [result], [output]
    )


class _Body:
    """The nodes of a function: copies with names that depend on the structure alone."""

    def __init__(self, program: Program, nodes: Sequence[ir.Node], copied: set[ir.Node]) -> None:
        self.program = program
        self.copied = copied
        self.outer: dict[ir.Value, ir.Value] = {}
        self.constants: list[ir.Value] = []
        self._inner: dict[ir.Value, ir.Value] = {}
        self._made: list[ir.Node] = []
        self._names: set[str] = set()
        for node in nodes:
            self._copy(node, [self._operand(node, i, v) for i, v in enumerate(node.inputs)])
        self.result = self._inner[nodes[-1].outputs[0]]

    def function(self, region: Region) -> ir.Function:
        opsets = {
            domain: self.program.graph.opset_imports.get(domain, 1)
            for domain in sorted({n.domain for n in self._made})
        }
        lines = [f"{sorted(opsets.items())} {region.kind}", *map(_line, self._made)]
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        chain = [op for op in region.operators if op not in (QUANTIZE, DEQUANTIZE)]
        readable = "_".join(chain if len(chain) <= 7 else [*chain[:6], "etc"])
        graph = ir.Graph(
            list(self.outer.values()), [self.result], nodes=self._made, opset_imports=opsets
        )
        name = f"{readable}_{digest[:6]}"
        function = ir.Function(FUSED_DOMAIN, name, graph=graph, attributes=[])
        function.metadata_props[KIND_KEY] = region.kind
        return function

    def _operand(self, node: ir.Node, index: int, value: ir.Value | None) -> ir.Value | None:
        if value is None:
            return None
        if value in self._inner:
            return self._inner[value]
        name = _formal_name(node, index)
        producer = value.producer()
        if producer in self.copied:
            assert producer is not None
            suffixes = ("", "_scale", "_zero_point")
            inputs = [
                None if v is None else self._outer_value(v, f"{name}{suffix}")
                for v, suffix in zip(producer.inputs, suffixes, strict=False)
            ]
            self._copy(producer, inputs)
            return self._inner[value]
        if is_constant(value) and (
            index in PARAMETERS.get(node.op_type, ()) or _moves_inside(node, value)
        ):
            return self._constant(value)
        return self._outer_value(value, name)

    def _outer_value(self, value: ir.Value, name: str) -> ir.Value:
        if value not in self.outer:
            self.outer[value] = ir.Value(name=self._fresh(name))
        return self.outer[value]

    def _constant(self, value: ir.Value) -> ir.Value:
        assert value.const_value is not None
        self.constants.append(value)
        name = self._fresh("constant")
        tensor = ir.tensor(value.const_value.numpy(), dtype=value.const_value.dtype, name=name)
        made = ir.Value(name=name)
        attribute = ir.AttrTensor("value", tensor)
        self._made.append(
            ir.Node("", "Constant", [], [attribute], outputs=[made], name=f"Constant_{name}")
        )
        self._inner[value] = made
        return made

    def _copy(self, node: ir.Node, inputs: Sequence[ir.Value | None]) -> None:
        outputs = [ir.Value(name=self._fresh(_stem(node))) for _ in node.outputs]
        self._inner |= dict(zip(node.outputs, outputs, strict=True))
        self._made.append(
            ir.Node(
                node.domain,
                node.op_type,
                inputs,
                list(node.attributes.values()),
                outputs=outputs,
                name=f"{node.op_type}_{outputs[0].name}",
            )
        )

    def _fresh(self, stem: str) -> str:
        name = stem
        count = 1
        while name in self._names:
            name = f"{stem}_{count}"
            count += 1
        self._names.add(name)
        return name


def _moves_inside(node: ir.Node, value: ir.Value) -> bool:
    """Scalars of pointwise arithmetic (the 0.5 of a spelled-out Gelu) describe the function."""
    return is_scalar(value) and not is_op(
        node, QUANTIZE, DEQUANTIZE, "Conv", "ConvTranspose", "Gemm", "MatMul", "PRelu",
        "LayerNormalization", "RMSNormalization", "BatchNormalization",
    )  # fmt: skip


def _formal_name(node: ir.Node, index: int) -> str:
    try:
        schema = onnx.defs.get_schema(node.op_type, domain=node.domain)
    except onnx.defs.SchemaError:
        return f"in{index}"
    return schema.inputs[min(index, len(schema.inputs) - 1)].name.lower()


def _stem(node: ir.Node) -> str:
    short = {QUANTIZE: "quantized", DEQUANTIZE: "real"}
    return short.get(node.op_type, node.op_type.lower())


def _line(node: ir.Node) -> str:
    if node.op_type == "Constant":
        return f"{node.outputs[0].name} = {tensor_hash(node.attributes['value'].as_tensor())}"
    return node_fingerprint(node)
