"""When a node of constants may be computed at compile time: bounded in memory, size and time."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import onnx_ir as ir

from optcompiler.errors import UnsupportedOperatorError
from optcompiler.program import Program, static_shape

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
GROWTH_BYTES = 1 << 20
TOTAL_GROWTH_BYTES = 64 << 20

_DATA_DEPENDENT = frozenset({"Compress", "NonZero", "Unique"})


@dataclass
class FoldingPolicy:
    """Says for each node of constants whether to compute it now.

    A result may be larger than the constants that it makes useless by `growth_bytes`; all results
    together by `total_growth_bytes`. A Cast of a weight may be four times as large as the weight.
    The size of a result is known from shape inference, before anything is computed.
    """

    main: ir.Graph
    growth_bytes: int
    total_growth_bytes: int
    grown_bytes: int = field(default=0, init=False)
    pending: list[ir.Node] = field(default_factory=list[ir.Node], init=False)

    def __call__(self, node: ir.Node) -> bool:
        """Whether ONNX's reference evaluator is to compute the node.

        It has faults (GatherElements, GlobalMaxPool, LRN, LpNormalization in onnx 1.23), so nodes
        of the main graph are computed here, by the executor, where that knows the operator.
        """
        if not self.allows(node):
            return False
        if node.graph is not self.main or not node.inputs:
            return True
        from optcompiler.executor import computed
        from optcompiler.ops import builtin_table

        if builtin_table().get(node) is None:
            return True
        try:
            node.outputs[0].const_value = computed(node)[0]
        except UnsupportedOperatorError:  # strings and other types that torch has not
            return True
        self.pending.append(node)
        return False

    def settle(self, program: Program) -> None:
        """Put initializers in the places of the nodes that were computed here."""
        for node in self.pending:
            output = node.outputs[0]
            tensor = output.const_value
            if node.graph is None or tensor is None or output.is_graph_output():
                output.const_value = None
                continue
            program.hold(output, tensor)
        self.pending.clear()

    def allows(self, node: ir.Node) -> bool:
        """Whether the bounds allow to compute the node, by whatever means."""
        if node.domain != "" or node.op_type in RANDOM | QUANTIZATION or len(node.outputs) != 1:
            return False
        output = node.outputs[0]
        if output.is_graph_output() or not isinstance(output.type, (ir.TensorType, type(None))):
            return False
        read = [v for v in node.inputs if v is not None and v.const_value is not None]
        if any(v.dtype is not None and v.dtype.bitwidth < 8 for v in read):
            return False  # indices of a codebook: in bytes they would take what they are to save
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


def fold_readers(program: Program) -> None:
    """Compute nodes of constants, for a pass that has made constants where there were none."""
    policy = FoldingPolicy(program.graph, GROWTH_BYTES, TOTAL_GROWTH_BYTES)
    for node in program.graph:
        held = [v.const_value is not None and not v.is_graph_input() for v in node.inputs if v]
        if held and all(held):
            policy(node)
    policy.settle(program)
