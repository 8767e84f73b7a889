"""When a node of constants may be computed at compile time: bounded in memory, size and time."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import onnx_ir as ir

from optcompiler.program import static_shape

RANDOM = frozenset(
    {
        "Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform",
        "RandomUniformLike",
    }
)  # fmt: skip
"""Operators that give something else each time."""

QUANTIZATION = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
"""Operators that say in which precision a tensor is kept, which folding would lose."""

_HEAVY = frozenset(
    {
        "Conv", "ConvInteger", "ConvTranspose", "DeformConv", "DFT", "Einsum", "GRU", "Gemm",
        "GridSample", "LSTM", "MatMul", "MatMulInteger", "MaxUnpool", "NonMaxSuppression",
        "QLinearConv", "QLinearMatMul", "RNN", "Resize", "RoiAlign", "STFT", "Upsample",
    }
)  # fmt: skip
_HEAVY_ELEMENTS = 1 << 16
_NOT_EVALUATED = frozenset({"GatherElements", "GlobalMaxPool", "LpNormalization"})
"""Operators that ONNX's reference evaluator gets wrong (the pooling with other than two spatial
axes, the norm of order 1 with negative numbers); `simplify` computes the first itself."""

_DATA_DEPENDENT = frozenset({"Compress", "NonZero", "Unique"})


@dataclass
class FoldingPolicy:
    """Says for each node of constants whether to compute it now.

    A result may be larger than the constants that it makes useless by `growth_bytes`; all results
    together by `total_growth_bytes`. A Cast of a weight may be four times as large as the weight.
    The size of a result is known from shape inference, before anything is computed.
    """

    growth_bytes: int
    total_growth_bytes: int
    grown_bytes: int = field(default=0, init=False)

    def __call__(self, node: ir.Node) -> bool:
        if node.op_type in _NOT_EVALUATED:
            return False
        return self.allows(node)

    def allows(self, node: ir.Node) -> bool:
        """Whether the bounds allow to compute the node, by whatever means."""
        if node.domain != "" or node.op_type in RANDOM | QUANTIZATION or len(node.outputs) != 1:
            return False
        output = node.outputs[0]
        if output.is_graph_output() or not isinstance(output.type, (ir.TensorType, type(None))):
            return False
        read = [v for v in node.inputs if v is not None and v.const_value is not None]
        elements = sum(v.const_value.size for v in read if v.const_value is not None)
        if node.op_type in _HEAVY and elements > _HEAVY_ELEMENTS:
            return False
        if output.dtype == ir.DataType.STRING:
            return False
        shape = static_shape(output)
        if shape is None or output.dtype is None:
            return node.op_type in _DATA_DEPENDENT and elements <= _HEAVY_ELEMENTS
        if node.op_type in _HEAVY and prod(shape) > _HEAVY_ELEMENTS:
            return False
        made = int(prod(shape) * output.dtype.itemsize)
        freed = sum(
            v.const_value.nbytes
            for v in set(read)
            if v.const_value is not None and len({n for n, _ in v.uses()}) == 1
        )
        if made <= freed or (node.op_type == "Cast" and made <= 4 * freed):
            return True
        growth = made - freed
        if growth > self.growth_bytes or self.grown_bytes + growth > self.total_growth_bytes:
            return False
        self.grown_bytes += growth
        return True
