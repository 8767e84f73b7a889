from __future__ import annotations

import pytest

from optcompiler.backend import Kernel
from optcompiler.cost import DeviceProfile, RooflineCostModel, at, rate_curve

PROFILE = DeviceProfile(
    name="toy", backend="toy", threads=1,
    mac_rate={"gemm/fp32": ((1e3, 1e9), (1e5, 1e10)), "gemm/int8": ((1e3, 4e9),)},
    flop_rate={"pointwise/fp32": ((1e3, 1e9),)},
    bandwidth=((1e3, 1e10), (1e6, 1e9)), launch_us=2.0, overhead_us=5.0,
)  # fmt: skip
MODEL = RooflineCostModel()


def test_rates_are_interpolated_on_logarithmic_axes() -> None:
    curve = PROFILE.mac_rate["gemm/fp32"]
    assert at(curve, 10) == 1e9
    assert at(curve, 1e4) == pytest.approx(10**9.5)
    assert at(curve, 1e9) == 1e10


def test_kind_never_measured_falls_back() -> None:
    assert rate_curve(PROFILE.mac_rate, "conv", "int8") == PROFILE.mac_rate["gemm/int8"]
    assert rate_curve(PROFILE.mac_rate, "gemm", "bf16") == PROFILE.mac_rate["gemm/fp32"]


def test_kernel_is_bound_by_arithmetic_or_by_memory() -> None:
    busy = Kernel("a", "gemm", "int8", (), macs=4_000_000, bytes_moved=10)
    assert MODEL.kernel_us(busy, PROFILE) == pytest.approx(2 + 1000)
    copy = Kernel("b", "movement", "fp32", (), bytes_moved=1_000_000)
    assert MODEL.kernel_us(copy, PROFILE) == pytest.approx(2 + 1000)
    assert MODEL.program_us([busy, copy], PROFILE) == pytest.approx(5 + 2004)


def test_measured_kernels_come_first() -> None:
    kernel = Kernel("a", "gemm", "fp32", (), macs=1_000_000, shape=(10, 10))
    profile = PROFILE.with_measured({kernel.signature: 7.0})
    renamed = Kernel("z", "gemm", "fp32", ("n",), macs=1_000_000, shape=(10, 10))
    assert MODEL.kernel_us(renamed, profile) == 7.0
    assert DeviceProfile.from_json(profile.to_json()) == profile
