"""The two sides of a contraction: integers, what they stand for, and their constants laid out."""

from __future__ import annotations

import numpy as np

from optcompiler.lowering.build import view_array
from optcompiler.lowering.ir import Operand, Quantization, View
from optcompiler_cuda.text import Axis, KernelText

BYTES = frozenset({"INT8", "UINT8"})


def integer(a: Operand, b: Operand) -> bool:
    """Whether the contraction sums integers."""
    return a.quantization is not None and b.quantization is not None


def shifted(kernel: KernelText, text: str, quantization: Quantization, channel: Axis) -> str:
    """`q - zero_point` as int32."""
    text = f"{text}.to(tl.int32)"
    if not quantization.zero_point.any():
        return text
    if quantization.zero_point.ndim == 0:
        return f"({text} - {kernel.real(float(quantization.zero_point))}.to(tl.int32))"
    points = quantization.zero_point.astype(np.int32)
    return f"({text} - {kernel.channel_constant('zero_points', points, channel)})"


def real(kernel: KernelText, text: str, quantization: Quantization | None, channel: Axis) -> str:
    """The float32 that an element stands for."""
    if quantization is None:
        return text
    moved = f"{shifted(kernel, text, quantization, channel)}.to(tl.float32)"
    if quantization.per_tensor:
        return f"({moved} * {kernel.real(float(quantization.scale))})"
    return f"({moved} * {kernel.channel_constant('scales', quantization.scale, channel)})"


def finish_total(
    kernel: KernelText,
    a: Operand,
    b: Operand,
    bias: np.ndarray | None,
    channel: Axis,
    channels: int,
) -> None:
    """Print the bias, and for a sum of integers the scale, into `total`."""
    if bias is not None:
        kernel.line(f"total = total + {kernel.channel_constant('bias', bias, channel)}")
    if a.quantization is None or b.quantization is None:
        return
    scale = a.quantization.scale.astype(np.float32) * b.quantization.scale.astype(np.float32)
    per_channel = np.broadcast_to(scale, (channels,)).astype(np.float32)
    factor = kernel.channel_constant("scale", per_channel, channel)
    kernel.line(f"total = total.to(tl.float32) * {factor}")


def constant_array(view: View) -> np.ndarray | None:
    """The elements of a view of a constant, or None when its buffer is not one."""
    return None if view.buffer.array is None else view_array(view)
