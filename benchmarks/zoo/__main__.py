"""python -m benchmarks.zoo: train what is not in the cache, and print what there is."""

from __future__ import annotations

import argparse

from benchmarks.zoo import SUBJECTS, store, subject


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the models of the quality benchmark.")
    parser.add_argument("--only", default=",".join(SUBJECTS), help="default: %(default)s")
    options = parser.parse_args()
    print(f"kept in {store.folder()}")
    for name in filter(None, options.only.split(",")):
        found = subject(name)
        score = found.metric(found.module) if found.reference is None else found.reference
        weights = sum(p.numel() for p in found.module.parameters())
        print(f"{found.title}: {weights} weights, {score:.3f} {found.unit}", flush=True)


if __name__ == "__main__":
    main()
