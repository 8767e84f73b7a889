"""Products of few rows with weights of few bits, beside float32 and beside ONNX Runtime.

    taskset -c 0 python -m benchmarks.weights --sizes 2048x8192 --rows 1,4

A row of a table is one K x N: the median of interleaved rounds in microseconds, one thread, and how
many times faster that is than our float32. ONNX Runtime makes MatMulNBits of the same program; its
accuracy level 1 keeps activations in float, level 4 (its default) rounds them to 8 bits.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime

from benchmarks.interleaving import in_turn
from optcompiler.program import Program
from optcompiler.target import Target
from optcompiler_cpu.backend import CpuBackend

BLOCK = 32


def product(m: int, k: int, n: int, kind: str) -> Program:
    """`y = x @ w` with a weight of `kind`: "fp32", "fp16", "int8", "int4" or "w4a8"."""
    rng = np.random.default_rng(0)
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=(m, k))
    nodes: list[ir.Node] = []
    initializers: list[ir.Value] = []

    def constant(name: str, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.val(name, dtype=tensor.dtype, shape=array.shape, const_value=tensor)
        initializers.append(value)
        return value

    def made(op_type: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        node = ir.node(op_type, inputs, attributes, name=f"n{len(nodes)}")
        nodes.append(node)
        node.outputs[0].name = f"v{len(nodes)}"
        return node.outputs[0]

    floats = rng.standard_normal((k, n)).astype(np.float32)
    data = x
    if kind == "fp32":
        weight = constant("w", floats)
    elif kind == "fp16":
        weight = made("Cast", constant("w", floats.astype(np.float16)), to=int(ir.DataType.FLOAT))
    elif kind == "int8":
        levels = constant("w", rng.integers(-127, 128, (k, n)).astype(np.int8))
        weight = made("DequantizeLinear", levels, constant("s", floats[0] ** 2), axis=1)
    else:
        levels = constant("w", rng.integers(-8, 8, (k, n)).astype(ml_dtypes.int4))
        scales = (floats[: k // BLOCK] ** 2).astype(np.float16).astype(np.float32)
        weight = made("DequantizeLinear", levels, constant("s", scales), axis=0, block_size=BLOCK)
    if kind == "w4a8":
        parameters = constant("c", np.asarray(np.float32(0.03))), constant("z", np.uint8(128))
        data = made("DequantizeLinear", made("QuantizeLinear", x, *parameters), *parameters)
    y = made("MatMul", data, weight)
    y.name, y.dtype, y.shape = "y", ir.DataType.FLOAT, ir.Shape((m, n))
    graph = ir.Graph([x], [y], nodes=nodes, initializers=initializers, name="product",
                     opset_imports={"": 21})  # fmt: skip
    return Program.from_onnx(ir.Model(graph, ir_version=10))


def ours(program: Program, directory: Path) -> Callable[[dict[str, np.ndarray]], object]:
    directory.mkdir()
    backend = CpuBackend()
    info = backend.lower(program, Target("cpu", threads=1), directory)
    return backend.load(directory, info, threads=1).run


def theirs(program: Program, level: str) -> Callable[[dict[str, np.ndarray]], object]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
    model = program.to_proto().SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="2048x8192,4096x4096")
    parser.add_argument("--rows", default="1,4,32")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    names = ["fp32", "fp16", "int8", "int4", "w4a8"]
    titles = [*names, "ORT fp32", "ORT int4, level 1", "ORT int4, level 4"]
    for rows in map(int, given.rows.split(",")):
        print(f"\n| {rows} x K x N | {' | '.join(titles)} |\n|{'---|' * (len(titles) + 1)}")
        for size in given.sizes.split(","):
            k, n = map(int, size.split("x"))
            x = {"x": np.random.default_rng(1).standard_normal((rows, k)).astype(np.float32)}
            programs = {name: product(rows, k, n, name) for name in names}
            with tempfile.TemporaryDirectory() as directory:
                runs = [ours(p, Path(directory) / name) for name, p in programs.items()]
                runs += [theirs(programs["fp32"], "0")]
                runs += [theirs(programs["int4"], level) for level in "14"]
                times = in_turn([partial(run, x) for run in runs], given.rounds)
            cells = [f"{t.us:.0f} ({times[0].us / t.us:.1f}x)" for t in times]
            print(f"| {size} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
