"""What a compile read, as a rule for Make and Ninja."""

from __future__ import annotations

import os
import re
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

from optcompiler.errors import InputError
from optcompiler.files import unwritable, write_text


class Inputs:
    """The files that a compile reads by the names it was given.

    Made before anything is imported by reference: modules of other top-level packages that are
    loaded afterwards count, where they lie below the working directory or a file that was named.
    """

    def __init__(self) -> None:
        self._files: list[Path] = []
        self._folders = [Path.cwd()]
        self._packages = {name.partition(".")[0] for name in sys.modules}

    def add_reference(self, text: str) -> None:
        """A model file with its external data, a folder of .npz files, or where a function is."""
        path = Path(text)
        place = Path(text.rpartition(":")[0])
        if path.is_dir():
            self._files += sorted(path.glob("*.npz"))
        elif path.suffix == ".onnx":
            from optcompiler.reading import data_files

            self._files += [path, *data_files(path)]
        elif path.is_file():
            self._files.append(path)
        elif place.suffix == ".py":
            self._files.append(place)
            self._folders.append(place.resolve().parent)

    def add_lock(self, path: Path) -> None:
        """A lock, or the artifact that holds it."""
        from optcompiler.lock import NAME

        self._files.append(path / NAME if path.is_dir() else path)

    def files(self) -> list[str]:
        """Paths as they were given, then those of modules; each file once."""
        found: dict[Path, str] = {}
        for path in (*self._files, *self._modules()):
            found.setdefault(path.resolve(), str(path))
        return list(found.values())

    def _modules(self) -> list[Path]:
        paths: set[Path] = set()
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None)
            if isinstance(file, str) and name.partition(".")[0] not in self._packages:
                paths.add(Path(file).resolve())
        installed = [Path(p).resolve() for p in sysconfig.get_paths().values()]
        here = Path.cwd()
        own = [
            p for p in sorted(paths)
            if any(p.is_relative_to(folder) for folder in self._folders)
            and not any(p.is_relative_to(folder) for folder in installed)
        ]  # fmt: skip
        return [p.relative_to(here) if p.is_relative_to(here) else p for p in own]


def write_depfile(path: Path, target: Path, inputs: Sequence[str]) -> None:
    """Write the rule that `target` is made from `inputs`, and that each may be gone.

    Raises `InputError` where it cannot be written, and for a name that Make has no spelling for.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error
    spelled = [*_spelled(inputs)]
    (made,) = _spelled([str(target)])
    lines = [" \\\n ".join([f"{made}:", *spelled])]
    write_text(path, "\n\n".join([*lines, *(f"{name}:" for name in spelled)]) + "\n")


def _spelled(names: Iterable[str]) -> Iterable[str]:
    for name in names:
        if "\n" in name or "\r" in name:
            raise InputError(f"{name!r}: Make has no spelling for a line break; rename the file.")
        name = os.fspath(name).replace("$", "$$")
        yield re.sub(r"(\\*)([ \t#:])", lambda m: m[1] * 2 + "\\" + m[2], name)
