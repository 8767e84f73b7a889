"""The search for the factors of channel groups, by the error of what reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from optcompiler.channels import ChannelGroup
from optcompiler.executor import computed, observe, to_torch
from optcompiler.program import Program, constant
from optcompiler.quantization import QuantizationScheme, quantize_array
from optcompiler.rewriting import Declined, PassContext
from optcompiler_passes._homogeneous import Reader, Scaling, multiplied, spread_out
from optcompiler_passes._linear import Linear, linear
from optcompiler_passes._rescaling import (
    is_symmetric,
    levels_of,
    observer_of,
    quantizer,
    rounded,
    scales_for,
)
from optcompiler_passes._samples import sample_count, size_of

if TYPE_CHECKING:
    import torch

    from optcompiler_passes.equalize import Equalize

ELEMENTS = 1 << 18
"""Of each value that readers are tried on."""

GAIN = 0.95
"""Share of the error without factors that there may be left with them."""

SPAN = 2.0**20
"""Greatest factor, and the inverse of the least, relative to their geometric mean."""

Factors = np.ndarray


@dataclass
class Seen:
    """What is kept of a value: samples, and the largest and mean magnitude of each channel."""

    axis: int
    samples: list[np.ndarray]
    largest: np.ndarray | None = None
    total: np.ndarray | float = 0.0
    count: int = 0

    def add(self, array: np.ndarray) -> None:
        others = tuple(i for i in range(array.ndim) if i != self.axis)
        magnitude = np.abs(array)
        largest = magnitude.max(axis=others)
        self.largest = largest if self.largest is None else np.maximum(self.largest, largest)
        self.total = self.total + magnitude.sum(axis=others, dtype=np.float64)
        self.count += magnitude.size // max(len(largest), 1)


class Search:
    """Factors for the channel groups of a quantised program; `scaling` is of its float form."""

    def __init__(
        self, student: Program, scaling: Scaling, context: PassContext, options: Equalize
    ) -> None:
        self.student = student
        self.scaling = scaling
        self.context = context
        self.options = options
        self.make = observer_of(options.observer, "equalize", context)
        self.groups = [g for g in scaling.groups if not g.pinned]
        self.readers = {g.name: scaling.readers(g) for g in self.groups}
        self.seen = self._look()

    def chosen(self) -> list[tuple[ChannelGroup, Factors]]:
        """Groups that lose less when they are scaled, and factors; those that gain most first."""
        found: list[tuple[float, ChannelGroup, Factors]] = []
        for group in self.context.progress.track(self.groups, "equalising channels"):
            try:
                best = self._best(group)
            except Declined:
                continue
            if best is not None:
                found.append((best[0], group, best[1]))
        return [(group, factors) for _, group, factors in sorted(found, key=lambda f: f[0])]

    def _best(self, group: ChannelGroup) -> tuple[float, Factors] | None:
        """The share of the error that is left with the best factors, and those."""
        readers = self.readers[group.name]
        if not any(self._quantizer(r) or self._weight_quantizer(r) for r in readers):
            return None
        none = self._error(group, np.ones(group.channels))
        best, least = None, GAIN * none
        for factors in self._ranged(group):
            error = self._error(group, factors)
            if error < least:
                best, least = factors, error
        return None if best is None else (least / none, best)

    # -- factors ----------------------------------------------------------------------------

    def _ranged(self, group: ChannelGroup) -> list[Factors]:
        """a^α / w^(1 - α) for every α."""
        activations = np.zeros(group.channels)
        weights = np.zeros(group.channels)
        for reader in self.readers[group.name]:
            seen = self.seen[str(reader.value.name)]
            assert seen.largest is not None
            mean = seen.total / max(seen.count, 1)
            magnitude = seen.largest if self._quantizer(reader) is not None else mean
            _take_largest(activations, reader.channel_of, np.asarray(magnitude))
            column = _columns(reader.node)
            if column is not None:
                _take_largest(weights, reader.channel_of, column)
        alone = not weights.any()
        found: list[Factors] = []
        for alpha in (1.0,) if alone else self.options.alphas:
            usable = (activations > 0) & (alone | (weights > 0))
            if not usable.any():
                continue
            logs = np.zeros(group.channels)
            logs[usable] = alpha * np.log(activations[usable])
            if not alone:
                logs[usable] -= (1 - alpha) * np.log(weights[usable])
            found.append(_normalised(logs, usable))
        return found

    # -- error ------------------------------------------------------------------------------

    def _error(self, group: ChannelGroup, factors: Factors) -> float:
        """Squared error of the readers' results, each relative to its variance, added up."""
        return sum(self._reader_error(r, factors) for r in self.readers[group.name])

    def _reader_error(self, reader: Reader, factors: Factors) -> float:
        mine = spread_out(reader.channel_of, factors)
        seen = self.seen[str(reader.value.name)]
        data = np.concatenate(seen.samples)
        shape = [-1 if i == reader.axis else 1 for i in range(data.ndim)]
        scaled = (data / mine.reshape(shape)).astype(np.float32)
        quantize = self._quantizer(reader)
        if quantize is not None:
            scaled = self._quantized(scaled, quantize)
        values: list[np.ndarray | None] = [constant(v) for v in reader.node.inputs]
        exact = list(values)
        exact[reader.operand] = data
        values[reader.operand] = scaled
        index = next(i for i, v in enumerate(values) if v is not None and i != reader.operand)
        values[index] = self._weight(reader, index, mine)
        wanted, got = (
            computed(reader.node, self.context.ops, v)[0].numpy() for v in (exact, values)
        )
        spread = float(np.var(wanted, dtype=np.float64)) or 1.0
        return float(np.square(got - wanted, dtype=np.float64).mean()) / spread

    def _quantized(self, array: np.ndarray, quantize: ir.Node) -> np.ndarray:
        scheme = QuantizationScheme(levels_of(quantize), symmetric=is_symmetric(quantize))
        observer = self.make()
        observer.update(array)
        low, high = observer.range(scheme.range_bits, scheme.symmetric)
        scale, zero = scheme.parameters(low, high)
        levels = quantize_array(array, np.array(scale), np.array(zero), scheme.dtype)
        return ((levels.astype(np.float32) - zero) * scale).astype(np.float32)

    def _weight(self, reader: Reader, index: int, factors: np.ndarray) -> np.ndarray:
        """The weight of a reader multiplied by factors of its input channels, and rounded."""
        array = multiplied(reader.node, factors)
        quantize = self._weight_quantizer(reader)
        if quantize is None:
            return array
        return rounded(quantize, array, scales_for(quantize, array, self.options.weight_observer))

    def _quantizer(self, reader: Reader) -> ir.Node | None:
        """What quantises the channels for a reader."""
        node = self.student.node(str(reader.node.name))
        return quantizer(node.inputs[reader.operand]) if node is not None else None

    def _weight_quantizer(self, reader: Reader) -> ir.Node | None:
        node = self.student.node(str(reader.node.name))
        if node is None or not isinstance(linear(reader.node), Linear):
            return None
        return quantizer(node.inputs[1])

    # -- values -----------------------------------------------------------------------------

    def _look(self) -> dict[str, Seen]:
        seen: dict[str, Seen] = {}
        for reader in (r for group in self.groups for r in self.readers[group.name]):
            seen.setdefault(str(reader.value.name), Seen(reader.axis, []))
        batches = self.context.calibration
        total = sample_count(batches)
        module = to_torch(self.scaling.program, self.context.ops, trainable=False)
        start = 0

        def look(name: str, tensor: torch.Tensor) -> None:
            array = tensor.detach().cpu().numpy()
            seen[name].add(array)
            wanted = max(1, ELEMENTS * size // max(array.size, 1))
            stride = max(1, -(-total // wanted))
            seen[name].samples.append(array[-start % stride :: stride][:ELEMENTS].copy())

        for batch in batches:
            size = size_of(batch)
            observe(module, batch, look, list(seen))
            start += size
        return seen


def _take_largest(into: np.ndarray, channel_of: np.ndarray, values: np.ndarray) -> None:
    held = channel_of >= 0
    np.maximum.at(into, channel_of[held], values[held])


def _normalised(logs: np.ndarray, usable: np.ndarray) -> Factors:
    """Factors with these logarithms, their geometric mean 1, and 1 where none is known."""
    logs = np.where(usable, logs - logs[usable].mean(), 0.0)
    return np.exp(np.clip(logs, -np.log(SPAN), np.log(SPAN)))


def _columns(node: ir.Node) -> np.ndarray | None:
    """Largest weight of each input channel, relative to the largest of its row.

    None for a depthwise Conv and for a vector, where each channel has rows of its own.
    """
    found: Any = linear(node)
    if not isinstance(found, Linear):
        return None
    array = constant(found.weight)
    assert array is not None
    if node.op_type == "Conv":
        groups = node.attributes.get_int("group", 1)
        rows = np.abs(array).reshape(*array.shape[:2], -1).max(axis=2)
        if rows.shape[1] == 1:
            return None
        relative = rows / np.maximum(rows.max(axis=1, keepdims=True), 1e-30)
        return relative.reshape(groups, -1, rows.shape[1]).max(axis=1).reshape(-1)
    if node.op_type == "ConvTranspose":
        rows = np.abs(array).reshape(*array.shape[:2], -1).max(axis=2)
    else:
        rows = np.abs(array.T if node.attributes.get_int("transB", 0) else array)
    return (rows / np.maximum(rows.max(axis=0, keepdims=True), 1e-30)).max(axis=1)
