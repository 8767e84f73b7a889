"""`python -m tests.conformance [SUBJECT ...]`: run the suite and print the scores."""

from __future__ import annotations

import argparse
import re
from collections import Counter

import torch

from tests.conformance.runner import Outcome, Verdict, judge, selected, table, useless_exclusions
from tests.conformance.subjects import SUBJECTS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("subjects", nargs="*", help=f"of {', '.join(SUBJECTS)}; default: all")
    parser.add_argument("--kind", action="append", help="kinds of models; default: all")
    parser.add_argument("--match", default="", help="only cases whose name holds this expression")
    parser.add_argument("--list", action="store_true", help="print cases that are not right")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[tuple[str, str], list[Outcome]] = {}
    for name in options.subjects or SUBJECTS:
        subject = SUBJECTS[name]
        for kind in options.kind or subject.floors:
            chosen = [c for c in selected(subject, kind) if re.search(options.match, c.name)]
            found[name, kind] = [judge(subject, case) for case in chosen]
        for exclusion in useless_exclusions(subject):
            print(f"{name}: exclusion {exclusion.pattern!r} matches no case")
    print(table(found))
    bad = [(s, o) for (s, _), outcomes in found.items() for o in outcomes]
    if options.list:
        for subject, outcome in bad:
            if outcome.verdict is not Verdict.RIGHT:
                print(f"{subject}: {outcome.case}: {outcome.verdict.value}: {outcome.reason}")
    if any(o.verdict is Verdict.WRONG for _, o in bad):
        count = Counter(s for s, o in bad if o.verdict is Verdict.WRONG)
        raise SystemExit(f"wrong: {dict(count)}")


if __name__ == "__main__":
    main()
