"""Fourier transforms and windows. Complex numbers are a last axis of length 2."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch

from optcompiler.ops.costs import TRANSCENDENTAL, pointwise_cost, reading_cost
from optcompiler.ops.declare import op
from optcompiler.ops.spec import OpSpec
from optcompiler.ops.types import carrier_type, first

Tensor = torch.Tensor
_fft: Any = torch.fft


def _as_complex(x: Tensor) -> Tensor:
    """[..., 2] as complex numbers, [..., 1] as real ones."""
    return torch.view_as_complex(x.contiguous()) if x.shape[-1] == 2 else x[..., 0]


def dft(
    x: Tensor,
    length: Any = None,
    along: Any = None,
    *,
    axis: int | None = None,
    inverse: int = 0,
    onesided: int = 0,
) -> Tensor:
    """Discrete Fourier transform; `onesided` keeps the first half of a real signal's spectrum.

    The axis is an input from opset 20 on (default -2), an attribute before.
    """
    where = axis if axis is not None else -2
    where = (first(along) if along is not None else where) % x.dim()
    z = _as_complex(x)
    if inverse and onesided:
        size = 2 * (z.shape[where] - 1) if length is None else int(first(length))
        return cast("Tensor", _fft.irfft(z, n=size, dim=where)).unsqueeze(-1)
    size = z.shape[where] if length is None else int(first(length))
    y = cast("Tensor", (_fft.ifft if inverse else _fft.fft)(z, n=size, dim=where))
    return torch.view_as_real(y.narrow(where, 0, size // 2 + 1) if onesided else y)


def stft(
    signal: Tensor,
    frame_step: Any,
    window: Tensor | None = None,
    frame_length: Any = None,
    *,
    onesided: int = 1,
) -> Tensor:
    """Spectra [batch, frames, bins, 2] of windowed frames of [batch, length, 1 or 2]."""
    if frame_length is not None:
        size = int(first(frame_length))
    else:
        size = signal.shape[1] if window is None else window.shape[0]
    frames = _as_complex(signal).unfold(1, size, int(first(frame_step)))
    frames = frames if window is None else frames * window
    y = cast("Tensor", _fft.fft(frames, dim=-1))
    return torch.view_as_real(y[..., : size // 2 + 1] if onesided else y)


def _cosines(size: Tensor, periodic: int, kind: int, weights: Sequence[float]) -> Tensor:
    """The sum of `weights[k] * cos(2 pi k n / N)`."""
    count = int(size.item())
    period = count if periodic else count - 1
    # One sample of a symmetric window is 0/0: NaN by ONNX's formula.
    at = torch.arange(count, dtype=torch.float64, device=size.device) * 2 * math.pi / period
    y = torch.zeros_like(at)
    for k, weight in enumerate(weights):
        y = y + weight * torch.cos(at * k)
    return y.to(carrier_type(kind))


def hann_window(size: Tensor, *, output_datatype: int = 1, periodic: int = 1) -> Tensor:
    return _cosines(size, periodic, output_datatype, (0.5, -0.5))


def hamming_window(size: Tensor, *, output_datatype: int = 1, periodic: int = 1) -> Tensor:
    return _cosines(size, periodic, output_datatype, (25 / 46, -21 / 46))


def blackman_window(size: Tensor, *, output_datatype: int = 1, periodic: int = 1) -> Tensor:
    return _cosines(size, periodic, output_datatype, (0.42, -0.5, 0.08))


def mel_weight_matrix(
    bins: Any, dft_length: Any, sample_rate: Any, lowest: Any, highest: Any,
    *, output_datatype: int = 1,
) -> Tensor:  # fmt: skip
    """`[dft_length // 2 + 1, bins]`: triangles of equal width on the mel scale, edges in hertz."""
    count, length = int(first(bins)), int(first(dft_length))
    low, high = (2595 * math.log10(1 + float(first(edge)) / 700) for edge in (lowest, highest))
    mels = low + torch.arange(count + 2, dtype=torch.float64) * ((high - low) / (count + 2))
    hertz = 700 * (torch.pow(10.0, mels / 2595) - 1)
    edges = ((length + 1) * hertz / int(first(sample_rate))).floor()
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    at = torch.arange(length // 2 + 1, dtype=torch.float64).unsqueeze(1)
    rising, falling = (at - left) / (centre - left), (right - at) / (right - centre)
    up = torch.where((at >= left) & (at <= centre) & (centre > left), rising, 0.0)
    down = torch.where((at >= centre) & (at < right), falling, up)
    flat = (at == centre) & (left == centre)
    return torch.where(flat & (right == centre), 1.0, down).to(carrier_type(output_datatype))


SPECS: tuple[OpSpec, ...] = (
    op("DFT", dft, reading_cost(4 * TRANSCENDENTAL), since=17, static=(1, 2)),
    op("STFT", stft, reading_cost(8 * TRANSCENDENTAL), since=17, static=(1, 3)),
    op("MelWeightMatrix", mel_weight_matrix, pointwise_cost(), since=17, static=range(5)),
    op("HannWindow", hann_window, pointwise_cost(TRANSCENDENTAL), since=17),
    op("HammingWindow", hamming_window, pointwise_cost(TRANSCENDENTAL), since=17),
    op("BlackmanWindow", blackman_window, pointwise_cost(2 * TRANSCENDENTAL), since=17),
)
