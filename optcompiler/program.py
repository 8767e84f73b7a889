"""Program: a valid ONNX model in memory, and the questions everything else asks of it."""

from __future__ import annotations

import copy
import hashlib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common as ir_passes

from optcompiler.errors import InputError, VerificationError
from optcompiler.files import replacing_file, replacing_files
from optcompiler.inference import infer
from optcompiler.spilling import spilled

if TYPE_CHECKING:
    import networkx as nx
    import torch

EXTERNAL_ABOVE_BYTES = 1 << 30
"""Weights beyond this are saved to a file of their own; a protobuf cannot hold 2 GiB."""

FUSED_DOMAIN = "optcompiler.fused"
"""Domain of the model-local functions that stand for fused regions."""

PASS_KEY = "optcompiler.pass"
"""Metadata key of a node: the pass that made it."""

SOURCE_KEY = "optcompiler.source"
"""Metadata key of a node: the module path it was traced from."""


STUB_ABOVE_BYTES = 1000
"""Initializers beyond this are left out where only types and shapes matter."""


@dataclass(frozen=True)
class Port:
    """One input or output of a program: `shape` holds ints and names of symbolic dimensions.

    `kind` is "tensor", "sequence", "optional tensor" or "optional sequence"; all but a tensor have
    no shape here, and `dtype` is the type of their elements.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    kind: str = "tensor"

    @property
    def static(self) -> bool:
        return self.kind == "tensor" and all(isinstance(d, int) for d in self.shape)

    def __str__(self) -> str:
        if self.kind != "tensor":
            return f"{self.name}: {self.kind} of {self.dtype.lower()}"
        return f"{self.name}: {self.dtype.lower()}[{', '.join(map(str, self.shape))}]"


class Program:
    """A valid ONNX model with static types, unique names and no overlapping edits.

    Storage is `model`, an `onnx_ir.Model`; nothing is kept beside it, so any onnx_ir tool works on
    it but an index of names, which is looked through anew when it does not answer. Every node and
    value has a unique name; names of surviving nodes and values do not change
    from pass to pass, which is what makes sites stable. Weights are shared between clones and stay
    memory-mapped when they were loaded from external data.
    """

    __slots__ = ("_index", "model")

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self._index: _Index | None = None

    # -- in and out -------------------------------------------------------------------------

    @classmethod
    def from_onnx(cls, source: str | Path | onnx.ModelProto | ir.Model) -> Program:
        """Take an ONNX model as it is and make it a verified program.

        Constants become initializers, every node gets a name, and shapes are inferred strictly.
        The argument is not changed. Raises `InputError` for a file that cannot be read
        and for a model that is not valid ONNX.
        """
        from optcompiler.importing import program_from_onnx

        return program_from_onnx(source)

    @classmethod
    def from_text(cls, text: str) -> Program:
        """Read ONNX's textual syntax (`onnx.parser`), verify, and infer shapes."""
        try:
            model = ir.from_onnx_text(text)
        except Exception as error:
            raise InputError(f"not ONNX text: {error}") from error
        return cls.from_onnx(model)

    def to_text(self) -> str:
        """The program in ONNX's textual syntax; `from_text` reads it back."""
        return ir.to_onnx_text(self.model)

    def to_proto(self) -> onnx.ModelProto:
        """A self-contained protobuf (copies the weights)."""
        return ir.to_proto(self._loaded().model)

    def save(self, path: str | Path) -> None:
        """Write an .onnx file, replacing one that is there in one step.

        Weights beyond `EXTERNAL_ABOVE_BYTES` go to `<name>.<hash>.data` beside it, and such files
        that it no longer refers to are removed. Raises `InputError` when it cannot be written.
        """
        path = Path(os.path.realpath(path))
        data, before = "", _data_files(path)
        if self.weight_bytes <= EXTERNAL_ABOVE_BYTES:
            with replacing_file(path) as fresh:
                ir.save(self._loaded().model, fresh)
        else:
            data = f"{path.name}.{self.content_hash()[:16]}.data"
            with replacing_files(path) as folder:
                ir.save(self.model, folder / path.name, external_data=data)
        for old in before - {data}:
            path.with_name(old).unlink(missing_ok=True)

    def to_torch(self, ops: Any = None) -> torch.fx.GraphModule:
        """A differentiable `torch.fx.GraphModule` computing this program; see `executor`."""
        from optcompiler.executor import to_torch

        return to_torch(self, ops)

    def refit(self, module: torch.fx.GraphModule) -> Program:
        """A program with the weights that `module`, made by `to_torch`, holds now."""
        from optcompiler.executor import refit

        return refit(self, module)

    def clone(self) -> Program:
        """An independent copy in time proportional to the nodes; weights are shared."""
        twin = Program(self.model.clone())
        twin._own_types()
        return twin

    def _own_types(self) -> None:
        """Give every value a type object of its own: onnx_ir's clones share them, and assigning to
        `value.dtype` writes into the type."""
        bodies = [*self.model.graphs(), *(f.graph for f in self.functions.values())]
        for graph in bodies:
            made = (v for node in graph for v in node.outputs)
            for value in (*graph.inputs, *graph.initializers.values(), *made):
                known = value.type
                if type(known) is ir.TensorType:
                    value.type = ir.TensorType(known.dtype, denotation=known.denotation)
                elif known is not None:
                    value.type = copy.deepcopy(known)

    def inlined(self) -> Program:
        """A copy in which every model-local function is expanded."""
        copy = self.clone()
        ir_passes.InlinePass()(copy.model)
        ir_passes.NameFixPass()(copy.model)
        return copy

    def _loaded(self) -> Program:
        """This program, or a copy without external tensors if it has any."""
        if not any(isinstance(t, ir.ExternalTensor) for t in self.weights().values()):
            return self
        copy = self.clone()
        for graph in copy.model.graphs():
            for value in graph.initializers.values():
                if isinstance(tensor := value.const_value, ir.ExternalTensor):
                    value.const_value = ir.Tensor(
                        tensor.numpy(), tensor.dtype, shape=tensor.shape, name=tensor.name
                    )
        return copy

    # -- looking ----------------------------------------------------------------------------

    @property
    def graph(self) -> ir.Graph:
        return self.model.graph

    @property
    def functions(self) -> dict[tuple[str, str, str], ir.Function]:
        return self.model.functions

    @property
    def opset(self) -> int:
        return self.graph.opset_imports[""]

    @property
    def inputs(self) -> tuple[Port, ...]:
        return tuple(port(v) for v in self.graph.inputs)

    @property
    def outputs(self) -> tuple[Port, ...]:
        return tuple(port(v) for v in self.graph.outputs)

    def node(self, name: str) -> ir.Node | None:
        """The node of the main graph with this name, or None."""
        return self._names.node(name) or self._looked_through().node(name)

    def value(self, name: str) -> ir.Value | None:
        """The value of the main graph with this name, or None."""
        return self._names.value(name) or self._looked_through().value(name)

    @property
    def _names(self) -> _Index:
        return self._index or self._looked_through()

    def _looked_through(self) -> _Index:
        """The index of names, made anew; names that were given out stay so."""
        given = self._index.given if self._index is not None else set[str]()
        self._index = _Index(self.graph, given)
        return self._index

    def weights(self) -> dict[str, ir.TensorProtocol]:
        """Initializers of the main graph by name."""
        return {
            name: v.const_value
            for name, v in self.graph.initializers.items()
            if v.const_value is not None
        }

    @property
    def weight_bytes(self) -> int:
        return sum(t.nbytes for t in self.weights().values())

    def all_nodes(self) -> Iterator[ir.Node]:
        """Nodes of the main graph, its subgraphs and every function body."""
        yield from self.graph.all_nodes()
        for function in self.functions.values():
            yield from function.all_nodes()

    def network(self) -> nx.DiGraph:
        """A `networkx` view of the main graph: node names, edges carrying the value's name.

        Graph inputs, initializers and outputs are nodes too, as `("input", name)`,
        `("weight", name)` and `("output", name)`. Made anew at each call; not a store.
        """
        import networkx as nx

        view = nx.DiGraph()
        made: dict[ir.Value, Any] = {v: ("input", v.name) for v in self.graph.inputs}
        made |= {v: ("weight", v.name) for v in self.graph.initializers.values()}
        view.add_nodes_from(made.values())
        for node in self.graph:
            view.add_node(node.name, op_type=node.op_type, domain=node.domain)
            made |= dict.fromkeys(node.outputs, node.name)
        for node in self.graph:
            for value in dict.fromkeys(consumed(node)):
                if value in made:
                    view.add_edge(made[value], node.name, value=value.name)
        for v in self.graph.outputs:
            view.add_edge(made[v], ("output", v.name), value=v.name)
        return view

    # -- identity ---------------------------------------------------------------------------

    def content_hash(self) -> str:
        """SHA-256 over the structure and the bytes of every weight; provenance does not count."""
        digest = hashlib.sha256()
        for line in self.structure():
            digest.update(line.encode())
            digest.update(b"\n")
        for name, tensor in sorted(self.weights().items()):
            digest.update(f"{name}:{tensor_hash(tensor)}\n".encode())
        return digest.hexdigest()

    def structure(self) -> Iterator[str]:
        """All but the weights, line by line."""
        yield f"opset {sorted(self.graph.opset_imports.items())}"
        yield from (f"in {p}" for p in self.inputs)
        yield from (f"out {p}" for p in self.outputs)
        for node in self.graph:
            yield node_fingerprint(node)
        for key, function in sorted(self.functions.items()):
            yield f"function {key} {[v.name for v in function.inputs]}"
            for node in function:
                yield node_fingerprint(node)
            yield f"returns {[v.name for v in function.outputs]}"

    def changes_since(
        self, before: Program
    ) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """Names of (nodes new or changed, nodes gone, initializers new or changed)."""
        old = {n.name: node_fingerprint(n) for n in before.graph}
        new = {n.name: node_fingerprint(n) for n in self.graph}
        added = tuple(str(k) for k, v in new.items() if old.get(k) != v)
        removed = tuple(str(k) for k in old if k not in new)
        weights = before.weights()
        changed = tuple(k for k, t in self.weights().items() if weights.get(k) is not t)
        return added, removed, changed

    def stamp(self, names: Iterable[str], pass_name: str) -> None:
        """Record `pass_name` as the maker of the named nodes that have no maker yet."""
        wanted = set(names)
        for node in self.graph:
            if node.name in wanted and PASS_KEY not in node.metadata_props:
                node.metadata_props[PASS_KEY] = pass_name

    # -- editing helpers --------------------------------------------------------------------

    def add_weight(self, name: str, array: np.ndarray | ir.TensorProtocol) -> ir.Value:
        """Register an initializer under a fresh name beginning with `name`; return its value."""
        tensor = ir.tensor(spilled(array), name=name) if isinstance(array, np.ndarray) else array
        fresh = self.fresh_name(name)
        tensor.name = fresh
        shape = ir.Shape(tensor.shape.numpy())
        value = ir.val(fresh, dtype=tensor.dtype, shape=shape, const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def hold(self, value: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
        """Put an initializer of the same name in the place of a node's one result.

        A graph output stays the output. Returns the initializer; the node is removed.
        """
        node, name = value.producer(), str(value.name)
        assert node is not None
        tensor.name = name
        held = ir.val(name, tensor.dtype, ir.Shape(tensor.shape.numpy()), const_value=tensor)
        value.replace_all_uses_with(held, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)
        self.graph.register_initializer(held)
        return held

    def set_weight(self, value: ir.Value, array: np.ndarray) -> None:
        """Give an initializer new contents (and type and shape) under its own name."""
        tensor = ir.tensor(spilled(array), name=value.name)
        value.const_value = tensor
        value.dtype = tensor.dtype
        value.shape = ir.Shape(array.shape)

    def fresh_name(self, stem: str) -> str:
        """`stem`, or `stem_1`, `stem_2`, … : a name that no node or value of the graph has.

        A name that was given out is not given again. A name that a rewrite made up itself is known
        here when it did so before its first question, or in place of a name that was known.
        """
        name, count = stem, 0
        while self._taken(name):
            count += 1
            name = f"{stem}_{count}"
        self._names.given.add(name)
        return name

    def _taken(self, name: str) -> bool:
        if name in self._names.given or name in self.graph.initializers:
            return True
        if not self._names.has(name):
            return False
        if self._names.node(name) is not None or self._names.value(name) is not None:
            return True
        return self._looked_through().has(name)

    def discard(self, *nodes: ir.Node) -> None:
        """Remove nodes whose results nothing uses, and what only they used, as far as it goes.

        Takes time in proportion to what is removed, where `sweep` looks at the whole program.
        """
        waiting = list(nodes)
        while waiting:
            node = waiting.pop()
            if node.graph is None or any(v.uses() or v.is_graph_output() for v in node.outputs):
                continue
            read = list(dict.fromkeys(consumed(node)))
            node.graph.remove(node, safe=True)
            for value in read:
                producer = value.producer()
                if producer is not None:
                    waiting.append(producer)
                elif value.is_initializer() and not value.is_graph_input():
                    self.forget(value)

    def forget(self, value: ir.Value) -> None:
        """Remove an initializer that nothing uses."""
        held = value.graph
        if held is not None and not value.uses() and not value.is_graph_output():
            held.initializers.pop(str(value.name), None)

    def sweep(self) -> None:
        """Remove nodes, initializers and functions that nothing uses."""
        ir_passes.RemoveUnusedNodesPass()(self.model)
        ir_passes.RemoveUnusedFunctionsPass()(self.model)

    def infer_shapes(self) -> None:
        """Forget the types of intermediate values and infer them again, strictly."""
        for node in self.graph:
            for value in node.outputs:
                if not value.is_graph_output():
                    value.shape = None
        try:
            inferred = infer(stub_proto(self.model))
        except Exception as error:
            raise VerificationError(f"shape inference failed: {_one_line(error)}") from error
        known = {v.name: v for v in (*inferred.graph.value_info, *inferred.graph.output)}
        for node in self.graph:
            for value in node.outputs:
                info = known.get(value.name or "")
                if info is None:
                    continue
                type_ = ir.serde.deserialize_type_proto_for_type(info.type)
                if type_ is not None:
                    value.type = type_
                shape = ir.serde.deserialize_type_proto_for_shape(info.type)
                if shape is not None and value.shape is None:
                    value.shape = shape

    # -- verification -----------------------------------------------------------------------

    def verify(self, like: Program | None = None) -> None:
        """Check names, `onnx.checker` (full: with strict shape inference) and the interface.

        Raises `VerificationError` naming what is wrong. With `like`, inputs and outputs must be the
        same as that program's. Weights are not copied.
        """
        names = [n.name for n in self.graph]
        if len(set(names)) != len(names) or None in names or "" in names:
            raise VerificationError("nodes without a name, or two with the same name.")
        newest = onnx.defs.onnx_opset_version()
        opset = self.graph.opset_imports.get("", newest)
        if not 0 < opset <= newest:
            raise VerificationError(f"opset {opset} is none of 1 to {newest}.")
        for name, value in self.graph.initializers.items():
            tensor = value.const_value
            if tensor is None:
                raise VerificationError(f"initializer {name!r} holds nothing.")
            if (value.dtype, value.shape) != (tensor.dtype, tensor.shape):
                raise VerificationError(
                    f"initializer {name!r} is declared {value.dtype}{value.shape} but holds "
                    f"{tensor.dtype}{tensor.shape}."
                )
        try:
            onnx.checker.check_model(stub_proto(self.model), full_check=True)
        except Exception as error:
            raise VerificationError(f"not valid ONNX: {_one_line(error)}") from error
        if like is not None and (self.inputs, self.outputs) != (like.inputs, like.outputs):
            raise VerificationError(
                f"the interface changed: was {_ports(like)}, is now {_ports(self)}."
            )

    def __repr__(self) -> str:
        return f"Program({_ports(self)}, {len(self.graph)} nodes, {self.weight_bytes} weight bytes)"


class _Index:
    """Nodes and values of a graph by name, as they were when it was looked through.

    What is found is still there under its name; what is not found may have come since.
    """

    def __init__(self, graph: ir.Graph, given: set[str]) -> None:
        self.graph = graph
        self.given = given
        self._nodes: dict[str, ir.Node] = {}
        self._values: dict[str, ir.Value] = {}
        for value in (*graph.inputs, *graph.initializers.values()):
            self._values.setdefault(str(value.name), value)
        for node in graph:
            self._nodes.setdefault(str(node.name), node)
            for value in node.outputs:
                self._values.setdefault(str(value.name), value)

    def has(self, name: str) -> bool:
        return name in self._nodes or name in self._values

    def node(self, name: str) -> ir.Node | None:
        found = self._nodes.get(name)
        there = found is not None and found.graph is self.graph and found.name == name
        return found if there else None

    def value(self, name: str) -> ir.Value | None:
        found = self._values.get(name)
        if found is None or found.name != name:
            return None
        producer = found.producer()
        there = found.graph is self.graph if producer is None else producer.graph is self.graph
        return found if there else None


def _data_files(path: Path) -> set[str]:
    """Names of the files beside `path` that `Program.save` gave weights to."""
    wanted = re.compile(f"{re.escape(path.name)}[.][0-9a-f]{{16}}[.]data")
    if not path.parent.is_dir():
        return set()
    return {name for name in os.listdir(path.parent) if wanted.fullmatch(name)}


def port(value: ir.Value) -> Port:
    """The name, ONNX type name and shape of a value; an unnamed dynamic dimension reads "?"."""
    dtype = value.dtype.name if value.dtype is not None else "UNDEFINED"
    kind, inner = "", value.type
    while isinstance(inner, (ir.OptionalType, ir.SequenceType)):
        kind += "optional " if isinstance(inner, ir.OptionalType) else "sequence "
        inner = inner.elem_type
    if not kind.endswith("sequence "):
        kind += "tensor"
    return Port(value.name or "", dtype, shape_of(value) if kind == "tensor" else (), kind.strip())


def shape_of(value: ir.Value) -> tuple[int | str, ...]:
    """The shape: ints, and names (or "?") of symbolic dimensions; () when unknown or scalar."""
    if value.shape is None:
        return ()
    return tuple(
        d if isinstance(d, int) else str(d.value) if d.value is not None else "?"
        for d in value.shape
    )


def static_shape(value: ir.Value) -> tuple[int, ...] | None:
    """The shape when every dimension is known, else None."""
    if value.shape is None or not value.shape.is_static():
        return None
    return tuple(int(d) for d in value.shape)  # type: ignore[arg-type]


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The contents of an initializer, or None when `value` is not one."""
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


def consumed(node: ir.Node) -> Iterator[ir.Value]:
    """Values that a node reads, those its subgraphs capture included."""
    yield from (v for v in node.inputs if v is not None)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            graphs: list[ir.Graph] = [attribute.as_graph()]
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs = list(attribute.as_graphs())
        else:
            continue
        for graph in graphs:
            inner = set(graph.inputs) | set(graph.initializers.values())
            for child in graph.all_nodes():
                inner.update(child.outputs)
            for child in graph.all_nodes():
                yield from (v for v in child.inputs if v is not None and v not in inner)


def node_fingerprint(node: ir.Node) -> str:
    """Operator, operands and attributes of a node as one line."""
    attributes = ";".join(f"{k}={_attribute_text(a)}" for k, a in sorted(node.attributes.items()))
    operands = ",".join("" if v is None else str(v.name) for v in node.inputs)
    results = ",".join(str(v.name) for v in node.outputs)
    operator = f"{node.domain}::{node.op_type}:{node.overload}"
    return f"{node.name}: {results} = {operator}({operands}) {attributes}"


def _attribute_text(attribute: ir.Attr) -> str:
    if attribute.is_ref():
        return f"@{attribute.ref_attr_name}"
    if attribute.type == ir.AttributeType.TENSOR:
        return tensor_hash(attribute.as_tensor())
    if attribute.type == ir.AttributeType.GRAPH:
        return "{" + "|".join(node_fingerprint(n) for n in attribute.as_graph()) + "}"
    return repr(attribute.value)


def tensor_hash(tensor: ir.TensorProtocol) -> str:
    """SHA-256 over type, shape and bytes; kept on the tensor's metadata after the first call."""
    known = tensor.meta.get("optcompiler.sha256")
    if known is None:
        digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(_bytes_of(tensor))
        known = tensor.meta["optcompiler.sha256"] = digest.hexdigest()
    return known


def _bytes_of(tensor: ir.TensorProtocol) -> Any:
    """The bytes of a tensor as a file holds them, in place where it is in memory or mapped so."""
    if tensor.dtype == ir.DataType.STRING:
        return "\0".join(map(str, tensor.numpy().flat)).encode()
    array = tensor.numpy()
    whole = ir.DataType(tensor.dtype).bitwidth == 8 * array.dtype.itemsize
    if not (whole and array.flags.c_contiguous and sys.byteorder == "little"):
        return tensor.tobytes()
    return array.reshape(-1).view(np.uint8).data


def stub_proto(model: ir.Model) -> onnx.ModelProto:
    """A protobuf in which all initializers are inputs, too, and large ones nothing else, so that
    checking copies no weights."""
    graph = model.graph
    weights = [v for v in graph.initializers.values() if not v.is_graph_input()]
    small = [v for v in graph.initializers.values() if _small(v.const_value)]
    view = ir.GraphView(
        [*graph.inputs, *weights], graph.outputs, nodes=graph, initializers=small,
        opset_imports=graph.opset_imports, name=graph.name,
    )  # fmt: skip
    stub: Any = ir.Model(
        cast("ir.Graph", view),
        ir_version=model.ir_version,
        functions=list(model.functions.values()),
    )
    return ir.to_proto(stub)


def _small(tensor: ir.TensorProtocol | None) -> bool:
    return tensor is not None and tensor.nbytes <= STUB_ABOVE_BYTES


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


def _ports(program: Program) -> str:
    ins = ", ".join(map(str, program.inputs))
    outs = ", ".join(map(str, program.outputs))
    return f"({ins}) -> ({outs})"
