"""Shorthand that the operator families share to declare an `OpSpec`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import onnx_ir as ir

from optcompiler.ops.channels import CHANNEL_RULES
from optcompiler.ops.spec import CostRule, FactsRule, OpSpec, TorchMeaning, TypeLookup


def op(
    op_type: str,
    torch: TorchMeaning,
    cost: CostRule,
    *,
    since: int = 1,
    pointwise: bool = False,
    static: Iterable[int] = (),
    facts: FactsRule | None = None,
    levels: Literal["integers", "moves", "consumes"] = "integers",
    domain: str = "",
) -> OpSpec:
    """An `OpSpec` whose channel rule is the one `CHANNEL_RULES` has for the operator, if any."""
    return OpSpec(
        op_type,
        torch,
        cost,
        channels=CHANNEL_RULES.get(op_type) if domain == "" else None,
        domain=domain,
        since=since,
        pointwise=pointwise,
        static=frozenset(static),
        facts=facts,
        levels=levels,
    )


def output_count(node: ir.Node, type_of: TypeLookup) -> Mapping[str, Any]:
    """How many outputs the node has, as the keyword `outputs`."""
    return {"outputs": len(node.outputs)}
