"""Kernels measured where they run: in the whole library, between the kernels that surround them.

The library is built a few times, each step with its next best kernel, and all of them are run in
turn; so a kernel meets its operands where its neighbours left them. Steps whose first kernels have
the same text are the same kernel, and are judged together.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from optcompiler import scratch
from optcompiler.backend import Runner
from optcompiler.cache import Cache
from optcompiler.choices import Choices
from optcompiler.errors import CacheWarning, OptcompilerError
from optcompiler.lowering.ir import Lowered, Step
from optcompiler_cpu.isa import Isa
from optcompiler_cpu.runner import NUMPY
from optcompiler_cpu.variants import print_other, variants_of

TRIED = 4
"""Kernels of one step that are measured."""

ROUNDS = 9
"""Runs of each library; of a kernel's times in them the median counts."""

GAIN = 0.97
"""Another kernel is taken where it takes less than this share of the first one's time."""

KIND = "cpu-kernels"

Make = Callable[[Isa, Path], Runner]
"""Builds the library in an empty directory with the kernels that are chosen, and loads it."""


def searched(
    lowered: Lowered, isa: Isa, make: Make, machine: Mapping[str, Any], choices: Choices
) -> tuple[Isa, list[dict[str, Any]]]:
    """`isa` with the kernels chosen that are measured quickest, and a row for each that is another
    than the rules say: step, kernel, and microseconds of it and of the first.

    Answers come from `choices`; where nothing is timed, rules and estimates decide alone. What was
    measured is kept between compiles, by the text of the kernels and `machine`.
    """
    key = choices.numbered("cpu kernels")
    rows = choices.choose(key, lambda: _found(lowered, isa, make, machine), [])
    return replace(isa, chosen={str(row["step"]): str(row["kernel"]) for row in rows}), rows


def _found(
    lowered: Lowered, isa: Isa, make: Make, machine: Mapping[str, Any]
) -> list[dict[str, Any]]:
    options = {s.name: variants_of(s, isa)[:TRIED] for s in lowered.steps}
    steps = [s for s in lowered.steps if options[s.name]]
    same: dict[str, list[str]] = {}
    for step in steps:
        same.setdefault(_text_of(step, isa, options[step.name]), []).append(step.name)
    cache = Cache()
    facts = {text: {"text": text, "isa": isa.name, **machine} for text in same}
    known = {text: _kept(cache, facts[text]) for text in same}
    missing = [text for text, times in known.items() if times is None]
    if missing:
        wanted = {name: options[name] for text in missing for name in same[text]}
        times = _measured(lowered, isa, make, wanted)
        for text in missing:
            known[text] = _together([times[name] for name in same[text]])
            cache.put(KIND, facts[text], json.dumps(known[text]).encode())
    rows: list[dict[str, Any]] = []
    for text, names in same.items():
        first = options[names[0]][0]
        us = known[text] or {}
        best = min(us, key=us.__getitem__, default=first)
        if best != first and first in us and us[best] < GAIN * us[first]:
            rows += [
                {"step": n, "kernel": best, "us": us[best], "first": first, "first_us": us[first]}
                for n in names
            ]
    return rows


def _text_of(step: Step, isa: Isa, names: Sequence[str]) -> str:
    """What decides how long the kernels take: their text, and how much they read."""
    digest = hashlib.sha256()
    for name in names:
        code = print_other(step, isa, name)  # type: ignore[arg-type]
        digest.update(f"{name}\n{code.text}\n".encode())
        digest.update(repr([p.data.shape for p in code.pointers if p.data is not None]).encode())
    return digest.hexdigest()


def _measured(
    lowered: Lowered, isa: Isa, make: Make, wanted: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, float]]:
    """Microseconds by step and kernel; a kernel that does not build, or gives other numbers than
    the first, is left out."""
    inputs = _inputs(lowered)
    found: dict[str, dict[str, list[float]]] = {name: {} for name in wanted}
    runs: list[tuple[Mapping[str, str], Runner]] = []
    place = scratch.new()
    try:
        first: Sequence[np.ndarray] = ()
        for k in range(max(map(len, wanted.values()))):
            chosen = {name: names[k] for name, names in wanted.items() if k < len(names)}
            (place / str(k)).mkdir()
            try:
                runner = make(replace(isa, chosen=chosen), place / str(k))
            except OptcompilerError as error:
                if k == 0:
                    raise
                warnings.warn(f"kernels left out of the search: {error}", CacheWarning, 2)
                continue
            runs.append((chosen, runner))
            outputs = runner.run(inputs)
            if k == 0:
                first = outputs
            elif not _agree(first, outputs):
                warnings.warn("kernels left out of the search: other numbers", CacheWarning, 2)
                runs.pop()
                runner.close()
        for _ in range(ROUNDS):
            for chosen, runner in runs:
                times = runner.kernel_times_us(inputs) or {}
                for name, kernel in chosen.items():
                    found[name].setdefault(kernel, []).append(times[name])
    finally:
        for _, runner in runs:
            runner.close()
        scratch.remove(place)
    return {
        name: {kernel: statistics.median(times) for kernel, times in kernels.items()}
        for name, kernels in found.items()
    }


def _agree(first: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> bool:
    """To what sums in another order, and Winograd's, may differ by."""
    for a, b in zip(first, other, strict=True):
        if not np.issubdtype(a.dtype, np.floating):
            continue
        wide = a.astype(np.float64)
        size = float(np.abs(wide[np.isfinite(wide)]).max(initial=0.0))
        if not np.allclose(wide, b.astype(np.float64), rtol=1e-2, atol=1e-2 * size, equal_nan=True):
            return False
    return True


def _inputs(lowered: Lowered) -> dict[str, np.ndarray]:
    """Seeded normal numbers for floats, zeros for what may be an index."""
    rng = np.random.default_rng(0)
    return {
        p.name: (
            rng.standard_normal(p.shape).astype(NUMPY[p.dtype])
            if p.dtype in {"FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16"}
            else np.zeros(p.shape, NUMPY[p.dtype])
        )
        for p in lowered.inputs
    }


def _together(times: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean over steps, of kernels that all of them have."""
    every = set.intersection(*(set(t) for t in times))
    return {kernel: statistics.mean(t[kernel] for t in times) for kernel in sorted(every)}


def _kept(cache: Cache, facts: Mapping[str, Any]) -> dict[str, float] | None:
    content = cache.get(KIND, facts)
    try:
        return None if content is None else {k: float(v) for k, v in json.loads(content).items()}
    except (ValueError, TypeError, AttributeError):
        return None
