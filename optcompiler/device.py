"""Measuring a device: probe programs run through the backend itself, rates fitted to their times.

Every backend is measured by the same probes through its own `lower` and `load`, so a third party's
backend is priced without writing anything. Profiles are cached per user in a private directory,
under a name that hashes what can change the outcome: machine, backend, target options, versions.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from optcompiler.cost import Curve, DeviceProfile
from optcompiler.errors import InputError, OptcompilerError
from optcompiler.program import Program

if TYPE_CHECKING:
    from optcompiler.backend import Backend, Kernel, Runner
    from optcompiler.rewriting import Progress
    from optcompiler.target import Target

FORMAT = 3


@dataclass(frozen=True)
class Probe:
    """A small program whose time shows one rate: `rate` is "mac", "flop", "bytes" or "launch"."""

    rate: str
    text: str
    weights: Mapping[str, np.ndarray]


def profile_for(
    backend: Backend,
    target: Target,
    *,
    remeasure: bool = False,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> DeviceProfile:
    """The device's profile: from the cache, or measured now (seconds) and cached.

    Where the target cannot be timed on this machine, the backend's nominal profile. Raises
    `InputError` when it has none.
    """
    path = (cache or cache_directory()) / f"device-{_key(backend, target)}.json"
    if not remeasure:
        known = _read(path)
        if known is not None:
            return known
    profile = measure(backend, target, progress)
    if profile is None:
        profile = backend.nominal_profile(target)
        if profile is None:
            raise InputError(
                f"target {target}: it cannot be timed on this machine and has no nominal profile."
            )
        return profile
    _write(path, profile)
    return profile


def remember(
    backend: Backend, target: Target, profile: DeviceProfile, cache: Path | None = None
) -> None:
    """Keep a profile whose table of measured kernels grew."""
    if not profile.estimated:
        _write((cache or cache_directory()) / f"device-{_key(backend, target)}.json", profile)


def cache_directory() -> Path:
    """`$OPTCOMPILER_CACHE`, else `optcompiler` in the user's cache directory; private to the user."""
    named = os.environ.get("OPTCOMPILER_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    directory = Path(named) if named else Path(base) / "optcompiler"
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    owner = directory.stat()
    if hasattr(os, "getuid") and owner.st_uid != os.getuid():
        raise InputError(f"cache {directory} belongs to another user; set OPTCOMPILER_CACHE.")
    return directory


def machine_name() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _key(backend: Backend, target: Target) -> str:
    facts = [
        FORMAT,
        machine_name(),
        os.cpu_count(),
        target.backend,
        target.threads,
        sorted(target.options.items()),
        sorted(backend.versions().items()),
    ]
    flags = Path("/proc/cpuinfo")
    if flags.exists():
        facts.append(next((x for x in flags.read_text().splitlines() if x.startswith("flags")), ""))
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def _read(path: Path) -> DeviceProfile | None:
    try:
        return DeviceProfile.from_json(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, profile: DeviceProfile) -> None:
    text = json.dumps(profile.to_json(), indent=1, sort_keys=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    Path(file.name).replace(path)


# -- timing ------------------------------------------------------------------------------------


def time_us(run: Callable[[], object], *, seconds: float = 0.15, most: int = 400) -> float:
    """Median microseconds of `run` after a warm-up, over at least 5 calls."""
    run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < end and len(times) < most):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


def interleaved_us(
    runs: Sequence[Callable[[], object]], *, seconds: float = 1.0, most: int = 300
) -> list[float]:
    """Median microseconds of each, timed in turn so that a drifting machine drifts for all."""
    for run in runs:
        run()
        run()
    times: list[list[float]] = [[] for _ in runs]
    end = time.perf_counter() + seconds * len(runs)
    rounds = 0
    while rounds < 7 or (time.perf_counter() < end and rounds < most):
        for run, kept in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            kept.append(time.perf_counter() - start)
        rounds += 1
    return [1e6 * statistics.median(t) for t in times]


# -- probes ------------------------------------------------------------------------------------


def measure(
    backend: Backend, target: Target, progress: Progress | None = None
) -> DeviceProfile | None:
    """Run every probe that the backend supports and fit the rates; None when it cannot be timed."""
    precisions = backend.capabilities(target).precisions
    probes = [p for p in _probes() if "int8" in precisions or "Quantize" not in p.text]
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    launch_us, overhead_us = 0.5, 1.0
    launches: list[tuple[int, float]] = []
    timed: list[tuple[Probe, Sequence[Kernel], float]] = []
    tracked = progress.track(probes, f"measuring {target}") if progress else iter(probes)
    for probe in tracked:
        program = _program(probe)
        try:
            microseconds = _time_program(backend, target, program)
        except OptcompilerError:
            continue
        if microseconds is None:
            return None
        kernels = backend.kernels(program, target)
        if probe.rate == "launch":
            launches.append((len(kernels), microseconds))
        else:
            timed.append((probe, kernels, microseconds))
    if len(launches) >= 2:
        (n0, t0), (n1, t1) = launches[0], launches[-1]
        launch_us = max((t1 - t0) / max(n1 - n0, 1), 0.01)
        overhead_us = max(t0 - n0 * launch_us, 0.1)
    for probe, kernels, microseconds in timed:
        main = max(kernels, key=lambda k: (k.macs, k.flops, k.bytes_moved))
        busy = max(microseconds - overhead_us - len(kernels) * launch_us, 0.05 * microseconds) / 1e6
        amount = {
            "mac": main.macs,
            "flop": main.flops,
            "bytes": main.bytes_moved + main.weight_bytes,
        }[probe.rate]
        if amount:
            key = "bytes" if probe.rate == "bytes" else f"{main.kind}/{main.dtype}"
            points.setdefault((probe.rate, key), []).append((float(amount), amount / busy))
    if not any(rate == "mac" for rate, _ in points):
        return None
    return DeviceProfile(
        name=machine_name(),
        backend=backend.name,
        threads=target.threads,
        mac_rate={k: _curve(v) for (r, k), v in points.items() if r == "mac"},
        flop_rate={k: _curve(v) for (r, k), v in points.items() if r == "flop"},
        bandwidth=_curve(points.get(("bytes", "bytes"), [(1.0, 5e9)])),
        launch_us=launch_us,
        overhead_us=overhead_us,
        versions=dict(backend.versions()),
    )


def _curve(points: list[tuple[float, float]]) -> Curve:
    merged: dict[float, list[float]] = {}
    for size, rate in points:
        merged.setdefault(size, []).append(rate)
    return tuple((s, statistics.median(r)) for s, r in sorted(merged.items()))


def _program(probe: Probe) -> Program:
    import onnx_ir as ir

    program = Program(ir.from_onnx_text(probe.text))
    by_name = {v.name: v for v in program.graph.inputs}
    for name, array in probe.weights.items():
        value = by_name[name]
        program.graph.inputs.remove(value)
        value.const_value = ir.tensor(array, name=name)
        program.graph.register_initializer(value)
    return Program.from_onnx(program.model)


def _time_program(backend: Backend, target: Target, program: Program) -> float | None:
    with tempfile.TemporaryDirectory(prefix="optcompiler-probe-") as scratch:
        info = backend.lower(program, target, Path(scratch))
        runner: Runner = backend.load(Path(scratch), info, threads=target.threads)
        try:
            if not runner.timed:
                return None
            rng = np.random.default_rng(0)
            inputs = {
                p.name: rng.standard_normal([int(d) for d in p.shape]).astype(np.float32)
                for p in program.inputs
            }
            return time_us(lambda: runner.run(inputs))
        finally:
            runner.close()


HEAD = '<ir_version: 10, opset_import: ["" : 20]>\n'


def _probes() -> Iterator[Probe]:
    rng = np.random.default_rng(0)

    def w(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    for count in (2, 34):
        yield Probe("launch", *_chain(count, w))
    for m, n, k in ((4, 64, 64), (64, 384, 384), (128, 1536, 384), (1, 1000, 512)):
        yield Probe("mac", *_matmul(m, n, k, w))
        yield Probe("mac", *_matmul(m, n, k, w, int8=True))
    for c, o, size, kernel, group in (
        (8, 8, 8, 3, 1), (64, 64, 28, 3, 1), (128, 256, 14, 3, 1), (32, 16, 56, 1, 1),
        (64, 256, 28, 1, 1), (32, 32, 56, 3, 32), (96, 96, 14, 3, 96),
    ):  # fmt: skip
        yield Probe("mac", *_conv(c, o, size, kernel, group, w))
        yield Probe("mac", *_conv(c, o, size, kernel, group, w, int8=True))
    for rows in (4, 64, 512):
        yield Probe("mac", *_attention_product(rows))
        for op in ("Softmax <axis = -1> (x)", "LayerNormalization <axis = -1> (x, g, b)"):
            yield Probe("flop", *_unary(op, rows, 384))
        for op in ("Erf(x)", "Tanh(x)", "Gelu(x)", "Mul(x, x)"):
            yield Probe("flop", *_unary(op, rows, 384))
    for rows in (4, 64, 1024, 8192):
        yield Probe("bytes", *_unary("Relu(x)", rows, 512))
    for size in (14, 56):
        yield Probe("flop", *_pool(size))


def _chain(count: int, w: Callable[..., np.ndarray]) -> tuple[str, dict[str, np.ndarray]]:
    lines = [
        f"v{i + 1} = MatMul(v{i}, w)" if i % 2 == 0 else f"v{i + 1} = Softmax <axis = -1> (v{i})"
        for i in range(count)
    ]
    body = "\n".join(lines)
    text = f"{HEAD}g (float[1,16] v0, float[16,16] w) => (float[1,16] v{count}) {{\n{body}\n}}"
    return text, {"w": w(16, 16)}


def _quantized(
    main: str, weight: np.ndarray, bias: np.ndarray, axis: int
) -> tuple[str, dict[str, np.ndarray]]:
    """Lines of an integer kernel `y = main(xd, wd, bd)` in Q/DQ form, and its constants."""
    reduced = tuple(i for i in range(weight.ndim) if i != axis)
    scale = (np.abs(weight).max(axis=reduced) / 127).astype(np.float32)
    shape = [1] * weight.ndim
    shape[axis] = -1
    levels = np.clip(np.rint(weight / scale.reshape(shape)), -127, 127).astype(np.int8)
    lines = f"""
      q = QuantizeLinear(x, s, z)
      xd = DequantizeLinear(q, s, z)
      wd = DequantizeLinear <axis = {axis}> (w, ws, wz)
      bd = DequantizeLinear <axis = 0> (b, bs, bz)
      t = {main}
      r = Relu(t)
      p = QuantizeLinear(r, s, z)
      y = DequantizeLinear(p, s, z)"""
    constants = {
        "s": np.float32(0.03), "z": np.uint8(110), "w": levels, "ws": scale,
        "wz": np.zeros(scale.shape, np.int8), "b": np.rint(bias / 0.03).astype(np.int32),
        "bs": (scale * np.float32(0.03)).astype(np.float32), "bz": np.zeros(scale.shape, np.int32),
    }  # fmt: skip
    return lines, {k: np.asarray(v) for k, v in constants.items()}


_TEXT_TYPES = {"float32": "float", "int8": "int8", "uint8": "uint8", "int32": "int32"}


def _graph(
    x: Sequence[int], y: Sequence[int], lines: str, constants: Mapping[str, np.ndarray]
) -> str:
    def typed(name: str, dtype: str, shape: Sequence[int]) -> str:
        dims = f"[{','.join(map(str, shape))}]" if len(shape) else ""
        return f"{dtype}{dims} {name}"

    arguments = [typed("x", "float", x)] + [
        typed(k, _TEXT_TYPES[str(v.dtype)], v.shape) for k, v in constants.items()
    ]
    return f"{HEAD}g ({', '.join(arguments)}) => ({typed('y', 'float', y)}) {{\n{lines}\n}}"


def _matmul(
    m: int, n: int, k: int, w: Callable[..., np.ndarray], int8: bool = False
) -> tuple[str, dict[str, np.ndarray]]:
    weight, bias = w(k, n), w(n)
    if int8:
        lines, constants = _quantized("Gemm(xd, wd, bd)", weight, bias, 1)
    else:
        lines, constants = "y = Gemm(x, w, b)", {"w": weight, "b": bias}
    return _graph((m, k), (m, n), lines, constants), constants


def _conv(
    c: int, o: int, size: int, kernel: int, group: int, w: Callable[..., np.ndarray],
    int8: bool = False,
) -> tuple[str, dict[str, np.ndarray]]:  # fmt: skip
    weight, bias, pad = w(o, c // group, kernel, kernel), w(o), kernel // 2
    attributes = (
        f"<group = {group}, kernel_shape = [{kernel},{kernel}], pads = [{pad},{pad},{pad},{pad}]>"
    )
    if int8:
        lines, constants = _quantized(f"Conv {attributes} (xd, wd, bd)", weight, bias, 0)
    else:
        lines = f"t = Conv {attributes} (x, w, b)\ny = Relu(t)"
        constants = {"w": weight, "b": bias}
    return _graph((1, c, size, size), (1, o, size, size), lines, constants), constants


def _attention_product(rows: int) -> tuple[str, dict[str, np.ndarray]]:
    text = (
        f"{HEAD}g (float[1,12,{rows},32] x, float[1,12,32,{rows}] k) => "
        f"(float[1,12,{rows},{rows}] y) {{ y = MatMul(x, k) }}"
    )
    return text, {}


def _unary(op: str, rows: int, columns: int) -> tuple[str, dict[str, np.ndarray]]:
    constants: dict[str, np.ndarray] = {}
    if "(x, g, b)" in op:
        constants = {"g": np.ones(columns, np.float32), "b": np.zeros(columns, np.float32)}
    return _graph((rows, columns), (rows, columns), f"y = {op}", constants), constants


def _pool(size: int) -> tuple[str, dict[str, np.ndarray]]:
    op = "y = MaxPool <kernel_shape = [3,3], strides = [2,2], pads = [1,1,1,1]> (x)"
    return _graph((1, 64, size, size), (1, 64, size // 2, size // 2), op, {}), {}


def estimate_only(profile: DeviceProfile) -> DeviceProfile:
    """The same rates without the table of measured kernels."""
    return replace(profile, measured={})
