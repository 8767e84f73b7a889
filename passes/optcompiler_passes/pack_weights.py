"""Store quantised weights as integers, and the biases of integer kernels as 32-bit integers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optcompiler.program import Program, constant, static_shape
from optcompiler.quantization import FLOAT8, INTEGER_RANGES, quantize_array
from optcompiler.rewriting import Candidate, Decline, Declined, Pass, PassContext, Stage
from optcompiler_passes._folding import fold_readers
from optcompiler_passes._qdq import dequantizer, laid_out

_LIMIT = float(2**31 - 1)


@dataclass(frozen=True)
class PackWeights(Pass):
    """Fold the quantisers of constants, and quantise biases to the scale of their accumulator.

    Before:
        w_quantized = QuantizeLinear <axis=0> (w, s_w, 0)
        w_dequantized = DequantizeLinear <axis=0> (w_quantized, s_w, 0)
        y = Conv (x_dequantized, w_dequantized, b)

    After (`w_quantized` is an int8 initializer, `b_quantized` an int32 one):
        w_dequantized = DequantizeLinear <axis=0> (w_quantized, s_w, 0)
        b_dequantized = DequantizeLinear <axis=0> (b_quantized, s_x * s_w)
        y = Conv (x_dequantized, w_dequantized, b_dequantized)

    Rules:
    1. Every QuantizeLinear whose operands are all constants becomes an initializer holding what the
       ONNX operator computes, in integers or floats of 8 bits. What reads constants alone then is
       computed too. A quantiser of a Transpose (or the like) of an initializer is folded with it.
    2. A constant float bias of a Conv, of a Gemm with alpha = beta = 1, or of an Add that alone
       reads a MatMul, becomes int32 with scale s_x * s_w and zero point 0 when data and weight come
       from DequantizeLinear with constant scales, that of the data for the whole tensor. That moves
       the bias by half a step of the accumulator at most. (ONNX Runtime runs such a node in float
       when its bias is float.)
       Rarely a value that lay between two levels of a later quantiser then takes the other one,
       which is why `rtol` bounds the root mean square of the change, and is not smaller.
    3. It declines a bias that would not fit 32 bits: that bias stays float.
    """

    name: ClassVar[str] = "pack-weights"
    stage: ClassVar[Stage] = Stage.FUSE
    summary: ClassVar[str] = "int8 weights and int32 biases stored as such"

    rtol: float = 0.05

    def propose(self, program: Program, context: PassContext) -> Iterable[Candidate | Decline]:
        folds = tuple(str(n.name) for n in program.graph if _folded(n) is not None)
        biases: list[str] = []
        for node in program.graph:
            found = _bias(node)
            if isinstance(found, str):
                yield Decline(str(node.name), found, (str(node.name),))
            elif found is not None:
                biases.append(str(node.name))
        if not folds and not biases:
            yield Decline("program", "no quantised constant and no bias of an integer kernel")
            return
        yield Candidate(
            "program",
            "pack",
            pack,
            exact=True,
            nodes=(*folds, *biases),
            rtol=self.rtol,
            typical=True,
            note=f"{len(folds)} constants to integers, {len(biases)} biases to int32",
        )


def pack(program: Program) -> None:
    """Fold constants' quantisers, then quantise biases; raises `Declined` with nothing to do."""
    changed = False
    for node in tuple(program.graph):
        tensor = _folded(node)
        if tensor is not None:
            program.hold(node.outputs[0], tensor)
            changed = True
    for node in tuple(program.graph):
        found = _bias(node)
        if isinstance(found, _Bias):
            _quantize_bias(program, node, found)
            changed = True
    if not changed:
        raise Declined("nothing is left to pack.")
    fold_readers(program)
    program.sweep()


def _folded(node: ir.Node) -> ir.TensorProtocol | None:
    """What a QuantizeLinear of constants computes; None for any other node."""
    if node.op_type != "QuantizeLinear" or node.domain != "":
        return None
    arrays = [laid_out(v) for v in node.inputs if v is not None]
    type_ = node.outputs[0].dtype
    if (
        any(a is None for a in arrays)
        or type_ is None
        or type_.name not in {*INTEGER_RANGES, *FLOAT8}
    ):
        return None
    if arrays[0] is None or arrays[1] is None or arrays[1].dtype != np.float32:
        return None
    zero_point = arrays[2].astype(np.int64) if len(arrays) > 2 and arrays[2] is not None else None
    axis = node.attributes.get_int("axis", 1)
    block = node.attributes.get_int("block_size", 0)
    levels = quantize_array(arrays[0], arrays[1], zero_point, type_.name, axis, block)
    return ir.tensor(np.ascontiguousarray(levels, type_.numpy()), dtype=type_)


@dataclass(frozen=True)
class _Bias:
    operand: int
    levels: np.ndarray
    scale: np.ndarray


def _bias(node: ir.Node) -> _Bias | str | None:
    """The integer bias of a node, the reason why it stays float, or None where there is none."""
    operand = 2
    contraction: ir.Node | None = node
    if node.domain == "" and node.op_type == "Add":
        constants = [i for i, v in enumerate(node.inputs) if constant(v) is not None]
        operand = constants[0] if len(constants) == 1 else 2
        contraction = _matmul_read_by(node, 1 - operand) if operand < 2 else None
    elif node.domain != "" or node.op_type not in ("Conv", "Gemm"):
        return None
    if contraction is None or len(node.inputs) <= operand:
        return None
    bias = constant(node.inputs[operand])
    data, weight = (_scale(v) for v in contraction.inputs[:2])
    channels = _channels(contraction)
    if bias is None or bias.dtype != np.float32 or channels is None:
        return None
    if data is None or weight is None or data.size != 1 or weight.size not in (1, channels):
        return None
    if bias.size not in (1, channels) or (bias.size > 1 and bias.shape[-1] != channels):
        return None
    where = f"the bias {node.inputs[operand].name!r}"  # type: ignore[union-attr]
    if node.op_type == "Gemm" and not _plain_gemm(node):
        return f"the Gemm scales its operands, so {where} stays float"
    scale = np.broadcast_to(data.reshape(()) * weight.reshape(-1), (channels,))
    scale = np.ascontiguousarray(scale, np.float32)
    values = np.broadcast_to(bias.reshape(-1), (channels,)).astype(np.float64)
    levels = np.rint(values / scale.astype(np.float64))
    over = int((np.abs(levels) > _LIMIT).sum())
    if over:
        return (
            f"{over} of {channels} values of {where} do not fit 32 bits at the scale of the "
            f"accumulator, so it stays float"
        )
    return _Bias(operand, levels.astype(np.int32), scale)


def _matmul_read_by(node: ir.Node, operand: int) -> ir.Node | None:
    value = node.inputs[operand]
    made = value.producer() if value is not None else None
    if value is None or made is None or made.op_type != "MatMul" or made.domain != "":
        return None
    return made if len(value.uses()) == 1 and not value.is_graph_output() else None


def _scale(value: ir.Value | None) -> np.ndarray | None:
    """That of integers; None for floats of 8 bits, whose kernels add biases in float."""
    made = dequantizer(value)
    levels = made.inputs[0] if made is not None else None
    if made is None or levels is None or (levels.dtype and levels.dtype.name in FLOAT8):
        return None
    return constant(made.inputs[1])


def _channels(node: ir.Node) -> int | None:
    """Output channels of a contraction, from its weight (whose dequantiser has it in int8)."""
    weight = node.inputs[1]
    shape = static_shape(weight) if weight is not None else None
    if shape is None or len(shape) < 2 or (node.op_type == "MatMul" and len(shape) != 2):
        return None
    if node.op_type == "Conv" or node.attributes.get_int("transB", 0):
        return shape[0]
    return shape[1]


def _plain_gemm(node: ir.Node) -> bool:
    get = node.attributes.get_float
    return get("alpha", 1.0) == 1.0 and get("beta", 1.0) == 1.0


def _quantize_bias(program: Program, node: ir.Node, bias: _Bias) -> None:
    value = node.inputs[bias.operand]
    assert value is not None
    name = str(value.name)
    operands = [
        program.add_weight(f"{name}_quantized", bias.levels),
        program.add_weight(f"{name}_scale", bias.scale),
        program.add_weight(f"{name}_zero_point", np.zeros(bias.levels.shape, np.int32)),
    ]
    dequantize = ir.node(
        "DequantizeLinear", operands, {"axis": 0}, name=program.fresh_name(f"{name}_dequantize")
    )
    result = dequantize.outputs[0]
    result.name = program.fresh_name(f"{name}_dequantized")
    result.type, result.shape = value.type, ir.Shape(bias.levels.shape)
    program.graph.insert_before(node, dequantize)
    node.replace_input_with(bias.operand, result)
