"""Programs to torch and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from optcompiler.errors import InputError, UnsupportedOperatorError
from optcompiler.executor import interpret, observe, refit, to_torch
from optcompiler.ops import OpSpec, OpTable, Work, builtin_specs
from optcompiler.program import Program
from tests.ops.comparing import check, run_torch
from tests.support import assert_close, random_inputs, run_onnx


class Convolutional(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = torch.nn.BatchNorm2d(8)
        self.depthwise = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = torch.nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.hardswish(self.norm(self.stem(x)))
        y = y + torch.nn.functional.relu6(self.depthwise(y))
        return self.head(torch.nn.functional.adaptive_avg_pool2d(y, 1).flatten(1))


class Attending(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 16)
        self.block = torch.nn.TransformerEncoderLayer(
            16, 2, 32, dropout=0.0, activation="gelu", batch_first=True
        )

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.block(self.embed(tokens))
        return y, y.mean(1)


def _export(module: torch.nn.Module, example: torch.Tensor) -> Program:
    with torch.no_grad():
        exported = torch.onnx.export(module.eval(), (example,), dynamo=True, verbose=False)
    assert exported is not None
    return Program(exported.model)


@pytest.mark.parametrize(
    ("module", "example"),
    [
        (Convolutional(), torch.randn(2, 3, 12, 12)),
        (Attending(), torch.randint(0, 11, (2, 7))),
    ],
    ids=["convolutional", "attending"],
)
def test_round_trip(module: torch.nn.Module, example: torch.Tensor) -> None:
    """torch → ONNX → Program → torch → refit → ONNX Runtime."""
    torch.manual_seed(0)
    program = _export(module, example)
    made = to_torch(program)
    expected = module(example)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for got, want in zip(made(example), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    sum(y.square().sum() for y in made(example)).backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        with torch.no_grad():
            parameter.add_(0.05 * torch.randn_like(parameter))
    changed = refit(program, made)
    inputs = {program.inputs[0].name: example.numpy()}
    after = [y.detach().numpy() for y in made(example)]
    assert_close(run_onnx(changed, inputs), after, 1e-4)
    assert_close(run_onnx(program, inputs), [y.detach().numpy() for y in expected], 1e-4)


MLP = """
    <ir_version: 10, opset_import: ["" : 20]>
    mlp (float[N,3] x) => (float[N,2] y)
    <float[3,4] "fc.1/w" = {1,2,3,4,5,6,7,8,9,10,11,12}, float[4] b = {1,2,3,4},
     float[4,2] w2 = {1,2,3,4,5,6,7,8}, int64[2] shape = {-1, 4}> {
        [first] h = Gemm (x, "fc.1/w", b)
        [shaped] r = Reshape (h, shape)
        [act] a = Relu (r)
        [second] y = MatMul (a, w2)
    }
"""


def _mlp() -> Program:
    return Program(ir.from_onnx_text(MLP))


def test_code_is_readable_and_names_are_kept() -> None:
    module = to_torch(_mlp())
    assert [n.name for n in module.graph.nodes if n.op == "call_function"] == [
        "first", "shaped", "act", "second"
    ]  # fmt: skip
    first = next(n for n in module.graph.nodes if n.name == "first")
    assert (first.meta["onnx_node"], first.meta["onnx_value"]) == ("first", "h")
    assert "[-1, 4]" in module.code
    assert module.meta["onnx_weights"] == {"fc_1_w": "fc.1/w", "b": "b", "w2": "w2"}
    assert set(dict(module.named_parameters())) == {"fc_1_w", "b", "w2"}


def test_refit_keeps_tensors_that_did_not_change() -> None:
    program = _mlp()
    module = to_torch(program)
    with torch.no_grad():
        module.get_parameter("b").add_(1)
    changed = refit(program, module)
    assert changed.weights()["w2"] is program.weights()["w2"]
    assert changed.weights()["b"].numpy().tolist() == [2, 3, 4, 5]
    assert program.weights()["b"].numpy().tolist() == [1, 2, 3, 4]
    assert changed.changes_since(program) == ((), (), ("b",))


def test_refit_refuses_other_modules_and_shapes() -> None:
    program = _mlp()
    module = to_torch(program)
    module.b = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(InputError, match=r"'b' has shape \[3\]"):
        refit(program, module)
    with pytest.raises(InputError, match="no weight map"):
        refit(program, torch.fx.symbolic_trace(torch.nn.ReLU()))
    other = Program(ir.from_onnx_text(MLP.replace("w2", "v2")))
    with pytest.raises(InputError, match="no initializer 'w2'"):
        refit(other, to_torch(program))


def test_intermediate_values() -> None:
    program = _mlp()
    inputs = random_inputs(program)
    outputs, hidden = to_torch(program, extra_outputs=["a"])(torch.from_numpy(inputs["x"]))
    values = interpret(program, inputs, ["a", "h", "x", "b"])
    assert list(values) == ["a", "h", "x", "b"]
    torch.testing.assert_close(values["a"], hidden)
    torch.testing.assert_close(values["a"], values["h"].relu())
    seen: dict[str, torch.Tensor] = {}
    results = observe(to_torch(program), inputs, seen.__setitem__, ["h", "y"])
    torch.testing.assert_close(seen["h"], values["h"])
    torch.testing.assert_close(results[0], outputs)
    assert interpret(to_torch(program), inputs, ["h"]).keys() == {"h"}


def test_unknown_values_and_missing_inputs() -> None:
    program = _mlp()
    with pytest.raises(InputError, match="no value 'nothing'"):
        interpret(program, random_inputs(program), ["nothing"])
    with pytest.raises(InputError, match="no value 'nothing'"):
        observe(to_torch(program), random_inputs(program), lambda *_: None, ["nothing"])
    with pytest.raises(InputError, match="input 'x'"):
        interpret(program, {}, ["y"])


def test_interpret_runs_only_what_is_needed() -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 20, "strange" : 1]>
        g (float[2] x) => (float[2] y) { h = Relu (x)  y = strange.Op (h) }
    """
    program = Program(ir.from_onnx_text(text))
    with pytest.raises(UnsupportedOperatorError, match="strange::Op of node"):
        interpret(program, {"x": np.ones(2, np.float32)}, ["y"])


def test_operators_of_plugins() -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 20, "strange" : 1]>
        g (float[2] x) => (float[2] y) { [odd] y = strange.Cube <factor = 2.0> (x) }
    """
    spec = OpSpec("Cube", _cube, lambda node: Work(), domain="strange")
    module = to_torch(Program(ir.from_onnx_text(text)), OpTable([*builtin_specs(), spec]))
    assert module(torch.tensor([1.0, 2.0]))[0].tolist() == [2, 16]


def _cube(x: torch.Tensor, *, factor: float) -> torch.Tensor:
    return factor * x * x * x


def test_trainable_modules_own_their_weights_and_others_share(tmp_path: Path) -> None:
    program = _mlp()
    before = program.weights()["w2"].numpy().copy()
    module = to_torch(program)
    with torch.no_grad():
        module.get_parameter("w2").zero_()
    assert (program.weights()["w2"].numpy() == before).all()
    ir.save(program.model, tmp_path / "m.onnx", external_data="m.data")
    mapped = Program(ir.load(tmp_path / "m.onnx"))
    inputs = random_inputs(mapped)
    shared = to_torch(mapped, trainable=False)
    assert not any(p.requires_grad for p in shared.parameters())
    expected = to_torch(program)(torch.from_numpy(inputs["x"]))[0]
    torch.testing.assert_close(shared(torch.from_numpy(inputs["x"]))[0], expected.detach())


def test_names_that_python_keeps_for_itself() -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[2] as, float[2] self, float[2] "1.a", float[2] "1/a") => (float[2] y)
        <float[2] class = {1, 2}, float[2] forward = {3, 4}, float[2] training = {5, 6}> {
            [import] a = Add (as, class)
            [torch] b = Mul (a, forward)
            [c] c = Sub (b, self)
            d = Add (c, training)
            e = Mul (d, "1.a")
            y = Sub (e, "1/a")
        }
    """
    check(Program(ir.from_onnx_text(text)))


def test_functions_are_expanded() -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 20, "optcompiler.fused" : 1]>
        g (float[2,3] x, float[3,3] w) => (float[2,3] y, float[2,3] z)
        <float s = {0.05}, uint8 z0 = {7}> {
            [one] q = optcompiler.fused.block <slope = 0.5> (x, w, s, z0)
            y = DequantizeLinear (q, s, z0)
            [two] p = optcompiler.fused.block (y, w, s, z0)
            z = DequantizeLinear (p, s, z0)
        }
        <domain: "optcompiler.fused", opset_import: ["" : 20]>
        block <slope: float = 0.1> (a, b, scale, zero) => (out) {
            m = MatMul (a, b)
            half = Constant <value = float {0.5}> ()
            h = Mul (m, half)
            l = LeakyRelu <alpha: float = @slope> (h)
            out = QuantizeLinear (l, scale, zero)
        }
    """
    program = Program(ir.from_onnx_text(text))
    check(program)
    module = to_torch(program)
    values = {str(n.meta.get("onnx_value")) for n in module.graph.nodes}
    assert {"q", "one/m", "two/l", "y"} <= values
    module(torch.ones(2, 3), torch.ones(3, 3))[1].sum().backward()
    assert module.get_parameter("s").grad is not None


def test_a_function_that_returns_its_input_and_leaves_inputs_out() -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 20, "f" : 1]>
        g (float[4] x) => (float[4] y, float[4] same) <float high = {0.5}> {
            same, y = f.both (x, "", high)
        }
        <domain: "f", opset_import: ["" : 20]>
        both (a, low, high) => (a, c) { c = Clip (a, low, high) }
    """
    program = Program(ir.from_onnx_text(text))
    x = np.array([-1, 0, 0.4, 3], np.float32)
    y, same = run_torch(program, {"x": x})
    assert y.tolist() == np.minimum(x, 0.5).tolist()
    assert same.tolist() == x.tolist()


def test_if_loop_and_scan() -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[3,2] x, bool c, int64 n) => (float[2] y, float[2] total, float[3,2] sums)
        <float[2] w = {1, 2}, bool go = {1}, float[2] start = {0, 0}> {
            r = ReduceSum <keepdims = 0> (x)
            y = If (c) <
                then_branch = t () => (float[2] a) { a = Mul (w, r) },
                else_branch = e () => (float[2] b) { b = Sub (w, r) }
            >
            total = Loop (n, go, start) <
                body = l (int64 i, bool k, float[2] s) => (bool k2, float[2] s2) {
                    k2 = Identity (k)
                    s2 = Add (s, y)
                }
            >
            last, sums = Scan (start, x) <num_scan_inputs = 1,
                body = s (float[2] acc, float[2] row) => (float[2] acc2, float[2] out) {
                    acc2 = Add (acc, row)
                    out = Mul (acc2, w)
                }
            >
        }
    """
    program = Program(ir.from_onnx_text(text))
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    for flag in (True, False):
        check(program, {"x": x, "c": np.array(flag), "n": np.array(3)})
    module = to_torch(program)
    module(torch.from_numpy(x), torch.tensor(True), torch.tensor(3))[2].sum().backward()
    assert module.get_parameter("w").grad is not None


def test_a_loop_that_stops_early_or_never_starts() -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 20]>
        g (int64 n, float[2] x) => (float[2] y, float[M,2] all) <float limit = {20}> {
            y, all = Loop (n, "", x) <
                body = l (int64 i, bool k, float[2] s) => (bool k2, float[2] s2, float[2] out) {
                    s2 = Add (s, s)
                    total = ReduceSum <keepdims = 0> (s2)
                    k2 = Less (total, limit)
                    out = Neg (s2)
                }
            >
        }
    """
    program = Program(ir.from_onnx_text(text))
    for count in (0, 1, 50):
        check(program, {"n": np.array(count), "x": np.array([1, 2], np.float32)})


def test_shapes_computed_at_run_time() -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[N,3,4] x) => (float[N,12] y, float[M] z)
        <int64[1] rest = {-1}, int64 zero = {0}, int64[1] axis = {0}> {
            s = Shape (x)
            n = Gather (s, zero)
            u = Unsqueeze (n, axis)
            shape = Concat <axis = 0> (u, rest)
            y = Reshape (x, shape)
            f = ConstantOfShape <value = float[1] {2}> (u)
            z = Expand (f, u)
        }
    """
    program = Program(ir.from_onnx_text(text))
    module = to_torch(program)
    for n in (1, 5):
        y, z = module(torch.ones(n, 3, 4))
        assert y.shape == (n, 12)
        assert z.tolist() == [2.0] * n


def test_strings_are_refused() -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 20]>
        g (string[2] x) => (string[2] y) { y = Identity (x) }
    """
    with pytest.raises(UnsupportedOperatorError, match=r"Identity of node '\w*' works on strings"):
        to_torch(Program(ir.from_onnx_text(text)))


def test_operators_of_an_older_meaning_are_refused() -> None:
    text = """
        <ir_version: 7, opset_import: ["" : 11]>
        g (float[2,3,4] x) => (float[2,3,4] y) { [old] y = Softmax <axis = 1> (x) }
    """
    with pytest.raises(UnsupportedOperatorError, match="Softmax of node 'old' is that of opset 11"):
        to_torch(Program(ir.from_onnx_text(text)))


def test_values_of_narrow_and_unsigned_types() -> None:
    for dtype in ("uint16", "uint32", "uint64", "float16", "bfloat16", "int8"):
        text = f"""
            <ir_version: 10, opset_import: ["" : 20]>
            g ({dtype}[3] x) => ({dtype}[3] y) {{ y = Add (x, x) }}
        """
        program = Program(ir.from_onnx_text(text))
        dtype_ = ir.DataType[dtype.upper()].numpy()
        got = run_torch(program, {"x": np.array([4, 5, 6], np.float32).astype(dtype_)})
        assert got[0].dtype == dtype_
        assert got[0].astype(np.float32).tolist() == [8, 10, 12]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    program = _mlp()
    inputs = random_inputs(program)
    expected = to_torch(program)(torch.from_numpy(inputs["x"]))[0]
    got = to_torch(program).to("cuda")(torch.from_numpy(inputs["x"]).cuda())[0]
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-4)
