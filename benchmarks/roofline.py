"""What each kernel of an artifact takes beside the least that this machine could take for it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peers import Job

    import optcompiler as oc
    from optcompiler.backend import Kernel
    from optcompiler.cost import Curve

Rates = Mapping[str, Mapping[str, float]]
"""Giga operations a second of one core, by type and instructions: `measuring.peaks`."""


@dataclass(frozen=True)
class Floor:
    """Microseconds below which a kernel cannot go, and whether "operations" or "bytes" say so."""

    us: float
    bound: str


def reached_by(rates: Rates, dtype: str, isa: str) -> float:
    """Operations a second of the best instructions for `dtype` that code for `isa` may use."""
    known = rates.get(dtype) or rates["fp32"]
    allowed = [rate for name, rate in known.items() if name != "amx" or "amx" in isa]
    return 1e9 * max(allowed)


def floor_of(kernel: Kernel, rates: Rates, isa: str, bandwidth: Curve, threads: int) -> Floor:
    """Operations over the peak of all threads, or bytes over the bandwidth that the device profile
    holds for so many, whichever is more. A pointwise operation takes the place of a fused
    multiply-add, so it counts as two."""
    from optcompiler.cost import at

    operations = 2 * kernel.macs / reached_by(rates, kernel.dtype, isa)
    operations += 2 * kernel.flops / reached_by(rates, "fp32", isa)
    moved = kernel.bytes_moved + kernel.weight_bytes
    bytes_s = moved / at(bandwidth, moved) if moved else 0.0
    us = 1e6 * max(operations / threads, bytes_s)
    return Floor(us, "operations" if operations / threads >= bytes_s else "bytes")


def kernels_of(artifact: oc.Compiled, job: Job, rates: Rates, rounds: int) -> dict[str, Any]:
    """Every kernel as a row, and the microseconds of a whole call (medians of `rounds` runs)."""
    from interleaving import in_turn

    import optcompiler as oc
    from optcompiler.device import profile_for

    target = oc.Target("cpu", threads=job.threads)
    backend = oc.Registry().backend("cpu")
    profile = profile_for(backend, target)
    assert artifact.program is not None
    isa = backend.spelled_out(target).options["isa"]
    names = [p.name for p in artifact.program.inputs]
    arrays = {n: t.numpy() for n, t in zip(names, job.inputs, strict=True)}
    runs = [artifact.profile(arrays) or {} for _ in range(max(rounds, 3) + 2)][2:]
    rows: list[dict[str, Any]] = []
    for kernel in backend.kernels(artifact.program, target):
        least = floor_of(kernel, rates, isa, profile.bandwidth, job.threads)
        rows.append({
            "name": kernel.name, "kind": kernel.kind, "dtype": kernel.dtype,
            "shape": list(kernel.shape), "macs": kernel.macs,
            "bytes": kernel.bytes_moved + kernel.weight_bytes,
            "us": statistics.median(run.get(kernel.name, 0.0) for run in runs),
            "floor_us": least.us, "bound": least.bound,
        })  # fmt: skip
    [whole] = in_turn([lambda: artifact(*job.inputs)], max(rounds, 3))
    return {"isa": isa, "rows": rows, "whole": asdict(whole)}


# -- printing -----------------------------------------------------------------------------------


def lost_us(row: Mapping[str, Any]) -> float:
    return row["us"] - row["floor_us"]


def by_kind(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, float]]:
    """(kind and type, µs, µs over the floor), what loses most first."""
    sums: dict[str, tuple[float, float]] = {}
    for row in rows:
        took, lost = sums.get(key := f"{row['kind']}/{row['dtype']}", (0.0, 0.0))
        sums[key] = took + row["us"], lost + lost_us(row)
    return sorted(((k, *v) for k, v in sums.items()), key=lambda entry: -entry[2])


def kernel_table(found: Mapping[str, Any]) -> str:
    """The kernels in Markdown, what loses most time first, and sums by kind below."""
    rows = sorted(found["rows"], key=lost_us, reverse=True)
    lines = ["| kernel | kind | shape | MACs | µs | floor µs | bound by | of floor | lost µs |",
             "|---|---|---|--:|--:|--:|---|--:|--:|"]  # fmt: skip
    for row in rows:
        share = 100 * row["floor_us"] / row["us"] if row["us"] else 0.0
        lines.append(
            f"| {row['name']} | {row['kind']}/{row['dtype']} | "
            f"{'×'.join(map(str, row['shape']))} | {row['macs']} | {row['us']:.1f} | "
            f"{row['floor_us']:.1f} | {row['bound']} | {share:.0f} % | {lost_us(row):.1f} |"
        )
    lines += ["", "| kind | µs | lost µs |", "|---|--:|--:|"]
    lines += [f"| {kind} | {took:.0f} | {lost:.0f} |" for kind, took, lost in by_kind(rows)]
    total, least = (sum(row[k] for row in rows) for k in ("us", "floor_us"))
    lines.append(
        f"\n{len(rows)} kernels for {found['isa']}: {total:.0f} µs profiled, floor {least:.0f} µs; "
        f"a whole call {found['whole']['us']:.0f} µs"
    )
    return "\n".join(lines)
