"""What a quantiser loses, for the ledger: figures against those of the numbers themselves."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from optcompiler import evidence
from optcompiler.files import to_json
from optcompiler.observers import MinMaxObserver, MseObserver, Observer, Seen
from optcompiler.quantization import (
    INTEGER_RANGES,
    QuantizationScheme,
    quantization_parameters,
    quantize_array,
    weight_scales,
)


def seen_by(observer: Observer, *arrays: np.ndarray) -> Seen:
    for array in arrays:
        observer.update(array)
    seen = observer.summary()
    assert seen is not None
    return seen


def noisy(size: int = 40_000) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.maximum(rng.standard_normal(size), -0.5).astype(np.float32)


def sqnr_db(exact: np.ndarray, got: np.ndarray) -> float:
    exact, got = exact.astype(np.float64), got.astype(np.float64)
    return 10 * math.log10(np.square(exact).sum() / np.square(got - exact).sum())


def test_a_histogram_counts_every_value_once() -> None:
    values = np.concatenate([noisy(), np.zeros(10_000, np.float32)])
    told = evidence.observed(seen_by(MseObserver(), values[:100], values[100:]))
    assert told["values"] == 50_000
    assert told["zeros"] == 0.2
    assert (told["low"], told["high"]) == (-0.5, evidence.figure(values.max()))
    expected, _ = np.histogram(noisy(), evidence.BARS)
    assert sum(told["histogram"]) == 40_000
    assert len(told["histogram"]) == evidence.BARS
    assert np.abs(np.array(told["histogram"]) - expected).max() < 100


def test_the_order_of_batches_changes_nothing() -> None:
    parts = np.array_split(noisy(), 7)
    forth, back = (seen_by(MseObserver(), *p) for p in (parts, parts[::-1]))
    assert to_json(evidence.observed(forth)) == to_json(evidence.observed(back))
    forms = [evidence.activation(s, "UINT8", 0.01, 50) for s in (forth, back)]
    assert to_json(forms[0]) == to_json(forms[1])


@pytest.mark.parametrize(("dtype", "high"), [("UINT8", 3.0), ("INT8", 1.5), ("UINT4", 2.0)])
def test_an_activation_loses_what_its_levels_do(dtype: str, high: float) -> None:
    values = noisy()
    scale, zero_point = quantization_parameters(-0.5, high, dtype)
    told = evidence.activation(seen_by(MseObserver(), values), dtype, float(scale), zero_point)
    levels = quantize_array(values, scale, np.asarray(zero_point), dtype)
    least, greatest = INTEGER_RANGES[dtype]
    assert told["sqnr_db"] == pytest.approx(
        sqnr_db(values, (levels - zero_point) * float(scale)), abs=0.1
    )
    outside = values > (greatest - zero_point + 0.5) * scale
    assert told["clipped"] == pytest.approx(float(outside.mean()), rel=0.02, abs=1e-4)
    assert told["low"] == pytest.approx((least - zero_point) * scale, rel=1e-3)
    assert np.float32(told["scale"]) == scale
    assert (told["type"], told["zero_point"]) == (dtype, zero_point)


def test_an_observer_of_extremes_knows_those() -> None:
    seen = seen_by(MinMaxObserver(), noisy())
    assert set(evidence.observed(seen)) == {"low", "high"}
    told = evidence.activation(seen, "UINT8", 0.01, 50)
    assert set(told) == {"type", "low", "high", "scale", "zero_point"}
    assert set(evidence.activation(None, "UINT8", 0.01, 50)) == set(told)


def test_nothing_seen_and_nothing_but_zeros() -> None:
    assert MseObserver().summary() is None
    told = evidence.observed(seen_by(MseObserver(), np.zeros(8, np.float32)))
    assert told == {"low": 0.0, "high": 0.0, "values": 8, "zeros": 1.0}
    zeros = seen_by(MseObserver(), np.zeros(8, np.float32))
    assert evidence.activation(zeros, "UINT8", 1.0, 0)["clipped"] == 0


@pytest.mark.parametrize("axis", [0, 1, None])
def test_a_weight_loses_what_its_levels_do(axis: int | None) -> None:
    rng = np.random.default_rng(1)
    weight = (rng.standard_normal((6, 8, 3)) * np.arange(1, 7)[:, None, None]).astype(np.float32)
    scales = weight_scales(weight, "INT4", axis)
    told = evidence.weight(weight, scales, QuantizationScheme("INT4", axis))
    shape = [-1 if i == axis else 1 for i in range(3)]
    step = scales.reshape(shape) if axis is not None else scales
    levels = np.clip(np.rint(weight / step), -8, 7)
    assert told["sqnr_db"] == pytest.approx(sqnr_db(weight, levels * step), rel=1e-3)
    outside = (weight > 7.5 * step) | (weight < -8.5 * step)
    assert told["clipped"] == pytest.approx(outside.mean(), rel=1e-3)
    assert told["scales"] == {
        "count": scales.size, "min": evidence.figure(scales.min()),
        "median": evidence.figure(np.median(scales)), "max": evidence.figure(scales.max()),
    }  # fmt: skip
    assert (told["low"], told["high"]) == tuple(map(evidence.figure, (weight.min(), weight.max())))


def test_zero_points_and_floats_of_eight_bits() -> None:
    weight = np.linspace(0, 1.5, 64, dtype=np.float32).reshape(2, 32)
    scales, zeros = np.full((2, 1), 0.1, np.float32), np.zeros((2, 1), np.float32)
    shifted = evidence.weight(weight, scales, QuantizationScheme("UINT4", 1, 32, False), zeros)
    levels = np.rint(weight / np.float32(0.1))
    assert shifted["sqnr_db"] == pytest.approx(sqnr_db(weight, levels * 0.1), rel=1e-3)
    assert (shifted["clipped"], shifted["block"]) == (0.0, 32)
    eight = evidence.weight(weight, weight_scales(weight, "FLOAT8E4M3FN", 0),
                            QuantizationScheme("FLOAT8E4M3FN", 0))  # fmt: skip
    assert 28 < eight["sqnr_db"] < 40
    told = evidence.activation(seen_by(MseObserver(), noisy()), "FLOAT8E4M3FN", 0.01, 0)
    assert (told["low"], told["high"]) == (-4.48, 4.48)
    assert told["clipped"] < 1e-4
    assert 28 < told["sqnr_db"] < 40


def test_a_large_weight_is_looked_at_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(2).standard_normal((64, 48)).astype(np.float32)
    blocked = np.repeat(weight_scales(weight, "INT4", 1)[None], 2, 0)
    for scales, axis, block in ((weight_scales(weight, "INT4", 1), 1, 0), (blocked, 0, 32)):
        scheme = QuantizationScheme("INT4", axis, block)
        whole = evidence.weight(weight, scales, scheme)
        monkeypatch.setattr(evidence, "SAMPLE", 512)
        part = evidence.weight(weight, scales, scheme)
        monkeypatch.undo()
        assert part != whole
        assert part["scales"] == whole["scales"]
        assert part["sqnr_db"] == pytest.approx(whole["sqnr_db"], abs=0.5)


def test_what_is_told_is_json() -> None:
    seen = seen_by(MseObserver(), noisy(100))
    told: list[Any] = [
        evidence.observed(seen), evidence.activation(seen, "UINT8", 0.02, 3),
        evidence.weight(noisy(8).reshape(2, 4), np.float32([1, 2]), QuantizationScheme("INT8", 0)),
    ]  # fmt: skip
    assert json.loads(json.dumps(told)) == told
