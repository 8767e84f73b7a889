"""What the compiler knows of an operator: torch meaning, cost, how its channels couple."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import onnx_ir as ir

from optcompiler.errors import PluginError, UnsupportedOperatorError

if TYPE_CHECKING:
    import torch

    from optcompiler.program import Program


@dataclass(frozen=True)
class Work:
    """Cost of one node, counted from its shapes.

    `macs`: multiply-accumulates of a contraction. `flops`: other arithmetic, an exponential or a
    division counted by its rough weight. `bytes_read` / `bytes_written`: activations;
    `weight_bytes`: constants read.
    """

    macs: int = 0
    flops: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    weight_bytes: int = 0


@dataclass(frozen=True)
class Axis:
    """One dimension of one value."""

    value: ir.Value
    axis: int


@dataclass(frozen=True)
class Coupling:
    """Channels of `source` and `target` that live and die together.

    Channel `c` of `source` (for `source_offset` <= c < `source_offset` + `count`) is tied to the
    `repeat` consecutive channels of `target` that start at
    `target_offset + (c - source_offset) * repeat`. Add couples one to one; Concat uses offsets;
    Flatten of [N, C, H, W] has `repeat = H * W`. `count` -1 means all.
    """

    source: Axis
    target: Axis
    repeat: int = 1
    source_offset: int = 0
    target_offset: int = 0
    count: int = -1


@dataclass(frozen=True)
class Channels:
    """How a node's axes couple.

    `couplings` tie axes of inputs and outputs. `produced` are axes of weights (or of the output)
    whose channels this node creates freely (Conv weight axis 0 with its output axis 1 coupled);
    `reduced` are axes summed over (Conv weight axis 1, coupled to its input's axis 1). An axis of
    an input or output that appears in none of the couplings is *pinned*: it cannot shrink.
    `groups` is the group count of a grouped contraction: channels must leave in whole groups or
    evenly from each.

    `normalised` are axes whose channels share statistics (LayerNormalization): removing one there
    is not the same as zeroing it. `repair` is called, before shapes are inferred again, on a node
    with axes that shrink, as `repair(program, node, extents)` with their new extents: it edits
    what the node states about them (a group count, the sizes of a Split).
    """

    couplings: tuple[Coupling, ...] = ()
    produced: tuple[Axis, ...] = ()
    reduced: tuple[Axis, ...] = ()
    groups: int = 1
    normalised: tuple[Axis, ...] = ()
    repair: Callable[[Program, ir.Node, Mapping[Axis, int]], None] | None = None


TorchMeaning = Callable[..., "torch.Tensor | list[torch.Tensor] | tuple[torch.Tensor, ...]"]
CostRule = Callable[[ir.Node], Work]
ChannelRule = Callable[[ir.Node], "Channels | None"]
TypeLookup = Callable[["ir.Value | None"], "ir.DataType | None"]
FactsRule = Callable[[ir.Node, TypeLookup], Mapping[str, Any]]


@dataclass(frozen=True)
class OpSpec:
    """One operator, declared once.

    `torch` is called as `torch(*inputs, **attributes)`: absent optional inputs are None, every
    attribute of the operator's schema is given (defaults filled in), and it returns the output or a
    tuple of outputs. It must be traceable by torch.fx (it becomes a `call_function`) and
    differentiable where the mathematics is. Meaning: the ONNX operator specification.
    `since` is the first opset whose semantics it follows.

    `static` holds the positions of inputs that describe structure (shapes, axes, pads, bounds):
    where such an input is a constant, `torch` gets it as a Python number or nested list and
    nothing is trained there; otherwise it gets the tensor. `facts` computes further keyword
    arguments from the node (its number of outputs) and from a lookup of the ONNX types of values,
    which knows more than `value.dtype` inside function bodies, and may still answer None.
    `levels` says what the operator does with a float tensor that holds quantised levels: "moves"
    it unchanged to the first output, "consumes" it, or wants "integers", to which it is cast.
    """

    op_type: str
    torch: TorchMeaning
    cost: CostRule
    channels: ChannelRule | None = None
    domain: str = ""
    since: int = 1
    pointwise: bool = False
    static: frozenset[int] = frozenset()
    facts: FactsRule | None = None
    levels: Literal["integers", "moves", "consumes"] = "integers"

    @property
    def key(self) -> tuple[str, str]:
        return (self.domain, self.op_type)


class OpTable:
    """Operators by domain and type; one per compiler, filled by the `optcompiler_ops` hook."""

    def __init__(self, specs: Iterable[OpSpec]) -> None:
        self._specs: dict[tuple[str, str], OpSpec] = {}
        for spec in specs:
            if spec.key in self._specs:
                raise PluginError(f"operator {spec.domain}::{spec.op_type} is declared twice.")
            self._specs[spec.key] = spec

    def get(self, node: ir.Node) -> OpSpec | None:
        return self._specs.get((node.domain, node.op_type))

    def require(self, node: ir.Node) -> OpSpec:
        """The declaration; raises `UnsupportedOperatorError` naming operator and node."""
        spec = self.get(node)
        if spec is None:
            raise UnsupportedOperatorError(
                f"operator {node.domain or 'ai.onnx'}::{node.op_type} of node {node.name!r} "
                f"has no declaration; add one through the optcompiler_ops hook."
            )
        return spec

    def __iter__(self) -> Iterator[OpSpec]:
        return iter(self._specs.values())

    def __len__(self) -> int:
        return len(self._specs)


def attributes_of(node: ir.Node) -> Mapping[str, Any]:
    """The node's attributes as plain Python values, the schema's defaults filled in."""
    import onnx

    values: dict[str, Any] = {}
    if node.domain == "":
        version = node.version or (node.graph.opset_imports.get("") if node.graph else None)
        try:
            schema = onnx.defs.get_schema(
                node.op_type, version or onnx.defs.onnx_opset_version(), ""
            )
        except onnx.defs.SchemaError:
            schema = None
        if schema is not None:
            for name, attribute in schema.attributes.items():
                default = attribute.default_value
                values[name] = onnx.helper.get_attribute_value(default) if default.type else None
    for name, attribute in node.attributes.items():
        values[name] = attribute.value
    return {k: _text(v) for k, v in values.items()}


def _text(value: Any) -> Any:
    """Strings of protobuf as Python strings, alone or in a list."""
    if isinstance(value, list):
        return [_text(v) for v in cast("list[Any]", value)]
    return value.decode() if isinstance(value, bytes) else value


def tensor_bytes(values: Sequence[ir.Value | None]) -> int:
    """Bytes of the given values; a symbolic dimension counts as 1, strings as nothing."""
    total = 0
    for value in values:
        if value is None or value.shape is None or value.dtype in (None, ir.DataType.STRING):
            continue
        count = 1
        for dim in value.shape:
            count *= dim if isinstance(dim, int) else 1
        total += int(count * value.dtype.itemsize)
    return total
