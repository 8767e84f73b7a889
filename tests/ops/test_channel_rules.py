"""What each channel rule states about one node, axis by axis.

A node is written with the shapes of its operands: `y[2,5] = Gemm (x[2,3], w[3,5], b[5])`. Names
that begin with w, b or s are weights, braces hold constants, the rest are inputs. Of what the rule
states, `x1~y1` ties axis 1 of x to axis 1 of y, `w1:2~x1+4` its first two channels to those from
the fourth on, and `x1~y1*4` each channel to four in a row.
"""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest

from optcompiler.channels import ChannelGraph
from optcompiler.ops import builtin_table
from optcompiler.ops.axes import (
    aligned,
    along,
    dims,
    integers,
    is_weight,
    opset_of,
    put_integers,
    row_major,
    spread,
)
from optcompiler.ops.channels import CHANNEL_RULES
from optcompiler.ops.spec import Axis, Channels, Coupling
from optcompiler.program import Program, constant
from tests.support import filled_program

OPERAND = re.compile(r"(?:(\w+) )?(\w+)\[([^\]]*)\](?: (\{[^}]*\}))?")


def written(text: str) -> Program:
    """The program of one node `n`."""
    results, call = text.split(" = ", 1)
    inputs: dict[str, str] = {}
    weights: dict[str, str] = {}
    for dtype, name, shape, held in OPERAND.findall(call):
        declared = f"{dtype or 'float'}{f'[{shape}]' if shape else ''} {name}"
        if held or name[0] in "wbs":
            weights[name] = f"{declared} = {held}" if held else declared
        else:
            inputs[name] = declared
    outputs = [
        f"{dtype or 'float'}{f'[{shape}]' if shape else ''} {name}"
        for dtype, name, shape, _ in OPERAND.findall(results)
    ]
    held = f"<{', '.join(weights.values())}>" if weights else ""
    return filled_program(
        '<ir_version: 10, opset_import: ["" : 21]>\n'
        f"net ({', '.join(inputs.values())}) => ({', '.join(outputs)}) {held} "
        f"{{ [n] {OPERAND.sub(lambda m: m[2], text)} }}"
    )


def node_of(program: Program) -> ir.Node:
    node = program.node("n")
    assert node is not None
    return node


def stated(text: str, version: int | None = None) -> str:
    """The rule of the one node, in words; of a version of its operator."""
    node = node_of(written(text))
    node.version = version
    rule = CHANNEL_RULES[node.op_type](node)
    if rule is None:
        return "nothing"
    parts = [" ".join(map(_coupling, rule.couplings))]
    for word, axes in (
        ("made", rule.produced), ("summed", rule.reduced), ("normalised", rule.normalised),
    ):  # fmt: skip
        if axes:
            parts.append(f"{word} {' '.join(map(_axis, axes))}")
    if rule.groups != 1:
        parts.append(f"groups {rule.groups}")
    return "; ".join(filter(None, parts))


def _axis(axis: Axis) -> str:
    return f"{axis.value.name}{axis.axis}"


def _coupling(c: Coupling) -> str:
    assert c.source_offset == 0 or c.source == c.target
    left = _axis(c.source) + (f"+{c.source_offset}" if c.source_offset else "")
    left += f":{c.count}" if c.count >= 0 else ""
    right = _axis(c.target) + (f"+{c.target_offset}" if c.target_offset else "")
    return f"{left}~{right}" + (f"*{c.repeat}" if c.repeat != 1 else "")


RULES = {
    "unary": (
        "y[2,8,4] = Relu (x[2,8,4])",
        "x0~y0 x1~y1 x2~y2",
    ),
    "broadcast": (
        "y[2,8,4] = Add (x[2,8,4], w[8,1])",
        "x0~y0 x1~y1 x2~y2 w0~y1",
    ),
    "stretched": (
        "y[2,8,4] = Mul (x[2,1,4], z[2,8,4])",
        "x0~y0 x2~y2 z0~y0 z1~y1 z2~y2",
    ),
    "symbolic": (
        "y[N,8] = Add (x[N,8], z[1,8])",
        "x0~y0 x1~y1 z0~y0 z1~y1",
    ),
    "two results": (
        "y[2,8], bool m[2,8] = Dropout (x[2,8])",
        "x0~y0 x1~y1 m0~y0 m1~y1",
    ),
    "absent operand": (
        "y[2,8] = Clip (x[2,8], , s[])",
        "x0~y0 x1~y1",
    ),
    "conv": (
        "y[2,8,4] = Conv (x[2,3,4], w[8,3,1], b[8])",
        "x0~y0 w0~y1 b0~y1 w1:3~x1; made w0; summed w1 x1",
    ),
    "conv without bias": (
        "y[2,8,4] = Conv (x[2,3,4], w[8,3,1])",
        "x0~y0 w0~y1 w1:3~x1; made w0; summed w1 x1",
    ),
    "depthwise": (
        "y[2,6,4] = Conv <group = 3> (x[2,3,4], w[6,1,1], b[6])",
        "x0~y0 w0~y1 b0~y1 x1~y1*2; groups 3",
    ),
    "one group of one": (
        "y[2,6,4] = Conv (x[2,1,4], w[6,1,1])",
        "x0~y0 w0~y1 w1:1~x1; made w0; summed w1 x1",
    ),
    "grouped": (
        "y[2,6,4] = Conv <group = 2> (x[2,4,4], w[6,2,1])",
        "x0~y0 w0~y1 w1:2~x1 w1:2~x1+2 w0:3~w0 w0:3~w0+3; made w0; summed w1 x1; groups 2",
    ),
    "transposed": (
        "y[2,8,4] = ConvTranspose (x[2,3,4], w[3,8,1], b[8])",
        "x0~y0 x1~w0 b0~y1 w1:8~y1; made w1; summed w0 x1",
    ),
    "transposed depthwise": (
        "y[2,6,4] = ConvTranspose <group = 3> (x[2,3,4], w[3,2,1])",
        "x0~y0 x1~w0 x1~y1*2; groups 3",
    ),
    "transposed grouped": (
        "y[2,6,4] = ConvTranspose <group = 2> (x[2,4,4], w[4,3,1], b[6])",
        "x0~y0 x1~w0 b0~y1 w1:3~y1 w1:3~y1+3 w0:2~w0 w0:2~w0+2; made w1; summed w0 x1; groups 2",
    ),
    "gemm": (
        "y[2,5] = Gemm (x[2,3], w[3,5], b[5])",
        "x0~y0 w0~x1 w1~y1 b0~y1; made w1; summed w0 x1",
    ),
    "gemm transposed": (
        "y[2,5] = Gemm <transA = 1, transB = 1> (x[3,2], w[5,3], b[2,1])",
        "x1~y0 w1~x0 w0~y1 b0~y0; made w0; summed w1 x0",
    ),
    "gemm of weights left": (
        "y[2,5] = Gemm (w[2,3], x[3,5])",
        "w0~y0 x0~w1 x1~y1; made w0; summed x0 w1",
    ),
    "matmul": (
        "y[2,4,5] = MatMul (x[2,4,3], w[3,5])",
        "w0~x2 w1~y2 x1~y1 x0~y0; made w1; summed w0 x2",
    ),
    "matmul of weights left": (
        "y[2,4,5] = MatMul (w[4,3], x[2,3,5])",
        "x1~w1 x2~y2 w0~y1 x0~y0; made w0; summed x1 w1",
    ),
    "matmul of vectors": (
        "y[] = MatMul (x[3], w[3])",
        "w0~x0; summed w0 x0",
    ),
    "matmul of a vector and a matrix": (
        "y[5] = MatMul (x[3], w[3,5])",
        "w0~x0 w1~y0; made w1; summed w0 x0",
    ),
    "matmul of a matrix and a vector": (
        "y[2,4] = MatMul (x[2,4,3], w[3])",
        "w0~x2 x1~y1 x0~y0; summed w0 x2",
    ),
    "matmul of batches": (
        "y[6,2,4,5] = MatMul (x[6,1,4,3], z[2,3,5])",
        "z1~x3 z2~y3 x2~y2 x0~y0 z0~y1; summed z1 x3",
    ),
    "matmul of single batches": (
        "y[1,4,5] = MatMul (x[1,4,3], z[1,3,5])",
        "z1~x2 z2~y2 x1~y1 x0~y0 z0~y0; summed z1 x2",
    ),
    "batchnorm": (
        "y[2,8,4] = BatchNormalization (x[2,8,4], s[8], b[8], w[8], w2[8])",
        "x0~y0 x1~y1 x2~y2 s0~y1 b0~y1 w0~y1 w20~y1",
    ),
    "instancenorm": (
        "y[2,8,4] = InstanceNormalization (x[2,8,4], s[8], b[8])",
        "x0~y0 x1~y1 s0~y1 b0~y1",
    ),
    "layernorm": (
        "y[2,3,8] = LayerNormalization (x[2,3,8], s[8], b[8])",
        "x0~y0 x1~y1 x2~y2 s0~y2 b0~y2; normalised y2",
    ),
    "layernorm from the second": (
        "y[2,3,8] = LayerNormalization <axis = 1> (x[2,3,8], s[3,8])",
        "x0~y0 x1~y1 x2~y2 s0~y1 s1~y2; normalised y1 y2",
    ),
    "softmax": (
        "y[2,3,8] = Softmax <axis = 1> (x[2,3,8])",
        "x0~y0 x2~y2",
    ),
    "hardmax": (
        "y[2,3,8] = Hardmax (x[2,3,8])",
        "x0~y0 x1~y1",
    ),
    "lp": (
        "y[2,3,8] = LpNormalization <axis = 0> (x[2,3,8])",
        "x1~y1 x2~y2",
    ),
    "cumsum": (
        "y[2,3,8] = CumSum (x[2,3,8], int64 k[] {-2})",
        "x0~y0 x2~y2",
    ),
    "maxpool": (
        "y[2,8,2] = MaxPool <kernel_shape = [2], strides = [2]> (x[2,8,4])",
        "x0~y0 x1~y1",
    ),
    "reduce": (
        "y[2,1,4] = ReduceMean (x[2,8,4], int64 k[1] {1})",
        "x0~y0 x2~y2",
    ),
    "reduce away": (
        "y[2,4] = ReduceSum <keepdims = 0> (x[2,8,4], int64 k[1] {-2})",
        "x0~y0 x2~y1; summed x1",
    ),
    "reduce all": (
        "y[] = ReduceL2 <keepdims = 0> (x[2,8])",
        "summed x0 x1",
    ),
    "reduce none": (
        "y[2,8] = ReduceSumSquare <noop_with_empty_axes = 1> (x[2,8])",
        "x0~y0 x1~y1",
    ),
    "argmax": (
        "int64 y[2,1,4] = ArgMax <axis = 1> (x[2,8,4])",
        "x0~y0 x2~y2",
    ),
    "argmin away": (
        "int64 y[8,4] = ArgMin <axis = -3, keepdims = 0> (x[2,8,4])",
        "x1~y0 x2~y1",
    ),
    "quantize per tensor": (
        "uint8 y[2,8] = QuantizeLinear (x[2,8], s[], uint8 z[] {0})",
        "x0~y0 x1~y1",
    ),
    "quantize per channel": (
        "int8 y[2,8] = QuantizeLinear <axis = 1> (x[2,8], s[8], int8 z[8])",
        "x0~y0 x1~y1 s0~y1 z0~y1",
    ),
    "dequantize per row": (
        "y[2,8] = DequantizeLinear <axis = -2> (int8 x[2,8], s[2])",
        "x0~y0 x1~y1 s0~y0",
    ),
    "dequantize blocks": (
        "y[2,8] = DequantizeLinear <axis = 1, block_size = 4> (int8 x[2,8], s[2,2])",
        "x0~y0 s0~y0",
    ),
    "dequantize a vector": (
        "y[8] = DequantizeLinear (int8 x[8], s[])",
        "x0~y0",
    ),
    "concat": (
        "y[2,9,4] = Concat <axis = 1> (x[2,3,4], z[2,6,4])",
        "x0~y0 x2~y2 x1~y1 z0~y0 z2~y2 z1~y1+3",
    ),
    "concat unknown": (
        "y[N,4] = Concat <axis = 0> (x[2,4], z[N,4])",
        "x1~y1 z1~y1",
    ),
    "split": (
        "y[2,3], z[2,5] = Split <axis = -1> (x[2,8], int64 k[2] {3, 5})",
        "y0~x0 y1~x1 z0~x0 z1~x1+3",
    ),
    "flatten": (
        "y[2,12] = Flatten (x[2,3,4])",
        "x1~y1*4 x0~y0",
    ),
    "reshape to more": (
        "y[2,3,4] = Reshape (x[2,12], int64 k[3] {0, 3, -1})",
        "y1~x1*4 x0~y0",
    ),
    "reshape that mixes": (
        "y[3,8] = Reshape (x[4,6], int64 k[2] {3, 8})",
        "",
    ),
    "squeeze": (
        "y[2,3] = Squeeze (x[2,1,3], int64 k[1] {1})",
        "x2~y1 x0~y0",
    ),
    "unsqueeze": (
        "y[2,1,3] = Unsqueeze (x[2,3], int64 k[1] {1})",
        "x1~y2 x0~y0",
    ),
    "expand": (
        "y[2,8,4] = Expand (x[8,1], int64 k[3] {2, 1, 4})",
        "x0~y1",
    ),
    "transpose": (
        "y[4,2,3] = Transpose <perm = [2,0,1]> (x[2,3,4])",
        "x2~y0 x0~y1 x1~y2",
    ),
    "transpose all": (
        "y[4,3,2] = Transpose (x[2,3,4])",
        "x2~y0 x1~y1 x0~y2",
    ),
    "slice": (
        "y[2,3,4] = Slice (x[2,8,4], int64 k[1] {0}, int64 l[1] {3}, int64 m[1] {-2})",
        "x0~y0 x2~y2",
    ),
    "slice without axes": (
        "y[1,3,4] = Slice (x[2,8,4], int64 k[2] {0, 0}, int64 l[2] {1, 3})",
        "x2~y2",
    ),
    "pad": (
        "y[2,9,4] = Pad (x[2,8,4], int64 k[6] {0, 0, 0, 0, 1, 0})",
        "x0~y0 x2~y2",
    ),
    "pad some axes": (
        "y[2,8,6] = Pad (x[2,8,4], int64 k[2] {1, 1}, , int64 m[1] {-1})",
        "x0~y0 x1~y1",
    ),
    "tile": (
        "y[2,16,4] = Tile (x[2,8,4], int64 k[3] {1, 2, 1})",
        "x0~y0 x2~y2",
    ),
    "resize by scales": (
        "y[2,8,8] = Resize (x[2,8,4], , b[3] {1, 1, 2})",
        "x0~y0 x1~y1",
    ),
    "resize by sizes": (
        "y[2,8,6] = Resize (x[2,8,4], , , int64 k[3] {2, 8, 6})",
        "x0~y0 x1~y1",
    ),
    "resize an axis": (
        "y[2,8,6] = Resize <axes = [-1]> (x[2,8,4], , , int64 k[1] {6})",
        "x0~y0 x1~y1",
    ),
    "gather": (
        "y[2,5,3] = Gather <axis = 1> (x[2,8,3], int64 k[5] {0,1,2,3,4})",
        "x0~y0 x2~y2 k0~y1",
    ),
    "gather rows of a table": (
        "y[2,3,4] = Gather (w[9,4], int64 x[2,3])",
        "w1~y2 x0~y0 x1~y1; made w1",
    ),
    "gather one": (
        "y[2,3] = Gather <axis = -2> (x[2,8,3], int64 k[] {0})",
        "x0~y0 x2~y1",
    ),
    "shape": (
        "int64 y[3] = Shape (x[2,8,4])",
        "",
    ),
    "shape of some": (
        "int64 y[1] = Shape <start = 1, end = 2> (x[2,8,4])",
        "x0~x0 x2~x2",
    ),
    "depth to space": (
        "y[2,2,4,4] = DepthToSpace <blocksize = 2> (x[2,8,2,2])",
        "y0~x0 y1:2~x1 y1:2~x1+2 y1:2~x1+4 y1:2~x1+6",
    ),
    "depth to space by columns": (
        'y[2,2,4,4] = DepthToSpace <blocksize = 2, mode = "CRD"> (x[2,8,2,2])',
        "y0~x0 y1~x1*4",
    ),
    "space to depth": (
        "y[2,8,2,2] = SpaceToDepth <blocksize = 2> (x[2,2,4,4])",
        "x0~y0 x1:2~y1 x1:2~y1+2 x1:2~y1+4 x1:2~y1+6",
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_what_is_tied(name: str) -> None:
    text, expected = RULES[name]
    assert stated(text) == expected


def test_softmax_of_old_works_on_a_matrix() -> None:
    """Before opset 13, of what is before the axis by the rest."""
    assert stated("y[2,3,8] = Softmax <axis = 1> (x[2,3,8])", 12) == "x0~y0"
    assert stated("y[2,3,8] = Softmax <axis = 1> (x[2,3,8])", 13) == "x0~y0 x2~y2"
    assert stated("y[2,3,8] = LpNormalization <axis = 1> (x[2,3,8])", 12) == "x0~y0 x2~y2"


@pytest.mark.parametrize(
    "text",
    [
        "y[2,N] = Reshape (x[2,12], int64 k[2])",
        "y[2,N], z[2,M] = Split <axis = 1> (x[2,8], int64 k[2])",
        "y[2,8,N] = Expand (x[8,1], int64 k[3])",
        "y[2,N,4] = Slice (x[2,8,4], int64 k[1], int64 l[1] {3}, int64 m[1] {1})",
        "y[2,N,4] = Slice (x[2,8,4], int64 k[1] {0}, int64 l[1] {3}, int64 m[1])",
        "y[2,N,4] = Pad (x[2,8,4], int64 k[6])",
        "y[2,N,4] = Pad (x[2,8,4], int64 k[2] {1, 1}, , int64 m[1])",
        "y[2,N,4] = Tile (x[2,8,4], int64 k[3])",
        "y[2,8,N] = Resize (x[2,8,4], , , int64 k[3])",
        "y[2,8,N] = Resize (x[2,8,4], , k[3])",
        "y[2,N,4] = ReduceMean (x[2,8,4], int64 k[1])",
        "y[2,3,8] = CumSum (x[2,3,8], int64 k[])",
        "y[2,8,2], int64 m[2,8,2] = MaxPool <kernel_shape = [2], strides = [2]> (x[2,8,4])",
        "y[2,8,4] = Conv (x[2,3,4], z[8,C,1])",
        "y[2,8,4] = Conv (x[2,3,4], z[M,3,1])",
        "y[2,8,4] = ConvTranspose (x[2,3,4], z[C,8,1])",
        "y[2,8,4] = ConvTranspose (x[2,3,4], z[3,M,1])",
        "y[2,C,4,4] = DepthToSpace <blocksize = 2> (x[2,D,2,2])",
        'y[2,8,4] = Resize <coordinate_transformation_mode = "tf_crop_and_resize"> '
        "(x[2,8,4], b[6], b2[3] {1, 1, 1})",
    ],
)  # fmt: skip
def test_what_is_computed_or_unknown_ties_nothing(text: str) -> None:
    assert stated(text) == "nothing"


@pytest.mark.parametrize("name", RULES)
def test_no_operand_of_unknown_shape_is_followed(name: str) -> None:
    program = written(RULES[name][0])
    for value in [*node_of(program).inputs, *node_of(program).outputs]:
        if value is None or value.shape is None:
            continue
        shape, value.shape = value.shape, None
        assert ChannelGraph(program, builtin_table()).rules == {}
        value.shape = shape
    assert list(ChannelGraph(program, builtin_table()).rules) == ["n"]


# -- what nodes state about their axes --------------------------------------------------------


def repaired(text: str, extents: dict[str, int]) -> ir.Node:
    """The one node after its axes, written `y1`, shrank."""
    program = written(text)
    return shrunk(program, node_of(program), extents)


def shrunk(program: Program, node: ir.Node, extents: dict[str, int]) -> ir.Node:
    values = {v.name: v for v in (*node.inputs, *node.outputs) if v is not None}
    rule = CHANNEL_RULES[node.op_type](node)
    assert isinstance(rule, Channels)
    assert rule.repair is not None
    rule.repair(program, node, {Axis(values[k[:-1]], int(k[-1])): e for k, e in extents.items()})
    return node


@pytest.mark.parametrize(
    ("text", "extents", "index", "expected"),
    [
        ("y[2,3], z[2,5] = Split <axis = 1> (x[2,8], int64 k[2] {3, 5})",
         {"x1": 6, "y1": 2, "z1": 4}, 1, [2, 4]),
        ("y[2,3], z[2,5] = Split <axis = 1> (x[2,8], int64 k[2] {3, 5})",
         {"x1": 7, "z1": 4}, 1, [3, 4]),
        ("y[2,3], z[2,5] = Split <axis = 1> (x[2,8], int64 k[2] {3, 5})", {"x0": 1}, 1, [3, 5]),
        ("y[2,4], z[2,4] = Split <axis = 1, num_outputs = 2> (x[2,8])",
         {"x1": 6, "y1": 4, "z1": 2}, 1, [4, 2]),
        ("y[2,3,4] = Reshape (x[2,12], int64 k[3] {2, 3, 4})", {"x1": 8, "y1": 2}, 1, [2, 2, 4]),
        ("y[2,3,4] = Reshape (x[2,12], int64 k[3] {0, 3, -1})", {"x1": 8, "y1": 2}, 1, [0, 2, -1]),
        ("y[2,3,4] = Reshape (x[2,12], int64 k[3] {2, -1, 4})", {"x1": 8, "y1": 2}, 1, [2, -1, 4]),
        ("y[2,6,4] = Reshape (x[2,6,2,2], int64 k[3] {0, 0, 4})",
         {"x1": 5, "y1": 5}, 1, [0, 5, 4]),
        ("y[2,3,8] = Expand (x[3,1], int64 k[3] {2, 3, 8})", {"x0": 2, "y1": 2}, 1, [2, 2, 8]),
        ("y[2,3,8] = Expand (x[2,3,1], int64 k[2] {3, 8})", {"x1": 2, "y1": 2}, 1, [2, 8]),
        ("y[2,3,8] = Expand (x[2,3,1], int64 k[3] {1, 1, 8})", {"x1": 2, "y1": 2}, 1, [1, 1, 8]),
        ("y[2,8,6] = Resize (x[2,8,4], , , int64 k[3] {2, 8, 6})", {"x1": 5, "y1": 5}, 3,
         [2, 5, 6]),
        ("y[2,8,6] = Resize <axes = [1, -1]> (x[2,8,4], , , int64 k[2] {8, 6})",
         {"x1": 5, "y1": 5}, 3, [5, 6]),
    ],
)  # fmt: skip
def test_stated_sizes_follow(
    text: str, extents: dict[str, int], index: int, expected: list[int]
) -> None:
    node = repaired(text, extents)
    assert constant(node.inputs[index]).tolist() == expected
    assert "num_outputs" not in node.attributes


def test_sizes_that_are_attributes_follow() -> None:
    program = written("y[2,4], z[2,4] = Split <axis = 1, num_outputs = 2> (x[2,8])")
    node = node_of(program)
    node.version, node.attributes["split"] = 12, ir.AttrInt64s("split", [4, 4])
    shrunk(program, node, {"x1": 6, "y1": 2})
    assert list(node.attributes["split"].as_ints()) == [2, 4]
    assert len(node.inputs) == 1


def test_scales_stay_as_they_are() -> None:
    node = repaired("y[2,8,8] = Resize (x[2,8,4], , b[3] {1, 1, 2})", {"x1": 5, "y1": 5})
    assert constant(node.inputs[2]).tolist() == [1, 1, 2]


def test_group_counts_follow() -> None:
    depthwise = "y[2,6,4] = Conv <group = 3> (x[2,3,4], w[6,1,1])"
    assert repaired(depthwise, {"x1": 2}).attributes["group"].as_int() == 2
    assert repaired(depthwise, {"x0": 1}).attributes["group"].as_int() == 3
    normal = "y[2,8,4] = GroupNormalization <num_groups = 4> (x[2,8,4], s[8], b[8])"
    program = written(normal)
    node = node_of(program)
    rule = CHANNEL_RULES["GroupNormalization"](node)
    assert rule is not None
    assert rule.repair is not None
    rule.repair(program, node, {Axis(node.outputs[0], 1): 6})
    assert node.attributes["num_groups"].as_int() == 3
    rule.repair(program, node, {Axis(node.outputs[0], 0): 6})
    assert node.attributes["num_groups"].as_int() == 3


# -- reading nodes ----------------------------------------------------------------------------


def test_dims_are_ints_names_and_unknowns() -> None:
    assert dims(None) is None
    assert dims(ir.val("x")) is None
    assert dims(ir.val("x", shape=ir.Shape([2, "N", None]))) == (2, "N", None)


def test_weights_are_seen_through_layout_and_precision() -> None:
    weight = ir.val("w", const_value=ir.tensor(np.zeros((2, 3), np.float32)))
    seen = ir.node("Transpose", [ir.node("Cast", [weight]).outputs[0]]).outputs[0]
    assert is_weight(weight)
    assert is_weight(seen)
    assert not is_weight(ir.node("Relu", [weight]).outputs[0])
    assert not is_weight(ir.node("Cast", [ir.val("x")]).outputs[0])
    assert not is_weight(ir.node("Cast", [None]).outputs[0])
    assert not is_weight(None)


def test_integers_are_inputs_or_attributes() -> None:
    held = ir.val("k", const_value=ir.tensor(np.array([[1], [2]])))
    node = ir.node("Squeeze", [ir.val("x"), held], {"axes": [3, 4]})
    assert integers(node, 1, "axes") == (1, 2)
    assert integers(node, 2, "axes") == (3, 4)
    assert integers(node, 2, "starts") == ()
    assert integers(node, 0, "axes") is None


def test_axes_count_from_either_end() -> None:
    assert [along(a, 3) for a in (-3, -1, 0, 2)] == [0, 2, 0, 2]


def test_aligned_axes() -> None:
    def value(name: str, *shape: object) -> ir.Value:
        return ir.val(name, shape=ir.Shape(shape))  # type: ignore[arg-type]

    def words(one: ir.Value, other: ir.Value) -> str:
        return " ".join(map(_coupling, aligned(one, other) or ()))

    assert words(value("a", 3, 4), value("b", 2, 3, 4)) == "a0~b1 a1~b2"
    assert words(value("a", 1, 4), value("b", 2, 3, 4)) == "a1~b2"
    assert words(value("a", "N", 3), value("b", 2, "M")) == "a0~b0 a1~b1"
    assert words(value("a", "N"), value("b", "M")) == ""
    assert aligned(value("a", 2, 3), value("b", 3)) is None
    assert aligned(ir.val("a"), value("b", 3)) is None
    assert aligned(value("a", 3), ir.val("b")) is None


def test_versions_of_operator_sets() -> None:
    node = ir.node("Relu", [ir.val("x")])
    assert opset_of(node) == 1
    ir.Graph([], [], nodes=[node], opset_imports={"": 17})
    assert opset_of(node) == 17
    assert opset_of(ir.node("Relu", [ir.val("x")], version=9)) == 9


def test_integers_are_put_back_for_one_user_alone() -> None:
    program = filled_program(
        """<ir_version: 10, opset_import: ["" : 21]>
        net (float[2,6] x) => (float[6,2] y, float[6,2] z)
        <int64[2] k = {6, 2}, int64[2] l = {6, 2}> {
          [a] y = Reshape (x, k)
          [b] p = Reshape (x, k)
          [c] z = Reshape (p, l)
        }"""
    )
    a, b, c = (program.node(n) for n in "abc")
    assert a is not None
    assert b is not None
    assert c is not None
    put_integers(program, a, 1, np.array([4, 3]))
    assert a.inputs[1].name == "k_1"  # type: ignore[union-attr]
    assert constant(a.inputs[1]).tolist() == [4, 3]
    assert constant(b.inputs[1]).tolist() == [6, 2]
    put_integers(program, c, 1, np.array([3, 4]))
    assert c.inputs[1].name == "l"  # type: ignore[union-attr]
    assert constant(c.inputs[1]).tolist() == [3, 4]


@pytest.mark.parametrize(
    ("old", "new", "runs"),
    [
        ((2, 3, 4), (6, 4), [([2], [1]), ([1, 0], [0])]),
        ((6, 4), (2, 3, 4), [([1], [2]), ([0], [1, 0])]),
        ((2, 0), (0, 2), []),
        ((None, 4), (None, 4), [([1], [1])]),
        (("N", "M"), ("N", "M"), [([1], [1]), ([0], [0])]),
        (("N", "M"), ("M", "N"), [([1, 0], [1, 0])]),
        (("N", 2), (2, "N"), [([1, 0], [1, 0])]),
        ((5, 4), (2, 4), [([1], [1])]),
        ((1, 1), (1, 1, 1), [([], []), ([], [])]),
        ((), (1,), []),
    ],
)
def test_runs_of_a_reshape(old: tuple, new: tuple, runs: list) -> None:
    assert row_major(old, new) == runs


def test_spreading_over_groups() -> None:
    one, other = Axis(ir.val("a"), 1), Axis(ir.val("b"), 0)
    assert [_coupling(c) for c in spread(one, other, 3, 2)] == ["a1:2~b0", "a1:2~b0+2", "a1:2~b0+4"]
