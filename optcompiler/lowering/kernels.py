"""The lowered form as the cost model sees it."""

from __future__ import annotations

from optcompiler.backend import Kernel
from optcompiler.lowering.ir import (
    Call,
    Conv,
    CumSum,
    Expr,
    Gather,
    Loop,
    Lowered,
    MatMul,
    Normalization,
    Pooling,
    Reduction,
    Scatter,
    Softmax,
    Step,
    TopK,
    View,
    itemsize,
    operands_of,
    product,
    walk,
)

FEW_BITS = {"INT4": 4, "UINT4": 4, "INT2": 2, "UINT2": 2}
"""Bits of a constant's elements, where packed ones take less than a byte."""

TRANSCENDENTAL = {
    "exp": 8, "log": 8, "erf": 12, "tanh": 12, "sigmoid": 12, "gelu": 14, "gelu_tanh": 14,
    "pow": 20, "div": 4,
}  # fmt: skip
"""Arithmetic weight of an operation, where it is not 1."""


def kernels_of(lowered: Lowered) -> list[Kernel]:
    """One kernel per step, in order."""
    return [kernel_of(step) for step in lowered.steps]


def kernel_of(step: Step) -> Kernel:
    kind, dtype, macs, shape = _work(step)
    points = _points(step)
    flops = sum(_weight(e) * points for e in step.expressions())
    moved = touched(step.out) * itemsize(step.out.dtype)
    weights = 0
    for view in {(v.buffer.index, v.offset): v for v in step.reads()}.values():
        size = touched(view) * itemsize(view.dtype)
        if view.buffer.kind == "constant" and view.dtype in FEW_BITS:
            size = -(-touched(view) * FEW_BITS[view.dtype] // 8)
        if isinstance(step, Gather) and view is step.data:
            size = step.out.elements * itemsize(view.dtype)
        if view.buffer.kind == "constant":
            weights += size
        else:
            moved += size
    if isinstance(step, (MatMul, Conv)) and step.b.quantization is not None:
        weights += step.b.quantization.scale.nbytes if step.b.quantization.block else 0
    return Kernel(
        name=step.name,
        kind=kind,
        dtype=dtype,
        nodes=step.nodes,
        macs=macs,
        flops=flops,
        bytes_moved=moved,
        weight_bytes=weights,
        shape=shape,
    )


def _work(step: Step) -> tuple[str, str, int, tuple[int, ...]]:
    match step:
        case MatMul():
            m, k = step.a.view.shape[-2:]
            n = step.b.view.shape[-1]
            batch = product(step.out.shape[:-2])
            return "gemm", _multiplied(step), batch * m * n * k, (batch, m, n, k)
        case Conv():
            n, c, h, w = step.a.view.shape
            oc, group, kh, kw = step.b.view.shape
            oh, ow = step.out.shape[2:]
            macs = step.out.elements * group * kh * kw
            kind = "depthwise" if step.depthwise else "conv"
            return kind, _multiplied(step), macs, (n, c, h, w, oc, kh, kw, oh, ow, step.groups)
        case Pooling():
            return "pooling", _arithmetic(step), 0, (*step.source.shape, *step.kernel)
        case Softmax():
            return "softmax", "fp32", 0, step.out.shape
        case Normalization():
            return "normalization", "fp32", 0, step.out.shape
        case Reduction():
            return "reduction", _arithmetic(step), 0, step.space
        case Loop():
            compute = any(isinstance(e, Call) or operands_of(e) for e in walk(step.epilogue))
            return "pointwise" if compute else "movement", _arithmetic(step), 0, step.out.shape
        case Gather() | CumSum() | Scatter() | TopK():
            return "movement", _arithmetic(step), 0, step.out.shape
        case _:
            return "other", _arithmetic(step), 0, step.out.shape


def _multiplied(step: Conv | MatMul) -> str:
    if step.a.quantization is not None and step.b.quantization is not None:
        return "int8"
    return "bf16" if step.a.view.dtype == "BFLOAT16" else "fp32"


def _arithmetic(step: Step) -> str:
    return "int8" if step.out.dtype in {"UINT8", "INT8"} else "fp32"


def _points(step: Step) -> int:
    match step:
        case Reduction() | Scatter() | TopK():
            return product(step.space)
        case Pooling():
            return step.out.elements * product(step.kernel)
        case Softmax() | Normalization():
            return step.out.elements * 8
        case _:
            return step.out.elements


def _weight(root: Expr) -> int:
    total = 0
    for expr in walk(root):
        if isinstance(expr, Call):
            total += TRANSCENDENTAL.get(expr.op, 1)
        elif operands_of(expr):
            total += 3
    return total


def touched(view: View) -> int:
    """Elements of the view in memory: those that it repeats count once."""
    return product(
        tuple(n for n, s in zip(view.shape, view.strides, strict=True) if s != 0 or n == 1)
    )
