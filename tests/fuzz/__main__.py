"""python -m tests.fuzz --graphs 10000 --seed 1: many graphs through every oracle."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from optcompiler_cpu.isa import ISAS
from tests.fuzz.run import CHUNK, Run


def main() -> int:
    """Prints what was covered; 1 when an oracle did not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--graphs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=int(time.time()) // 86_400,
                        help="default: the day")  # fmt: skip
    parser.add_argument("--isa", choices=list(ISAS), default="portable")
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"),
                        help="where programs that fail are written")  # fmt: skip
    options = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="optcompiler-fuzz-") as scratch:
        run = Run(Path(scratch), options.isa)
        chunk = 0
        while (left := options.graphs - run.statistics.graphs) > 0:
            known = len(run.failures)
            run.chunk(min(CHUNK, left), options.seed * 100_003 + chunk)
            chunk += 1
            minutes = (time.monotonic() - begin) / 60
            print(
                f"{run.statistics.graphs} graphs, {run.rate:.1f}/s on one core, {minutes:.1f} min, "
                f"{len(run.failures)} kinds of failure",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            for text in list(run.failures)[known:]:
                print(text, file=sys.stderr, flush=True)
    print(run.statistics.text())
    print(f"{run.rate:.1f} graphs/s on one core; seed {options.seed}")
    for number, (message, text) in enumerate(run.failures.items()):
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"seed{options.seed}_{number}.onnxtxt"
        path.write_text(text, encoding="utf-8")
        print(f"FAILED {message}\n  kept as {path}; copy it to tests/fuzz/regressions once mended")
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())
