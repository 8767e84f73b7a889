"""Cost rules: what a node's shapes say about its work. A symbolic dimension counts as 1."""

from __future__ import annotations

from math import prod

import onnx_ir as ir

from optcompiler.ops.spec import CostRule, Work, tensor_bytes

CHEAP = 1
"""Weight in flops of an addition, a comparison, a clamp."""
DIVISION = 8
"""Weight in flops of a division or a square root."""
TRANSCENDENTAL = 12
"""Weight in flops of an exponential, a logarithm, a hyperbolic tangent or an error function."""


def dims(value: ir.Value | None) -> tuple[int, ...]:
    """The shape with 1 for every symbolic dimension; () when unknown."""
    if value is None or value.shape is None:
        return ()
    return tuple(d if isinstance(d, int) else 1 for d in value.shape)


def elements(value: ir.Value | None) -> int:
    """Number of elements, symbolic dimensions counted as 1; 0 for an absent value."""
    return 0 if value is None else prod(dims(value))


def is_weight(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None


def traffic(node: ir.Node, *, macs: int = 0, flops: int = 0) -> Work:
    """Work with every input read once and every output written once."""
    return Work(
        macs=macs,
        flops=flops,
        bytes_read=tensor_bytes([v for v in node.inputs if not is_weight(v)]),
        bytes_written=tensor_bytes(node.outputs),
        weight_bytes=tensor_bytes([v for v in node.inputs if is_weight(v)]),
    )


def pointwise_cost(weight: int = CHEAP) -> CostRule:
    """`weight` flops for each element of the first output."""

    def cost(node: ir.Node) -> Work:
        return traffic(node, flops=weight * elements(node.outputs[0]))

    return cost


def variadic_cost(node: ir.Node) -> Work:
    """One flop for each element of the output and each operand."""
    return traffic(node, flops=max(len(node.inputs) - 1, 0) * elements(node.outputs[0]))


def reading_cost(weight: int = CHEAP) -> CostRule:
    """`weight` flops for each element of the first input: reductions, normalisations."""

    def cost(node: ir.Node) -> Work:
        return traffic(node, flops=weight * elements(node.inputs[0] if node.inputs else None))

    return cost


def movement_cost(node: ir.Node) -> Work:
    """No arithmetic; every byte of the outputs is read and written once."""
    written = tensor_bytes(node.outputs)
    weights = tensor_bytes([v for v in node.inputs if is_weight(v)])
    return Work(bytes_read=written, bytes_written=written, weight_bytes=min(weights, written))


def free_cost(node: ir.Node) -> Work:
    """A view of its input: nothing moves."""
    return Work()


def _attribute(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None or attribute.is_ref() else int(attribute.value)


def conv_cost(node: ir.Node) -> Work:
    """N * M * (C / group) * prod(kernel) * prod(spatial output) multiply-accumulates."""
    out = elements(node.outputs[0])
    kernel = prod(dims(node.inputs[1])[1:])
    bias = out if len(node.inputs) > 2 and node.inputs[2] is not None else 0
    return traffic(node, macs=out * kernel, flops=bias)


def conv_transpose_cost(node: ir.Node) -> Work:
    """Every element of the input meets every tap of its group's kernels."""
    taps = prod(dims(node.inputs[1])[1:])
    return traffic(node, macs=elements(node.inputs[0]) * taps)


def qlinear_conv_cost(node: ir.Node) -> Work:
    """As `conv_cost`; the weight is input 3."""
    out = elements(node.outputs[0])
    return traffic(node, macs=out * prod(dims(node.inputs[3])[1:]), flops=4 * out)


def matmul_cost(node: ir.Node) -> Work:
    """Elements of the output times the length of the contracted axis."""
    inner = dims(node.inputs[0])[-1:]
    return traffic(node, macs=elements(node.outputs[0]) * prod(inner))


def gemm_cost(node: ir.Node) -> Work:
    """M * N * K multiply-accumulates, and one flop for each element of the bias sum."""
    a = dims(node.inputs[0])
    inner = a[0 if _attribute(node, "transA", 0) else 1] if len(a) == 2 else 1
    out = elements(node.outputs[0])
    bias = out if len(node.inputs) > 2 and node.inputs[2] is not None else 0
    return traffic(node, macs=out * inner, flops=bias)


def einsum_cost(node: ir.Node) -> Work:
    """The product of the lengths of all letters, for each pair of operands contracted."""
    attribute = node.attributes.get("equation")
    equation = str(attribute.value) if attribute is not None else ""
    left = equation.replace(" ", "").split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, value in zip(left, node.inputs, strict=False):
        letters = term.replace("...", "")
        shape = dims(value)
        sizes |= dict(zip(letters, shape[len(shape) - len(letters) :], strict=False))
    return traffic(node, macs=prod(sizes.values()) * max(len(left) - 1, 1))


def pooling_cost(node: ir.Node) -> Work:
    """One flop for each element of the output and each tap of the window."""
    attribute = node.attributes.get("kernel_shape")
    taps = prod(attribute.as_ints()) if attribute is not None else 1
    return traffic(node, flops=taps * elements(node.outputs[0]))


def attention_cost(node: ir.Node) -> Work:
    """Two contractions over queries times keys, and a softmax over the scores.

    3-D inputs are [batch, length, heads * size], 4-D ones [batch, heads, length, size].
    """
    query, key, value = (dims(v) for v in node.inputs[:3])
    if len(query) not in (3, 4) or len(key) != len(query) or len(value) != len(query):
        return traffic(node)
    heads = _attribute(node, "q_num_heads", 1) if len(query) == 3 else query[1]
    past = dims(node.inputs[4])[2] if len(node.inputs) > 4 and node.inputs[4] is not None else 0
    length = key[-2] + past
    kv_heads = _attribute(node, "kv_num_heads", heads) if len(query) == 3 else key[1]
    width = value[-1] // kv_heads * heads if len(query) == 3 else value[-1] * heads
    depth = query[-1] if len(query) == 3 else query[-1] * heads
    scores = query[0] * query[-2] * length
    return traffic(
        node,
        macs=scores * (depth + width),
        flops=scores * heads * (TRANSCENDENTAL + DIVISION),
    )


def recurrent_cost(node: ir.Node) -> Work:
    """Both weight matrices once for each step and batch element."""
    steps = prod(dims(node.inputs[0])[:2])
    macs = steps * (elements(node.inputs[1]) + elements(node.inputs[2]))
    gates = elements(node.inputs[1]) // max(dims(node.inputs[1])[-1:] or (1,))
    return traffic(node, macs=macs, flops=steps * gates * TRANSCENDENTAL)
