"""Observers read any amount of data in constant memory and end up with a sensible range."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from optcompiler.errors import InputError
from optcompiler.observers import (
    EntropyObserver,
    MinMaxObserver,
    MovingAverageObserver,
    MseObserver,
    PercentileObserver,
    builtin_observers,
    observe,
)
from optcompiler.program import Program
from optcompiler.quantization import (
    FLOAT8,
    INTEGER_RANGES,
    quantization_parameters,
    quantize_array,
    weight_scales,
)
from tests.support import random_inputs, run_onnx


def fed(observer, *arrays):
    for array in arrays:
        observer.update(np.asarray(array))
    return observer


def squared_error(values, low, high, bits=8):
    scale = (high - low) / (2**bits - 1)
    offset = round(low / scale)
    levels = np.clip(np.rint(values / scale), offset, offset + 2**bits - 1)
    return float(np.mean((values - levels * scale) ** 2))


def test_minmax_is_the_extremes_with_zero():
    observer = fed(MinMaxObserver(), [1.0, 3.0], [2.5])
    assert observer.range(8, False) == (0.0, 3.0)
    assert fed(observer, [-4.0]).range(8, False) == (-4.0, 3.0)
    assert observer.range(8, True) == (-4.0, 4.0)


@pytest.mark.parametrize("kind", [o for o in builtin_observers() if o is not MovingAverageObserver])
def test_ranges_do_not_depend_on_the_order_of_batches(kind):
    rng = np.random.default_rng(0)
    batches = [rng.standard_normal(500) * 10.0**k for k in (-3, 2, 0, 1)]
    expected = fed(kind(), *batches).range(8, False)
    assert fed(kind(), *reversed(batches)).range(8, False) == expected
    assert fed(kind(), np.concatenate(batches)).range(8, False) == expected


def test_memory_does_not_grow_with_samples():
    rng = np.random.default_rng(0)
    observer = fed(MseObserver(), rng.standard_normal(100))

    def size():
        return sum(
            v.nbytes if isinstance(v, np.ndarray) else sys.getsizeof(v)
            for v in vars(observer).values()
        )

    before = size()
    for step in range(50):
        observer.update(rng.standard_normal(1000) * step)
    assert size() <= before + 64


def test_percentile_drops_outliers_and_minmax_keeps_them():
    rng = np.random.default_rng(1)
    values = np.concatenate([rng.uniform(-1, 1, 100_000), [50.0]])
    low, high = fed(PercentileObserver(), values).range(8, False)
    assert -1.0 <= low < -0.95
    assert 0.95 < high < 1.1
    assert fed(MinMaxObserver(), values).range(8, False)[1] == 50.0


def test_moving_average_forgets_a_batch_that_was_unlike_the_others():
    observer = fed(MovingAverageObserver(momentum=0.5), [-8.0, 2.0], [-1.0, 2.0], [-1.0, 4.0])
    assert observer.range(8, False) == (-2.75, 3.0)
    assert fed(observer, [np.nan]).range(8, False) == (-2.75, 3.0)
    with pytest.raises(InputError, match="momentum=0"):
        MovingAverageObserver(momentum=0)


def test_entropy_clips_a_long_tail_and_keeps_what_is_even():
    rng = np.random.default_rng(0)
    even = fed(EntropyObserver(), rng.uniform(-1, 1, 200_000)).range(8, False)
    assert even == pytest.approx((-1, 1), abs=0.05)
    tail = np.concatenate([rng.standard_normal(100_000), [60.0]])
    low, high = fed(EntropyObserver(), tail).range(4, False)
    assert 3 < high < 30
    assert squared_error(tail[:-1], low, high, 4) < squared_error(tail[:-1], tail.min(), 60.0, 4)


def test_percentile_counts_zeros():
    values = np.zeros(1_000_000, np.float32)
    values[:50] = 10.0
    assert fed(PercentileObserver(), values).range(8, False)[1] == 0.0
    assert fed(MseObserver(), values).range(8, False)[1] == pytest.approx(10.0, rel=0.01)


@pytest.mark.parametrize("bits", [4, 8])
def test_mse_is_no_worse_than_the_other_observers(bits):
    rng = np.random.default_rng(2)
    values = rng.standard_t(3, 50_000)
    bounds = {k.name: fed(k(), values).range(bits, False) for k in builtin_observers()}
    errors = {name: squared_error(values, *b, bits) for name, b in bounds.items()}
    assert errors["mse"] <= min(errors.values()) * 1.001
    assert errors["mse"] < (0.5 if bits == 4 else 0.95) * errors["minmax"]


def test_mse_of_rectified_values_starts_at_zero():
    values = np.maximum(np.random.default_rng(3).standard_normal(10_000), 0).astype(np.float32)
    assert fed(MseObserver(), values).range(8, False)[0] == 0.0


def test_values_that_are_not_finite_are_counted_and_left_out():
    observer = fed(MseObserver(), np.array([1.0, np.nan, np.inf, -2.0], np.float32))
    assert observer.non_finite == 2
    low, high = observer.range(8, False)
    assert -2.0 <= low < 0 < high <= 1.0


@pytest.mark.parametrize("kind", builtin_observers())
def test_nothing_seen_is_an_error_and_zeros_are_not(kind):
    with pytest.raises(InputError, match="no finite value"):
        kind().range(8, False)
    assert fed(kind(), np.zeros(4)).range(8, False) == (0.0, 0.0)


def test_integers_and_half_floats_are_read():
    assert fed(MinMaxObserver(), np.array([1, 7], np.int64)).range(8, False) == (0.0, 7.0)
    high = fed(MseObserver(), np.linspace(0, 1, 999, dtype=np.float16)).range(8, False)[1]
    assert high == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("dtype", sorted(INTEGER_RANGES))
@pytest.mark.parametrize("bounds", [(-1.0, 3.0), (0.0, 6.0), (-5.0, 0.0), (2.0, 9.0), (0, 1e-42)])
def test_zero_is_exact_and_the_range_is_covered(dtype, bounds):
    scale, zero_point = quantization_parameters(*bounds, dtype)
    least, greatest = INTEGER_RANGES[dtype]
    assert least <= zero_point <= greatest
    assert scale > np.finfo(np.float32).tiny
    step = float(scale)
    low, high = min(bounds[0], 0.0), max(bounds[1], 0.0)
    assert (least - zero_point) * step <= low + step
    assert (greatest - zero_point) * step >= high - step


def test_range_of_a_clip_stays_below_its_bound():
    scale, zero_point = quantization_parameters(0.0, 6.0, "UINT8")
    assert zero_point == 0
    assert float(scale) * 255 <= 6.0


def test_symmetric_parameters():
    assert quantization_parameters(-2.0, 1.27, "INT8", True) == (np.float32(2 / 127), 0)
    assert quantization_parameters(0.0, 0.0, "INT8", True) == (1.0, 0)
    assert quantization_parameters(-1.0, 1.0, "UINT8", True)[1] == 128


def test_parameters_refuse_what_they_cannot_do():
    with pytest.raises(InputError, match="FLOAT16"):
        quantization_parameters(0, 1, "FLOAT16")
    with pytest.raises(InputError, match="not finite"):
        quantization_parameters(0, float("nan"), "INT8")


def test_weight_scales_per_channel():
    weight = np.random.default_rng(0).standard_normal((5, 3, 3, 3)).astype(np.float32)
    weight[2] = 0.0
    weight[4] *= 100
    exact = weight_scales(weight, axis=0, method="minmax")
    largest = np.abs(weight).reshape(5, -1).max(axis=1)
    largest[2] = largest.max()
    np.testing.assert_allclose(exact, largest / 127, rtol=1e-6)
    assert weight_scales(weight, axis=2, method="minmax").shape == (3,)
    assert weight_scales(weight, method="minmax").shape == ()
    searched = weight_scales(weight, "INT4", axis=0)

    def error(scales):
        levels = quantize_array(weight, scales, None, "INT4", axis=0)
        return np.square(weight - levels * scales.reshape(-1, 1, 1, 1)).sum(axis=(1, 2, 3))

    assert (error(searched) <= error(weight_scales(weight, "INT4", 0, "minmax")) + 1e-9).all()


def test_weight_scales_refuse_nan():
    with pytest.raises(InputError, match="NaN"):
        weight_scales(np.array([[1.0, np.nan]]), axis=0)


def test_quantize_array_is_the_operator():
    program = Program.from_text(
        """<ir_version: 10, opset_import: ["": 21]>
        g (float[2,6] x) => (int8[2,6] y)
        <float[2,3] s = {0.1,0.2,0.3,0.4,0.5,0.6}, int8[2,3] z = {0,1,2,3,4,-5}>
        { y = QuantizeLinear<axis=1, block_size=2>(x, s, z) }"""
    )
    x = random_inputs(program, 0)["x"] * 100
    weights = {k: t.numpy() for k, t in program.weights().items()}
    scale, zero_point = sorted(weights.values(), key=lambda a: a.dtype.kind)
    got = quantize_array(x, scale, zero_point, "INT8", axis=1, block=2)
    np.testing.assert_array_equal(got, run_onnx(program, {"x": x})[0])


@pytest.mark.parametrize("dtype", sorted(FLOAT8))
def test_quantize_array_rounds_to_floats_of_eight_bits(dtype: str):
    program = Program.from_text(
        f"""<ir_version: 10, opset_import: ["": 21]>
        g (float[2,300] x) => (float[2,300] y)
        <float[2] s = {{0.1,0.001}}, {dtype.lower()}[2] z = {{0,0}}> {{
          q = QuantizeLinear<axis=0>(x, s, z)
          y = DequantizeLinear<axis=0>(q, s, z)
        }}"""
    )
    x = (random_inputs(program, 0)["x"] * 50).astype(np.float32)
    scale = np.array([0.1, 0.001], np.float32)
    got = quantize_array(x, scale, None, dtype, axis=0)
    assert got.dtype.itemsize == 1
    [wanted] = run_onnx(program, {"x": x})
    np.testing.assert_array_equal(got.astype(np.float32) * scale[:, None], wanted)


def test_scales_of_floats_reach_the_largest_number():
    weight = np.random.default_rng(0).standard_normal((4, 30)).astype(np.float32)
    scales = weight_scales(weight, "FLOAT8E4M3FN", axis=0)
    np.testing.assert_allclose(scales, np.abs(weight).max(axis=1) / 448, rtol=1e-6)


def test_observe_runs_the_program_once_for_all_names():
    program = Program.from_text(
        """<ir_version: 10, opset_import: ["": 21]>
        g (float[2,3] x) => (float[2,3] y) { a = Abs(x) b = Neg(a) y = Exp(b) }"""
    )
    batches = [random_inputs(program, seed) for seed in range(3)]
    seen = observe(program, ["x", "b"], batches, MinMaxObserver)
    values = np.stack([b["x"] for b in batches])
    assert seen["x"].range(8, False) == pytest.approx((values.min(), values.max()))
    assert seen["b"].range(8, False) == pytest.approx((-np.abs(values).max(), 0.0))
