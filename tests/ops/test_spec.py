"""The operator table, attributes and costs."""

import subprocess
import sys

import onnx
import onnx_ir as ir
import pytest

from optcompiler.errors import PluginError, UnsupportedOperatorError
from optcompiler.ops import OpTable, Work, attributes_of, builtin_specs, builtin_table
from optcompiler.program import Program
from tests.ops.comparing import single


def _cost(program: Program) -> Work:
    node = next(iter(program.graph))
    return builtin_table().require(node).cost(node)


def test_every_operator_is_known_to_onnx_and_declared_once() -> None:
    keys = [spec.key for spec in builtin_specs()]
    assert len(keys) == len(set(keys))
    known = {s.name for s in onnx.defs.get_all_schemas_with_history() if s.domain == ""}
    assert {name for domain, name in keys if domain == ""} <= known
    with pytest.raises(PluginError, match="declared twice"):
        OpTable([*builtin_specs(), builtin_specs()[0]])


def test_unknown_operator_names_operator_and_node() -> None:
    program = Program(
        ir.from_onnx_text(
            '<ir_version: 10, opset_import: ["" : 20, "x" : 1]> '
            "g (float[1] a) => (float[1] y) { [here] y = x.Odd (a) }"
        )
    )
    with pytest.raises(UnsupportedOperatorError, match="x::Odd of node 'here'"):
        builtin_table().require(program.graph[0])


def test_importing_the_table_loads_no_torch() -> None:
    code = "import sys, optcompiler.ops; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_attributes_have_defaults_and_strings() -> None:
    program = single("GRU", "float[5,2,3] x, float[1,12,3] w, float[1,12,4] r", "float[5,1,2,4] y")
    attributes = attributes_of(program.graph[0])
    assert attributes["direction"] == "forward"
    assert attributes["layout"] == 0
    program = single("RNN", "float[5,2,3] x, float[1,4,3] w, float[1,4,4] r", "float[5,1,2,4] y")
    assert attributes_of(program.graph[0])["activations"] == ["Tanh", "Tanh"]


def test_cost_of_a_convolution_counts_weights_apart() -> None:
    program = single(
        "Conv", "float[1,4,8,8] x", "float[1,2,8,8] y", "pads = [1,1,1,1], group = 2",
        "float[2,2,3,3] w = {" + ", ".join(["1"] * 36) + "}, float[2] b = {1, 2}",
    )  # fmt: skip
    outputs = 2 * 8 * 8
    assert _cost(program) == Work(
        macs=outputs * 2 * 9,
        flops=outputs,
        bytes_read=4 * 8 * 8 * 4,
        bytes_written=outputs * 4,
        weight_bytes=38 * 4,
    )


@pytest.mark.parametrize(
    ("program", "macs"),
    [
        (single("MatMul", "float[2,3,4] a, float[4,5] b", "float[2,3,5] y"), 2 * 3 * 5 * 4),
        (single("Gemm", "float[4,3] a, float[4,5] b", "float[3,5] y", "transA = 1"), 3 * 5 * 4),
        (
            single(
                "Einsum", "float[2,3,4] a, float[2,4,5] b", "float[2,3,5] y",
                'equation = "bij,bjk->bik"',
            ),
            2 * 3 * 4 * 5,
        ),
        (
            single("ConvTranspose", "float[1,4,5,5] x, float[4,3,3,3] w", "float[1,3,7,7] y"),
            4 * 25 * 27,
        ),
        (
            single(
                "Attention", "float[2,4,3,8] q, float[2,2,5,8] k, float[2,2,5,6] v",
                "float[2,4,3,6] y", opset=23,
            ),
            2 * 4 * 3 * 5 * (8 + 6),
        ),
        (
            single(
                "LSTM", "float[5,2,3] x, float[1,16,3] w, float[1,16,4] r", "float[5,1,2,4] y",
                "hidden_size = 4",
            ),
            5 * 2 * 16 * (3 + 4),
        ),
    ],
)  # fmt: skip
def test_macs_of_contractions(program: Program, macs: int) -> None:
    assert _cost(program).macs == macs


def test_costs_of_pointwise_moving_and_free_operators() -> None:
    add = _cost(single("Add", "float[2,3] a, float[3] b", "float[2,3] y"))
    assert add == Work(flops=6, bytes_read=36, bytes_written=24)
    assert _cost(single("Exp", "float[2,3] a", "float[2,3] y")).flops > 6 * 8
    moved = _cost(single("Transpose", "float[2,3] a", "float[3,2] y"))
    assert moved == Work(bytes_read=24, bytes_written=24)
    free = single("Reshape", "float[2,3] a", "float[6] y", "", "int64[1] s = {6}")
    assert _cost(free) == Work()
