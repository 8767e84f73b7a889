"""hard-activations: piecewise stand-ins for activations that need an exponential."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import onnx_ir as ir

from optcompiler import Candidate, Decline, Declined, Pass, PassContext, Program, Stage

HARDSWISH_SINCE = 14
"""First operator set with HardSwish."""


@dataclass(frozen=True)
class HardActivations(Pass):
    """Offer HardSigmoid for Sigmoid, and HardSwish for x · sigmoid(x), Swish and Gelu.

        s = Sigmoid(x)                 y = HardSwish(x)
        y = Mul(x, s)           →

    1. HardSigmoid(x) = max(0, min(1, x / 6 + 1 / 2)); HardSwish(x) = x · HardSigmoid(x)
       (Howard et al., "Searching for MobileNetV3", 2019, §5.2).
    2. Each site is a candidate of its own and an approximation: the core measures what it damages,
       and takes it only when the saving is worth that under the budget.

    Declines a Sigmoid that makes an output of the program (probabilities would saturate), a
    `x · sigmoid(x)` whose sigmoid is read elsewhere too, a Swish with another slope than 1, types
    without a HardSwish, and operator sets before 14. `kinds` narrows what is looked for.
    """

    name: ClassVar[str] = "hard-activations"
    stage: ClassVar[Stage] = Stage.REDUCE
    summary: ClassVar[str] = "HardSigmoid and HardSwish in place of Sigmoid, Swish and Gelu."

    kinds: tuple[str, ...] = ("sigmoid", "swish", "gelu")

    def propose(self, program: Program, context: PassContext) -> Iterator[Candidate | Decline]:
        for node in program.graph:
            kind = _kind(node)
            if kind not in self.kinds:
                continue
            name = str(node.name)
            reason = _objection(program, node, kind)
            if reason:
                yield Decline(name, reason, (name,))
                continue
            gate = _gate(node)
            yield Candidate(
                site=name,
                choice="HardSigmoid" if kind == "sigmoid" else "HardSwish",
                rewrite=partial(_replace, name),
                exact=False,
                nodes=(name,) if gate is None else (str(gate.name), name),
            )


def _is(node: ir.Node | None, op_type: str) -> bool:
    return node is not None and node.domain == "" and node.op_type == op_type


def _kind(node: ir.Node) -> str:
    """ "sigmoid", "swish" or "gelu", by the node that makes the result; "" for other nodes."""
    if _is(node, "Gelu"):
        return "gelu"
    if _is(node, "Swish") or _gate(node) is not None:
        return "swish"
    if _is(node, "Sigmoid") and not any(_gate(n) is node for n, _ in node.outputs[0].uses()):
        return "sigmoid"
    return ""


def _gate(node: ir.Node) -> ir.Node | None:
    """The Sigmoid(x) of Mul(x, Sigmoid(x))."""
    if not _is(node, "Mul"):
        return None
    for data, other in (node.inputs, node.inputs[::-1]):
        sigmoid = other.producer() if other is not None else None
        if sigmoid is not None and _is(sigmoid, "Sigmoid") and sigmoid.inputs[0] is data:
            return sigmoid
    return None


def _objection(program: Program, node: ir.Node, kind: str) -> str:
    """Why the site is left alone, or nothing."""
    value = node.outputs[0]
    if program.opset < HARDSWISH_SINCE:
        return f"operator set {program.opset} has no HardSwish; it came with {HARDSWISH_SINCE}."
    if value.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE):
        dtype = value.dtype.name.lower() if value.dtype is not None else "of unknown type"
        return f"its result is {dtype}; HardSwish has float, float16 and double."
    if kind == "sigmoid" and value.is_graph_output():
        return f"it makes the output {value.name!r}; probabilities would saturate at 0 and 1."
    gate = _gate(node)
    if gate is not None and (len(gate.outputs[0].uses()) > 1 or gate.outputs[0].is_graph_output()):
        return f"its sigmoid {gate.outputs[0].name!r} is also read elsewhere."
    alpha = node.attributes.get("alpha")
    if _is(node, "Swish") and alpha is not None and alpha.as_float() != 1.0:
        return f"its slope is {alpha.as_float():g}; HardSwish has 1."
    return ""


def _replace(name: str, program: Program) -> None:
    """Put the piecewise activation where the node `name` stands; it keeps the name."""
    node = program.node(name)
    kind = _kind(node) if node is not None else ""
    if node is None or not kind:
        raise Declined(f"{name!r} is no longer a smooth activation.")
    gate = _gate(node)
    data = gate.inputs[0] if gate is not None else node.inputs[0]
    old = node.outputs[0]
    made = ir.Value(name=old.name, type=old.type, shape=old.shape)
    attributes = [ir.AttrFloat32("alpha", 1 / 6), ir.AttrFloat32("beta", 0.5)]
    hard = ir.Node(
        "",
        "HardSigmoid" if kind == "sigmoid" else "HardSwish",
        [data],
        attributes if kind == "sigmoid" else [],
        outputs=[made],
        name=name,
        metadata_props=dict(node.metadata_props),
    )
    ir.convenience.replace_nodes_and_values(program.graph, node, [node], [hard], [old], [made])
    program.sweep()
