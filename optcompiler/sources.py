"""What the command line names: functions as `package.module:function`, model files, folders."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from optcompiler.archives import screen_archive
from optcompiler.errors import InputError, OptcompilerError
from optcompiler.untrusted import opened

if TYPE_CHECKING:
    from optcompiler.calibration_sources import CalibrationSource

MODEL_SUFFIXES = (".onnx", ".pt2")
SOURCES = {
    "augment": ("optcompiler.augmenting", "Augment"),
    "select": ("optcompiler.selecting", "Select"),
    "synthetic": ("optcompiler.synthesizing", "Synthetic"),
}
"""Sources of calibration samples that the command line knows: module and class."""

PICKLED_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle", ".joblib")


def load_reference(text: str) -> Any:
    """The object that `package.module:function` or `path/file.py:function` names.

    Raises `InputError` for a module or name that is missing, and for a module that raises while
    it is imported, with the line that raised.
    """
    place, separator, name = text.rpartition(":")
    if not separator or not place or not all(part.isidentifier() for part in name.split(".")):
        raise InputError(
            f"{text!r} names no function; write package.module:function or path/file.py:function."
        )
    found: Any = _module_of_file(Path(place)) if place.endswith(".py") else _module(place)
    for part in name.split("."):
        if not hasattr(found, part):
            raise InputError(f"{text!r}: {place} has no {name!r}; check the name.")
        found = getattr(found, part)
    return found


def model_from_reference(text: str) -> tuple[Any, Any]:
    """A model and its example inputs: a .onnx or .pt2 path, or what a function returns.

    The function takes no arguments and returns (module, example_inputs). A file has no example
    inputs: None. Raises `InputError` for a reference that is missing, or a function that raises or
    returns something else.
    """
    path = Path(text)
    if path.suffix == ".pt2":
        screen_archive(path, text)
        return path, None
    if path.suffix in MODEL_SUFFIXES:
        with opened(path, text):
            return path, None
    if path.suffix in PICKLED_SUFFIXES and os.path.exists(text):
        raise InputError(
            f"{text}: pickled files run code when they are loaded and are not read; save the model "
            f"with torch.export.save as .pt2, or give module:function."
        )
    if ":" not in text and os.path.exists(text):
        raise InputError(
            f"{text}: not a model by its name; give a {' or '.join(MODEL_SUFFIXES)} file, or "
            f"module:function."
        )
    made = _called(text)
    if not isinstance(made, tuple) or len(cast(tuple[Any, ...], made)) != 2:
        raise InputError(
            f"{text!r} returned a {type(made).__name__}; return (model, example_inputs)."
        )
    return cast(tuple[Any, Any], made)


def metric_from_reference(text: str) -> Callable[..., Any]:
    """The metric that a reference names: called by the compiler, so it must be callable."""
    metric = load_reference(text)
    if not callable(metric):
        raise InputError(f"{text!r} is a {type(metric).__name__}; name a function as the metric.")
    return metric


def calibration_from_reference(text: str) -> Any:
    """Calibration data: the path of a folder, the iterable that a function returns, or a source
    that makes samples, as "synthetic:count=64" or "select:count=64,source=REF".

    Raises `InputError` for what is none of these.
    """
    name, _, options = text.partition(":")
    if name in SOURCES and (not options or "=" in options.partition(",")[0]):
        return _source(name, options)
    if Path(text).is_dir():
        from optcompiler.calibration import screen_folder

        screen_folder(Path(text))
        return Path(text)
    if ":" not in text:
        raise InputError(f"{text}: no such folder; give one with .npz files, or a function.")
    made = _called(text)
    if made is None or not hasattr(made, "__iter__") or isinstance(made, (str, bytes, Mapping)):
        raise InputError(f"{text!r} returned a {type(made).__name__}; return batches to iterate.")
    return made


def _source(name: str, text: str) -> CalibrationSource:
    module, class_name = SOURCES[name]
    cls: type[CalibrationSource] = getattr(importlib.import_module(module), class_name)
    if name == "synthetic":
        return cls.from_text(text)
    options, separator, inner = f",{text}".partition(",source=")
    if not separator:
        raise InputError(
            f"calibration {name}: it needs samples to work on; end it with source=REF, where REF "
            f"is a folder or a function."
        )
    return cls.from_text(options, source=calibration_from_reference(inner))


def referred(text: str) -> str:
    """What a reference to calibration data reads: that of the innermost source."""
    while text.partition(":")[0] in SOURCES and "source=" in text:
        text = text.partition("source=")[2]
    return text


def _called(text: str) -> Any:
    function = load_reference(text)
    if not callable(function):
        raise InputError(f"{text!r} is a {type(function).__name__}; name a function.")
    try:
        return function()
    except OptcompilerError:
        raise
    except Exception as error:
        raise InputError(f"{text!r} raised {_account(error)}; fix the function.") from error


def _module(name: str) -> ModuleType:
    _search(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise InputError(
                f"there is no module {name!r}; check the name, install it, or give a .py file."
            ) from error
        raise InputError(f"importing {name!r} raised {_account(error)}; install it.") from error
    except Exception as error:
        raise InputError(f"importing {name!r} raised {_account(error)}; fix the module.") from error


def _module_of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path.")
    resolved = path.resolve()
    name = f"_optcompiler_{hashlib.sha256(str(resolved).encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, resolved)
    if spec is None or spec.loader is None:
        raise InputError(f"{path}: not a Python file; give one that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    _search(resolved.parent)
    # dataclasses and torch look a class's module up by name
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise InputError(f"{path} raised {_account(error)}; fix the file.") from error
    return module


def _search(folder: Path) -> None:
    """Let modules beside the user's code be found, also by imports inside its functions."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _account(error: Exception) -> str:
    """Type, message, and the file and line of the user's code that raised."""
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg} at {error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    frames = [f for f in frames if f.filename != __file__ and "importlib" not in f.filename]
    message = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(": ")
    if not frames:
        return message
    last = frames[-1]
    return f"{message} at {last.filename}:{last.lineno} in {last.name} ({last.line})"
