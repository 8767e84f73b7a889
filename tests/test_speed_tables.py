"""The arithmetic of the latency tables."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.interleaving import in_turn
from benchmarks.roofline import by_kind, floor_of, kernel_table, reached_by
from benchmarks.tables import geometric_mean, means, remarks, row_of, table
from optcompiler.backend import Kernel

RATES = {
    "fp32": {"avx512": 100.0},
    "int8": {"avx512_vnni": 400.0, "amx": 3200.0},
}


def entry(who: str, precision: str, us: float, threads: int, error: float = 0.0) -> dict[str, Any]:
    return {"who": who, "precision": precision, "threads": threads, "us": us,
            "low_us": 0.9 * us, "high_us": 1.1 * us, "error": error}  # fmt: skip


def result(threads: int = 1, **changes: Any) -> dict[str, Any]:
    times = [
        entry("optcompiler", "fp32", 1000.0, threads), entry("A", "fp32", 2000.0, threads),
        entry("B", "fp32", 1500.0, threads), entry("optcompiler", "int8", 500.0, threads),
        entry("A", "int8", 250.0, threads),
    ]  # fmt: skip
    if threads > 1:
        times.append(entry("optcompiler", "fp32", 1800.0, 1))
    found = {"model": "net", "batch": 1, "threads": threads, "operations": 50_000_000,
             "peaks": RATES, "times": times, "failed": [], "notes": []}  # fmt: skip
    return {**found, **changes}


def test_a_row_compares_with_the_best_peer_of_its_precision() -> None:
    row = row_of(result(), "fp32")
    assert row is not None
    assert row.best == ("B", 1500.0)
    assert row.ratio == pytest.approx(1.5)
    assert row.spread == pytest.approx(0.1)
    assert row.of_peak == {"avx512": pytest.approx(0.5)}
    assert row.speed_up is None
    quantized = row_of(result(), "int8")
    assert quantized is not None
    assert quantized.ratio == pytest.approx(0.5)
    assert quantized.of_peak == {"avx512_vnni": pytest.approx(0.25), "amx": pytest.approx(1 / 32)}


def test_one_thread_of_ours_is_no_peer_and_the_peak_is_of_all_threads() -> None:
    row = row_of(result(threads=2), "fp32")
    assert row is not None
    assert row.speed_up == pytest.approx(1.8)
    assert set(row.peers_us) == {"A", "B"}
    assert row.of_peak == {"avx512": pytest.approx(0.25)}


def test_a_precision_that_did_not_run_has_no_row_and_one_without_peers_no_ratio() -> None:
    assert row_of(result(), "bf16") is None
    alone = row_of(result(times=[entry("optcompiler", "fp32", 10.0, 1)]), "fp32")
    assert alone is not None
    assert alone.best is None
    assert alone.ratio is None
    assert table([result()], "bf16") == ""


def test_geometric_mean() -> None:
    assert geometric_mean([0.5, 2.0, 8.0]) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="nothing"):
        geometric_mean([])


def test_the_table_has_a_column_for_each_peer_and_means_by_batch_and_threads() -> None:
    text = table([result(), result(batch=8), result(threads=2)], "fp32")
    assert "| net | 1 | 1 | 1000 | 10% | 2000 | 1500 | B | 1.50 | 50% | - |" in text
    assert "| net | 1 | 2 | 1000 | 10% | 2000 | 1500 | B | 1.50 | 25% | 1.80 |" in text
    assert "batch 1, 2 threads: geometric mean 1.50× the best peer (least 1.50×, 1 of 1" in text
    assert text.endswith("; 1.80× one thread")
    rows = [r for n in (1, 2) if (r := row_of(result(batch=n), "int8"))]
    assert means(rows)[-1].startswith("all: geometric mean 0.50× the best peer")
    assert "0 of 2 at least as quick" in means(rows)[-1]


def test_failures_and_wrong_numbers_are_told() -> None:
    failed = [{"who": "A", "precision": "int8", "reason": "RuntimeError: no"}]
    times = [
        entry("optcompiler", "fp32", 1.0, 1, error=float("nan")),
        entry("A", "fp32", 1.0, 1, error=1e-6),
        entry("A", "int8", 1.0, 1, error=0.5),
    ]
    assert remarks([result(failed=failed, times=times, notes=["conv: declined, no"])]) == [
        "net, batch 1, 1 thread: A int8 failed and is not counted: RuntimeError: no",
        "net, batch 1, 1 thread: left in float, conv: declined, no",
        "net, batch 1, 1 thread: optcompiler fp32 differs from eager by nan",
    ]


def test_a_floor_is_of_operations_or_of_bytes() -> None:
    bandwidth = ((1.0, 1e9),)
    busy = Kernel("k", "gemm", "int8", (), macs=200_000_000, bytes_moved=1000)
    assert reached_by(RATES, "int8", "avx512_vnni") == 4e11
    assert reached_by(RATES, "int8", "amx") == 3.2e12
    floor = floor_of(busy, RATES, "avx512_vnni", bandwidth, threads=1)
    assert (floor.us, floor.bound) == (pytest.approx(1000.0), "operations")
    assert floor_of(busy, RATES, "avx512_vnni", bandwidth, 2).us == pytest.approx(500.0)
    idle = Kernel("k", "movement", "int8", (), bytes_moved=3000, weight_bytes=1000)
    floor = floor_of(idle, RATES, "avx512_vnni", bandwidth, threads=2)
    assert (floor.us, floor.bound) == (pytest.approx(4.0), "bytes")


def test_kernels_are_sorted_by_time_lost() -> None:
    def kernel(name: str, kind: str, us: float, floor_us: float) -> dict[str, Any]:
        return {"name": name, "kind": kind, "dtype": "fp32", "shape": [2, 3], "macs": 6, "us": us,
                "floor_us": floor_us, "bound": "bytes"}  # fmt: skip

    rows = [kernel("near", "gemm", 100.0, 99.0), kernel("far", "softmax", 10.0, 1.0),
            kernel("idle", "gemm", 0.0, 0.0)]  # fmt: skip
    assert by_kind(rows) == [("softmax/fp32", 10.0, 9.0), ("gemm/fp32", 100.0, 1.0)]
    lines = kernel_table({"rows": rows, "isa": "avx2", "whole": {"us": 120.0}}).splitlines()
    assert lines[2] == "| far | softmax/fp32 | 2×3 | 6 | 10.0 | 1.0 | bytes | 10 % | 9.0 |"
    assert lines[3].startswith("| near |")
    assert lines[-1].endswith("110 µs profiled, floor 100 µs; a whole call 120 µs")


def test_callables_take_turns() -> None:
    order: list[str] = []
    times = in_turn([lambda: order.append("a"), lambda: order.append("b")], rounds=2)
    assert len(times) == 2
    assert all(t.low_us <= t.us <= t.high_us for t in times)
    turns = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert turns == ["a", "b"] * 3
