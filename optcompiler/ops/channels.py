"""How the channels of each ONNX operator's operands live and die together."""

from __future__ import annotations

import onnx_ir as ir

from optcompiler.ops.spec import Axis, ChannelRule, Channels, Coupling

CHANNEL_RULES: dict[str, ChannelRule] = {}
"""Channel rule by operator type of the default domain; an operator without one pins its axes."""


def pointwise(node: ir.Node) -> Channels | None:
    """Unary and broadcasting operators: equal extents of aligned axes are one."""
    out = node.outputs[0]
    if out.shape is None:
        return None
    couplings: list[Coupling] = []
    for value in node.inputs:
        if value is None:
            continue
        if value.shape is None:
            return None
        lead = len(out.shape) - len(value.shape)
        for axis, extent in enumerate(value.shape):
            if extent == out.shape[lead + axis]:
                couplings.append(Coupling(Axis(value, axis), Axis(out, lead + axis)))
    return Channels(tuple(couplings))


CHANNEL_RULES |= dict.fromkeys(("Add", "Sub", "Mul", "Div", "Relu", "Sigmoid", "Tanh"), pointwise)
