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
from optcompiler.lowering.ir import Conv, Lowered, MatMul
from optcompiler_cpu.isa import Isa
from optcompiler_cpu.runner import NUMPY
from optcompiler_cpu.variants import print_other, variants_of

TRIED = 4
"""Kernels of one step that are measured."""

ROUNDS = 9
"""Runs of each library; of a kernel's times in them the median counts."""

GAIN = 0.97
"""Another kernel is taken where it takes less than this share of the first one's time."""

AT_ONCE = 40
"""Different kernels whose others are measured together; then what was measured is kept."""

UNEQUAL = 0.05
"""The share of integers that may differ between kernels."""

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
    steps = [s for s in lowered.steps if isinstance(s, (Conv, MatMul)) and options[s.name]]
    same: dict[str, list[str]] = {}
    for step in steps:
        same.setdefault(_text_of(step, isa, options[step.name]), []).append(step.name)
    cache = Cache()
    facts = {text: {"text": text, "isa": isa.name, **machine} for text in same}
    known = {text: times for text in same if (times := _kept(cache, facts[text])) is not None}
    missing = [text for text in same if text not in known]
    for chunk in (missing[i : i + AT_ONCE] for i in range(0, len(missing), AT_ONCE)):
        names = {text: same[text] for text in chunk}
        wanted = {text: options[same[text][0]] for text in chunk}
        found = _measured(lowered, isa, make, names, wanted)
        winners = {
            t: [wanted[t][0], best] for t in chunk if (best := _best(wanted[t][0], found[t]))
        }
        if winners:  # one of many was bound to be quick by chance
            for text, times in _measured(lowered, isa, make, names, winners).items():
                found[text] |= times
        for text in chunk:
            known[text] = found[text]
            if set(found[text]) == set(wanted[text]):
                cache.put(KIND, facts[text], json.dumps(found[text]).encode())
    rows: list[dict[str, Any]] = []
    for text, names in same.items():
        first, us = options[names[0]][0], known[text]
        if best := _best(first, us):
            rows += [
                {"step": n, "kernel": best, "us": us[best], "first": first, "first_us": us[first]}
                for n in names
            ]
    return rows


def _best(first: str, us: Mapping[str, float]) -> str | None:
    """The kernel that takes least, where that is less than the first by more than noise."""
    best = min(us, key=us.__getitem__, default=first)
    return best if first in us and us[best] < GAIN * us[first] else None


def _text_of(step: Conv | MatMul, isa: Isa, names: Sequence[str]) -> str:
    """What decides how long the kernels take: their text, and how much they read."""
    digest = hashlib.sha256()
    for name in names:
        code = print_other(step, isa, name)
        digest.update(f"{name}\n{code.text}\n".encode())
        digest.update(repr([p.data.shape for p in code.pointers if p.data is not None]).encode())
    return digest.hexdigest()


def _measured(
    lowered: Lowered, isa: Isa, make: Make, steps: Mapping[str, Sequence[str]],
    wanted: Mapping[str, Sequence[str]],
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Microseconds of the `wanted` kernels by the key of each group of `steps`, the mean of theirs.

    Kernels that do not build, or give other numbers than the first, are left out with all that are
    built beside them.
    """
    inputs = _inputs(lowered)
    found: dict[str, dict[str, list[float]]] = {text: {} for text in wanted}
    runs: list[tuple[Mapping[str, str], Runner]] = []
    place = scratch.new()
    try:
        first: Sequence[np.ndarray] = ()
        for k in range(max(map(len, wanted.values()))):
            kernels = {text: names[k] for text, names in wanted.items() if k < len(names)}
            chosen = {step: kernel for text, kernel in kernels.items() for step in steps[text]}
            (place / str(k)).mkdir()
            try:
                runner = make(replace(isa, chosen=chosen), place / str(k))
            except OptcompilerError as error:
                if k == 0:
                    raise
                _left_out(chosen, str(error))
                continue
            runs.append((kernels, runner))
            outputs = runner.run(inputs)
            if k == 0:
                first = outputs
            elif not _agree(first, outputs):
                _left_out(chosen, "other numbers than before")
                runs.pop()
                runner.close()
        for _ in range(ROUNDS):
            for kernels, runner in runs:
                times = runner.kernel_times_us(inputs) or {}
                for text, kernel in kernels.items():
                    mean = statistics.mean(times[step] for step in steps[text])
                    found[text].setdefault(kernel, []).append(mean)
    finally:
        for _, runner in runs:
            runner.close()
        scratch.remove(place)
    return {
        text: {kernel: statistics.median(times) for kernel, times in kernels.items()}
        for text, kernels in found.items()
    }


def _left_out(chosen: Mapping[str, str], why: str) -> None:
    some = ", ".join(f"{step} as {kernel}" for step, kernel in list(chosen.items())[:3])
    more = f" and {len(chosen) - 3} more" if len(chosen) > 3 else ""
    warnings.warn(f"kernels left out of the search: {some}{more}: {why}", CacheWarning, 3)


def _agree(first: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> bool:
    """To what sums in another order, and Winograd's, may differ by; of integers a few may, where
    floats were rounded to them."""
    for a, b in zip(first, other, strict=True):
        if not np.issubdtype(a.dtype, np.floating):
            if a.size and np.mean(a != b) > UNEQUAL:
                return False
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


def _kept(cache: Cache, facts: Mapping[str, Any]) -> dict[str, float] | None:
    content = cache.get(KIND, facts)
    try:
        return None if content is None else {k: float(v) for k, v in json.loads(content).items()}
    except (ValueError, TypeError, AttributeError):
        return None
