"""Scales of a quantised program after its values or weights changed, and which values did."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable

import numpy as np
import onnx_ir as ir

from optcompiler.errors import Declined, InputError
from optcompiler.observers import Observer, builtin_observers, observe
from optcompiler.program import Program, constant
from optcompiler.quantization import (
    FLOAT8,
    INTEGER_RANGES,
    QuantizationScheme,
    quantize_array,
    spread,
    weight_scales,
)
from optcompiler.rewriting import PassContext
from optcompiler_passes._blocks import block_scales
from optcompiler_passes._qdq import dequantizer, laid_out, quantized_source

RESCALED_KEY = "optcompiler.rescaled"
"""Metadata key of a value whose channels are not those of the teacher's value of that name, but
those divided by the factors that it holds, as JSON: a list of (axis, factors)."""


def observer_of(name: str, pass_name: str, context: PassContext) -> type[Observer]:
    """The observer with this name; raises `InputError` in the name of a pass that takes it."""
    available = {o.name: o for o in builtin_observers()} | dict(context.observers)
    if name not in available:
        raise InputError(
            f"{pass_name}: observer {name!r} is not known; "
            f"take one of {', '.join(sorted(available))}."
        )
    return available[name]


# -- the float program ----------------------------------------------------------------------


def without_pairs(program: Program) -> Program:
    """A copy in which what is quantised and dequantised again is read as it was before.

    Nodes and values keep their names, and integers that are stored stay.
    """
    copy = program.clone()
    for node in tuple(copy.graph):
        if node.op_type != "DequantizeLinear" or node.outputs[0].is_graph_output():
            continue
        source = quantized_source(node.outputs[0])
        if source is not None:
            node.outputs[0].replace_all_uses_with(source)
    copy.sweep()
    return copy


def take_weights(program: Program, changed: Program) -> list[str]:
    """Give `program` the initializers of `changed`, which was made by `without_pairs`.

    Names of the values whose contents changed.
    """
    found: list[str] = []
    for node in changed.graph:
        mine = program.node(str(node.name))
        for index, value in enumerate(node.inputs):
            array = constant(value)
            if value is None or array is None or mine is None:
                continue
            held = quantized_source(mine.inputs[index]) or mine.inputs[index]
            if held is None or held.const_value is None or held.const_value is value.const_value:
                continue
            if held.name == value.name:
                program.set_weight(held, array)
            elif np.array_equal(array, held.const_value.numpy()):
                continue
            else:
                held = program.add_weight(str(value.name), np.array(array))
                mine.replace_input_with(index, held)
            found.append(str(held.name))
    return found


# -- scales ---------------------------------------------------------------------------------


def refresh_scales(
    program: Program,
    values: Collection[str],
    readers: Iterable[str],
    context: PassContext,
    make: Callable[[], Observer],
    weight_observer: str = "mse",
) -> None:
    """Compute anew the scales of the pairs on `values`, and of the weights of nodes `readers`.

    Ranges of activations are those of the float program on the calibration and hold-out batches;
    of pairs that share a scale the first one's value counts. Types, axes and blocks stay, and so
    does the symmetry of activations. Weights, which have to be symmetric, get scales large enough
    for a bias to fit 32 bits.
    """
    _refresh_activations(program, values, context, make)
    for name in readers:
        node = program.node(name)
        if node is not None and len(node.inputs) > 1:
            _refresh_weight(node, program, weight_observer)


def _refresh_activations(
    program: Program, values: Collection[str], context: PassContext, make: Callable[[], Observer]
) -> None:
    quantisers: dict[str, list[ir.Node]] = {}
    for node in program.graph:
        if node.op_type != "QuantizeLinear" or constant(node.inputs[1]) is None:
            continue
        if laid_out(node.inputs[0]) is None:
            quantisers.setdefault(str(node.inputs[1].name), []).append(node)  # type: ignore[union-attr]
    sharing = [g for g in quantisers.values() if any(_source(n).name in values for n in g)]
    if not sharing:
        return
    names = sorted({str(_source(group[0]).name) for group in sharing})
    batches = [*context.calibration, *context.holdout]
    observers = observe(without_pairs(program), names, batches, make, context.ops)
    for group in sharing:
        scheme = QuantizationScheme(levels_of(group[0]), symmetric=is_symmetric(group[0]))
        observer = observers[str(_source(group[0]).name)]
        low, high = observer.range(scheme.range_bits, scheme.symmetric)
        scale, zero = scheme.parameters(low, high)
        held = group[0].inputs[1]
        assert held is not None
        program.set_weight(held, np.array(scale, np.float32))
        _set_zero_points(program, group, zero)


def _source(quantize: ir.Node) -> ir.Value:
    source = quantize.inputs[0]
    assert source is not None
    return source


def _set_zero_points(program: Program, quantisers: Iterable[ir.Node], zero: int) -> None:
    fresh: dict[ir.Value, ir.Value] = {}
    for quantize in quantisers:
        for node in (quantize, *quantize.outputs[0].consumers()):
            old = node.inputs[2] if len(node.inputs) > 2 else None
            known = constant(old)
            if old is None or known is None or old.dtype is None or int(known) == zero:
                continue
            if old not in fresh:
                array = np.array(zero).astype(old.dtype.numpy())
                fresh[old] = program.add_weight(str(old.name), ir.tensor(array, dtype=old.dtype))
            node.replace_input_with(2, fresh[old])


def levels_of(quantize: ir.Node) -> str:
    """The ONNX name of the type that a quantiser writes."""
    kind = quantize.outputs[0].dtype
    zero = quantize.inputs[2] if len(quantize.inputs) > 2 else None
    kind = zero.dtype if zero is not None else kind
    return kind.name if kind is not None else "UINT8"


def is_symmetric(quantize: ir.Node) -> bool:
    """Whether a quantiser's zero point is in the middle of its levels, as it is of floats."""
    if levels_of(quantize) in FLOAT8:
        return True
    zero = constant(quantize.inputs[2]) if len(quantize.inputs) > 2 else None
    least, greatest = INTEGER_RANGES[levels_of(quantize)]
    return zero is not None and bool((zero.astype(np.int64) == (least + greatest + 1) // 2).all())


def quantizer(value: ir.Value | None) -> ir.Node | None:
    """The QuantizeLinear whose levels, dequantised, are `value`."""
    made = dequantizer(value)
    levels = made.inputs[0] if made is not None else None
    node = levels.producer() if levels is not None else None
    return node if node is not None and node.op_type == "QuantizeLinear" else None


def scales_for(quantize: ir.Node, array: np.ndarray, method: str = "mse") -> np.ndarray:
    """Scales of a weight that has the contents `array` now, laid out as its quantiser says.

    Raises `Declined` for one that is not symmetric.
    """
    dtype = levels_of(quantize)
    if not dtype.startswith(("INT", "FLOAT8")) or not is_symmetric(quantize):
        raise Declined(f"{quantize.name!r} does not quantise symmetrically.")
    known = constant(quantize.inputs[1])
    axis = quantize.attributes.get_int("axis", 1)
    block = quantize.attributes.get_int("block_size", 0)
    if block:
        if array.ndim != 2 or dtype != "INT4":
            raise Declined(f"{quantize.name!r} has blocks of another kind than 4 bits in a matrix.")
        return block_scales(array, axis, block)
    per_tensor = known is None or known.ndim == 0
    return weight_scales(array, dtype, None if per_tensor else axis, method)


def rounded(quantize: ir.Node, array: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """`array` quantised with `scales`, as its symmetric quantiser says, and dequantised."""
    axis = quantize.attributes.get_int("axis", 1)
    block = quantize.attributes.get_int("block_size", 0)
    levels = quantize_array(array, scales, None, levels_of(quantize), axis, block)
    wide = spread(scales, array.shape, axis, block)
    return (levels * wide).astype(np.float32)


def _refresh_weight(node: ir.Node, program: Program, method: str) -> None:
    quantize = quantizer(node.inputs[1])
    source = quantize.inputs[0] if quantize is not None else None
    array = laid_out(source)
    if quantize is None or array is None:
        return
    scales = np.array(scales_for(quantize, array, method))
    _raise_to_bias(node, scales)
    held = quantize.inputs[1]
    assert held is not None
    program.set_weight(held, scales)


def _raise_to_bias(node: ir.Node, scales: np.ndarray) -> None:
    """Make the scales of nearly dead channels large enough for their bias to fit 32 bits."""
    found = bias_of(node)
    made = dequantizer(node.inputs[0])
    activation = constant(made.inputs[1]) if made is not None else None
    if found is None or activation is None or activation.ndim or scales.ndim != 1:
        return
    bias = constant(found[0].inputs[found[1]])
    if bias is None or bias.size != scales.size:
        return
    least = np.abs(bias.reshape(-1)).astype(np.float64) / (float(activation) * 2.0**30)
    np.maximum(scales, least.astype(np.float32), out=scales)


def fit_bias(program: Program, node: ir.Node) -> None:
    """Raise the scales of a contraction's weight where its bias would not fit 32 bits."""
    quantize = quantizer(node.inputs[1])
    held = quantize.inputs[1] if quantize is not None else None
    known = constant(held)
    if held is None or known is None:
        return
    scales = np.array(known)
    _raise_to_bias(node, scales)
    if not np.array_equal(scales, known):
        program.set_weight(held, scales)


def bias_of(node: ir.Node) -> tuple[ir.Node, int] | None:
    """Where the constant bias of a contraction is read: the node, or the Add that alone reads it.

    The second element is the operand's index.
    """
    if node.op_type != "MatMul":
        given = len(node.inputs) > 2 and constant(node.inputs[2]) is not None
        return (node, 2) if given else None
    uses = tuple(node.outputs[0].uses())
    reader = uses[0].node if len(uses) == 1 and not node.outputs[0].is_graph_output() else None
    if reader is None or reader.op_type != "Add":
        return None
    return next(((reader, i) for i, v in enumerate(reader.inputs) if constant(v) is not None), None)


# -- values that are not the teacher's ------------------------------------------------------


def mark_rescaled(value: ir.Value, axis: int, factors: np.ndarray) -> None:
    """Record that the channels of `value` along `axis` were divided by `factors`."""
    held = json.loads(value.metadata_props.get(RESCALED_KEY, "[]"))
    held.append([axis, [float(f"{f:.9g}") for f in factors]])
    value.metadata_props[RESCALED_KEY] = json.dumps(held, separators=(",", ":"))


def is_rescaled(value: ir.Value) -> bool:
    """Whether the teacher's value of this name has other channel scales."""
    return RESCALED_KEY in value.metadata_props


def as_in_teacher(value: ir.Value, axis: int, per_channel: np.ndarray) -> np.ndarray | None:
    """Numbers per channel of `value` along `axis` as they are in the teacher.

    None where other axes of it were rescaled too.
    """
    for held, factors in json.loads(value.metadata_props.get(RESCALED_KEY, "[]")):
        if held != axis:
            return None
        per_channel = per_channel * np.asarray(factors)
    return per_channel
