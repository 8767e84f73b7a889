"""What a compile gives back: an artifact that can be called, looked into and saved."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import weakref
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from optcompiler import scratch
from optcompiler.artifact import CODE, Artifact, is_artifact, open_artifact
from optcompiler.errors import InputError, PluginError
from optcompiler.files import inside, replacing_directory, write_text
from optcompiler.signature import is_torch

if TYPE_CHECKING:
    from types import TracebackType

    import numpy as np

    from optcompiler.backend import Backend, Runner
    from optcompiler.explaining import Sensitivity
    from optcompiler.ledger import Ledger
    from optcompiler.plugins import Registry
    from optcompiler.program import Port, Program
    from optcompiler.target import Target

_MISREAD = (KeyError, TypeError, ValueError, AttributeError, OSError)
"""What a backend raises that believes a manifest which another program wrote."""


class Compiled:
    """An artifact on disk and, from the first call on, its loaded code.

    Calls from several threads take turns; load the artifact once per thread to run them side by
    side. With `owned`, the directory is removed when the object is closed or collected. `artifact`
    is what `open_artifact` made of the directory, where that was done already. Raises `InputError`
    when the directory is not an artifact, is incomplete or was altered.
    """

    def __init__(
        self,
        directory: Path,
        backend: Backend,
        *,
        owned: bool,
        program: Program | None = None,
        threads: int | None = None,
        artifact: Artifact | None = None,
    ) -> None:
        self._artifact = artifact or open_artifact(directory)
        self._stamps = _stamps(self._artifact)
        self._backend = backend
        self._program = program
        self._threads = threads or self._artifact.target.threads
        self._runner: Runner | None = None
        self._closed = False
        self._lock = threading.RLock()
        self._finalizer = weakref.finalize(self, scratch.remove, Path(directory)) if owned else None

    # -- running ----------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model as it was called before: same arguments, same structure of outputs.

        Torch tensors in, torch tensors out; numpy arrays in, numpy arrays out. NaN and infinity in
        the outputs are returned as they are. Raises `InputError` for arguments that do not fit.
        """
        signature = self._artifact.signature
        outputs = self._run(signature.bind(args, kwargs))
        return signature.restore(outputs, like_torch=_holds_torch((args, kwargs)))

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Outputs in graph order for arrays by input name.

        Raises `InputError` when a name, type or shape is not that of `inputs`.
        """
        return self._run(self._artifact.signature.check(inputs))

    def _run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        with self._lock:
            return self._load().run(inputs)

    def profile(self, inputs: Mapping[str, np.ndarray]) -> dict[str, float] | None:
        """Microseconds by kernel name in one profiled run; None where the backend cannot tell."""
        checked = self._artifact.signature.check(inputs)
        with self._lock:
            return self._load().kernel_times_us(checked)

    def _load(self) -> Runner:
        if self._closed:
            raise InputError(f"the artifact {self.directory} was closed; load it again.")
        if self._runner is None:
            artifact = self._artifact
            self._check_unchanged()
            try:
                self._runner = self._backend.load(
                    artifact.code, artifact.backend_info, threads=self._threads
                )
            except PluginError as error:
                if self._program is not None or not isinstance(error.__cause__, _MISREAD):
                    raise
                raise InputError(
                    f"{self.directory}: {artifact.target.backend} cannot load what the manifest "
                    f"says ({error.__cause__!r}); compile or copy the artifact again."
                ) from error
        return self._runner

    def _check_unchanged(self) -> None:
        """Hash the files again if one was written or replaced after they were hashed."""
        if self._stamps == _stamps(self._artifact):
            return
        if open_artifact(self.directory).manifest != self.manifest:
            raise InputError(f"{self.directory} was replaced after it was opened; load it again.")

    # -- looking ----------------------------------------------------------------------------

    @property
    def directory(self) -> Path:
        return self._artifact.directory

    @property
    def manifest(self) -> dict[str, Any]:
        return self._artifact.manifest

    @property
    def ledger(self) -> Ledger:
        """A row for every candidate of every pass, with its outcome and the reason."""
        return self._artifact.ledger

    @property
    def measurements(self) -> dict[str, Any]:
        """What was predicted and measured; the keys are those of `artifact.Contents`."""
        return self._artifact.measurements

    @property
    def target(self) -> Target:
        return self._artifact.target

    @property
    def threads(self) -> int:
        """How many CPU threads the code runs with."""
        return self._threads

    @property
    def inputs(self) -> tuple[Port, ...]:
        return self._artifact.inputs

    @property
    def outputs(self) -> tuple[Port, ...]:
        return self._artifact.outputs

    @property
    def bounds(self) -> dict[str, tuple[int, int]]:
        """The least and the greatest size of symbolic dimensions that have such, by name."""
        return {name: (least, most) for name, least, most in self._artifact.signature.bounds}

    @property
    def program(self) -> Program | None:
        """The final program, in the process that compiled it; None for a loaded artifact."""
        return self._program

    def summary(self) -> str:
        """The summary as a table of text, 100 columns wide."""
        from optcompiler.summary import render

        return render(self.manifest, self.ledger, self.measurements)

    def sensitivity(self) -> list[Sensitivity]:
        """What each lossy choice damages alone, by site; the site that hurts most first."""
        from optcompiler.explaining import sensitivities

        return sensitivities(self.ledger)

    def report(self, path: str | Path) -> Path:
        """Write a self-contained HTML page: the summary, every ledger row and every kernel."""
        from optcompiler.report import page

        path = Path(path)
        write_text(path, page(self._artifact))
        return path

    # -- keeping ----------------------------------------------------------------------------

    def save(self, directory: str | Path) -> Path:
        """Copy the artifact to `directory`, whole or not at all; returns the path.

        An artifact that is there already is replaced in one step. Raises `InputError` when
        `directory` is anything else than absent, empty or an artifact.
        """
        destination = Path(directory)
        if destination.exists() and destination.samefile(self.directory):
            return destination
        with replacing_directory(destination, refuse_other_than_artifact) as fresh:
            self._copy_to(fresh)
        return destination

    def _copy_to(self, fresh: Path) -> None:
        (fresh / CODE).mkdir()
        for name in self._artifact.files:
            copy = fresh / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(inside(self.directory, name), copy)
            if os.access(self.directory / name, os.X_OK):
                copy.chmod(copy.stat().st_mode | (copy.stat().st_mode & 0o444) >> 2)

    def close(self) -> None:
        """Release the loaded code and remove the directory when owned. May be called twice."""
        with self._lock:
            self._closed = True
            if self._runner is not None:
                self._runner.close()
                self._runner = None
            if self._finalizer is not None:
                self._finalizer()

    def __enter__(self) -> Compiled:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        ins, outs = (", ".join(map(str, ports)) for ports in (self.inputs, self.outputs))
        return f"Compiled({str(self.target)!r}, ({ins}) -> ({outs}), {str(self.directory)!r})"


def load(
    directory: str | Path, *, threads: int | None = None, registry: Registry | None = None
) -> Compiled:
    """Open an artifact that `Compiled.save` or `optcompiler compile` wrote.

    Every file is hashed first; nothing pickled is read. `threads` replaces the number the artifact
    was compiled for. Raises `InputError` for a directory that is not a whole artifact, or when no
    plugin offers its backend.
    """
    from optcompiler.plugins import Registry

    if threads is not None and threads < 1:
        raise InputError(f"load: threads={threads}; give 1 or more.")
    artifact = open_artifact(directory)
    backend = (registry or Registry()).backend(artifact.target.backend)
    return Compiled(artifact.directory, backend, owned=False, threads=threads, artifact=artifact)


def refuse_other_than_artifact(directory: Path) -> None:
    """Raises `InputError` when `directory` holds something that is not ours to replace."""
    if not directory.is_dir():
        raise InputError(f"{directory} is a file, not a directory; choose another place.")
    if any(directory.iterdir()) and not is_artifact(directory):
        raise InputError(
            f"{directory} holds something that is not an optcompiler artifact; remove it or choose "
            f"another place."
        )


def _stamps(artifact: Artifact) -> dict[str, tuple[int, ...]]:
    """What a file system knows of each file's content without reading it."""
    found: dict[str, tuple[int, ...]] = {}
    for name in artifact.manifest["files"]:
        with contextlib.suppress(OSError):
            s = (artifact.directory / name).stat()
            found[name] = (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)
    return found


def _holds_torch(value: Any) -> bool:
    """Whether a torch tensor is in `value`, at any depth of containers and plain objects."""
    if is_torch(value):
        return True
    if isinstance(value, Mapping):
        return any(map(_holds_torch, cast("Mapping[Any, Any]", value).values()))
    if isinstance(value, (tuple, list)):
        return any(map(_holds_torch, cast("list[Any]", value)))
    if is_dataclass(value) and not isinstance(value, type):
        return any(_holds_torch(getattr(value, f.name)) for f in fields(value))
    return False
