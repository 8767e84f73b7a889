"""The process that is interrupted: a warm parent that forks for every point.

Started by `running.run` with the shim preloaded; run by hand, it starts itself so.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from tests.faults.running import FULL, KILL, run, write_state

NO_CACHE = "nothing is kept for the next compile"
NAMES = {KILL: "kill", FULL: "full"}


def main(names: list[str], folder: Path, most: int) -> None:
    """Print a line of JSON for each scenario: points tried, what was there after each, faults."""
    from tests.faults.scenarios import SCENARIOS

    os.environ["OPTCOMPILER_CACHE"] = str(folder / "cache")
    for name in names or list(SCENARIOS):
        result = _Trial(SCENARIOS[name], folder).all(most)
        print(json.dumps({"scenario": name, **result}), flush=True)


class _Trial:
    def __init__(self, scenario: Any, folder: Path) -> None:
        self.scenario = scenario
        self.folder = folder / "under"
        self.pristine = folder / "pristine"
        self.messages = folder / "messages"
        self.calls = 0
        with open(os.environ["FAULTS"], "r+b") as stream:
            self.state = mmap.mmap(stream.fileno(), 0)
        shutil.rmtree(self.pristine, ignore_errors=True)
        for part in ("tmp", "cache", "there"):
            (self.pristine / part).mkdir(parents=True, mode=0o700)
        scenario.prepare(self.pristine)
        scenario.warm(self.pristine)

    def all(self, most: int) -> dict[str, Any]:
        self.reset()
        code, message = self.act(1 << 40, KILL)
        points = self.calls
        faults = [] if code == 0 and self.scenario.look(self.folder) == "new" else [message]
        before, clean = self.entries(self.pristine), self.entries(self.folder)
        step = max(1, -(-points // most))
        outcomes: dict[str, dict[str, int]] = {}
        for kind in self.scenario.kinds:
            seen = outcomes.setdefault(NAMES[kind], {})
            for at in range(points, 0, -step):
                self.reset()
                code, message = self.act(at, kind)
                found, wrong = self.judge(kind, code, message, before, clean)
                seen[found] = seen.get(found, 0) + 1
                faults += [f"{NAMES[kind]} at {at}: {w}" for w in wrong]
        return {"points": points, "step": step, "outcomes": outcomes, "faults": faults}

    def reset(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.pristine, self.folder)
        (self.folder / "there").chmod(0o700)

    def entries(self, folder: Path) -> set[str]:
        return {str(p.relative_to(folder)) for p in folder.rglob("*")}

    def judge(
        self, kind: int, code: int, message: str, before: set[str], clean: set[str]
    ) -> tuple[str, list[str]]:
        wrong: list[str] = []
        try:
            found = self.scenario.look(self.folder)
        except Exception:
            return "broken", [traceback.format_exc(limit=-2)]
        if kind == KILL:
            if code != 137:
                wrong.append(f"exit code {code}: {message}")
            code, message = self.act(0, KILL)
            if code or self.scenario.look(self.folder) != "new":
                wrong.append(f"done again: exit code {code}: {message}")
            if left := self.entries(self.folder) - clean:
                wrong.append(f"done again, it leaves {sorted(left)}")
            return found, wrong
        told = code == 2 and "No space left on device" in message
        done = code == 0 and found == "new"  # what was left to do needed no room
        if self.scenario.told and not told and not done:
            wrong.append(f"exit code {code}: {message}")
        if len([line for line in message.splitlines() if NO_CACHE not in line]) > 1:
            wrong.append(f"more than a line: {message}")
        if left := self.entries(self.folder) - before - clean:
            wrong.append(f"it leaves {sorted(left)}")
        return found, wrong

    def act(self, at: int, kind: int) -> tuple[int, str]:
        """Exit code and message of a fork that acts, hit at a point; 0: never."""
        child = os.fork()
        if child:
            _, status = os.waitpid(child, 0)
            self.calls = write_state(self.state, "", 0, 0)
            return os.waitstatus_to_exitcode(status), self.messages.read_text()
        code = 99
        try:
            handle = os.open(self.messages, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(handle, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            tempfile.tempdir = str(self.folder / "tmp")
            os.environ["OPTCOMPILER_CACHE"] = str(self.folder / "cache")
            code = self._act(at, kind)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _act(self, at: int, kind: int) -> int:
        from optcompiler import scratch
        from optcompiler.errors import OptcompilerError

        write_state(self.state, str(self.folder), at, kind)
        try:
            self.scenario.act(self.folder)
            code = 0
        except OptcompilerError as error:
            print(error, file=sys.stderr)
            code = error.exit_code
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
            code = 98
        scratch.remove_all()
        return code


if __name__ == "__main__":
    if "FAULTS" in os.environ:
        main(sys.argv[3:], Path(sys.argv[1]), int(sys.argv[2]))
    else:
        with tempfile.TemporaryDirectory() as place:
            for line in run(sys.argv[1:], Path(place)):
                print(json.dumps(line, indent=1))
