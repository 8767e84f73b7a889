"""Calibration data: batches of named arrays from an iterable, a folder of .npz, a callable, or a
source that makes them."""

from __future__ import annotations

import contextlib
import math
import os
import zipfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from optcompiler.bounds import memory_bytes
from optcompiler.calibration_sources import (
    CalibrationSource,
    Given,
    batch_dimension,
    part,
    sample_count,
)
from optcompiler.errors import InputError
from optcompiler.program import Port
from optcompiler.reading import not_finite
from optcompiler.signature import Signature, as_array, is_torch
from optcompiler.untrusted import opened

Batch = Mapping[str, np.ndarray]
"""Inputs by name, each with the batch dimension first."""

MAX_SAMPLES = 512
"""How many samples are read by default: ranges hardly move after some hundreds."""

MOST_UNPACKED_BYTES = 1 << 26
MOST_PACKING = 100
"""How many bytes an .npz may unpack to: this many, and so many times its own."""

HOLDOUT_FROM = 4
"""With fewer batches than this, nothing is held out."""

_BATCH = "_samples"


def load_calibration(
    source: Any,
    signature: Signature,
    *,
    max_samples: int | None = None,
    note: Callable[[str], None] | None = None,
    given: Given | None = None,
) -> list[Batch]:
    """Read at most `max_samples` samples from `source`, checked against the signature's inputs.

    `source` is None (no batches), an iterable of batches, a callable returning one, a folder of
    .npz files, read in the order of their names, or a `CalibrationSource`, which needs `given`. A
    batch is a tensor or array, a tuple of positional arguments, or a dict by argument or input
    name. Where every input begins with the same static batch dimension, batches of other sizes are
    regrouped to it and a remainder is dropped; where that dimension is symbolic, fewer than four
    batches are split to make four. `note` hears of what was dropped.

    `max_samples` is by default `MAX_SAMPLES`, or the count of a source that makes samples. Nothing
    is read after the batch that reaches it, and of a batch no more is kept than is used.

    Raises `InputError` naming the batch and the input: for one that does not fit, and for NaN or
    infinite values (a mask of zeros, ones and infinities may pass).
    """
    if source is None:
        return []
    if max_samples is None:
        made = isinstance(source, CalibrationSource)
        max_samples = source.count if made else MAX_SAMPLES
    elif max_samples < 1:
        raise InputError(f"calibration: {max_samples} samples are asked for; give 1 or more.")
    dimension = batch_dimension(signature.inputs)
    batches: list[Batch] = []
    samples = 0
    for batch in read_batches(source, signature, given):
        size = sample_count(batch) if dimension is not None else 1
        if samples + size > max_samples:
            batch = {n: a.copy() for n, a in part(batch, 0, max_samples - samples).items()}
        batches.append(batch)
        samples += size
        if samples >= max_samples:
            break
    if not batches:
        raise InputError("calibration: the source holds no batches; give at least one.")
    if isinstance(dimension, int):
        return _regrouped(batches, dimension, note)
    if dimension is not None and len(batches) < HOLDOUT_FROM <= samples:
        return _regrouped(batches, math.ceil(samples / HOLDOUT_FROM), None, keep_rest=True)
    return batches


def read_batches(source: Any, signature: Signature, given: Given | None = None) -> Iterator[Batch]:
    """All batches of `source` one by one, of any number of samples, checked as they come."""
    odd = [port for port in signature.inputs if port.kind != "tensor"]
    if odd:
        raise InputError(
            f"calibration: input {odd[0]} is no tensor of known rank, which calibration needs; "
            f"compile with precision 'fp32' and without calibration."
        )
    relaxed = signature
    if batch_dimension(signature.inputs) is not None:
        ports = tuple(replace(p, shape=(_BATCH, *p.shape[1:])) for p in signature.inputs)
        relaxed = replace(signature, inputs=ports)
    for where, item in _items(source, given):
        yield _checked(relaxed, item, where)


def split_holdout(
    batches: Sequence[Batch], fraction: float = 0.25
) -> tuple[list[Batch], list[Batch]]:
    """Batches for calibrating and batches for judging: evenly spread, the same at every call.

    The second list is empty when there are fewer than four batches.
    """
    if not 0 <= fraction < 1:
        raise InputError(f"calibration: holdout fraction {fraction}; give one from 0 to below 1.")
    if len(batches) < HOLDOUT_FROM:
        return list(batches), []
    held = [math.floor((i + 1) * fraction) > math.floor(i * fraction) for i in range(len(batches))]
    pairs = list(zip(batches, held, strict=True))
    return [b for b, h in pairs if not h], [b for b, h in pairs if h]


# -- reading --------------------------------------------------------------------------------


def _items(source: Any, given: Given | None) -> Iterator[tuple[str, Any]]:
    """Batches as they come, each with the words that an error calls it by."""
    if isinstance(source, CalibrationSource):
        if given is None:
            raise InputError(
                f"calibration: {source.name} makes samples for a model; pass it to compile."
            )
        for index, batch in enumerate(source.batches(given)):
            yield f"calibration batch {index} of {source.name}", batch
        return
    if isinstance(source, (str, os.PathLike)):
        yield from _folder(Path(cast("str | os.PathLike[str]", source)))
        return
    if is_torch(source) or isinstance(source, (np.ndarray, Mapping)):
        raise InputError(
            f"calibration is a single {type(source).__name__}; put the batches into a list."
        )
    if callable(source):
        source = source()
    if not isinstance(source, Iterable):
        raise InputError(
            f"calibration is a {type(source).__name__}; "
            f"give an iterable of batches, a folder of .npz files, or a callable."
        )
    for index, item in enumerate(cast(Iterable[Any], source)):
        yield f"calibration batch {index}", item


def screen_folder(folder: Path) -> list[Path]:
    """The .npz files of a folder, in the order of their names, after a look at what each declares.

    Raises `InputError` for a folder without any, for one that is not plain arrays and for a link
    that leads out of the folder.
    """
    if not folder.is_dir():
        raise InputError(f"calibration: {folder} is not a folder; give one with .npz files.")
    files = sorted(folder.glob("*.npz"))
    if not files:
        raise InputError(f"calibration: {folder} holds no .npz files; save batches with np.savez.")
    for index, path in enumerate(files):
        where = _spelled(index, path)
        if not path.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{where} is a link out of {folder}; copy the file into the folder.")
        with (
            _plain_arrays(where),
            opened(path, where) as (handle, _),
            open(handle, "rb", closefd=False) as stream,
        ):
            _refuse_bombs(stream, where)
    return files


def _folder(folder: Path) -> Iterator[tuple[str, Any]]:
    for index, path in enumerate(screen_folder(folder)):
        where = _spelled(index, path)
        with _plain_arrays(where), np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        yield where, arrays


def _spelled(index: int, path: Path) -> str:
    return f"calibration batch {index} ({path.name})"


@contextlib.contextmanager
def _plain_arrays(where: str) -> Generator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{where} is not an .npz of plain arrays ({' '.join(str(error).split())[:200]}); "
            f"save it again with np.savez."
        ) from error


def _refuse_bombs(stream: IO[bytes], where: str) -> None:
    """Refuse an archive that unpacks to more than memory, or that says it holds more than it does:
    numpy makes room for what a header says before it reads."""
    with zipfile.ZipFile(stream) as archive:
        unpacked = sum(e.file_size for e in archive.infolist())
        packed = sum(e.compress_size for e in archive.infolist())
        if unpacked > min(memory_bytes(), MOST_UNPACKED_BYTES + MOST_PACKING * packed):
            raise InputError(
                f"{where} unpacks {packed} bytes to {unpacked}; save it again with np.savez."
            )
        for entry in archive.infolist():
            with archive.open(entry) as member:
                version = np.lib.format.read_magic(member)
                read = np.lib.format.read_array_header_1_0
                if version != (1, 0):
                    read = np.lib.format.read_array_header_2_0
                shape, _, dtype = read(member)
                room = entry.file_size - member.tell()
            if dtype.hasobject:
                raise ValueError(f"{entry.filename} holds Python objects: allow_pickle=False")
            if prod(shape) * dtype.itemsize > room or min(shape, default=0) < 0:
                raise InputError(
                    f"{where}: {entry.filename} says its shape is {list(shape)}, of which "
                    f"{room} bytes hold a part; save it again with np.savez."
                )


def _checked(signature: Signature, item: Any, where: str) -> Batch:
    try:
        batch = _bound(signature, item)
    except InputError as error:
        detail = str(error).replace(f"['{_BATCH}'", "[N").replace(f"[{_BATCH}", "[N")
        raise InputError(f"{where} does not fit: {detail.replace(repr(_BATCH), 'N')}") from error
    for name, array in batch.items():
        bad = not_finite(array) if array.dtype.kind not in "biuOSU" else 0
        if bad:
            raise InputError(
                f"{where}: input {name!r} holds {bad} NaN or infinite values of {array.size}; "
                f"leave that batch out."
            )
    return batch


def _bound(signature: Signature, item: Any) -> Batch:
    if isinstance(item, Mapping):
        named = cast(Mapping[Any, Any], item)
        if named.keys() <= {p.name for p in signature.inputs}:
            return signature.check(_as_arrays(named, signature.inputs))
        first = signature.parameters[0].tree.kind if signature.parameters else ""
        if first in ("dict", "object") and not named.keys() & {
            p.name for p in signature.parameters
        }:
            return signature.bind((item,), {})
        return signature.bind((), named)
    if isinstance(item, (tuple, list)):
        return signature.bind(tuple(cast(Sequence[Any], item)), {})
    return signature.bind((item,), {})


def _as_arrays(named: Mapping[Any, Any], ports: Sequence[Port]) -> dict[str, np.ndarray]:
    return {p.name: as_array(named[p.name], p) for p in ports if p.name in named}


# -- regrouping -----------------------------------------------------------------------------


def _regrouped(
    batches: Sequence[Batch], size: int, note: Callable[[str], None] | None, keep_rest: bool = False
) -> list[Batch]:
    """The same samples in batches of `size`; what is left over is dropped, or kept on request.

    Samples of different shapes stay in batches of their own.
    """
    if all(sample_count(b) == size for b in batches):
        return list(batches)
    alike: dict[tuple[tuple[int, ...], ...], list[Batch]] = {}
    for batch in batches:
        alike.setdefault(tuple(a.shape[1:] for a in batch.values()), []).append(batch)
    made: list[Batch] = []
    dropped = 0
    for group in alike.values():
        whole = {name: np.concatenate([b[name] for b in group]) for name in group[0]}
        rest = 0 if keep_rest else sample_count(whole) % size
        dropped += rest
        end = sample_count(whole) - rest
        made += [part(whole, start, start + size) for start in range(0, end, size)]
    count = sum(map(sample_count, batches))
    if not made:
        raise InputError(
            f"calibration: {count} samples given, the model takes batches of {size}; give more."
        )
    if dropped and note is not None:
        note(f"calibration: dropped {dropped} of {count} samples to make batches of {size}")
    return made
