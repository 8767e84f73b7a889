"""The training loop of distillation."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import networkx as nx
import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from optcompiler.binding import resolved
from optcompiler.damage import kl, nmse
from optcompiler.errors import InputError
from optcompiler.executor import WEIGHTS_KEY, to_torch
from optcompiler.program import Program, constant, shape_of
from optcompiler.rewriting import Batch, Declined, PassContext
from optcompiler_passes._clock import Clock
from optcompiler_passes._qdq import laid_out

if TYPE_CHECKING:
    from optcompiler_passes.distill import Distill

Tensor = torch.Tensor

MOST_BLOCKS = 16
MOST_PARTS = 8
"""Samples per step where a program is fixed to fewer at a time."""

_CONTRACTIONS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_NORMALIZATIONS = frozenset(
    {"GroupNormalization", "InstanceNormalization", "LayerNormalization", "RMSNormalization"}
)
_ENDS = {"UINT8": (0, 255), "INT8": (-128, 127), "UINT4": (0, 15), "INT4": (-8, 7)}
_LARGEST = 1e30
_FLOORS = {"weights": 0.01, "biases": 0.1}
"""Least magnitude that step sizes are relative to; biases are often zero to begin with."""


# -- what learns ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Learnable:
    """An initializer that training changes; `most` bounds a scale from above."""

    name: str
    role: str
    most: float = math.inf
    bounds: tuple[int, int] = (0, 0)


def learnables(program: Program, roles: Sequence[str]) -> list[Learnable]:
    """The initializers of the given roles, in the order of the graph's nodes."""
    found: dict[str, Learnable] = {}
    for node in program.graph:
        for index, value in enumerate(node.inputs):
            array = constant(value)
            if value is None or array is None or value.is_graph_output():
                continue
            item = _learnable(node, index, value, array)
            name = str(value.name)
            if item is None or item.role not in roles:
                continue
            if name in found and found[name].most < item.most:
                continue
            found[name] = item
    return list(found.values())


def _learnable(node: ir.Node, index: int, value: ir.Value, array: np.ndarray) -> Learnable | None:
    name = str(value.name)
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        if index == 0:
            return _through_quantizer(node, name, array)
        source = node.inputs[0]
        if source is None or (constant(source) is not None and node.op_type == "DequantizeLinear"):
            return None
        if index == 1 and array.dtype == np.float32:
            return Learnable(name, "scales", _most(node, array))
        kind = value.dtype.name if value.dtype is not None else ""
        if index == 2 and array.ndim == 0 and kind in _ENDS and int(array) not in _ENDS[kind]:
            symmetric = laid_out(source) is not None
            return None if symmetric else Learnable(name, "zero_points", bounds=_ENDS[kind])
        return None
    role = _role(node, index, array)
    return Learnable(name, role) if role is not None and _trainable(array) else None


def _through_quantizer(node: ir.Node, name: str, array: np.ndarray) -> Learnable | None:
    """A float weight or bias whose dequantised form a node reads."""
    if node.op_type != "QuantizeLinear" or not _trainable(array):
        return None
    for dequantize in node.outputs[0].consumers():
        for use in dequantize.outputs[0].uses():
            role = _role(use.node, use.idx, array)
            if role is not None:
                return Learnable(name, role)
    return None


def _role(node: ir.Node, index: int, array: np.ndarray) -> str | None:
    if node.domain != "":
        return None
    if node.op_type in _CONTRACTIONS:
        return "weights" if index < 2 else "biases"
    if node.op_type in _NORMALIZATIONS:
        return "weights" if index == 1 else "biases"
    if array.size > 1 and node.op_type in ("Add", "Sub"):
        return "biases"
    if array.size > 1 and node.op_type in ("Mul", "PRelu"):
        return "weights"
    return None


def _trainable(array: np.ndarray) -> bool:
    return array.dtype == np.float32 and bool((np.abs(array) < _LARGEST).all())


def _most(node: ir.Node, scale: np.ndarray) -> float:
    """The largest scale with which a quantiser after a Clip implies the clip's upper bound."""
    source = node.inputs[0]
    clip = source.producer() if source is not None else None
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    if clip is None or clip.op_type != "Clip" or len(clip.inputs) < 3 or scale.ndim:
        return math.inf
    bound, zero_point = constant(clip.inputs[2]), constant(zero)
    if bound is None or zero is None or zero_point is None or zero.dtype is None:
        return math.inf
    above = _ENDS.get(zero.dtype.name, (0, 255))[1] - int(zero_point)
    return float(bound) / above * (1 - 1e-6) if above > 0 and float(bound) > 0 else math.inf


# -- what is compared -----------------------------------------------------------------------


def blocks(student: Program, teacher: Program) -> list[str]:
    """Values of both programs, of the same float shape, that every path from some input passes."""
    shapes = {
        str(v.name): (v.dtype, shape_of(v)) for n in teacher.graph for v in n.outputs if v.name
    }
    view = student.network()
    view.remove_nodes_from([n for n in view if isinstance(n, tuple) and n[0] == "weight"])
    sink = ("sink", "")
    for value in student.graph.outputs:
        view.add_edge(("output", value.name), sink)
    above: Mapping[object, object] = nx.immediate_dominators(view.reverse(copy=False), sink)
    passed: set[object] = set()
    for value in student.graph.inputs:
        step: object = ("input", value.name)
        while step in above and above[step] != step and step != sink:
            step = above[step]
            passed.add(step)
    found: list[str] = []
    for node in student.graph:
        if node.name not in passed or len(node.outputs) != 1:
            continue
        value = node.outputs[0]
        if value.is_graph_output() or value.dtype != ir.DataType.FLOAT:
            continue
        if shapes.get(str(value.name)) == (value.dtype, shape_of(value)) and shape_of(value):
            found.append(str(value.name))
    stride = max(1, math.ceil(len(found) / MOST_BLOCKS))
    return found[::-1][::stride][::-1]


def same_function(program: Program, context: PassContext) -> bool:
    """Whether `program` and the teacher agree on the first batch, up to float rounding."""
    from optcompiler.executor import interpret

    batch = context.calibration[0]
    pair = [
        interpret(p, batch, [port.name for port in p.outputs], context.ops)
        for p in (context.teacher, program)
    ]
    for expected, got in zip(pair[0].values(), pair[1].values(), strict=True):
        if expected.shape != got.shape:
            return False
        if not expected.is_floating_point():
            if not torch.equal(expected, got):
                return False
        elif expected.numel() and not nmse(expected, got) < 1e-8:
            return False
    return True


class Loss:
    """Disagreement of student and teacher: outputs first, then values of blocks."""

    def __init__(self, outputs: int, options: Distill) -> None:
        self.outputs = outputs
        self.temperature = options.temperature
        self.block_weight = options.block_weight

    def __call__(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        total = torch.zeros((), device=teacher[0].device)
        errors: list[Tensor] = []
        for index, (s, t) in enumerate(zip(student, teacher, strict=True)):
            if not t.is_floating_point() or not t.numel():
                continue
            s, t = s.float(), t.float()
            scores = t.ndim > 0 and t.shape[-1] > 1
            if index < self.outputs and scores:
                total = total + self._divergence(s, t)
            finite = torch.isfinite(t) & torch.isfinite(s)
            gap = torch.where(finite, s - t, 0).square().mean()
            known = t[torch.isfinite(t)]
            spread = known.var(correction=0) if known.numel() else gap.detach()
            error = gap / spread.clamp_min(1e-12)
            if index < self.outputs and not scores:
                total = total + error
            else:
                errors.append(error)
        if errors and self.block_weight:
            total = total + self.block_weight * torch.stack(errors).mean()
        return total

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        t = torch.log_softmax(torch.nan_to_num(teacher / self.temperature, neginf=-1e4), -1)
        s = torch.log_softmax(torch.nan_to_num(student / self.temperature, neginf=-1e4), -1)
        return self.temperature**2 * (t.exp() * (t - s)).sum(-1).mean()


# -- data -----------------------------------------------------------------------------------


BYTE_MACS = 10
"""Multiply-accumulates that take as long as moving one byte, roughly, when training on a CPU."""


def work_per_sample(context: PassContext) -> int:
    """Multiply-accumulates of the teacher for one sample, and what moving its activations costs."""
    nodes = resolved(context.teacher).graph
    specs = [(context.ops.get(n), n) for n in nodes]
    costs = [s.cost(n) for s, n in specs if s is not None]
    work = sum(c.macs + BYTE_MACS * (c.bytes_read + c.bytes_written) for c in costs)
    return work // max(_size(context.calibration[0]) if _fixed(context.teacher) else 1, 1)


def _fixed(program: Program) -> bool:
    return all(isinstance(d, int) for p in program.inputs for d in p.shape[:1])


def sample_count(batches: Sequence[Batch]) -> int:
    """Samples in the batches: the sizes of their first axes."""
    return sum(_size(b) for b in batches)


def _size(batch: Batch) -> int:
    first = next(iter(batch.values()), None)
    return int(first.shape[0]) if first is not None and first.ndim else 1


class Samples:
    """Calibration data as mini-batches of the size asked for, in a random order, mixed.

    Batches whose inputs do not share their first axis, or differ in their other axes, are used as
    they were given.
    """

    def __init__(
        self,
        program: Program,
        batches: Sequence[Batch],
        augment: bool,
        device: torch.device,
        generator: torch.Generator,
    ) -> None:
        names = [p.name for p in program.inputs]
        self.generator = generator
        self.given = [[torch.from_numpy(np.array(b[n])).to(device) for n in names] for b in batches]
        self.joined = self._join()
        self.augment = augment and all(t.is_floating_point() for t in self.given[0])
        self.size = 1
        self._queue: list[int] = []

    def _join(self) -> list[Tensor] | None:
        for row in self.given:
            like = zip(row, self.given[0], strict=True)
            if any(t.ndim == 0 or t.shape[0] != row[0].shape[0] for t in row):
                return None
            if any(t.shape[1:] != f.shape[1:] for t, f in like):
                return None
        return [torch.cat(columns) for columns in zip(*self.given, strict=True)]

    def draw(self) -> list[Tensor]:
        """The inputs of one mini-batch."""
        if self.joined is None:
            return self.given[self._next(1, len(self.given))[0]]
        total = self.joined[0].shape[0]
        rows = torch.tensor(self._next(self.size, total))
        picked = [t[rows.to(t.device)] for t in self.joined]
        if not self.augment:
            return picked
        order = torch.randperm(len(rows), generator=self.generator)
        keep = 1 - 0.5 * torch.rand(len(rows), generator=self.generator)
        keep = torch.where(torch.rand(len(rows), generator=self.generator) < 0.5, keep, 1.0)
        return [_mix(t, order.to(t.device), keep.to(t.device, t.dtype)) for t in picked]

    def _next(self, count: int, total: int) -> list[int]:
        while len(self._queue) < count:
            self._queue += torch.randperm(total, generator=self.generator).tolist()
        taken, self._queue = self._queue[:count], self._queue[count:]
        return taken


def _mix(samples: Tensor, order: Tensor, keep: Tensor) -> Tensor:
    keep = keep.reshape([-1] + [1] * (samples.ndim - 1))
    return keep * samples + (1 - keep) * samples[order]


# -- training -------------------------------------------------------------------------------


class Student:
    """A program's module with its learnable tensors replaced by what the optimiser moves.

    Scales are trained as the logarithm of their ratio to the first value, zero points as floats
    that round with a straight-through gradient, everything else as itself.
    """

    def __init__(self, module: fx.GraphModule, learnt: Sequence[Learnable]) -> None:
        self.module = module
        attributes = {name: key for key, name in module.meta[WEIGHTS_KEY].items()}
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self.learnt = {attributes[i.name]: i for i in learnt if i.name in attributes}
        self.fixed = {k: t.detach() for k, t in tensors.items() if k not in self.learnt}
        self.start = {k: tensors[k].detach().clone() for k in self.learnt}
        self.free: dict[str, Tensor] = {}
        self.groups: list[dict[str, object]] = []
        for key, item in self.learnt.items():
            start = self.start[key]
            if item.role == "scales":
                free, step = torch.zeros_like(start), 1.0
            elif item.role == "zero_points":
                free, step = start.float(), float(item.bounds[1] - item.bounds[0]) / 4
            else:
                free = start.clone()
                step = max(float(start.square().mean().sqrt()), _FLOORS[item.role])
            self.free[key] = free.requires_grad_()
            self.groups.append({"params": [free], "lr": step})

    def tensors(self) -> dict[str, Tensor]:
        """Every learnable tensor as the module is to see it now."""
        return {key: self._shown(key, item) for key, item in self.learnt.items()}

    def _shown(self, key: str, item: Learnable) -> Tensor:
        free = self.free[key]
        if item.role == "scales":
            return (self.start[key] * torch.exp(free)).clamp(max=item.most)
        if item.role == "zero_points":
            level = free.clamp(*item.bounds)
            return level + (torch.round(level) - level).detach()
        return free

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        tensors = {**self.fixed, **self.tensors()}
        return torch.func.functional_call(self.module, tensors, tuple(inputs))

    def state(self) -> dict[str, Tensor]:
        """A copy of every learnable tensor by initializer name."""
        shown = self.tensors()
        return {item.name: shown[key].detach().clone() for key, item in self.learnt.items()}


def distill(student: Program, context: PassContext, options: Distill) -> None:
    """Train `student` in place; raises `Declined` when no state is nearer to the teacher."""
    learnt = learnables(student, options.learn)
    if not learnt:
        raise Declined(f"it holds no {' or '.join(options.learn)} to learn.")
    device = _device(context.choices.keep("distill: device", lambda: _device_of(options.device)))
    with _deterministic():
        best = _train(student, context, options, learnt, device)
    if best is None:
        raise Declined(
            f"none of {options.steps} steps came nearer to the teacher on data held out."
        )
    values = {str(v.name): v for v in student.graph.initializers.values()}
    for item in learnt:
        if item.name in best:
            value = values[item.name]
            kind = value.const_value.dtype if value.const_value is not None else value.dtype
            assert kind is not None
            array = best[item.name].cpu().numpy().astype(kind.numpy())
            student.set_weight(value, array)


def _train(
    program: Program,
    context: PassContext,
    options: Distill,
    learnt: Sequence[Learnable],
    device: torch.device,
) -> dict[str, Tensor] | None:
    names = blocks(program, context.teacher) if options.block_weight else []
    generator = torch.Generator().manual_seed(context.seed)
    samples = Samples(program, context.calibration, options.augment, device, generator)
    held_out = context.holdout or context.calibration
    judged = Samples(program, held_out, False, device, generator).given
    names = _comparable(program, context, names, judged[0], device)
    free = _batch_free(context.teacher), _batch_free(program)
    teacher = _module(free[0], context, names, False, device)
    wanted = min(options.batch_size, sample_count(context.calibration))
    samples.size = _batch_size(program, teacher, samples, wanted)
    if samples.size != wanted:
        free = context.teacher, program
        teacher = _module(free[0], context, names, False, device)
    student = Student(_module(free[1], context, names, True, device), learnt)
    outputs = len(program.outputs)
    loss_of = Loss(outputs, options)
    references = [_plain(teacher(*inputs))[:outputs] for inputs in judged]

    def judge() -> float:
        with torch.no_grad():
            pairs = [(r, student(i)[:outputs]) for r, i in zip(references, judged, strict=True)]
        return sum(_distance(r, s) for r, s in pairs) / len(pairs)

    optimizer = torch.optim.Adam(student.groups, betas=(0.9, 0.99))  # type: ignore[arg-type]
    peak = options.learning_rate * _share(references, judged, student)
    rates = [peak * float(g["lr"]) for g in optimizer.param_groups]
    parts = max(1, min(wanted, MOST_PARTS) // samples.size) if samples.joined else 1
    clock = Clock(options.steps, options.minutes, context.choices)
    best, nearest = None, judge()
    for step in context.progress.track(range(options.steps), "distilling"):
        if step >= clock.steps:
            break
        optimizer.zero_grad(set_to_none=True)
        for _ in range(parts):
            inputs = samples.draw()
            with torch.no_grad():
                expected = _plain(teacher(*inputs))
            (loss_of(student(inputs), expected) / parts).backward()
        if not _finite(student.free.values()):
            continue
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * clock.factor(step)
        optimizer.step()
        clock.tick(step)
        if clock.evaluates(step):
            distance = judge()
            if distance < nearest:
                best, nearest = student.state(), distance
    clock.stop()
    return best


def _module(
    program: Program,
    context: PassContext,
    names: Sequence[str],
    trainable: bool,
    device: torch.device,
) -> fx.GraphModule:
    module = to_torch(program, context.ops, extra_outputs=names, trainable=trainable)
    return module.to(device)


def _comparable(
    program: Program,
    context: PassContext,
    names: list[str],
    inputs: Sequence[Tensor],
    device: torch.device,
) -> list[str]:
    """Those values that mean the same in both programs: an exact pass may reuse a name."""
    if not names:
        return names
    count = len(program.outputs)
    with torch.no_grad():
        pair = [
            _module(p, context, names, False, device)(*inputs)[count:]
            for p in (context.teacher, program)
        ]
    return [n for n, t, s in zip(names, *pair, strict=True) if nmse(t, s) < 1.0]


def _batch_free(program: Program) -> Program:
    """A copy whose Reshape and Expand keep the first axis where they are given its size."""
    copy = program.clone()
    for node in tuple(copy.graph):
        if node.domain != "" or node.op_type not in ("Reshape", "Expand"):
            continue
        data, shape = node.inputs[0], constant(node.inputs[1])
        first = shape_of(data)[:1] if data is not None else ()
        if shape is None or not shape.size or first != (int(shape[0]),):
            continue
        if node.op_type == "Reshape" and node.attributes.get_int("allowzero", 0):
            continue
        freed = shape.copy()
        freed[0] = 0 if node.op_type == "Reshape" else 1
        node.replace_input_with(1, copy.add_weight(f"{node.name}_shape", freed))
    return copy


def _batch_size(program: Program, teacher: fx.GraphModule, samples: Samples, wanted: int) -> int:
    """`wanted`, or the batch size that the program is fixed to when it takes no other."""
    fixed = [p.shape[0] for p in program.inputs if p.shape]
    sizes = {d for d in fixed if isinstance(d, int)}
    if not sizes or sizes == {wanted}:
        return wanted
    size = max(sizes)
    if samples.joined is None:
        return wanted
    rows = (torch.arange(wanted) % samples.joined[0].shape[0]).to(samples.joined[0].device)
    inputs = [t[rows] for t in samples.joined]
    with torch.no_grad():
        try:
            # A GraphModule that is called prints what it raises.
            whole = teacher.forward(*inputs)
            parts = teacher.forward(*[t[:size] for t in inputs])
        except (RuntimeError, ValueError):
            return size
    for w, p in zip(whole, parts, strict=True):
        if w.ndim == 0 or w.shape[0] != wanted or w.shape[1:] != p.shape[1:]:
            return size
        if not torch.allclose(w[:size], p, rtol=1e-3, atol=1e-4, equal_nan=True):
            return size
    return wanted


def _distance(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> float:
    """Damage as the planner sees it, with a little of the squared error for what it is blind to."""
    total = 0.0
    for t, s in zip(teacher, student, strict=True):
        if t.is_floating_point() and t.numel():
            value = kl(t, s) + 0.01 * nmse(t, s)
            total += value if math.isfinite(value) else math.inf
    return total


def _share(
    references: Sequence[Sequence[Tensor]], inputs: Sequence[Sequence[Tensor]], student: Student
) -> float:
    """How far the outputs are off to begin with, relative to their spread, between 0.05 and 1.

    Small errors need small steps: the noise of a step is not to exceed what is to be repaired.
    """
    errors = [0.0]
    with torch.no_grad():
        for reference, given in zip(references, inputs, strict=True):
            got = student(given)[: len(reference)]
            for t, s in zip(reference, got, strict=True):
                if t.is_floating_point() and t.numel():
                    errors.append(nmse(t, s))
    return min(max(math.sqrt(max(errors)), 0.05), 1.0) if math.isfinite(max(errors)) else 1.0


def _plain(outputs: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach() for t in outputs]


def _finite(tensors: Iterable[Tensor]) -> bool:
    return all(t.grad is None or bool(torch.isfinite(t.grad).all()) for t in tensors)


def _device_of(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"distill: device={name!r} is not known; take cpu or cuda.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"distill: device {name!r} is not on this machine; take cpu.")
    return device


@contextlib.contextmanager
def _deterministic() -> Generator[None]:
    """Deterministic algorithms while training, as before afterwards."""
    before = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
