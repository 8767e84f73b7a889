"""python -m tests.mutants: how many small faults put into the core do its tests notice?

mutmut makes the mutants; they are tried here and not by its own runner, because a session of
pytest that imports torch takes a second to begin. One is begun and collected, and every mutant is a
fork of it that runs the tests that reach the mutated function, quickest first, to the first
failure. Results are kept in mutmut's files under `mutants/`, which `mutmut results` reads.
"""

from __future__ import annotations

import argparse
import difflib
import fnmatch
import gc
import itertools
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mutmut.__main__ as mutmut_main
import pytest
from _pytest.runner import runtestprotocol
from mutmut.configuration import config
from mutmut.mutation.data import MutantLineSpans, SourceFileMutationData
from mutmut.mutation.trampoline import set_mutant_under_test
from mutmut.state import state
from mutmut.utils.file_utils import copy_src_dir
from mutmut.utils.format_utils import mangled_name_from_mutant_name

ROOT = Path("mutants")
ENOUGH = 0.8
SECONDS = 1.0
KILLED, SURVIVED, UNTESTED, TIMEOUT = 1, 0, 33, -signal.SIGXCPU


@dataclass(frozen=True)
class Target:
    """A part of the core, and arguments of pytest: the tests that are to notice its mutants."""

    files: tuple[str, ...]
    tests: tuple[str, ...]


TARGETS = {
    "graph": Target(
        (
            "optcompiler/channels.py",
            "optcompiler/ops/axes.py",
            "optcompiler/ops/channels.py",
            "optcompiler/ops/channels_layout.py",
        ),
        (
            "tests/ops/test_channel_rules.py",
            "tests/ops/test_channels.py",
            "tests/test_channel_editing.py",
            "tests/test_channel_graph.py",
            "--deselect=tests/test_channel_graph.py::test_random_networks",
        ),
    ),
    "verifier": Target(
        ("optcompiler/contract.py", "optcompiler/program.py"),
        ("tests/test_contract.py", "tests/test_program.py"),
    ),
    "planner": Target(
        ("optcompiler/exact.py", "optcompiler/planner.py", "optcompiler/session.py"),
        ("tests/test_exact.py", "tests/test_planner.py", "tests/test_session.py"),
    ),
}


class Trial:
    """The plugin of the one pytest session, which tries the mutants in place of running tests."""

    def __init__(self, target: Target, options: argparse.Namespace) -> None:
        self.files = [SourceFileMutationData(path=path) for path in target.files]
        self.wanted: Sequence[str] = options.only
        self.survivors: bool = options.survivors
        self.every: int = options.every
        self.jobs: int = options.jobs
        self.seconds: float = options.seconds
        self.in_child = False

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> None:
        failed = call.excinfo
        if failed and not failed.errisinstance((pytest.skip.Exception, pytest.xfail.Exception)):
            if self.in_child:
                os._exit(KILLED)
            pytest.exit(f"{item.nodeid} fails without a mutant: {failed.value!r}", 1)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            raise session.Interrupted("the tests cannot be collected")
        reached, seconds = self._reached(session.items)
        gc.freeze()
        running: dict[int, tuple[SourceFileMutationData, str, float]] = {}
        begun = time.monotonic()
        done = 0
        for data, name in list(self._chosen()):
            tests = reached.get(mangled_name_from_mutant_name(name), [])
            if not tests:
                data.exit_code_by_key[name] = UNTESTED
                continue
            while len(running) >= self.jobs:
                done += self._reap(running)
            tests = self._within(tests, seconds)
            limit = math.ceil(5 * sum(seconds[t.nodeid] for t in tests) + 3)
            pid = self._fork(name, tests, limit)
            running[pid] = (data, name, time.monotonic() + 20 * limit)
            if done % 100 == 0:
                for file in self.files:
                    file.save()
                rate = done / (time.monotonic() - begun)
                print(f"{done} tried, {rate:.1f}/s", end="\r", file=sys.stderr, flush=True)
        while running:
            self._reap(running)
        for data in self.files:
            data.save()
        return True

    def _chosen(self) -> Iterator[tuple[SourceFileMutationData, str]]:
        for data in self.files:
            data.load()
            for name, known in list(data.exit_code_by_key.items())[:: self.every]:
                if self.survivors and known in (KILLED, TIMEOUT):
                    continue
                if all(fnmatch.fnmatch(name, f"*{w}*") for w in self.wanted):
                    yield data, name

    def _reached(
        self, items: Sequence[pytest.Item]
    ) -> tuple[dict[str, list[pytest.Item]], dict[str, float]]:
        """The tests that reach each function, quickest first, and the CPU seconds of each test.

        They run in this process, so that a fork of it finds imported and cached what they need.
        """
        set_mutant_under_test("stats")
        reached: dict[str, list[pytest.Item]] = {}
        seconds: dict[str, float] = {}
        functions: dict[str, set[str]] = {}
        for item in items:
            state()._stats.clear()
            begun = time.process_time()
            runtestprotocol(item, log=False, nextitem=None)
            seconds[item.nodeid] = time.process_time() - begun
            functions[item.nodeid] = set(state()._stats)
        for item in sorted(items, key=lambda i: seconds[i.nodeid]):
            for function in functions[item.nodeid]:
                reached.setdefault(function, []).append(item)
        return reached, seconds

    def _within(
        self, tests: Sequence[pytest.Item], seconds: Mapping[str, float]
    ) -> list[pytest.Item]:
        """As many of the tests as the time for one mutant allows."""
        spent = list(itertools.accumulate(seconds[t.nodeid] for t in tests))
        return [t for t, s in zip(tests, spent, strict=True) if s <= self.seconds] or [tests[0]]

    def _fork(self, name: str, tests: Sequence[pytest.Item], seconds: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        self.in_child = True
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        set_mutant_under_test(name)
        try:
            for item in tests:
                runtestprotocol(item, log=False, nextitem=None)
        finally:
            os._exit(KILLED if sys.exc_info()[0] else SURVIVED)

    def _reap(self, running: dict[int, tuple[SourceFileMutationData, str, float]]) -> int:
        """Wait for children, ending those that are overdue; how many are done."""
        reaped = 0
        while not reaped:
            for pid, (data, name, deadline) in list(running.items()):
                if time.monotonic() > deadline:
                    os.kill(pid, signal.SIGXCPU)
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    code = os.waitstatus_to_exitcode(status)
                    data.exit_code_by_key[name] = TIMEOUT if code == -signal.SIGKILL else code
                    del running[pid]
                    reaped += 1
            if not reaped:
                time.sleep(0.002)
        return reaped


def generate() -> None:
    """Write the core with its mutants to `mutants/optcompiler`, first in line to be imported."""
    config().only_mutate = [file for target in TARGETS.values() for file in target.files]
    ROOT.mkdir(exist_ok=True)
    with mutmut_main.CatchOutput():
        copy_src_dir()
        mutmut_main.create_mutants(1)
    sys.path.insert(0, str(ROOT.absolute()))


def score(name: str) -> float:
    """Print what became of the mutants of one target; the share of those tried that was noticed."""
    target = TARGETS[name]
    codes: list[int | None] = []
    for path in target.files:
        data = SourceFileMutationData(path=path)
        data.load()
        codes += data.exit_code_by_key.values()
    timeouts = codes.count(TIMEOUT)
    untried = codes.count(None)
    survived = codes.count(SURVIVED) + codes.count(UNTESTED)
    killed = len(codes) - timeouts - untried - survived
    share = (killed + timeouts) / max(1, len(codes) - untried)
    print(
        f"{name}: {len(codes)} mutants, {killed} killed, {timeouts} timeouts, {survived} survived"
        + (f", {untried} not tried" if untried else "")
        + f": {share:.1%}"
    )
    return share


def survivors(name: str) -> Iterator[str]:
    """What each mutant that no test noticed changes, line by line."""
    for path in TARGETS[name].files:
        data = SourceFileMutationData(path=path)
        data.load()
        spans = MutantLineSpans.load(path)
        assert spans is not None
        for mutant, code in data.exit_code_by_key.items():
            if code not in (SURVIVED, UNTESTED):
                continue
            function = mutant.rpartition(".")[2]
            original = f"{mangled_name_from_mutant_name(function)}__mutmut_orig"
            old, new = spans.read_function_sources([original, function])
            diff = list(difflib.ndiff(old.splitlines(), new.splitlines()))
            yield "\n".join([mutant, *(line for line in diff[2:] if line[0] in "-+")])


def main() -> int:
    """Prints the score by target; 1 when one is under 80%."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--only", action="append", default=[], metavar="TEXT",
                        help="only mutants with this in their names")  # fmt: skip
    parser.add_argument("--survivors", action="store_true",
                        help="only those that no test has noticed yet")  # fmt: skip
    parser.add_argument("--every", type=int, default=1, metavar="N",
                        help="a sample: only each N-th mutant of a file")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=SECONDS,
                        help=f"of tests that one mutant gets; default: {SECONDS}")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="print the survivors of the last run")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    names = options.targets or list(TARGETS)
    if unknown := set(names) - set(TARGETS):
        parser.error(f"no target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    if options.list:
        for name in names:
            print(*survivors(name), sep="\n\n")
        return 0
    generate()
    for name in names:
        trial = Trial(TARGETS[name], options)
        code = _in_child(trial, TARGETS[name].tests)
        if code:
            return code
    return 0 if all([score(name) >= ENOUGH for name in names]) else 1


def _in_child(trial: Trial, tests: Sequence[str]) -> int:
    """Run the session in a process of its own: a target's imports are not another's."""
    pid = os.fork()
    if pid == 0:
        arguments = ["-s", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:terminal"]
        os._exit(int(pytest.main([*arguments, *tests], plugins=[trial])))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    sys.exit(main())
