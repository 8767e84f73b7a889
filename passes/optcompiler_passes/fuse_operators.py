"""fuse-operators: group nodes that a backend turns into one kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import onnx_ir as ir

from optcompiler.program import Program, constant
from optcompiler.rewriting import Candidate, Decline, Pass, PassContext, Stage
from optcompiler_passes._regions import (
    DEQUANTIZE,
    QUANTIZE,
    Finder,
    Region,
    fuse,
    is_constant,
    is_op,
    is_scalar,
    same_shape,
    sole_consumer,
)

CONTRACTIONS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
NORMALIZATIONS = (
    "LayerNormalization", "RMSNormalization", "GroupNormalization", "InstanceNormalization",
)  # fmt: skip
SOFTMAXES = ("Softmax", "LogSoftmax")

Found = Region | Decline


@dataclass(frozen=True)
class FuseOperators(Pass):
    """Turn regions into model-local functions, which a code generator emits as one kernel each.

        c = Conv(x, w, b)                     y = optcompiler.fused.Conv_Add_Relu_3fa2c1(x, w, b, r)
        s = Add(c, r)                  →
        y = Relu(s)

    1. A region's kind is one that the backend lists in `Capabilities.fusions`. They are looked for
       in this order, and no node is in two regions: attention (MatMul, scale and mask, Softmax,
       MatMul, with the Transposes around them), contraction (Conv, ConvTranspose, Gemm or MatMul
       with the pointwise nodes after it), normalization (the ONNX operators or ReduceMean, Sub,
       Pow, … spelled out), softmax (with scale and mask before it), pointwise (two nodes or more).
    2. Pointwise nodes join as long as they close to one value of the same shape; branches that meet
       again (`x * sigmoid(x)`, the Erf and tanh forms of Gelu) are taken whole. A QuantizeLinear
       ends a region. The DequantizeLinear nodes that feed a region are copied into it.
    3. A region has one result; nothing outside reads its inner values. So it is convex.
    4. Weights, biases, scales and zero points are inputs of the function; constants that say what
       to do (Clip bounds, axes, exponents, scalar factors) are Constant nodes of its body. Regions
       with the same body share one function.

    Declines when an anchor stands alone: what follows is read elsewhere, changes the shape, is an
    output of the program, or is no pointwise operator. The call keeps the anchor's name and the
    name of the region's result.
    """

    name: ClassVar[str] = "fuse-operators"
    stage: ClassVar[Stage] = Stage.FUSE
    summary: ClassVar[str] = "Group nodes into regions that become one kernel each."
    after: ClassVar[tuple[str, ...]] = ("pack-weights", "move-integers")

    def propose(self, program: Program, context: PassContext) -> Iterator[Candidate | Decline]:
        def pointwise(node: ir.Node) -> bool:
            spec = context.ops.get(node)
            return spec is not None and spec.pointwise

        for found in find_regions(program, context.capabilities.fusions, pointwise):
            if isinstance(found, Decline):
                yield found
                continue
            yield Candidate(
                site=found.anchor,
                choice=found.choice,
                rewrite=partial(fuse, region=found),
                exact=True,
                nodes=(*found.prologue, *found.nodes),
                note=found.note,
            )


def find_regions(
    program: Program, kinds: Iterable[str], pointwise: Callable[[ir.Node], bool]
) -> Iterator[Found]:
    """Disjoint regions of the wanted kinds, and what was left alone with the reason.

    `pointwise` says whether an operator works element by element.
    """
    finder = Finder(program, pointwise)
    wanted = frozenset(kinds)
    for kind, match in _MATCHERS.items():
        if kind not in wanted:
            continue
        for node in program.graph:
            if finder.free(node):
                found = match(finder, node)
                if found is not None:
                    yield found


def _contraction(finder: Finder, anchor: ir.Node) -> Found | None:
    if not is_op(anchor, *CONTRACTIONS):
        return None
    chain = finder.grow(anchor.outputs[0])
    nodes = [anchor, *chain.nodes]
    if len(nodes) == 1 and not finder.prologue(nodes):
        return Decline(str(anchor.name), f"nothing to fuse: {chain.stop}.", (str(anchor.name),))
    return finder.region("contraction", anchor, nodes, chain.stop)


def _normalization(finder: Finder, anchor: ir.Node) -> Found | None:
    if is_op(anchor, *NORMALIZATIONS) and _only_first_output(anchor):
        nodes = [anchor]
    elif is_op(anchor, "ReduceMean"):
        nodes = _spelled_out_normalization(finder, anchor)
        if not nodes:
            return None
    else:
        return None
    chain = finder.grow(nodes[-1].outputs[0])
    alone = len(nodes) == 1
    nodes += chain.nodes
    _absorb_before(finder, nodes, anchor)
    if alone and len(nodes) == 1 and not finder.prologue(nodes):
        return Decline(str(anchor.name), f"nothing to fuse: {chain.stop}.", (str(anchor.name),))
    return finder.region("normalization", anchor, nodes, chain.stop)


def _softmax(finder: Finder, anchor: ir.Node) -> Found | None:
    if not is_op(anchor, *SOFTMAXES):
        return None
    chain = finder.grow(anchor.outputs[0])
    nodes = [anchor, *chain.nodes]
    _absorb_before(finder, nodes, anchor)
    if len(nodes) == 1 and not finder.prologue(nodes):
        return Decline(str(anchor.name), f"nothing to fuse: {chain.stop}.", (str(anchor.name),))
    return finder.region("softmax", anchor, nodes, chain.stop)


def _pointwise(finder: Finder, anchor: ir.Node) -> Found | None:
    if not finder.pointwise(anchor) or anchor.outputs[0].shape is None:
        return None
    chain = finder.grow(anchor.outputs[0])
    nodes = [anchor, *chain.nodes]
    finder.absorb(nodes, chain.end)
    if len(nodes) == 1 and not finder.prologue(nodes):
        return Decline(str(anchor.name), f"nothing to fuse: {chain.stop}.", (str(anchor.name),))
    return finder.region("pointwise", anchor, nodes, chain.stop)


def _attention(finder: Finder, softmax: ir.Node) -> Found | None:
    """MatMul → scale, mask → Softmax → MatMul; the anchor is the second MatMul."""
    if not is_op(softmax, "Softmax"):
        return None
    scores = _scores(finder, softmax)
    if scores is None:
        return None
    if isinstance(scores, str):
        return Decline(str(softmax.name), f"no attention: {scores}.", (str(softmax.name),))
    chain = finder.grow(softmax.outputs[0], through=True)
    product = sole_consumer(chain.end)
    if product is None or not is_op(product, "MatMul") or product.inputs[0] is not chain.end:
        # A chain that ends in QuantizeLinear belongs to the consumer of the quantised value.
        reason = "its result does not feed one MatMul as the first operand"
        return Decline(str(softmax.name), f"no attention: {reason}.", (str(softmax.name),))
    if not finder.free(product):
        return None
    nodes = [*scores, softmax, *chain.nodes, product]
    for operand in (*scores[0].inputs, product.inputs[1]):
        nodes += _operand_chain(finder, operand)
    result = product.outputs[0]
    after = sole_consumer(result)
    if after is not None and is_op(after, "Transpose") and finder.free(after):
        nodes.append(after)
        result = after.outputs[0]
    tail = finder.grow(result)
    nodes += tail.nodes
    last = sole_consumer(tail.end)
    moved = last is not None and is_op(last, "Transpose") and finder.free(last)
    if last is not None and moved and tail.nodes and result is product.outputs[0]:
        nodes.append(last)
    return finder.region("attention", product, nodes, tail.stop)


_MATCHERS: dict[str, Callable[[Finder, ir.Node], Found | None]] = {
    "attention": _attention,
    "contraction": _contraction,
    "normalization": _normalization,
    "softmax": _softmax,
    "pointwise": _pointwise,
}


def _only_first_output(node: ir.Node) -> bool:
    return not any(v.uses() or v.is_graph_output() for v in node.outputs[1:])


def _absorb_before(finder: Finder, nodes: list[ir.Node], anchor: ir.Node) -> None:
    """Take pointwise producers of the anchor's data that nothing else reads."""
    data = anchor.inputs[0]
    if data is not None:
        finder.absorb(nodes, data)


def _scores(finder: Finder, softmax: ir.Node) -> list[ir.Node] | str | None:
    """Nodes from the first MatMul of an attention up to its Softmax; a near miss; or nothing."""
    nodes: list[ir.Node] = []
    value = softmax.inputs[0]
    while value is not None:
        producer = value.producer()
        if producer is None or not finder.free(producer):
            return None
        if sole_consumer(value) is None:
            return f"{value.name!r} is read more than once"
        nodes.append(producer)
        if is_op(producer, "MatMul"):
            return nodes[::-1]
        if is_op(producer, QUANTIZE, DEQUANTIZE):
            value = producer.inputs[0]
        elif finder.pointwise(producer):
            result = producer.outputs[0]
            value = next((v for v in producer.inputs if _leads_back(v, result)), None)
        else:
            return None
    return None


def _leads_back(value: ir.Value | None, result: ir.Value) -> bool:
    return value is not None and value.producer() is not None and same_shape(value, result)


def _operand_chain(finder: Finder, value: ir.Value | None) -> list[ir.Node]:
    """Transposes and scalar factors that make an operand of attention and feed nothing else."""
    nodes: list[ir.Node] = []
    while value is not None and sole_consumer(value) is not None:
        node = value.producer()
        if node is None or not finder.free(node):
            break
        if is_op(node, "Transpose"):  # noqa: SIM114
            value = node.inputs[0]
        elif is_op(node, DEQUANTIZE) and _transposed(finder, node.inputs[0]):
            value = node.inputs[0]
        elif is_op(node, "Mul") and any(is_scalar(v) for v in node.inputs):
            value = next((v for v in node.inputs if not is_scalar(v)), None)
        elif is_op(node, "Div") and is_scalar(node.inputs[1]):
            value = node.inputs[0]
        else:
            break
        nodes.append(node)
    return nodes


def _transposed(finder: Finder, value: ir.Value | None) -> bool:
    """Whether a Transpose, which may join the region, makes the value for one reader."""
    if value is None or sole_consumer(value) is None:
        return False
    producer = value.producer()
    return is_op(producer, "Transpose") and finder.free(producer)


def _spelled_out_normalization(finder: Finder, mean: ir.Node) -> list[ir.Node]:
    """The nodes of a normalisation written with ReduceMean, or none.

    LayerNorm: m = ReduceMean(x); d = x - m; v = ReduceMean(d * d); y = d / Sqrt(v + eps).
    RMSNorm: v = ReduceMean(x * x); y = x / Sqrt(v + eps).
    """
    if not _keeps_last_axes(mean):
        return []
    squared = mean.inputs[0].producer() if mean.inputs[0] is not None else None
    data = _squared_operand(squared)
    nodes: list[ir.Node] = []
    if data is not None and squared is not None and sole_consumer(squared.outputs[0]) is mean:
        nodes, variance = [squared, mean], mean
    else:
        centred = sole_consumer(mean.outputs[0])
        if not is_op(centred, "Sub") or centred is None:
            return []
        if centred.inputs[0] is not mean.inputs[0]:
            return []
        data = centred.outputs[0]
        squared = next((n for n, _ in data.uses() if _squared_operand(n) is data), None)
        variance = sole_consumer(squared.outputs[0]) if squared is not None else None
        if squared is None or not is_op(variance, "ReduceMean") or variance is None:
            return []
        if not _keeps_last_axes(variance):
            return []
        nodes = [mean, centred, squared, variance]
    scaled = _divided_by_deviation(data, variance)
    if not scaled:
        return []
    nodes += scaled
    members = set(nodes)
    if not all(finder.free(n) for n in nodes):
        return []
    inner = [v for n in nodes[:-1] for v in n.outputs]
    if any(v.is_graph_output() or any(n not in members for n, _ in v.uses()) for v in inner):
        return []
    return nodes


def _keeps_last_axes(node: ir.Node) -> bool:
    """Whether a ReduceMean keeps its rank and reduces known axes."""
    keep = node.attributes.get("keepdims")
    if keep is not None and keep.as_int() == 0:
        return False
    if "axes" in node.attributes:
        return True
    return len(node.inputs) > 1 and is_constant(node.inputs[1])


def _squared_operand(node: ir.Node | None) -> ir.Value | None:
    """x of Pow(x, 2) and Mul(x, x)."""
    if node is not None and is_op(node, "Mul") and node.inputs[0] is node.inputs[1]:
        return node.inputs[0]
    if node is not None and is_op(node, "Pow") and is_scalar(node.inputs[1]):
        exponent = constant(node.inputs[1])
        if exponent is not None and float(exponent.reshape(())) == 2.0:
            return node.inputs[0]
    return None


def _divided_by_deviation(data: ir.Value, variance: ir.Node) -> list[ir.Node]:
    """Add(eps), Sqrt and Div (or Reciprocal or Pow(-0.5), and Mul) that end in data / deviation."""
    nodes: list[ir.Node] = []
    value = variance.outputs[0]
    for _ in range(4):
        node = sole_consumer(value)
        if node is None:
            return []
        nodes.append(node)
        if is_op(node, "Div") and node.inputs[0] is data and node.inputs[1] is value:
            return nodes
        if is_op(node, "Mul") and data in node.inputs:
            return nodes
        if not is_op(node, "Add", "Sqrt", "Reciprocal", "Pow", "Div"):
            return []
        if not all(v is value or is_scalar(v) for v in node.inputs):
            return []
        value = node.outputs[0]
    return []
