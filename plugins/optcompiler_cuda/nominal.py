"""A Hopper GPU by its data sheet, for predicting on machines that have none."""

from __future__ import annotations

from optcompiler.cost import Curve, DeviceProfile

FP32_MACS = 33.5e12
INT8_MACS = 989e12
HBM_BYTES = 3.35e12
L2_BYTES = 5.5e12
"""NVIDIA H100 Tensor Core GPU data sheet, SXM, dense: 67 TFLOP/s fp32, 1979 TOPS int8, 3.35 TB/s;
the cache's rate is what microbenchmarks report. An H200 differs in its memory alone (4.8 TB/s)."""

REACHED = 0.5
"""Share of a peak assumed of a large generated kernel. An assumption, not a measurement."""

SMALL = (1e6, 0.5e12)
"""A product of 10⁶ multiply-accumulates takes some two microseconds in any type: it waits."""

LARGE = 1e10
POINTWISE_RATE = 5e12
LAUNCH_US = 2.0
OVERHEAD_US = 25.0
"""A kernel inside a captured graph; copies in and out and the graph's start."""


def hopper(threads: int) -> DeviceProfile:
    """An H100 SXM: rates from the data sheet, halved; `estimated`."""

    def macs(peak: float) -> Curve:
        return (SMALL, (LARGE, peak * REACHED))

    plain: Curve = (SMALL, (1e9, FP32_MACS * REACHED / 2))
    return DeviceProfile(
        name="NVIDIA H100 SXM (data sheet)",
        backend="cuda",
        threads=threads,
        mac_rate={
            "gemm/fp32": macs(FP32_MACS),
            "conv/fp32": macs(FP32_MACS),
            "depthwise/fp32": plain,
            "gemm/int8": macs(INT8_MACS),
            "conv/int8": macs(INT8_MACS),
            "depthwise/int8": plain,
        },
        flop_rate={"pointwise/fp32": ((1e6, POINTWISE_RATE),)},
        bandwidth=((5e7, L2_BYTES), (1e8, HBM_BYTES)),
        launch_us=LAUNCH_US,
        overhead_us=OVERHEAD_US,
        estimated=True,
    )
