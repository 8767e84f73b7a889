"""Models that parse but lie, contradict themselves, nest without end or explode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.hostile.corpus import add

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
HUGE = 1 << 40


def compile_of(model: onnx.ModelProto | bytes, *options: str) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        data = model if isinstance(model, bytes) else model.SerializeToString()
        (folder / "model.onnx").write_bytes(data)
        return ["compile", str(folder / "model.onnx"), *options]

    return make


def ints(name: str, *values: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), name)


def scalar(name: str, value: float) -> onnx.TensorProto:
    return numpy_helper.from_array(np.float32(value).reshape(()), name)


def info(name: str, *shape: int | str, dtype: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, list(shape))


def model(
    nodes: Sequence[onnx.NodeProto],
    weights: Sequence[onnx.TensorProto] = (),
    inputs: Sequence[onnx.ValueInfoProto] | None = None,
    outputs: Sequence[onnx.ValueInfoProto] | None = None,
    functions: Sequence[onnx.FunctionProto] = (),
    opsets: Sequence[onnx.OperatorSetIdProto] | None = None,
    infos: Sequence[onnx.ValueInfoProto] = (),
) -> onnx.ModelProto:
    """Inputs and outputs are `x` and `y`, float [1, 4], unless given."""
    graph = helper.make_graph(
        list(nodes), "graph",
        [info("x", 1, 4)] if inputs is None else list(inputs),
        [info("y", 1, 4)] if outputs is None else list(outputs),
        list(weights), value_info=list(infos),
    )  # fmt: skip
    opsets = (
        [helper.make_opsetid("", 21), helper.make_opsetid("f", 1)] if opsets is None else opsets
    )
    return helper.make_model(
        graph, opset_imports=list(opsets), functions=list(functions), ir_version=10
    )


def node(op_type: str, reads: str, makes: str, **attributes: object) -> onnx.NodeProto:
    """Operands and results are named in one text each, separated by blanks."""
    return helper.make_node(op_type, reads.split(), makes.split(), **attributes)


RELU = node("Relu", "x", "y")


def relu_of(**changes: object) -> onnx.ModelProto:
    return model([RELU], **changes)  # type: ignore[arg-type]


# -- structure ------------------------------------------------------------------------------


def _function(name: str, *nodes: onnx.NodeProto) -> onnx.FunctionProto:
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("f", 1)]
    return helper.make_function("f", name, ["a"], ["b"], list(nodes), imports)


def _call(name: str, reads: str = "a", makes: str = "b") -> onnx.NodeProto:
    return node(name, reads, makes, domain="f")


def function_chain(depth: int) -> onnx.ModelProto:
    chain = [_function(f"F{i}", _call(f"F{i + 1}")) for i in range(depth)]
    return model(
        [_call("F0", "x", "y")], functions=[*chain, _function(f"F{depth}", node("Relu", "a", "b"))]
    )


def doubling_functions(levels: int) -> onnx.ModelProto:
    """Each function calls the next one twice: 2 ** levels nodes when expanded."""
    chain = [
        _function(f"F{i}", _call(f"F{i + 1}", "a", "c"), _call(f"F{i + 1}", "c", "b"))
        for i in range(levels)
    ]
    return model(
        [_call("F0", "x", "y")], functions=[*chain, _function(f"F{levels}", node("Relu", "a", "b"))]
    )


def _branch(*nodes: onnx.NodeProto, makes: str) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), "branch", [], [info(makes, 1, 4)])


def functions_of_ifs(depth: int) -> onnx.ModelProto:
    """A chain of functions, each of which calls the next inside an If."""

    def body(call: onnx.NodeProto) -> list[onnx.NodeProto]:
        return [
            node("Constant", "", "c", value=numpy_helper.from_array(np.array(True), "c")),
            node(
                "If", "c", "b", then_branch=_branch(call, makes="t"),
                else_branch=_branch(node("Identity", "a", "e"), makes="e"),
            ),
        ]  # fmt: skip

    chain = [_function(f"F{i}", *body(_call(f"F{i + 1}", "a", "t"))) for i in range(depth)]
    return model(
        [_call("F0", "x", "y")], functions=[*chain, _function(f"F{depth}", node("Relu", "a", "b"))]
    )


_IS_GRAPH = b"\xa0\x01\x05"
"""Field 20 of an attribute: its type, which is GRAPH."""


def _field(number: int, content: bytes) -> bytes:
    length, size = b"", len(content)
    while size > 0x7F:
        length += bytes([size & 0x7F | 0x80])
        size >>= 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + content


def nested_ifs(depth: int) -> bytes:
    """Written field by field: protobuf libraries do not write what they would not read."""
    graph = _branch(node("Relu", "x", "y"), makes="y").SerializeToString()
    for _ in range(depth):
        branch = _field(1, b"then_branch") + _field(6, graph)
        branch += _IS_GRAPH
        other = _field(1, b"else_branch") + _field(
            6, _branch(node("Identity", "x", "e"), makes="e").SerializeToString()
        ) + _IS_GRAPH  # fmt: skip
        if_ = _field(1, b"c") + _field(2, b"y") + _field(4, b"If")
        if_ += _field(5, branch) + _field(5, other)
        graph = _field(1, if_) + _field(2, b"g") + _field(12, info("y", 1, 4).SerializeToString())
    graph += _field(11, info("x", 1, 4).SerializeToString())
    graph += _field(11, info("c", dtype=TensorProto.BOOL).SerializeToString())
    return b"\x08\x0a" + _field(7, graph) + _field(8, b"\x10\x15")


def deep_type(depth: int) -> onnx.ModelProto:
    value = relu_of()
    type_ = value.graph.input[0].type
    for _ in range(depth):
        outer = onnx.TypeProto()
        outer.sequence_type.elem_type.CopyFrom(type_)
        type_.CopyFrom(outer)
    return value


def _captures_nothing() -> onnx.ModelProto:
    then = _branch(node("Relu", "nowhere", "t"), makes="t")
    other = _branch(node("Identity", "x", "e"), makes="e")
    return model(
        [node("If", "c", "y", then_branch=then, else_branch=other)],
        inputs=[info("x", 1, 4), info("c", dtype=TensorProto.BOOL)],
    )


def _twice_imported() -> onnx.ModelProto:
    return relu_of(opsets=[helper.make_opsetid("", 21), helper.make_opsetid("", 13)])


def _no_opset() -> onnx.ModelProto:
    found = relu_of()
    del found.opset_import[:]
    return found


def _two_functions_of_a_name() -> onnx.ModelProto:
    return model(
        [_call("F", "x", "y")],
        functions=[_function("F", node("Relu", "a", "b")), _function("F", node("Neg", "a", "b"))],
    )


def _bare(text: str) -> onnx.ModelProto:
    found = onnx.ModelProto()
    found.ir_version = 10
    found.opset_import.append(helper.make_opsetid("", 21))
    if text == "no inputs or outputs":
        found.graph.name = "g"
    return found


for name, made, words in (
    ("function-chain-3000", function_chain(3000), "100 deep"),
    ("function-chain-100000", function_chain(100_000), "deep"),
    ("function-recursive", model([_call("F", "x", "y")], functions=[_function("F", _call("F"))]),
     "itself"),
    ("function-mutual", model([_call("F", "x", "y")],
     functions=[_function("F", _call("G")), _function("G", _call("F"))]), "itself"),
    ("function-doubling-40", doubling_functions(40), "nodes"),
    ("function-chain-of-ifs", functions_of_ifs(60), ""),
    ("function-twice", _two_functions_of_a_name(), "F"),
    ("function-missing", model([_call("G", "x", "y")]), "G"),
    ("if-nested-200", nested_ifs(200), "deep"),
    ("if-nested-3000", nested_ifs(3000), "deep"),
    ("if-captures-nothing", _captures_nothing(), "nowhere"),
    ("type-nested-40", deep_type(40), ""),
    ("cycle", model([node("Add", "x b", "a"), node("Relu", "a", "b"), node("Relu", "b", "y")]), ""),
    ("cycle-of-one", model([node("Add", "x y", "y")]), ""),
    ("made-twice", model([node("Relu", "x", "y"), node("Neg", "x", "y")]), "'y'"),
    ("output-twice-declared", relu_of(outputs=[info("y", 1, 4), info("y", 4, 1)]), ""),
    ("input-twice", relu_of(inputs=[info("x", 1, 4), info("x", 1, 4)]), "'x'"),
    ("input-made-by-node", model([node("Relu", "x", "x"), RELU]), "'x'"),
    ("initializer-twice", model([node("Add", "x w", "y")],
     [scalar("w", 1), scalar("w", 2)]), "'w'"),
    ("initializer-made-by-node", model([node("Relu", "x", "w"), node("Neg", "w", "y")],
     [scalar("w", 1)]), "'w'"),
    ("dangling-operand", model([node("Add", "x nowhere", "y")]), "nowhere"),
    ("dangling-output", model([node("Relu", "x", "z")]), "'y'"),
    ("no-graph", _bare(""), "no ONNX graph"),
    ("no-outputs", _bare("no inputs or outputs"), "no outputs"),
    ("opset-999", relu_of(opsets=[helper.make_opsetid("", 999)]), "999"),
    ("opset-0", relu_of(opsets=[helper.make_opsetid("", 0)]), "0"),
    ("opset-negative", relu_of(opsets=[helper.make_opsetid("", -5)]), "-5"),
    ("opset-overflowing", relu_of(opsets=[helper.make_opsetid("", (1 << 63) - 1)]), "922337"),
    ("opset-missing", _no_opset(), "operator set"),
    ("opset-twice", _twice_imported(), ""),
    ("operator-unknown", model([node("Frobnicate", "x", "y")]), "Frobnicate"),
    ("operator-empty", model([node("", "x", "y")]), ""),
    ("domain-unknown", model([node("Gelu", "x", "y", domain="evil.corp")],
     opsets=[helper.make_opsetid("", 21), helper.make_opsetid("evil.corp", 1)]), "evil.corp"),
    ("domain-not-imported", model([node("Gelu", "x", "y", domain="evil.corp")]), "evil.corp"),
    ("attribute-unknown", model([node("Relu", "x", "y", colour="red")]), "colour"),
    ("attribute-of-wrong-type", model([node("Concat", "x x", "y", axis="one")]), "Concat"),
    ("attribute-missing", model([node("Concat", "x x", "y")]), "axis"),
    ("too-many-operands", model([node("Relu", "x x x", "y")]), "Relu"),
    ("too-few-operands", model([node("Add", "x", "y")]), "Add"),
    ("type-contradiction", model([node("Add", "x w", "y")], [ints("w", 1)]), "Add"),
    ("type-of-output-contradicts", relu_of(outputs=[info("y", 1, 4, dtype=INT64)]), "y"),
    ("shape-contradiction", model([node("MatMul", "x w", "y")],
     [numpy_helper.from_array(np.ones((3, 4), np.float32), "w")]), "MatMul"),
    ("shape-of-output-contradicts", relu_of(outputs=[info("y", 7, 9)]), "y"),
    ("shape-of-value-contradicts", model([node("Relu", "x", "h"), node("Relu", "h", "y")],
     infos=[info("h", 5, 5)]), ""),
    ("if-nothing-true", model([node("If", "c", "y")],
     inputs=[info("x", 1, 4), info("c", dtype=TensorProto.BOOL)]), "If"),
):  # fmt: skip
    fresh = name in (
        "function-chain-3000", "function-recursive", "function-doubling-40", "if-nested-3000",
        "cycle", "opset-999", "operator-unknown",
    )  # fmt: skip
    add(name, compile_of(made), says=words, fresh=fresh)


# -- bombs ----------------------------------------------------------------------------------


def bomb(
    op_type: str, weights: Sequence[onnx.TensorProto], **attributes: object
) -> onnx.ModelProto:
    """`op_type` of constants gives 2 ** 40 elements, whose sum is added to x."""
    reads = " ".join(w.name for w in weights)
    return model(
        [
            node(op_type, reads, "big", **attributes),
            node("Cast", "big", "wide", to=FLOAT),
            node("ReduceSum", "wide", "one", keepdims=0),
            node("Add", "x one", "y"),
        ],
        weights,
    )


def _doublings(count: int, op_type: str) -> onnx.ModelProto:
    """Small steps: every one doubles what there is, and none is large for its operands."""
    nodes: list[onnx.NodeProto] = []
    for i in range(count):
        reads = f"v{i} v{i}" if op_type == "Concat" else f"v{i} two"
        options = {"axis": 0} if op_type == "Concat" else {}
        nodes.append(node(op_type, reads, f"v{i + 1}", **options))
    nodes += [node("ReduceSum", f"v{count}", "one", keepdims=0), node("Add", "x one", "y")]
    start = numpy_helper.from_array(np.ones(4, np.float32), "v0")
    return model(nodes, [start, ints("two", 2)])


def _doubled_shape(count: int) -> onnx.ModelProto:
    """Shape tensors that double: inference which follows their contents would hold them."""
    nodes = [node("Shape", "x", "s0")]
    nodes += [node("Concat", f"s{i} s{i}", f"s{i + 1}", axis=0) for i in range(count)]
    nodes += [
        node("ReduceSum", f"s{count}", "n", keepdims=0), node("Cast", "n", "f", to=FLOAT),
        node("Add", "x f", "y"),
    ]  # fmt: skip
    return model(nodes)


def _endless_loop() -> onnx.ModelProto:
    body = helper.make_graph(
        [node("Identity", "c", "d"), node("Relu", "v", "w")], "body",
        [info("i", dtype=INT64), info("c", dtype=TensorProto.BOOL), info("v", 1, 4)],
        [info("d", dtype=TensorProto.BOOL), info("w", 1, 4)],
    )  # fmt: skip
    weights = [numpy_helper.from_array(np.array(1 << 62), "trips"),
               numpy_helper.from_array(np.ones((1, 4), np.float32), "start")]  # fmt: skip
    return model(
        [node("Loop", "trips always start", "z", body=body),
         node("Add", "x z", "y")],
        [*weights, numpy_helper.from_array(np.array(True), "always")],
    )  # fmt: skip


def _zeros(name: str, *shape: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.zeros(shape, np.float32), name)


def _counter(name: str, value: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(value, np.int64), name)


_RESIZE = helper.make_node("Resize", ["v", "", "", "s"], ["big"], mode="nearest")
_RESIZED = model(
    [_RESIZE, node("ReduceSum", "big", "one", keepdims=0), node("Add", "x one", "y")],
    [_zeros("v", 1, 1, 2, 2), ints("s", 1, 1, 1 << 20, 1 << 20)],
)

for name, made in (
    ("ConstantOfShape", bomb("ConstantOfShape", [ints("s", HUGE)])),
    ("ConstantOfShape-square", bomb("ConstantOfShape", [ints("s", 1 << 20, 1 << 20)])),
    ("Expand", bomb("Expand", [scalar("v", 1), ints("s", 1 << 20, 1 << 20)])),
    ("Tile", bomb("Tile", [_zeros("v", 2), ints("s", HUGE >> 1)])),
    ("Range", bomb("Range", [_counter("a", 0), _counter("b", HUGE), _counter("c", 1)])),
    ("Resize", _RESIZED),
    ("Pad", bomb("Pad", [_zeros("v", 2), ints("s", 0, HUGE)])),
    ("OneHot", bomb("OneHot", [ints("i", *range(8)), _counter("d", HUGE),
                               numpy_helper.from_array(np.array([0, 1], np.float32), "v")])),
    ("EyeLike", model([node("ConstantOfShape", "s", "v"), node("EyeLike", "v", "big"),
                       node("ReduceSum", "big", "one", keepdims=0), node("Add", "x one", "y")],
                      [ints("s", 1 << 20, 1 << 20)])),
    ("RandomNormal", bomb("RandomNormal", [], shape=[1 << 20, 1 << 20])),
    ("RandomUniform", bomb("RandomUniform", [], shape=[HUGE])),
    ("HannWindow", bomb("HannWindow", [_counter("n", HUGE)])),
    ("overflowing", bomb("ConstantOfShape", [ints("s", 1 << 32, 1 << 32)])),
    ("negative", bomb("ConstantOfShape", [ints("s", -8)])),
    ("doublings-Concat", _doublings(40, "Concat")),
    ("doublings-Tile", _doublings(40, "Tile")),
    ("doublings-of-shapes", _doubled_shape(34)),
    ("Einsum", bomb("Einsum", [_zeros("a", 1 << 10), _zeros("b", 1 << 10), _zeros("c", 1 << 10),
                     _zeros("d", 1 << 10)], equation="a,b,c,d->abcd")),
):  # fmt: skip
    add(
        f"bomb-{name}",
        compile_of(made),
        fresh=name in ("ConstantOfShape", "Tile", "doublings-Concat"),
    )
add("bomb-Loop", compile_of(_endless_loop()))


# -- dimensions -----------------------------------------------------------------------------


def _weight(dims: Sequence[int], data_type: int = FLOAT, **content: object) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name="w", data_type=data_type, dims=dims)
    for key, value in content.items():
        if key == "raw_data":
            tensor.raw_data = value  # type: ignore[assignment]
        else:
            getattr(tensor, key).extend(value)
    return tensor


def weighted(tensor: onnx.TensorProto) -> onnx.ModelProto:
    return model([node("Add", "x w", "y")], [tensor])


def _sparse(indices: Sequence[int], dims: Sequence[int]) -> onnx.ModelProto:
    made = model([node("Add", "x w", "y")])
    values = numpy_helper.from_array(np.ones(len(indices), np.float32), "w")
    sparse = helper.make_sparse_tensor(values, ints("i", *indices), list(dims))
    made.graph.sparse_initializer.append(sparse)
    return made


ONE = np.ones(4, np.float32).tobytes()
NAN = np.array([1, np.nan, np.inf, 1], np.float32).tobytes()
for name, made, words in (
    ("float-and-raw", weighted(_weight([4], raw_data=ONE, float_data=[1, 2, 3, 4])), "'w'"),
    ("raw-too-short", weighted(_weight([4], raw_data=ONE[:7])), "'w'"),
    ("raw-too-long", weighted(_weight([4], raw_data=ONE * 2)), "'w'"),
    ("values-too-few", weighted(_weight([4], float_data=[1])), "'w'"),
    ("values-of-other-type", weighted(_weight([4], int64_data=[1, 2, 3, 4])), "'w'"),
    ("no-values", weighted(_weight([4])), "'w'"),
    ("dims-negative", weighted(_weight([-4], raw_data=ONE)), "'w'"),
    ("dims-two-negative", weighted(_weight([-2, -2], raw_data=ONE)), "'w'"),
    ("dims-overflowing", weighted(_weight([1 << 62, 1 << 62], raw_data=ONE)), "'w'"),
    ("dims-overflowing-to-4", weighted(_weight([(1 << 62) + 1, 4], raw_data=ONE)), "'w'"),
    ("dims-huge-and-zero", weighted(_weight([1 << 62, 0], raw_data=b"")), ""),
    ("dims-2-40", weighted(_weight([HUGE], raw_data=ONE)), "'w'"),
    ("rank-100000", weighted(_weight([1] * 100_000, raw_data=ONE[:4])), ""),
    ("type-unknown", weighted(_weight([4], 99, raw_data=ONE)), "'w'"),
    ("type-undefined", weighted(_weight([4], 0, raw_data=ONE)), "'w'"),
    ("nan", weighted(_weight([4], raw_data=NAN)), "NaN"),
    ("bad-utf8", weighted(_weight([4], TensorProto.STRING, string_data=[b"\xff\xfe"] * 4)), ""),
    ("sparse-out-of-range", _sparse([7], [4]), ""),
    ("sparse-negative", _sparse([-1], [4]), ""),
    ("sparse-unsorted", _sparse([3, 1], [4]), ""),
    ("sparse-huge", _sparse([1], [HUGE]), ""),
):
    add(f"weight-{name}", compile_of(made), says=words, fresh=name in ("nan", "float-and-raw"))

for name, shape in (
    ("2-40", [HUGE]), ("2-63-1", [(1 << 63) - 1]), ("overflowing", [1 << 32, 1 << 32, 4]),
    ("negative", [-1, 4]), ("lowest", [-(1 << 63)]),
):  # fmt: skip
    add(
        f"input-dims-{name}",
        compile_of(relu_of(inputs=[info("x", *shape)], outputs=[info("y", *shape)])),
        says="x",
        fresh=name == "2-40",
    )


def _named_badly() -> bytes:
    """A name whose bytes are not UTF-8, which protobuf lets through where it does not check."""
    data = relu_of(outputs=[info("yyyy", 1, 4)]).SerializeToString()
    return data.replace(b"yyyy", b"\xff\xfe\xfd\xfc")


add("name-not-utf8", compile_of(_named_badly()))
