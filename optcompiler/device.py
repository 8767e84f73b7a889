"""Measuring a device: probe programs run through the backend itself, rates fitted to their times.

Every backend is measured by the same probes through its own `lower` and `load`, so a third party's
backend is priced without writing anything. Profiles are kept in the user's cache for as long as
what can change the outcome stays: machine, backend, target options, versions.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_dtypes import bfloat16

from optcompiler import scratch
from optcompiler.cache import Cache
from optcompiler.cost import Curve, DeviceProfile
from optcompiler.errors import InputError, UnsupportedOperatorError
from optcompiler.files import to_json
from optcompiler.program import Program

if TYPE_CHECKING:
    from optcompiler.backend import Backend, Runner
    from optcompiler.rewriting import Progress
    from optcompiler.target import Target

FORMAT = 7
KIND = "device"

WINDOWS = 4
QUIET = 1.1
"""A median within this ratio of the best decile says that the machine was quiet."""


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
    store, facts = Cache(cache), _facts(backend, target)
    known = None if remeasure else _kept(store, facts)
    if known is not None:
        return known
    with store.lock(KIND, facts):
        known = None if remeasure else _kept(store, facts)
        if known is not None:
            return known
        profile = measure(backend, backend.profiled_as(target), progress)
        if profile is not None:
            _keep(store, facts, profile)
            return profile
    nominal = backend.nominal_profile(target)
    if nominal is None:
        raise InputError(
            f"target {target}: it cannot be timed on this machine and has no nominal profile."
        )
    return nominal


def remember(
    backend: Backend, target: Target, profile: DeviceProfile, cache: Path | None = None
) -> None:
    """Keep a profile whose table of measured kernels grew, with what others added meanwhile."""
    if profile.estimated:
        return
    store, facts = Cache(cache), _facts(backend, target)
    with store.lock(KIND, facts):
        known = _kept(store, facts)
        if known is not None:
            profile = known.with_measured(profile.measured)
        _keep(store, facts, profile)


def machine_name() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _facts(backend: Backend, target: Target) -> dict[str, Any]:
    """What can change the outcome of measuring."""
    target = backend.profiled_as(backend.spelled_out(target))
    flags = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return {
        "format": FORMAT,
        "machine": machine_name(),
        "flags": flags,
        "processors": os.cpu_count(),
        "backend": target.backend,
        "threads": target.threads,
        "options": dict(target.options),
        "versions": dict(backend.versions()),
    }


def _kept(store: Cache, facts: Mapping[str, Any]) -> DeviceProfile | None:
    content = store.get(KIND, facts)
    try:
        return None if content is None else DeviceProfile.from_json(json.loads(content))
    except (ValueError, KeyError, TypeError):
        return None


def _keep(store: Cache, facts: Mapping[str, Any], profile: DeviceProfile) -> None:
    store.put(KIND, facts, to_json(profile.to_json()).encode())


# -- timing ------------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class Probe:
    """One small program whose time shows a rate, or two whose difference does.

    `rate` is "launch", "bytes", "flop" or "mac". With `longer`, the second program holds `extra`
    more kernels like those of the first, and the rate is fitted to the difference, so that what
    stands at the ends (converting to integers and back, the call itself) does not count.
    """

    rate: str
    program: Program
    longer: Program | None = None
    extra: int = 0


def measure(
    backend: Backend, target: Target, progress: Progress | None = None
) -> DeviceProfile | None:
    """Run every probe that the backend supports and fit the rates; None when it cannot be timed."""
    if not backend.runs_here(target):
        return None
    probes = list(_probes(backend.capabilities(target).precisions))
    programs = [p for probe in probes for p in (probe.program, probe.longer) if p is not None]
    times: dict[int, float] = {}
    first = _build(backend, target, programs[0])
    if first is None or not _keep_time(first, programs[0], times):
        return None
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        made = list(pool.map(lambda p: _build(backend, target, p), programs[1:]))
    built = [(p, m) for p, m in zip(programs[1:], made, strict=True) if m is not None]
    for program, each in progress.track(built, f"measuring {target}") if progress else built:
        _keep_time(each, program, times)
    profile = _launches(backend, target, probes, times)
    for rate in ("bytes", "flop", "mac"):
        profile = _fitted(backend, target, profile, rate, probes, times)
    return profile if profile.mac_rate else None


Made = tuple["Runner", Path]


def _build(backend: Backend, target: Target, program: Program) -> Made | None:
    code = scratch.new()
    try:
        info = backend.lower(program, target, code)
        return backend.load(code, info, threads=target.threads), code
    except UnsupportedOperatorError:
        scratch.remove(code)
        return None
    except BaseException:
        scratch.remove(code)
        raise


def _keep_time(made: Made, program: Program, times: dict[int, float]) -> bool:
    """Time what was built and remove it; False where time says nothing about the target."""
    runner, code = made
    try:
        if runner.timed:
            times[id(program)] = _time(runner, program)
        return runner.timed
    finally:
        runner.close()
        scratch.remove(code)


def _time(runner: Runner, program: Program) -> float:
    """Microseconds of one run when nothing else disturbs the machine.

    The lowest decile of a window of runs; while the window's median is far above it, something
    does disturb, and further windows (at most `WINDOWS`) are taken.
    """
    rng = np.random.default_rng(0)
    inputs = {
        p.name: rng.standard_normal([int(d) for d in p.shape]).astype(np.float32)
        for p in program.inputs
    }
    runner.run(inputs)
    best = float("inf")
    for _ in range(WINDOWS):
        times: list[float] = []
        end = time.perf_counter() + 0.08
        while len(times) < 10 or (time.perf_counter() < end and len(times) < 400):
            start = time.perf_counter()
            runner.run(inputs)
            times.append(time.perf_counter() - start)
        decile = statistics.quantiles(times, n=10)[0]
        best = min(best, decile)
        if statistics.median(times) < QUIET * best:
            break
    return 1e6 * best


def _launches(
    backend: Backend, target: Target, probes: Sequence[Probe], times: Mapping[int, float]
) -> DeviceProfile:
    launch_us, overhead_us = 0.5, 1.0
    for probe in probes:
        if probe.rate != "launch" or probe.longer is None or id(probe.longer) not in times:
            continue
        short, long = times[id(probe.program)], times[id(probe.longer)]
        fewer = len(backend.kernels(probe.program, target))
        more = len(backend.kernels(probe.longer, target))
        launch_us = max((long - short) / max(more - fewer, 1), 0.01)
        overhead_us = max(short - fewer * launch_us, 0.1)
    return DeviceProfile(
        name=machine_name(),
        backend=backend.name,
        threads=target.threads,
        mac_rate={},
        flop_rate={"pointwise/fp32": ((1.0, 1e12),)},
        bandwidth=((1.0, 1e12),),
        launch_us=launch_us,
        overhead_us=overhead_us,
        versions=dict(backend.versions()),
    )


def _fitted(
    backend: Backend, target: Target, profile: DeviceProfile, rate: str, probes: Sequence[Probe],
    times: Mapping[int, float],
) -> DeviceProfile:  # fmt: skip
    """The profile with one kind of rate fitted."""
    points: dict[str, list[tuple[float, float]]] = {}
    for probe in probes:
        last = probe.longer or probe.program
        if probe.rate != rate or id(last) not in times or id(probe.program) not in times:
            continue
        main = max(backend.kernels(last, target), key=lambda k: (k.macs, k.flops, k.bytes_moved))
        if probe.longer is not None:
            each = (times[id(last)] - times[id(probe.program)]) / probe.extra
        else:
            each = times[id(last)] - profile.overhead_us
        floor = times[id(last)] / (20 * max(probe.extra, 1))
        busy = max(each - profile.launch_us, floor) / 1e6
        amount, key = {
            "mac": (main.macs, f"{main.kind}/{main.dtype}"),
            "flop": (main.flops, f"{main.kind}/{main.dtype}"),
            "bytes": (main.bytes_moved + main.weight_bytes, "all"),
        }[rate]
        if amount:
            points.setdefault(key, []).append((float(amount), amount / busy))
    curves = {k: _curve(v) for k, v in points.items()}
    if rate == "bytes":
        return replace(profile, bandwidth=curves["all"]) if curves else profile
    if rate == "flop":
        return replace(profile, flop_rate={**profile.flop_rate, **curves}) if curves else profile
    return replace(profile, mac_rate=curves)


def _curve(points: list[tuple[float, float]]) -> Curve:
    merged: dict[float, list[float]] = {}
    for size, rate in points:
        merged.setdefault(size, []).append(rate)
    return tuple((s, statistics.median(r)) for s, r in sorted(merged.items()))


HEAD = '<ir_version: 10, opset_import: ["" : {}]>\n'
TEXT_TYPES = {"float32": "float", "bfloat16": "bfloat16", "int8": "int8", "uint8": "uint8",
              "int32": "int32"}  # fmt: skip
PAIRS = 3
"""A longer chain goes to and fro this many times, a shorter one once."""

MATMULS = ((4, 64, 64), (64, 384, 384), (128, 1536, 384), (1, 1000, 512))
"""Rows, columns, depth."""
CONVS = ((8, 16, 8, 3, 1), (64, 64, 28, 3, 1), (128, 256, 14, 3, 1), (16, 32, 56, 1, 1),
         (64, 256, 28, 1, 1), (32, 32, 56, 3, 32), (96, 96, 14, 3, 96))  # fmt: skip
"""Channels in, channels out, height and width, kernel, groups."""


def _probes(precisions: frozenset[str]) -> Iterator[Probe]:
    rng = np.random.default_rng(0)
    yield Probe("launch", _small_steps(2), _small_steps(34), 32)
    for precision in ("fp32", *(p for p in ("bf16", "int8") if p in precisions)):
        for sizes in MATMULS:
            short, long = (_matmuls(*sizes, pairs, rng, precision) for pairs in (1, PAIRS))
            yield Probe("mac", short, long, 2 * (PAIRS - 1))
        for conv in CONVS:
            short, long = (_convs(*conv, pairs, rng, precision) for pairs in (1, PAIRS))
            yield Probe("mac", short, long, 2 * (PAIRS - 1))
    for rows in (16, 128):
        yield Probe("mac", _attention_product(rows))
    for rows in (4, 64, 512):
        for op in ("Softmax <axis = -1> (x)", "LayerNormalization <axis = -1> (x, g)",
                   "Erf (x)", "Tanh (x)", "Gelu (x)", "Mul (x, x)"):  # fmt: skip
            yield Probe("flop", _unary(op, rows, 384))
    for size in (14, 56):
        yield Probe("flop", _pool(size))
    for rows in (4, 64, 1024, 8192):
        yield Probe("bytes", _unary("Relu (x)", rows, 512))


def _program(
    x: Sequence[int], y: Sequence[int], lines: str, constants: Mapping[str, np.ndarray],
    opset: int = 20,
) -> Program:  # fmt: skip
    """A program from `x` to `y`, both float, with `constants` as initializers."""
    import onnx_ir as ir

    def typed(name: str, dtype: str, shape: Sequence[int]) -> str:
        dims = f"[{','.join(map(str, shape))}]" if len(shape) else ""
        return f"{dtype}{dims} {name}"

    declared = [typed(k, TEXT_TYPES[str(v.dtype)], v.shape) for k, v in constants.items()]
    arguments = ", ".join([typed("x", "float", x), *declared])
    model = ir.from_onnx_text(
        f"{HEAD.format(opset)}g ({arguments}) => ({typed('y', 'float', y)}) {{\n{lines}\n}}"
    )
    for value in list(model.graph.inputs)[1:]:
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(constants[str(value.name)], name=value.name)
        model.graph.register_initializer(value)
    return Program.from_onnx(model)


def _small_steps(count: int) -> Program:
    lines = [
        f"v{i + 1} = MatMul (v{i}, w)" if i % 2 == 0 else f"v{i + 1} = Softmax <axis = -1> (v{i})"
        for i in range(count)
    ]
    lines = ["v0 = Softmax <axis = -1> (x)", *lines, f"y = Softmax <axis = -1> (v{count})"]
    return _program((1, 16), (1, 16), "\n".join(lines), {"w": np.eye(16, dtype=np.float32)})


Layer = tuple[str, np.ndarray, int]
"""Operator with its attributes, weight, and the axis of the weight's output channels."""


def _chain(
    layers: Sequence[Layer], shape: Sequence[int], rng: np.random.Generator, precision: str
) -> Program:
    """Layers one after another, each followed by Relu, in float, bfloat16 or Q/DQ form."""
    int8, bf16 = precision == "int8", precision == "bf16"
    constants: dict[str, np.ndarray] = {}
    lines: list[str] = []
    value = "x"
    if int8:
        constants |= {"s": np.float32(0.03), "z": np.uint8(0)}  # pyright: ignore[reportAssignmentType]
        lines += ["q = QuantizeLinear (x, s, z)", "d = DequantizeLinear (q, s, z)"]
        value = "d"
    elif bf16:
        lines.append("d = Cast <to = 16> (x)")
        value = "d"
    for i, (op, weight, axis) in enumerate(layers):
        bias = rng.standard_normal(weight.shape[axis]).astype(np.float32)
        w, b = f"w{i}", f"b{i}"
        if int8:
            lines += _quantized_constants(i, weight, bias, axis, constants)
            w, b = f"wd{i}", f"bd{i}"
        else:
            stored = bfloat16 if bf16 else np.float32
            constants |= {w: weight.astype(stored), b: bias.astype(stored)}
        lines += [f"t{i} = {op} ({value}, {w}, {b})", f"r{i} = Relu (t{i})"]
        value = f"r{i}"
        if int8:
            lines += [f"q{i} = QuantizeLinear ({value}, s, z)",
                      f"d{i} = DequantizeLinear (q{i}, s, z)"]  # fmt: skip
            value = f"d{i}"
    if bf16:
        lines.append(f"f = Cast <to = 1> ({value})")
        value = "f"
    lines.append(f"y = Relu ({value})")
    constants = {k: np.asarray(v) for k, v in constants.items()}
    return _program(shape, shape, "\n".join(lines), constants, 22 if bf16 else 20)


def _quantized_constants(
    i: int, weight: np.ndarray, bias: np.ndarray, axis: int, constants: dict[str, np.ndarray]
) -> list[str]:
    scale = np.abs(weight).max(axis=tuple(a for a in range(weight.ndim) if a != axis)) / 127
    spread = [-1 if a == axis else 1 for a in range(weight.ndim)]
    levels = np.clip(np.rint(weight / scale.reshape(spread)), -127, 127)
    constants |= {
        f"w{i}": levels.astype(np.int8), f"ws{i}": scale.astype(np.float32),
        f"wz{i}": np.zeros(scale.shape, np.int8), f"b{i}": np.rint(bias / 0.01).astype(np.int32),
        f"bs{i}": (0.03 * scale).astype(np.float32), f"bz{i}": np.zeros(scale.shape, np.int32),
    }  # fmt: skip
    return [f"wd{i} = DequantizeLinear <axis = {axis}> (w{i}, ws{i}, wz{i})",
            f"bd{i} = DequantizeLinear <axis = 0> (b{i}, bs{i}, bz{i})"]  # fmt: skip


def _matmuls(
    m: int, n: int, k: int, pairs: int, rng: np.random.Generator, precision: str
) -> Program:
    def layer(a: int, b: int) -> Layer:
        return "Gemm", (rng.standard_normal((a, b)) / np.sqrt(a)).astype(np.float32), 1

    return _chain([layer(k, n), layer(n, k)] * pairs, (m, k), rng, precision)


def _convs(
    c: int, o: int, size: int, kernel: int, groups: int, pairs: int, rng: np.random.Generator,
    precision: str,
) -> Program:  # fmt: skip
    pad = ",".join([str(kernel // 2)] * 4)
    op = f"Conv <group = {groups}, kernel_shape = [{kernel},{kernel}], pads = [{pad}]>"

    def layer(a: int, b: int) -> Layer:
        shape = (b, a // groups, kernel, kernel)
        return op, (rng.standard_normal(shape) / np.sqrt(a * kernel)).astype(np.float32), 0

    return _chain([layer(c, o), layer(o, c)] * pairs, (1, c, size, size), rng, precision)


def _attention_product(rows: int) -> Program:
    lines = "t = Transpose <perm = [0,1,3,2]> (x)\ny = MatMul (x, t)"
    return _program((1, 12, rows, 32), (1, 12, rows, rows), lines, {})


def _unary(op: str, rows: int, columns: int) -> Program:
    constants = {"g": np.ones(columns, np.float32)} if ", g)" in op else {}
    return _program((rows, columns), (rows, columns), f"y = {op}", constants)


def _pool(size: int) -> Program:
    op = "y = MaxPool <kernel_shape = [3,3], strides = [2,2], pads = [1,1,1,1]> (x)"
    return _program((1, 64, size, size), (1, 64, size // 2, size // 2), op, {})
