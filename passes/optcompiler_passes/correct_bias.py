"""Take the mean error of every channel, which quantisation leaves behind, out of the biases."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from optcompiler.errors import InputError
from optcompiler.program import Program, constant
from optcompiler.rewriting import Batch, Candidate, Decline, Declined, Pass, PassContext, Stage
from optcompiler_passes._likeness import likeness
from optcompiler_passes._linear import Linear, linear, per_channel
from optcompiler_passes._qdq import quantized_source
from optcompiler_passes._regions import is_op
from optcompiler_passes._rescaling import as_in_teacher, fit_bias, without_pairs

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class CorrectBias(Pass):
    """Make the mean of each channel of each layer what it is in the teacher.

        y = Conv(Q(x), Q(w), b)     →     y = Conv(Q(x), Q(w), b + E[y_teacher] - E[y])

    Rounding errors of a weight do not average out where activations have a mean, as behind a Relu,
    and clipping shifts them all one way (Nagel et al., "Data-Free Quantization", 2019, section 4.2;
    Banner et al., "Post training 4-bit quantization", 2019, section 4).

    1. A layer is a Conv, ConvTranspose or Gemm with a constant bias, or a MatMul and the Add of its
       bias. One without a bias is declined.
    2. Layers are corrected in the order of the graph, in one run: the means of a layer are taken
       when all before it are corrected. `samples` of the calibration data take part.
    3. The teacher's value is the one of the same name and shape; channels that `equalize` scaled
       are compared as they were. A layer whose mean would move by more than the teacher's values
       are large is left alone: those cannot be the same values.
    4. It declines where the damage on the hold-out batches does not fall.
    """

    name: ClassVar[str] = "correct-bias"
    stage: ClassVar[Stage] = Stage.TUNE
    after: ClassVar[tuple[str, ...]] = ("equalize",)
    summary: ClassVar[str] = "take the mean errors of quantisation out of the biases"
    time_limit_s: ClassVar[float] = math.inf

    samples: int = 256

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise InputError(f"correct-bias: samples={self.samples}; give a positive number.")

    def propose(self, program: Program, context: PassContext) -> Iterable[Candidate | Decline]:
        if not context.calibration:
            yield Decline("program", "no calibration data to measure on; pass calibration=batches")
            return
        if not any(node.op_type == "QuantizeLinear" for node in program.graph):
            yield Decline("program", "nothing in it is quantised")
            return
        layers, declines = _layers(program, context.teacher)
        yield from declines
        if not layers:
            yield Decline("program", "no layer has a bias and the teacher's result to compare")
            return

        def rewrite(student: Program) -> None:
            _correct(student, context, self.samples)

        note = f"{len(layers)} layers"
        yield Candidate("program", "corrected", rewrite, exact=False, note=note)


def _layers(program: Program, teacher: Program) -> tuple[dict[str, Linear], list[Decline]]:
    """Layers to correct by the name of their results, of the program without its pairs."""
    like = likeness(teacher)
    found: dict[str, Linear] = {}
    declines: list[Decline] = []
    within: set[str] = set()
    for node in reversed(tuple(without_pairs(program).graph)):
        layer = linear(node)
        name = str(node.name)
        if not isinstance(layer, Linear) or name in within:
            continue
        within.add(str(layer.node.name))
        result = node.outputs[0]
        if layer.bias is None:
            declines.append(Decline(name, "it has no bias", (name,)))
        elif not like(result):
            declines.append(Decline(name, f"the teacher has no {result.name!r} like it", (name,)))
        else:
            found[str(result.name)] = layer
    return dict(reversed(found.items())), declines[::-1]


def _correct(student: Program, context: PassContext, samples: int) -> None:
    from optcompiler.damage import Judge
    from optcompiler_passes._samples import size_of

    before = student.clone()
    layers, _ = _layers(student, context.teacher)
    batches: list[Batch] = []
    for batch in context.calibration:
        if sum(map(size_of, batches)) >= samples:
            break
        batches.append(batch)
    means = _means(context, layers, batches)
    shifts = _run_corrected(student, context, layers, batches, means)
    for name, shift in shifts.items():
        _shift(student, layers[name], shift)
    judge = Judge(context.teacher, context.holdout or context.calibration, context.ops)
    old, new = judge.damage(before), judge.damage(student)
    if not new < old:
        raise Declined(f"the damage on data held out is {old:.3g} before and {new:.3g} after.")


def _means(
    context: PassContext, layers: dict[str, Linear], batches: list[Batch]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Mean and mean square of each channel in the teacher."""
    from optcompiler.executor import observe, to_torch

    sums: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}

    def seen(name: str, tensor: torch.Tensor) -> None:
        axis = layers[name].axis
        rows = tensor.detach().double().movedim(axis, 0).flatten(1)
        part = np.stack([rows.sum(1).numpy(), rows.square().sum(1).numpy()])
        sums[name] = sums.get(name, np.zeros_like(part)) + part
        counts[name] = counts.get(name, 0) + rows.shape[1]

    module = to_torch(context.teacher, context.ops, trainable=False)
    for batch in batches:
        observe(module, batch, seen, list(layers))
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, (total, squares) in sums.items():
        found[name] = total / counts[name], squares / counts[name]
    return found


def _run_corrected(
    student: Program,
    context: PassContext,
    layers: dict[str, Linear],
    batches: list[Batch],
    means: dict[str, tuple[np.ndarray, np.ndarray]],
) -> dict[str, np.ndarray]:
    """What to add to the bias of each layer, each found with all before it corrected."""
    import torch

    from optcompiler.executor import VALUE_KEY, argument_of, to_torch

    module = to_torch(student, context.ops, trainable=False)
    names = [p.name for p in student.inputs]
    runs = [torch.fx.Interpreter(module) for _ in batches]
    for run, batch in zip(runs, batches, strict=True):
        run.env = {}
        run.args_iter = iter([argument_of(batch[n]) for n in names])
    shifts: dict[str, np.ndarray] = {}
    with torch.no_grad():
        for node in module.graph.nodes:
            for run in runs:
                run.env[node] = run.run_node(node)
            name = node.meta.get(VALUE_KEY)
            if name in layers and name not in shifts:
                axis = layers[name].axis
                rows = [run.env[node].double().movedim(axis, 0).flatten(1) for run in runs]
                count = sum(r.shape[1] for r in rows)
                mean = sum(r.sum(1) for r in rows).numpy() / count  # type: ignore[union-attr]
                shifts[name] = _shift_between(student, name, axis, mean, *means[name])
                wide = torch.from_numpy(shifts[name]).float()
                for run in runs:
                    value = run.env[node]
                    shape = [-1 if i == axis else 1 for i in range(value.ndim)]
                    run.env[node] = value + wide.to(value.dtype).reshape(shape)
            for run in runs:
                for old in run.user_to_last_uses.get(node, ()):
                    del run.env[old]
    return {name: shift for name, shift in shifts.items() if shift.any()}


def _shift_between(
    student: Program,
    name: str,
    axis: int,
    mean: np.ndarray,
    wanted: np.ndarray,
    squares: np.ndarray,
) -> np.ndarray:
    """Teacher's mean less the student's, in the student's units; zeros where they do not compare.

    `mean` is the student's; `wanted` and `squares` are mean and mean square in the teacher.
    """
    value = student.value(name)
    assert value is not None
    units = as_in_teacher(value, axis, np.ones_like(mean))
    if units is None:
        return np.zeros_like(mean)
    shift = wanted - mean * units
    alike = np.isfinite(shift).all() and np.square(shift).sum() < squares.sum()
    return shift / units if alike else np.zeros_like(mean)


def _shift(student: Program, layer: Linear, shift: np.ndarray) -> None:
    """Add `shift` [channels] to the bias of a layer."""
    last = student.node(str(layer.last.name))
    node = student.node(str(layer.node.name))
    assert last is not None
    assert node is not None
    assert layer.bias is not None
    index = next(
        i for i, v in enumerate(last.inputs)
        if v is not None and layer.bias.name in (v.name, getattr(quantized_source(v), "name", None))
    )  # fmt: skip
    bias = last.inputs[index]
    array = constant(bias)
    if bias is None or array is None:
        return
    if is_op(node, "Gemm"):
        shift = shift / (node.attributes["beta"].as_float() if "beta" in node.attributes else 1.0)
    rank = 1 if is_op(node, "Conv", "ConvTranspose") else layer.axis + 1
    held = per_channel(array, rank, rank - 1, layer.channels)
    assert held is not None
    shape = array.shape if array.size == layer.channels else (layer.channels,)
    changed = (held + shift).astype(array.dtype).reshape(shape)
    if len(bias.uses()) == 1:
        student.set_weight(bias, changed)
    else:
        last.replace_input_with(index, student.add_weight(f"{bias.name}.{last.name}", changed))
    fit_bias(student, node)
