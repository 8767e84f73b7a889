"""`python -m tests.hostile [--forked] [--json] [WORD...]`: run the corpus and print a table.

Every item whose name holds one of the words (all, without words) is run in a fresh process, with
`--forked` in a fork of this one, which has imported what a refusal needs. The exit code is 1
when any item ends otherwise than it should.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import tempfile
from pathlib import Path

from tests.hostile import archives, artifacts, calibration, files, graphs  # noqa: F401
from tests.hostile.corpus import ITEMS
from tests.hostile.running import Outcome, run_item, warm


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--forked", action="store_true")
    parser.add_argument("--named", action="store_true", help="the words are whole names")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    chosen = [i for i in ITEMS.values() if _wanted(i.name, options.words)]
    if options.named:
        chosen = [ITEMS[name] for name in options.words]
    if options.forked:
        warm()
    outcomes: list[Outcome] = []
    failed = False
    for item in chosen:
        with tempfile.TemporaryDirectory(prefix="hostile-") as place:
            outcome = run_item(item, Path(place) / "item", fresh=not options.forked)
        outcomes.append(outcome)
        faults = outcome.faults(item)
        failed = failed or bool(faults)
        if not options.json:
            print(_line(outcome, faults), flush=True)
    if options.json:
        json.dump([dataclasses.asdict(o) for o in outcomes], sys.stdout)
        return 0
    worst = max(outcomes, key=lambda o: o.cpu_seconds), max(outcomes, key=lambda o: o.megabytes)
    print(f"{len(outcomes)} items; most CPU {worst[0].name} {worst[0].cpu_seconds:.2f} s; "
          f"most memory {worst[1].name} {worst[1].megabytes:.0f} MB")  # fmt: skip
    return int(failed)


def _wanted(name: str, words: list[str]) -> bool:
    return not words or any(word in name for word in words)


def _line(outcome: Outcome, faults: list[str]) -> str:
    sentence = re.sub(r"/\S*/hostile-\w+/item/", "", " ".join(outcome.stderr.split()))[:400]
    line = f"{outcome.name:34} {outcome.code:4} {outcome.cpu_seconds:6.2f} s "
    line += f"{outcome.megabytes:6.0f} MB  {sentence}"
    return line + (f"\n    !! {'; '.join(faults)}" if faults else "")


if __name__ == "__main__":
    sys.exit(main())
