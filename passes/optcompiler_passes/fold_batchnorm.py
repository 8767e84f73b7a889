"""fold-batchnorm: batch normalisation and per-channel arithmetic move into weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optcompiler.errors import Declined
from optcompiler.program import Program, constant
from optcompiler.rewriting import Candidate, Decline, Pass, PassContext, Stage
from optcompiler_passes._linear import Linear, linear, per_channel, scale_inputs, scale_outputs
from optcompiler_passes._regions import is_constant, is_op, sole_consumer

BATCHNORM = "BatchNormalization"
ARITHMETIC = ("Mul", "Div", "Add", "Sub")
MOVEMENT = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity")


@dataclass(frozen=True)
class Affine:
    """y = scale · x + shift with x = `data`: a node's arithmetic with constants, not yet shaped."""

    node: ir.Node
    data: ir.Value
    scale: np.ndarray
    shift: np.ndarray | None


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold BatchNormalization, and Mul, Div, Add and Sub by constants per channel, into weights.

        c = Conv(x, w, b)                              y = Conv(x, w·s, b·s + t)
        y = BatchNormalization(c, g, h, m, v)    →     with s = g / sqrt(v + eps), t = h - m·s

    1. After Conv, ConvTranspose, Gemm or MatMul with bias: into that contraction's weights and
       bias. A Mul or Div by one number is also folded through Reshape and Transpose, so the scale
       of an attention ends in the weights of its projections.
    2. BatchNormalization before a Conv without padding, or before a Gemm: into that one.
    3. Any other BatchNormalization becomes Mul and Add per channel, where the backend fuses
       pointwise nodes; else it stays.
    4. Arithmetic is done in float64 and rounded once. A weight that another node reads is copied.

    Declines when the contraction's result is read elsewhere or is an output, when weights or
    statistics are not constant, in training mode, and when the variance is not positive.
    The result keeps its name; the contraction keeps its node name.
    """

    name: ClassVar[str] = "fold-batchnorm"
    stage: ClassVar[Stage] = Stage.CLEAN
    summary: ClassVar[str] = "Fold batch normalisation and per-channel arithmetic into weights."
    after: ClassVar[tuple[str, ...]] = ("simplify",)

    def propose(self, program: Program, context: PassContext) -> Iterator[Candidate | Decline]:
        separate = bool({"pointwise", "contraction"} & context.capabilities.fusions)
        promised: set[ir.Node] = set()
        for node in program.graph:
            found = _look(node, promised, separate)
            if isinstance(found, Candidate):
                promised.add(node)
            if found is not None:
                yield found


def _look(node: ir.Node, promised: set[ir.Node], separate: bool) -> Candidate | Decline | None:
    """What to do with one node; nodes in `promised` are taken to be folded by then."""
    name = str(node.name)
    affine = _affine(node)
    if affine is None:
        return None
    if isinstance(affine, str):
        return Decline(name, affine, (name,))
    target = _target(affine, promised)
    if isinstance(target, Linear):
        return Candidate(
            site=name,
            choice=f"into {target.label}",
            rewrite=partial(_fold_after, name),
            exact=True,
            nodes=(str(target.node.name), name),
        )
    if not is_op(node, BATCHNORM):
        return Decline(name, target, (name,)) if target else None
    following = _following(affine)
    if isinstance(following, Linear):
        return Candidate(
            site=name,
            choice=f"into {following.label}",
            rewrite=partial(_fold_before, name),
            exact=True,
            nodes=(name, str(following.node.name)),
        )
    reason = target or following
    if separate:
        return Candidate(
            site=name,
            choice="Mul and Add",
            rewrite=partial(_separate, name),
            exact=True,
            nodes=(name,),
            note=f"not folded: {reason}",
        )
    return Decline(name, f"{reason}.", (name,))


def _affine(node: ir.Node) -> Affine | str | None:
    """The scale and shift of a node, why it has none, or None for other operators."""
    if is_op(node, BATCHNORM):
        return _batchnorm(node)
    if not is_op(node, *ARITHMETIC):
        return None
    first, second = node.inputs
    if first is None or second is None or is_constant(first) == is_constant(second):
        return None
    data, value = (second, first) if is_constant(first) else (first, second)
    array = constant(value)
    if array is None or array.dtype.kind in "biu" or array.size == 0:
        return None
    wide = array.astype(np.float64)
    one = np.ones(())
    if node.op_type == "Mul":
        return Affine(node, data, wide, None)
    if node.op_type == "Div":
        if data is second or (wide == 0).any():
            return None
        return Affine(node, data, 1.0 / wide, None)
    if node.op_type == "Add":
        return Affine(node, data, one, wide)
    return Affine(node, data, -one, wide) if data is second else Affine(node, data, one, -wide)


def _batchnorm(node: ir.Node) -> Affine | str:
    data = node.inputs[0]
    if data is None or data.shape is None:
        return "the rank of its operand is unknown."
    training = node.attributes.get("training_mode")
    if (training is not None and training.as_int()) or len(node.outputs) > 1:
        return "it is in training mode."
    if not all(is_constant(v) for v in node.inputs[1:]):
        return "its statistics or parameters are not constant."
    gamma, beta, mean, variance = (_wide(v) for v in node.inputs[1:])
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    if (variance + epsilon <= 0).any():
        worst = float((variance + epsilon).min())
        return f"variance + epsilon is {worst:g}; the checkpoint is broken."
    scale = gamma / np.sqrt(variance + epsilon)
    shape = (-1, *(1,) * (len(data.shape) - 2))
    return Affine(node, data, scale.reshape(shape), (beta - mean * scale).reshape(shape))


def _wide(value: ir.Value | None) -> np.ndarray:
    array = constant(value)
    assert array is not None
    return array.astype(np.float64)


def _target(affine: Affine, promised: set[ir.Node]) -> Linear | str:
    """The contraction whose result `affine` scales; or why it cannot be folded; "" when none."""
    value = affine.data
    scalar = affine.shift is None and affine.scale.size == 1
    while True:
        producer = value.producer()
        passes = producer is not None and (
            producer in promised or (scalar and is_op(producer, *MOVEMENT))
        )
        found = None if passes else linear(producer)
        if found is None and not passes:
            return ""
        if isinstance(found, str):
            return f"{found}."
        if sole_consumer(value) is not (affine.node if value is affine.data else _reader(value)):
            where = found.label if found is not None else f"{producer.op_type} {producer.name!r}"  # type: ignore[union-attr]
            return f"the result {value.name!r} of {where} is also read elsewhere or is an output."
        if found is not None:
            break
        assert producer is not None
        passed = _affine(producer) if producer in promised else None
        ahead = passed.data if isinstance(passed, Affine) else producer.inputs[0]
        if ahead is None:
            return ""
        value = ahead
    if found.last is found.node and is_op(found.node, "MatMul") and affine.shift is not None:
        return ""
    if _channelwise(affine, found) is None:
        return f"its constant is not one number per channel of {found.label}."
    return found


def _reader(value: ir.Value) -> ir.Node | None:
    return next((n for n, _ in value.uses()), None)


def _channelwise(affine: Affine, target: Linear) -> tuple[np.ndarray, np.ndarray | None] | None:
    rank = target.axis + 1
    result = target.last.outputs[0]
    if result.shape is not None:
        rank = len(result.shape)
    scale = per_channel(affine.scale, rank, target.axis, target.channels)
    if scale is None:
        return None
    if affine.shift is None:
        return scale, None
    shift = per_channel(affine.shift, rank, target.axis, target.channels)
    return None if shift is None else (scale, shift)


def _following(affine: Affine) -> Linear | str:
    """The Conv or Gemm that alone reads a BatchNormalization, or why it cannot take it in."""
    result = affine.node.outputs[0]
    node = sole_consumer(result)
    if node is None or not is_op(node, "Conv", "Gemm") or node.inputs[0] is not result:
        return "no contraction is next to it"
    found = linear(node)
    if not isinstance(found, Linear):
        return found or "no contraction is next to it"
    if is_op(node, "Gemm"):
        transposed = "transA" in node.attributes and node.attributes["transA"].as_int()
        return f"{found.label} transposes it" if transposed else found
    pads = node.attributes["pads"].as_ints() if "pads" in node.attributes else ()
    auto = node.attributes["auto_pad"].as_string() if "auto_pad" in node.attributes else "NOTSET"
    if any(pads) or auto not in ("NOTSET", "VALID"):
        return f"{found.label} pads its input with zeros"
    return found


def _site(program: Program, name: str) -> Affine:
    node = program.node(name)
    affine = _affine(node) if node is not None else None
    if not isinstance(affine, Affine):
        raise Declined(affine or f"node {name!r} is gone.")
    return affine


def _fold_after(name: str, program: Program) -> None:
    affine = _site(program, name)
    target = _target(affine, set())
    if not isinstance(target, Linear):
        raise Declined(target or f"{name!r} no longer follows a contraction.")
    channels = _channelwise(affine, target)
    assert channels is not None
    scale_outputs(program, target, *channels)
    _remove(program, affine)


def _remove(program: Program, affine: Affine) -> None:
    """Take the node out; the value it read is now called what its result was called."""
    data, result = affine.data, affine.node.outputs[0]
    name, type_, shape = result.name, result.type, result.shape
    ir.convenience.replace_all_uses_with(result, data, replace_graph_outputs=True)
    program.discard(affine.node)
    data.name, data.type, data.shape = name, type_, shape


def _fold_before(name: str, program: Program) -> None:
    affine = _site(program, name)
    target = _following(affine)
    if not isinstance(target, Linear):
        raise Declined(f"{target}.")
    assert affine.shift is not None
    scale_inputs(program, target, affine.scale.reshape(-1), affine.shift.reshape(-1))
    target.node.replace_input_with(0, affine.data)
    program.discard(affine.node)


def _separate(name: str, program: Program) -> None:
    affine = _site(program, name)
    result, parameters = affine.node.outputs[0], affine.node.inputs[1:]
    assert affine.data.dtype is not None
    assert affine.shift is not None
    dtype = affine.data.dtype.numpy()
    factor = program.add_weight(f"{name}.scale", affine.scale.astype(dtype))
    term = program.add_weight(f"{name}.shift", affine.shift.astype(dtype))
    scaled = ir.Value(
        name=program.fresh_name(f"{result.name}.scaled"), type=result.type, shape=result.shape
    )
    made = ir.Value(name=result.name, type=result.type, shape=result.shape)
    nodes = [
        ir.Node(
            "", "Mul", [affine.data, factor], outputs=[scaled],
            name=program.fresh_name(f"{name}.mul"), metadata_props=dict(affine.node.metadata_props),
        ),
        ir.Node(
            "", "Add", [scaled, term], outputs=[made],
            name=program.fresh_name(f"{name}.add"), metadata_props=dict(affine.node.metadata_props),
        ),
    ]  # fmt: skip
    ir.convenience.replace_nodes_and_values(
        program.graph, affine.node, [affine.node], nodes, [result], [made]
    )
    for parameter in dict.fromkeys(v for v in parameters if v is not None):
        program.forget(parameter)
