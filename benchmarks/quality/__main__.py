"""What low precision loses, ours beside the peers.

    pip install -c constraints.txt -e '.[benchmark,peers]'
    python -m benchmarks.zoo                                  # trains the models, once
    python -m benchmarks.quality --json quality.json          # everything: many hours
    python -m benchmarks.quality --subjects mobilenet --settings w8a8 --samples 64 --seeds 0
    python -m benchmarks.quality --ablation --subjects mobilenet-twin --settings w4a8

Each cell is a process of its own. With --json results are kept as they come, and cells that are in
the file are not made again. Scores of ours are the compiled program's in ONNX Runtime. Samples come
from a pool that shares nothing with the test set and carry no labels; 0 samples is without data.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.quality import ours, tables
from benchmarks.quality.cells import SETTINGS, Cell, run
from benchmarks.quality.tools import TOOLS
from benchmarks.zoo import SUBJECTS

FITTING = {"gpt": ("w8a8", "w4"), "minilm": ("w8a8",)}
"""Settings by subject, where not all but weight-only are asked."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--subjects", default=",".join(SUBJECTS), help="default: %(default)s")
    parser.add_argument("--tools", default=",".join(TOOLS), help="default: %(default)s")
    parser.add_argument("--settings", default=",".join(SETTINGS), help="default: %(default)s")
    parser.add_argument("--samples", default="0,8,64,512", help="default: %(default)s")
    parser.add_argument("--seeds", default="0,1,2", help="default: %(default)s")
    parser.add_argument("--ablation", action="store_true", help="ours, step by step, alone")
    parser.add_argument("--twice", action="store_true", help="make ours twice, compare hashes")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="keep results in this file, and go on from it")
    parser.add_argument("--verbose", action="store_true", help="show what the tools print")
    options = parser.parse_args()
    known: dict[str, dict[str, Any]] = {}
    if options.json and options.json.exists():
        known = {entry.pop("key"): entry for entry in json.loads(options.json.read_text())}
    wanted = cells(options)
    for index, cell in enumerate(wanted):
        if known.get(cell.key, {}).get("score") is not None:
            continue
        say(f"{index + 1} of {len(wanted)}: {cell.subject}, {cell.tool} {cell.variant}, "
            f"{cell.setting}, {cell.samples} samples, seed {cell.seed}")  # fmt: skip
        known[cell.key] = run(cell, options.threads, options.verbose)
        result = known[cell.key]
        say(f"    {result['score']} in {result.get('seconds', 0):.0f} s {result.get('reason', '')}")
        if options.json:
            entries = [{"key": key, **entry} for key, entry in known.items()]
            fresh = options.json.with_suffix(".partial")
            fresh.write_text(json.dumps(entries, indent=1))
            fresh.replace(options.json)
        if options.twice and cell.tool == "ours":
            again = run(cell, options.threads, options.verbose)
            same = again.get("hash") == result.get("hash")
            say(f"    made twice: {'the same hash' if same else 'ANOTHER HASH'}")
    results = [known[c.key] for c in wanted]
    print(tables.ablation(results) if options.ablation else tables.drops(results))
    print(f"\n{tables.costs(results)}")


def cells(options: argparse.Namespace) -> list[Cell]:
    """Every cell that is asked for, the float ones first."""
    tools = [t for t in options.tools.split(",") if t in TOOLS and installed(t)]
    settings, seeds = options.settings.split(","), [int(s) for s in options.seeds.split(",")]
    found: list[Cell] = []
    for subject in options.subjects.split(","):
        found.append(Cell(subject, "fp32", "fp32", 0, 0))
        for setting in settings:
            if setting not in FITTING.get(subject, ("w8a8", "w4a8", "w4a4")):
                continue
            for samples in map(int, options.samples.split(",")):
                for name in ["ours"] if options.ablation else tools:
                    tool = TOOLS[name]
                    if setting not in tool.settings or (tool.needs_data and not samples):
                        continue
                    variants = ours.VARIANTS if options.ablation else ("",)
                    found += [
                        Cell(subject, name, setting, samples, seed, variant)
                        for variant in variants for seed in seeds
                    ]  # fmt: skip
    return found


def installed(name: str) -> bool:
    missing = [p for p in TOOLS[name].packages if importlib.util.find_spec(p) is None]
    if missing:
        say(f"{TOOLS[name].title} is skipped: {', '.join(missing)} is not installed")
    return not missing


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
