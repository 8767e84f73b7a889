"""What is interrupted: each writes something new over something old, and says which is there."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from optcompiler import device, reproducer
from optcompiler import program as programs
from optcompiler.artifact import open_artifact
from optcompiler.cache import Cache
from optcompiler.cli import main
from optcompiler.compiled import load
from optcompiler.cost import DeviceProfile
from optcompiler.program import Program
from optcompiler_cpu.toolchain import build
from tests.faults.running import FULL, KILL
from tests.support import MLP, make_artifact
from tests.toy import Harden, ToyBackend, registry, sigmoid_net

FACTS = {"facts": 1}
CONTENT = {"old": b"old" * 1000, "new": b"new" * 1000}


@dataclass(frozen=True)
class Scenario:
    """`prepare` fills an empty folder; `act` writes below it; `look` tells "old", "new" or "none",
    and raises for anything else. Where `told`, what `act` cannot write is an error. `warm` imports
    what `act` needs, once for all forks."""

    prepare: Callable[[Path], Any]
    act: Callable[[Path], Any]
    look: Callable[[Path], str]
    told: bool = True
    kinds: tuple[int, ...] = (KILL, FULL)
    warm: Callable[[Path], Any] = lambda _: None


def net(version: str) -> Program:
    return Program.from_text(MLP if version == "old" else MLP.replace("12}", "13}"))


def version_of(found: str) -> str:
    (version,) = (v for v in ("old", "new") if net(v).content_hash() == found)
    return version


# -- save -------------------------------------------------------------------------------------


def two_artifacts(folder: Path) -> None:
    make_artifact(folder / "there" / "net", net("old"))
    make_artifact(folder / "made", net("new"))


def save(folder: Path, name: str = "net") -> None:
    with load(folder / "made", registry=registry()) as compiled:
        compiled.save(folder / "there" / name)


def artifact(folder: Path, name: str = "net") -> str:
    """Whole, or `open_artifact` raises."""
    if not os.path.lexists(folder / "there" / name):
        return "none"
    return version_of(open_artifact(folder / "there" / name).manifest["program_hash"])


# -- files ------------------------------------------------------------------------------------


def old_report(folder: Path) -> None:
    two_artifacts(folder)
    (folder / "there" / "net.html").write_text("old")


def report(folder: Path) -> None:
    with load(folder / "made", registry=registry()) as compiled:
        compiled.report(folder / "there" / "net.html")


def page(folder: Path) -> str:
    text = (folder / "there" / "net.html").read_text()
    assert text == "old" or text.endswith("</body></html>\n")
    return "old" if text == "old" else "new"


def save_program(folder: Path, version: str = "new") -> None:
    (folder / "there").mkdir(exist_ok=True)
    net(version).save(folder / "there" / "net.onnx")


def program(folder: Path) -> str:
    return version_of(Program.from_onnx(folder / "there" / "net.onnx").content_hash())


def external(act: Callable[[Path], Any]) -> Callable[[Path], None]:
    """With every weight in a file of its own."""

    def call(folder: Path) -> None:
        before, programs.EXTERNAL_ABOVE_BYTES = programs.EXTERNAL_ABOVE_BYTES, 0
        try:
            act(folder)
        finally:
            programs.EXTERNAL_ABOVE_BYTES = before

    return call


# -- cache and reproducers --------------------------------------------------------------------


def put(folder: Path, version: str = "new") -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Cache(folder / "there").put("kind", FACTS, CONTENT[version])


def kept(folder: Path) -> str:
    found = Cache(folder / "there").get("kind", FACTS)
    (version,) = (v for v in (*CONTENT, "none") if found == CONTENT.get(v))
    return version


def reproduce(folder: Path, version: str = "new") -> None:
    record = {"format": reproducer.FORMAT, "version": version}
    inputs = {"x": np.zeros(100, np.float32)}
    reproducer.store(
        folder / "there" / "case", record, version, {"program.onnx": net(version)}, inputs
    )


def reproduced(folder: Path) -> str:
    place = folder / "there" / "case"
    version = (place / "README.txt").read_text()
    assert f'"version": "{version}"' in (place / reproducer.RECORD).read_text()
    assert Program.from_onnx(place / "program.onnx").content_hash() == net(version).content_hash()
    with np.load(place / "inputs.npz") as stored:
        assert stored["x"].shape == (100,)
    return version


# -- the C compiler, which writes by itself ---------------------------------------------------


def source(folder: Path) -> None:
    (folder / "there" / "net.c").write_text("int answer(void) { return 42; }\n")


def build_library(folder: Path) -> None:
    build(folder / "there", {"net.c": ()}, "net.so")


def library(folder: Path) -> str:
    return "new" if (folder / "there" / "net.so").exists() else "none"


# -- the whole way ----------------------------------------------------------------------------

PROFILE = DeviceProfile(
    name="toy", backend="toy", threads=1, mac_rate={"gemm/fp32": ((1.0, 1e9),)},
    flop_rate={"pointwise/fp32": ((1.0, 1e9),)}, bandwidth=((1.0, 1e12),),
    launch_us=0.0, overhead_us=0.0,
)  # fmt: skip


def old_and_model(folder: Path) -> None:
    make_artifact(folder / "there" / "net", net("old"))
    sigmoid_net([1.0, 0.5]).save(folder / "net.onnx")


def compile_(folder: Path, name: str = "net") -> None:
    """By the command line, in this process; the profile is measured anew, and kept."""
    device.measure = lambda *_: PROFILE
    plugins = registry(ToyBackend(), Harden)
    main.main(
        ["compile", str(folder / "net.onnx"), "-o", str(folder / "there" / name), "--target",
         "toy", "--precision", "fp32"],
        obj=lambda: plugins,
    )  # fmt: skip


def warm(folder: Path) -> None:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        compile_(folder, "warm")
    shutil.rmtree(folder / "there" / "warm")


def compiled(folder: Path) -> str:
    found = open_artifact(folder / "there" / "net").manifest
    return "old" if found["teacher_hash"] == net("old").content_hash() else "new"


SCENARIOS = {
    "save": Scenario(two_artifacts, save, artifact),
    "save-first": Scenario(
        two_artifacts, lambda f: save(f, "a/first"), lambda f: artifact(f, "a/first")
    ),
    "report": Scenario(old_report, report, page),
    "program": Scenario(lambda f: save_program(f, "old"), save_program, program),
    "external": Scenario(
        external(lambda f: save_program(f, "old")), external(save_program), program
    ),
    "cache": Scenario(lambda f: put(f, "old"), put, kept, told=False),
    "reproducer": Scenario(lambda f: reproduce(f, "old"), reproduce, reproduced),
    "c-compiler": Scenario(source, build_library, library, kinds=(FULL,)),
    "compile": Scenario(old_and_model, compile_, compiled, warm=warm),
}


def listing(folder: Path) -> dict[str, str]:
    """What lies below a folder, to tell whether anything was left."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        if p.is_file()
        else ""
        for p in folder.rglob("*")
    }
