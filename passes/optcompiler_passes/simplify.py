"""simplify: clean-up that keeps the function and is always right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as ir_passes

from optcompiler.errors import Declined, VerificationError
from optcompiler.program import (
    FUSED_DOMAIN,
    Program,
    constant,
    node_fingerprint,
    static_shape,
    tensor_hash,
)
from optcompiler.rewriting import Candidate, Decline, Pass, PassContext, Stage
from optcompiler_passes._control import without_iterations
from optcompiler_passes._folding import (
    GROWTH_BYTES,
    QUANTIZATION,
    RANDOM,
    TOTAL_GROWTH_BYTES,
    FoldingPolicy,
)
from optcompiler_passes._gelu import as_gelu
from optcompiler_passes._regions import is_constant, is_op, same_shape

ROUNDS = 8
"""Rounds of rules after which a program that still changes is taken as it is."""

LARGE_ACTIVATION = 1e30
"""What the result of an operator with finite operands is taken to stay under."""


@dataclass(frozen=True)
class Simplify(Pass):
    """Fold constants, remove what does nothing, share what is computed twice.

        s = Shape(w)                    y = Conv(x, w)
        z = Expand(0, s)         →
        c = Conv(x, w, z)
        y = Identity(c)

    1. Nodes whose operands are constant are computed, when their result is not much larger than
       the constants that become useless: `growth_bytes` each and `total_growth_bytes` together. The
       result's size is known before it is computed. Random operators and QuantizeLinear or
       DequantizeLinear are never folded.
    2. Identity, Dropout, Cast to the same type, Reshape to the same shape, addition of 0 and
       multiplication by 1, identity Transpose and consecutive Transpose, Reshape, Slice, Clip and
       Relu are removed or merged; Pad joins the Conv after it; zero biases go
       (onnxscript's rewrite rules).
    3. Reshape, Transpose of the last two axes and Reshape back become one Transpose.
    4. `Where(IsNaN(softmax), c, softmax)` loses its guard when the operand of the Softmax is shown
       to be finite: scores, which are finite for finite inputs, plus a mask whose interval is
       finite in the operand's type. A mask with -inf, or one that is a float input, keeps it.
    5. Equal nodes with equal operands become one. Nodes, initializers and functions that
       nothing uses are removed.
    6. An If of a constant condition becomes its branch; a Loop that is known to run no iteration
       gives back what went in. Other control flow, sequences and strings stay as they are.
    7. Gelu spelled out with Erf or Tanh becomes the operator, from opset 20 on, in float: it is
       computed in fewer steps, and passes know its range.

    Inputs and outputs keep names, types and shapes; values and nodes that survive keep their names.
    Changes nothing where there is nothing to do.
    """

    name: ClassVar[str] = "simplify"
    stage: ClassVar[Stage] = Stage.CLEAN
    summary: ClassVar[str] = (
        "Fold constants, remove what does nothing, share common subexpressions."
    )

    growth_bytes: int = GROWTH_BYTES
    total_growth_bytes: int = TOTAL_GROWTH_BYTES

    def propose(self, program: Program, context: PassContext) -> Iterator[Candidate | Decline]:
        yield Candidate(site="program", choice="simplify", rewrite=self.rewrite, exact=True)

    def rewrite(self, program: Program) -> None:
        """Simplify `program` in place; raises `Declined` when it cannot be done."""
        named = _Named.of(program)
        interface = {v: (v.type, v.shape) for v in program.graph.inputs}
        outputs = [(v.name, v.type, v.shape) for v in program.graph.outputs]
        policy = FoldingPolicy(program.graph, self.growth_bytes, self.total_growth_bytes)
        for _ in range(ROUNDS):
            if not _round(program, policy):
                break
        ir_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(
            program.model
        )
        _share_small_constants(program)
        _share_nodes(program)
        program.sweep()
        named.restore(program)
        for value, (type_, shape) in interface.items():
            value.type, value.shape = type_, shape
        for value, (name, type_, shape) in zip(program.graph.outputs, outputs, strict=True):
            value.name, value.type, value.shape = name, type_, shape
        try:
            program.infer_shapes()
        except VerificationError as error:
            raise Declined(f"the simplified program is not valid ONNX: {error}") from error


def _round(program: Program, policy: FoldingPolicy) -> bool:
    """One application of every rule; whether anything changed."""
    from onnxscript.optimizer import fold_constants_ir
    from onnxscript.rewriter import RewritePass

    model = program.model
    before = [node_fingerprint(n) for n in program.graph]
    limit = 1 << 62  # the policy has bounded the result before it is computed
    try:
        fold_constants_ir(
            model,
            onnx_shape_inference=True,
            input_size_limit=limit,
            output_size_limit=limit,
            should_fold=policy,
        )
    except RuntimeError as error:  # its evaluators of single operators have faults of their own
        raise Declined(f"constant folding failed: {error.__cause__ or error}") from error
    policy.settle(program)
    rules: list[Any] = [_AtRoot(rule) for rule in _rules()]
    rules += [_AtRoot(rule, unless=_clips_apart) for rule in _rules_of_clips()]
    RewritePass(rules)(model)
    for node in list(program.all_nodes()):
        without_iterations(program, node)
    for node in list(program.all_nodes()):
        _without_identity(node)
    for node in list(program.graph):
        if node.graph is not None:
            _without_change_of_shape(node)
            _without_effect(node)
            _without_scatter(node)
            _as_one_transpose(program, node)
            _without_nan_guard(node)
            as_gelu(program, node)
    ir_passes.RemoveUnusedNodesPass()(model)
    return before != [node_fingerprint(n) for n in program.graph]


def _rules() -> list[Any]:
    from onnxscript.rewriter.rules import common as rules

    return [
        rules.dropout_inference_rule, rules.dropout_zero_rule,
        rules.no_op_cast_rule, rules.cast_cast_rule, rules.no_op_expand_rule,
        rules.no_op_transpose_rule, rules.transpose_transpose_rule,
        rules.reshape_reshape_rule, rules.squeeze_reshape_1d_rule, rules.unsqueeze_unsqueeze_rule,
        rules.collapse_slice_rule, rules.collapse_slice2_rule,
        rules.successive_clip_relu_rule, rules.successive_relu_rule,
        rules.min_max_rule, rules.max_min_rule, rules.min_min_rule, rules.max_max_rule,
        rules.normalize_pad_format_conv_rule, rules.fuse_pad_into_conv_rule,
        rules.materialize_reshape_shape_rule,
        rules.no_op_dynamic_scatter_nd_rule,
        rules.remove_optional_bias_from_conv_rule,
        rules.remove_optional_bias_from_conv_transpose_rule,
        rules.remove_optional_bias_from_gemm_rule,
    ]  # fmt: skip


def _rules_of_clips() -> list[Any]:
    from onnxscript.rewriter.rules import common as rules

    return [rules.successive_clip_rule, rules.successive_relu_clip_rule]


def _clips_apart(node: ir.Node) -> bool:
    """Whether a Clip or Relu of a Clip keeps no interval: the rules say its lower end, wrongly."""
    value = node.inputs[0]
    first = value.producer() if value is not None else None
    if first is None or first.op_type != "Clip":
        return False
    lows, highs = [-np.inf] + [0.0] * (node.op_type == "Relu"), [np.inf]
    for clip in (first, node) if node.op_type == "Clip" else (first,):
        for found, index in ((lows, 1), (highs, 2)):
            bound = constant(clip.inputs[index]) if len(clip.inputs) > index else None
            if bound is not None:
                found.append(float(bound.reshape(-1)[0]))
    return not max(lows) <= min(highs)


class _AtRoot:
    """A rule of the rewriter that is tried only at nodes of its pattern's root operator.

    Nor in the bodies of functions, whose values have no types; rules ask for those. Nor where
    `unless` holds.
    """

    def __init__(self, rule: Any, unless: Callable[[ir.Node], bool] = lambda node: False) -> None:
        self._unless = unless
        pattern = rule._target_pattern  # the rewriter asks for it at every node
        root = pattern.output_node.op_identifier() if pattern.has_single_output_node else None
        self._rule, self._operator = rule, root and root[:2]

    def try_rewrite(self, model: ir.Model, graph: Any, node: ir.Node, **options: Any) -> Any:
        if self._operator is not None and self._operator != (node.domain, node.op_type):
            return None
        if isinstance(graph, ir.Function) or self._unless(node):
            return None
        return self._rule.try_rewrite(model, graph, node, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rule, name)


def _bypass(node: ir.Node, value: ir.Value) -> None:
    """Let readers of the node's result read `value`; where it is an output, by an Identity."""
    result = node.outputs[0]
    if not result.is_graph_output():
        result.replace_all_uses_with(value)
        return
    graph = node.graph
    assert graph is not None
    made = ir.Value(name=result.name, type=result.type, shape=result.shape)
    identity = ir.Node("", "Identity", [value], outputs=[made], name=node.name)
    ir.convenience.replace_nodes_and_values(graph, node, [node], [identity], [result], [made])


def _without_identity(node: ir.Node) -> None:
    """Readers of y = Identity(x) read x. Where y is an output, x takes its name, unless x is known
    by a name already: an input or a constant, another output, a value of an outer graph."""
    if not is_op(node, "Identity") or node.inputs[0] is None:
        return
    graph, x, y = node.graph, node.inputs[0], node.outputs[0]
    producer = x.producer()
    if y.is_graph_output():
        if producer is None or producer.graph is not graph or x.is_graph_output():
            return
        name, type_, shape = y.name, y.type or x.type, y.shape if y.shape is not None else x.shape
        y.replace_all_uses_with(x, replace_graph_outputs=True)
        y.name, x.name, x.type, x.shape = x.name, name, type_, shape
    else:
        y.replace_all_uses_with(x)
    assert graph is not None
    graph.remove(node, safe=True)


def _without_change_of_shape(node: ir.Node) -> None:
    """Reshape, Flatten, Squeeze, Unsqueeze and Expand to the shape that the operand has."""
    if not is_op(node, "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand"):
        return
    data = node.inputs[0]
    if data is not None and static_shape(data) is not None and same_shape(data, node.outputs[0]):
        _bypass(node, data)


def _without_scatter(node: ir.Node) -> None:
    """ScatterND that overwrites every row of its data, in order."""
    if not is_op(node, "ScatterND") or node.attributes.get_string("reduction", "none") != "none":
        return
    data, indices, updates = node.inputs
    rows = constant(indices)
    if data is None or updates is None or rows is None or not same_shape(data, updates):
        return
    shape = static_shape(data)
    if shape and rows.shape == (shape[0], 1) and (rows[:, 0] == np.arange(shape[0])).all():
        _bypass(node, updates)


_NEUTRAL = {"Add": 0.0, "Sub": 0.0, "Mul": 1.0, "Div": 1.0}


def _without_effect(node: ir.Node) -> None:
    """x + 0, x - 0, x * 1 and x / 1, where the constant does not broadcast x to another shape."""
    if node.domain != "" or node.op_type not in _NEUTRAL:
        return
    operands = [(0, 1), (1, 0)] if node.op_type in ("Add", "Mul") else [(0, 1)]
    for data_index, constant_index in operands:
        data, other = node.inputs[data_index], node.inputs[constant_index]
        if data is None or other is None or not is_constant(other):
            continue
        array = constant(other)
        if (
            array is not None
            and array.size > 0
            and bool((array == _NEUTRAL[node.op_type]).all())
            and same_shape(data, node.outputs[0])
        ):
            _bypass(node, data)
            return


def _as_one_transpose(program: Program, last: ir.Node) -> None:
    """Reshape [.., M, N] → [B, M, N], Transpose to [B, N, M], Reshape → [.., N, M]."""
    if not is_op(last, "Reshape") or last.inputs[0] is None or last.inputs[0].producer() is None:
        return
    middle = last.inputs[0].producer()
    if middle is None or not is_op(middle, "Transpose") or "perm" not in middle.attributes:
        return
    flat = middle.inputs[0]
    first = flat.producer() if flat is not None else None
    if tuple(middle.attributes["perm"].as_ints()) != (0, 2, 1) or not is_op(first, "Reshape"):
        return
    assert first is not None
    assert flat is not None
    data, result = first.inputs[0], last.outputs[0]
    if data is None or data.shape is None or flat.shape is None or result.shape is None:
        return
    rank = len(data.shape)
    if (
        rank < 3
        or len(result.shape) != rank
        or any(not isinstance(d, int) for d in data.shape.dims[-2:])
    ):
        return
    leads = ir.val("", shape=ir.Shape(data.shape.dims[:-2]))
    if (
        flat.shape.dims[1:] != data.shape.dims[-2:]
        or result.shape.dims[-2:] != data.shape.dims[:-3:-1]
        or not same_shape(leads, ir.val("", shape=ir.Shape(result.shape.dims[:-2])))
    ):
        return
    perm = (*range(rank - 2), rank - 1, rank - 2)
    made = ir.Value(name=result.name, type=result.type, shape=result.shape)
    node = ir.Node("", "Transpose", [data], [ir.AttrInt64s("perm", perm)], outputs=[made])
    ir.convenience.replace_nodes_and_values(program.graph, last, [last], [node], [result], [made])


def _without_nan_guard(node: ir.Node) -> None:
    """Where(IsNaN(p), c, p) with p = Softmax(x), x finite."""
    if not is_op(node, "Where"):
        return
    test, _, softmax = node.inputs
    guard = test.producer() if test is not None else None
    producer = softmax.producer() if softmax is not None else None
    if softmax is None or producer is None or not is_op(guard, "IsNaN"):
        return
    if guard is None or guard.inputs[0] is not softmax or not is_op(producer, "Softmax"):
        return
    operand = producer.inputs[0]
    if operand is None or operand.dtype is None or not operand.dtype.is_floating_point():
        return
    bounds = interval(operand)
    if bounds is None:
        return
    with np.errstate(over="ignore"):
        ends = np.array(bounds).astype(operand.dtype.numpy())
    if np.isfinite(ends.astype(np.float64)).all():
        _bypass(node, softmax)


_MOVES = (
    "Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze",
    "Tile", "Transpose", "Unsqueeze",
)  # fmt: skip
_FINITE = (
    "Conv", "Gemm", "MatMul", "LayerNormalization", "Softmax", "Sigmoid", "Tanh", "Relu", "Gelu",
    "HardSwish", "HardSigmoid", "BatchNormalization", "DequantizeLinear",
)  # fmt: skip


def interval(value: ir.Value, depth: int = 32) -> tuple[float, float] | None:
    """Bounds of the elements of `value`, or None when they are not known.

    Results of contractions and activations are taken to stay within `LARGE_ACTIVATION`: they are
    finite for finite inputs. Graph inputs of float type have no bounds.
    """
    if value.dtype == ir.DataType.BOOL:
        return (0.0, 1.0)
    array = constant(value) if is_constant(value) else None
    if array is not None:
        if array.size == 0 or array.dtype.kind in "OSU" or np.isnan(array.astype(np.float64)).any():
            return None
        return (float(array.min()), float(array.max()))
    node = value.producer()
    if node is None or node.domain != "" or depth == 0:
        return None
    if node.op_type in _FINITE:
        return (-LARGE_ACTIVATION, LARGE_ACTIVATION)
    operands = node.inputs
    if node.op_type == "Where":
        operands = operands[1:]
    elif node.op_type in _MOVES and node.op_type != "Concat":
        operands = operands[:1]
    elif node.op_type not in ("Add", "Sub", "Mul", "Div", "Neg", "Cast", "Concat"):
        return None
    known = [interval(v, depth - 1) if v is not None else None for v in operands]
    bounds = [b for b in known if b is not None]
    if len(bounds) != len(known) or not bounds:
        return None
    return _combine(node.op_type, bounds)


def _combine(op_type: str, bounds: list[tuple[float, float]]) -> tuple[float, float] | None:
    (a, b), (c, d) = bounds[0], bounds[-1]
    if op_type == "Add":
        corners = [a + c, b + d]
    elif op_type == "Sub":
        corners = [a - d, b - c]
    elif op_type == "Neg":
        corners = [-b, -a]
    elif op_type == "Mul":
        corners = [a * c, a * d, b * c, b * d]
    elif op_type == "Div":
        if c <= 0 <= d:
            return None
        corners = [a / c, a / d, b / c, b / d]
    else:
        corners = [end for pair in bounds for end in pair]
    if any(np.isnan(corners)):
        return None
    return (min(corners), max(corners))


_OWN_PARAMETERS = QUANTIZATION | {
    "ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul",
}  # fmt: skip
"""Operators whose scales and zero points other passes look at one by one."""


def _share_small_constants(program: Program) -> None:
    """Equal integer tensors and float scalars become one; weights and scales stay their own."""
    seen: dict[str, ir.Value] = {}
    for value in list(program.graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.size > 64 or value.is_graph_input() or value.is_graph_output():
            continue
        if tensor.dtype.is_floating_point() and len(tensor.shape) > 0:
            continue
        if any(n.op_type in _OWN_PARAMETERS or n.domain == FUSED_DOMAIN for n, _ in value.uses()):
            continue
        kept = seen.setdefault(tensor_hash(tensor), value)
        if kept is not value:
            value.replace_all_uses_with(kept)


def _share_nodes(program: Program) -> None:
    """Common subexpressions: the first of equal nodes in graph order stays."""
    seen: dict[object, ir.Node] = {}
    for node in list(program.graph):
        if node.op_type in RANDOM or any(v.is_graph_output() for v in node.outputs):
            continue
        if any(
            a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
            for a in node.attributes.values()
        ):
            continue
        text = node_fingerprint(node).split(" = ", 1)[1]
        kept = seen.setdefault((text, tuple(map(id, node.inputs)), len(node.outputs)), node)
        if kept is not node:
            for mine, theirs in zip(node.outputs, kept.outputs, strict=True):
                mine.replace_all_uses_with(theirs)
            program.graph.remove(node, safe=True)


@dataclass(frozen=True)
class _Named:
    """The names and metadata of a program's nodes, by value that they make."""

    made_by: dict[str | None, tuple[str, dict[str, str]]]
    nodes: set[str | None]

    @classmethod
    def of(cls, program: Program) -> _Named:
        made_by = {
            v.name: (str(n.name), dict(n.metadata_props)) for n in program.graph for v in n.outputs
        }
        return cls(made_by, {n.name for n in program.graph})

    def restore(self, program: Program) -> None:
        """Give a new node the name and metadata of the node that made its result before."""
        taken = {n.name for n in program.graph if n.name in self.nodes}
        taken |= set(program.graph.initializers)
        taken |= {v.name for v in program.graph.inputs}
        taken |= {v.name for n in program.graph for v in n.outputs}
        seen: set[str | None] = set()
        for node in program.graph:
            if node.name in self.nodes and node.name not in seen:
                seen.add(node.name)
                continue
            source, metadata = self.made_by.get(node.outputs[0].name, ("", {}))
            stem = source or f"{node.op_type}_{node.outputs[0].name}"
            name, count = stem, 1
            while name in taken:
                name, count = f"{stem}_{count}", count + 1
            taken.add(name)
            node.name = name
            for key, text in metadata.items():
                node.metadata_props.setdefault(key, text)
