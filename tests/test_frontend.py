"""Torch in: names, structure, dynamic dimensions, shared memory, and what cannot be traced."""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from optcompiler import compile
from optcompiler.errors import InputError, UnsupportedOperatorError
from optcompiler.frontend import import_model
from optcompiler.frontend_torch import no_pickle
from optcompiler.ops import aten
from optcompiler.program import SOURCE_KEY, Program
from tests.support import run_onnx

Pair = namedtuple("Pair", ["first", "second"])


@dataclass
class Answer:
    logits: torch.Tensor
    hidden: torch.Tensor | None = None


torch.export.register_dataclass(Answer, serialized_type_name="tests.Answer")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(x))


def call(imported, *args, **kwargs):
    """The imported program run by ONNX Runtime, called as the module was."""
    arrays = imported.signature.bind(args, kwargs)
    return imported.signature.restore(run_onnx(imported.program, arrays), like_torch=True)


def same(got, wanted) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_module_is_imported_as_it_is():
    net = Net().train()
    net.head.eval()
    x = torch.randn(2, 4)
    imported = import_model(net, (x,))
    assert [p.name for p in imported.program.inputs] == ["x"]
    assert str(imported.program.outputs[0]) == "output: float[2, 3]"
    assert "body.0.weight" in imported.program.weights()
    assert {n.metadata_props.get(SOURCE_KEY) for n in imported.program.graph} >= {"body.0", "head"}
    assert net.training
    assert net.body[1].training
    assert not net.head.training
    assert all(p.requires_grad for p in net.parameters())
    for again in (import_model(net, (x,)), import_model(imported.program.to_proto())):
        assert again.program.content_hash() == imported.program.content_hash()
    weight = imported.program.weights()["head.weight"].numpy()
    assert weight.__array_interface__["data"][0] == net.head.weight.data_ptr()
    same(call(imported, x), net.eval()(x))


def test_nothing_is_printed_logged_or_warned(capfd, caplog):
    with warnings.catch_warnings(), caplog.at_level(logging.INFO):
        warnings.simplefilter("error")
        import_model(Net(), (torch.randn(2, 4),))
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert not caplog.records
    assert logging.root.manager.disable == logging.NOTSET


def test_a_dynamic_batch_traced_from_one_sample_takes_any():
    net = Net().eval()
    imported = import_model(net, np.zeros((1, 4), np.float32), dynamic="batch")
    assert imported.program.inputs[0].shape == ("batch", 4)
    assert imported.program.outputs[0].shape == ("batch", 3)
    for n in (1, 5):
        x = torch.randn(n, 4)
        same(call(imported, x), net(x))


def test_named_inputs_share_a_dynamic_dimension():
    class Two(nn.Module):
        def forward(self, ids, mask=None, scale=1.0, *, bias):
            return {"sum": (ids * mask).sum(1) * scale + bias, "any": mask > 0}

    x = torch.randn(1, 5)
    example = {"ids": x, "mask": torch.ones(1, 5), "scale": 2.0, "bias": torch.ones(())}
    dynamic = {"ids": {0: "n", 1: "t"}, "mask": {0: "n", 1: "t"}}
    imported = import_model(Two(), example, dynamic=dynamic)
    assert [str(p) for p in imported.program.inputs] == [
        "ids: float[n, t]",
        "mask: float[n, t]",
        "bias: float[]",
    ]
    assert [p.name for p in imported.program.outputs] == ["sum", "any"]
    x, mask, bias = torch.randn(3, 2), torch.ones(3, 2), torch.ones(())
    same(call(imported, x, mask, bias=bias), Two()(x, mask, 2.0, bias=bias))
    same(call(imported, x, mask=mask, bias=bias, scale=2.0), Two()(x, mask, 2.0, bias=bias))
    with pytest.raises(InputError, match=r"'scale' was fixed to 2.0"):
        call(imported, x, mask, 3.0, bias=bias)
    with pytest.raises(InputError, match="at most 3 expected"):
        call(imported, x, mask, 2.0, bias)


def test_arguments_after_a_gap_go_by_name():
    class Gap(nn.Module):
        def forward(self, a, b=None, c=None):
            return a + c

    imported = import_model(Gap(), {"c": torch.ones(2), "a": torch.zeros(2)})
    assert [(p.name, p.positional) for p in imported.signature.parameters] == [
        ("a", True),
        ("c", False),
    ]


def test_nested_arguments_and_every_kind_of_result():
    class Everything(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.arange(3.0))

        def forward(self, batch, *rest, k=2):
            y = batch["image"] * k + batch["points"][0] + rest[0]
            return OrderedDict(
                y=y,
                again=y,
                none=None,
                number=k,
                text="fine",
                x=batch["image"],
                table=self.table,
                constant=torch.ones(2),
                pair=Pair(y > 0, [y.T, (y.view(-1),)]),
                answer=Answer(logits=y + 1),
                rows=y.shape[0],
            )

    def arguments(n):
        return {"image": torch.randn(n, 3), "points": [torch.randn(3)]}, torch.randn(n, 3)

    module = Everything()
    imported = import_model(
        module, arguments(2), dynamic={"batch_image": {0: "n"}, "rest_0": {0: "n"}}
    )
    assert [p.name for p in imported.program.inputs] == ["batch_image", "batch_points_0", "rest_0"]
    assert [p.name for p in imported.program.outputs] == [
        "y", "again", "x", "table_output", "constant", "pair_first", "pair_second_0",
        "pair_second_1_0", "answer_logits", "rows",
    ]  # fmt: skip
    assert "table" in imported.program.weights()
    given = arguments(4)
    got, wanted = call(imported, *given), module(*given)
    assert list(got) == list(wanted)
    assert (got["none"], got["number"], got["text"], got["rows"]) == (None, 2, "fine", 4)
    for key in ("y", "again", "x", "table", "constant"):
        same(got[key], wanted[key])
    assert isinstance(got["pair"], Pair)
    assert got["pair"].first.dtype == torch.bool
    same(got["pair"].second, wanted["pair"].second)
    assert isinstance(got["answer"], Answer)
    same(got["answer"].logits, wanted["answer"].logits)
    assert got["answer"].hidden is None


def test_arguments_without_names_of_their_own():
    class Loose(nn.Module):
        def forward(self, *tensors, **more):
            return tensors[0] + tensors[1] * more["scale"]

    class Starred(nn.Module):
        def forward(self, first, **more):
            return first * more["scale"]

    x = torch.ones(2, 2)
    example = {"first": x, "scale": x}
    with pytest.raises(InputError, match=r"'scale' reaches forward.*declare it by name"):
        import_model(Starred(), example, dynamic="batch")
    # one tensor given for two arguments does not make them one
    imported = import_model(Starred(), example)
    same(call(imported, x, scale=x + 1), x + 1)
    same(call(imported, x * 3, scale=x), x * 3)
    with pytest.raises(InputError, match="at most 1 expected"):
        call(imported, x, x)
    with pytest.raises(InputError, match="KeyError"):
        import_model(Loose(), (x, x))


def test_tied_weights_stay_one():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 4)
            self.out = nn.Linear(4, 5, bias=False)
            self.out.weight = self.embed.weight
            self.register_buffer("view", self.embed.weight.detach())

        def forward(self, ids):
            return self.out(self.embed(ids)) + self.view.sum()

    imported = import_model(Tied(), (torch.arange(5),))
    big = [name for name, t in imported.program.weights().items() if t.size == 20]
    assert len(big) == 1


# -- other forms of a torch model -----------------------------------------------------------


def test_exported_programs_and_their_files(tmp_path):
    net = Net().eval()
    x = torch.randn(2, 4)
    batch = torch.export.Dim("batch")
    exported = torch.export.export(net, (x,), dynamic_shapes={"x": {0: batch}})
    code = exported.graph_module.code
    torch.export.save(exported, tmp_path / "net.pt2")
    for model in (exported, str(tmp_path / "net.pt2")):
        imported = import_model(model)
        same(call(imported, x[:1]), net(x[:1]))
        same(call(imported, x=x), net(x))
    assert exported.graph_module.code == code
    fixed = import_model(exported, (x,))
    assert fixed.program.inputs[0].shape == fixed.signature.inputs[0].shape == (2, 4)
    assert fixed.program.outputs[0].shape == (2, 3)
    with pytest.raises(InputError, match=r"dimension 1 of x: float.*which the model fixes"):
        import_model(exported, (x,), dynamic={"x": {1: "width"}})


def test_graph_modules_are_traced():
    net = Net().eval()
    x = torch.randn(2, 4)
    for module in (torch.fx.symbolic_trace(net), torch.export.export(net, (x,)).module()):
        same(call(import_model(module, (x,)), x), net(x))


def test_pickled_objects_in_files_are_not_loaded():
    class Payload:
        def __reduce__(self):
            return print, ("pickled code ran",)

    buffer = io.BytesIO()
    torch.save(Payload(), buffer)
    buffer.seek(0)
    with no_pickle(), pytest.raises(Exception, match="Weights only load failed"):
        torch.load(buffer, weights_only=False)
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_files_that_are_no_exported_program(tmp_path):
    path = tmp_path / "a.pt2"
    with pytest.raises(InputError, match="no such file"):
        import_model(path)
    for content, says in ((b"", "the file is empty"), (b"garbage", "truncated, or no .pt2")):
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"a.pt2: {says}"):
            import_model(path)


# -- ONNX through the same door -------------------------------------------------------------


def symbolic() -> Program:
    return Program.from_text("""
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[n, t] x, float[n] b) => (float[n, t] y, float[m] z) {
            axis = Constant <value_ints = [1]> ()
            c = Unsqueeze (b, axis)
            y = Add (x, c)
            z = ReduceMax <keepdims = 0> (x, axis)
        }
    """)


def test_an_onnx_model_gets_the_sizes_of_the_examples():
    program = symbolic()
    example = (np.zeros((2, 3), np.float32), np.zeros(2, np.float32))
    assert import_model(program).program is program
    fixed = import_model(program.model, example)
    assert [str(p) for p in fixed.program.inputs] == ["x: float[2, 3]", "b: float[2]"]
    assert [str(p) for p in fixed.program.outputs] == ["y: float[2, 3]", "z: float[2]"]
    partly = import_model(program, example, dynamic={"x": {0: "n"}, "b": {0: "n"}})
    assert [str(p) for p in partly.program.inputs] == ["x: float[n, 3]", "b: float[n]"]
    assert import_model(program, example, dynamic="n").program.inputs == partly.program.inputs
    assert program.inputs[0].shape == ("n", "t")
    with pytest.raises(InputError, match="dimension 2 of 'x'"):
        import_model(program, example, dynamic={"x": {2: "n"}})
    with pytest.raises(InputError, match="dimension 'n' is 3 here and 2 in 'x'"):
        import_model(program, (example[0], np.zeros(3, np.float32)))
    with pytest.raises(InputError, match="which the model fixes"):
        import_model(fixed.program, example, dynamic={"x": {0: "n"}})


def test_the_same_program_comes_from_a_file_a_protobuf_and_the_model(tmp_path):
    program = symbolic()
    program.save(tmp_path / "m.onnx")
    hashes = {
        import_model(m).program.content_hash()
        for m in (tmp_path / "m.onnx", str(tmp_path / "m.onnx"), program.to_proto(), program.model)
    }
    assert hashes == {program.content_hash()}


# -- what cannot be imported ----------------------------------------------------------------


def test_things_that_are_no_models():
    for thing in (3, None, lambda x: x, nn.Module):
        with pytest.raises(InputError, match=r"is not a model; give an nn.Module"):
            import_model(thing)
    with pytest.raises(InputError, match="TorchScript"):
        import_model(torch.jit.trace(Net().eval(), torch.randn(2, 4)), (torch.randn(2, 4),))


def test_examples_that_do_not_fit():
    with pytest.raises(InputError, match="Net: tracing a module needs example inputs"):
        import_model(Net())
    with pytest.raises(InputError, match=r"do not fit forward\(x\): missing a required argument"):
        import_model(Net(), ())
    with pytest.raises(InputError, match="unexpected keyword argument 'y'"):
        import_model(Net(), {"x": torch.ones(2, 4), "y": 1})
    with pytest.raises(InputError, match=r"cannot trace it \(RuntimeError: a and b must"):
        import_model(Net(), (torch.ones(2, 5),))
    with pytest.raises(InputError, match="name them by strings"):
        import_model(Net(), {0: torch.ones(2, 4)})


def test_dynamic_dimensions_that_do_not_exist_or_do_not_hold():
    x = torch.ones(2, 4)
    with pytest.raises(InputError, match="dynamic names the input 'y'; the example inputs are x"):
        import_model(Net(), (x,), dynamic={"y": {0: "batch"}})
    with pytest.raises(InputError, match="dimension 2 of 'x', which has 2 dimensions"):
        import_model(Net(), (x,), dynamic={"x": {2: "batch"}})
    with pytest.raises(InputError, match="give it an identifier"):
        import_model(Net(), (x,), dynamic={"x": {0: "a b"}})
    with pytest.raises(InputError, match="cannot trace it"):
        import_model(Net(), (x,), dynamic={"x": {1: "width"}})

    class Add(nn.Module):
        def forward(self, a, b):
            return a + b.sum()

    with pytest.raises(InputError, match="'n' is 3 in 'b' and 2 in another"):
        import_model(Add(), (torch.ones(2), torch.ones(3)), dynamic="n")


def test_models_that_cannot_be_traced_or_converted():
    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(InputError, match=r"Branch: torch.export cannot trace it") as caught:
        import_model(Branch(), (torch.ones(2),))
    assert "\n" not in str(caught.value)

    class Exotic(nn.Module):
        def forward(self, x):
            return x.to_sparse().to_dense()

    with pytest.raises(UnsupportedOperatorError, match="_to_sparse"):
        import_model(Exotic(), (torch.eye(3),))


def test_an_operator_without_an_onnx_form_stays_itself():
    class Factors(nn.Module):
        def forward(self, x):
            return torch.linalg.lu_factor(x)[0], torch.linalg.eigvals(x)

    x = torch.randn(3, 3)
    imported = import_model(Factors(), (x,))
    nodes = {n.op_type: n.domain for n in imported.program.graph}
    assert nodes["linalg_lu_factor"] == nodes["linalg_eig"] == aten.DOMAIN
    outputs = imported.program.to_torch()(x)
    same(imported.signature.restore([o.detach().numpy() for o in outputs], True), Factors()(x))
    with pytest.raises(UnsupportedOperatorError, match=r"aten::linalg_lu_factor of node"):
        compile(Factors(), (x,), target="onnxruntime", precision="fp32")


def test_what_draws_random_numbers_is_refused_by_name():
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x)

    with pytest.raises(UnsupportedOperatorError, match=r"RandomNormalLike of node .* draws random"):
        compile(Noisy(), (torch.ones(2),), precision="fp32")


def test_a_forward_without_a_tensor_to_return_is_refused():
    class Sizes(nn.Module):
        def forward(self, x):
            return x.shape[0], "rows"

    with pytest.raises(InputError, match="returns no tensor"):
        import_model(Sizes(), (torch.ones(2),))


def test_numbers_and_integer_tensors_are_promoted_as_torch_does():
    class Mask(nn.Module):
        def forward(self, x, mask):
            return 1.0 - mask, 1 - mask, torch.divide(x, mask + 1), torch.greater(x, mask)

    x, mask = torch.randn(3), torch.tensor([0, 1, 2])
    same(call(import_model(Mask(), (x, mask)), x, mask), Mask()(x, mask))


def test_the_exporter_is_left_as_it_was_and_keeps_its_tables():
    from torch.export import export
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    from optcompiler import frontend_export

    found = vars(ONNXRegistry)["from_torchlib"]
    exported = export(Net().eval(), (torch.ones(2, 4),))
    first = frontend_export.to_onnx(exported)
    assert vars(ONNXRegistry)["from_torchlib"] is found
    kept = frontend_export._registry.cache_info().currsize
    second = frontend_export.to_onnx(exported)
    assert frontend_export._registry.cache_info().currsize == kept == 1
    assert [n.op_type for n in second.model.graph] == [n.op_type for n in first.model.graph]


def test_named_tuples_of_torch_and_complex_numbers_come_back_as_they_were():
    class Spectrum(nn.Module):
        def forward(self, x, z):
            return torch.fft.fft(x) * z, torch.max(x, dim=0)

    x, z = torch.randn(3, 4), torch.randn(4, dtype=torch.complex64)
    imported = import_model(Spectrum(), (x, z))
    got, wanted = call(imported, x, z), Spectrum()(x, z)
    assert got[0].dtype == torch.complex64
    assert type(got[1]) is torch.return_types.max
    same(got, wanted)


def test_nan_weights_are_refused():
    net = Net()
    with torch.no_grad():
        net.head.weight[0, :2] = torch.nan
    with pytest.raises(InputError, match=r"'head.weight' holds 2 NaN or infinite values of 24"):
        import_model(net, (torch.ones(2, 4),))


def test_state_between_calls_is_refused_unless_nothing_depends_on_it():
    class Stateful(nn.Module):
        def __init__(self, reads: bool) -> None:
            super().__init__()
            self.reads = reads
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.seen.add_(1)
            return x + self.seen if self.reads else x + 1

    with pytest.raises(InputError, match="changes the buffer 'seen' and reads it"):
        import_model(Stateful(True), (torch.ones(2),))
    module = Stateful(False)
    same(call(import_model(module, (torch.ones(2),)), torch.ones(2)), torch.ones(2) + 1)
    assert module.seen == 0


@pytest.mark.parametrize("kind", [nn.MaxPool2d, nn.AvgPool2d])
def test_a_window_of_ceil_mode_that_would_start_in_the_padding_is_none(kind):
    module, x = nn.Sequential(kind(2, 3, 1, ceil_mode=True), nn.ReLU()), torch.randn(1, 2, 7, 7)
    imported = import_model(module, (x,))
    same(call(imported, x), module(x))
    same(imported.program.to_torch()(x)[0], module(x))


def test_bounds_name_dimensions_and_reach_the_trace():
    net = nn.Linear(4, 2)
    imported = import_model(net, (torch.ones(3, 4),), dynamic={"batch": (1, 8)})
    assert imported.program.inputs[0].shape == ("batch", 4)
    example = (np.zeros((2, 3), np.float32), np.zeros(2, np.float32))
    kept = import_model(symbolic(), example, dynamic={"t": (1, 8)})
    assert [str(p) for p in kept.program.inputs] == ["x: float[2, t]", "b: float[2]"]

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.ones(16, 4))

        def forward(self, x):
            return x + self.table[: x.shape[0]]

    named = {"x": {0: "t"}, "t": (2, 16)}
    bounded = import_model(Positions(), (torch.ones(3, 4),), dynamic=named)
    assert bounded.program.inputs[0].shape == ("t", 4)
    with pytest.raises(InputError, match="have batch 9, which is not from 1 to 8"):
        import_model(net, (torch.ones(9, 4),), dynamic={"batch": (1, 8)})
    with pytest.raises(InputError, match="which dimensions n, m are"):
        import_model(net, (torch.ones(3, 4),), dynamic={"n": (1, 8), "m": (1, 8)})
    with pytest.raises(InputError, match="'batch' the value 8"):
        import_model(net, (torch.ones(3, 4),), dynamic={"batch": 8})
