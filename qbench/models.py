"""Float models by name: torchvision's, or what a function in a file of the user's returns."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from qbench._torchvision import classification_model
from qbench.errors import ConfigError
from qbench.modes import evaluating


def build_model(spec: str, num_classes: int) -> nn.Module:
    """Build a float model.

    Args:
        spec: A torchvision classification name, `"resnet18"`, or `"path/to/file.py:function"`. The function is called
            with `num_classes=` if it has a parameter of that name, else without arguments, and returns a module.
        num_classes: How many classes the model tells apart.

    Raises:
        ConfigError: an unknown name (near names are listed), a missing file or function, a function that fails or
            returns something else.
        MissingDependencyError: torchvision is needed and not installed.
    """
    file, separator, name = spec.rpartition(":")
    if separator and file.endswith(".py"):
        return _call(_find_function(Path(file), name), spec, num_classes)
    if spec.endswith(".py") or separator:
        raise ConfigError(f"model {spec!r}: expected file.py:function, the function's name after a colon")
    return classification_model(spec, num_classes)


def check_outputs(model: nn.Module, spec: str, example: Tensor, num_classes: int) -> None:
    """Run a model once in eval mode and look at what it returns.

    Args:
        model: Its modules keep their modes.
        spec: Names the model in the message.
        example: A batch, (batch, 3, height, width).
        num_classes: Expected width of the output.

    Raises:
        ConfigError: it cannot run on such a batch, or does not return a (batch, num_classes) tensor.
    """
    try:
        with evaluating(model):
            outputs = model(example)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"model {spec!r} cannot run on images of shape {tuple(example.shape)}: {_first_line(error)}; "
            "another --image-size may suit it"
        ) from error
    expected = (len(example), num_classes)
    if not isinstance(outputs, Tensor) or tuple(outputs.shape) != expected:
        got = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ConfigError(f"model {spec!r} returned {got}; expected a tensor of shape {expected}, (batch, classes)")


def _find_function(file: Path, name: str) -> Callable[..., Any]:
    module = _import_file(file)
    functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    function = getattr(module, name, None)
    if callable(function):
        return function
    near = get_close_matches(name, functions, n=4, cutoff=0.4) or functions[:4]
    hint = f"; near names: {', '.join(near)}" if near else ""
    raise ConfigError(f"{file} has no function {name!r}{hint}")


def _import_file(file: Path) -> ModuleType:
    """Import a file under a name of its own, its folder first on the path so that it finds its neighbours."""
    if not file.is_file():
        raise ConfigError(f"model file {file} does not exist; expected file.py:function")
    spec = importlib.util.spec_from_file_location(f"qbench_user_{file.stem}", file.resolve())
    if spec is None or spec.loader is None:
        raise ConfigError(f"{file} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # so that what it defines can be pickled
    sys.path.insert(0, str(file.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        raise ConfigError(f"{file} cannot be imported: {_where(error, file)}") from error
    finally:
        sys.path.remove(str(file.resolve().parent))
    return module


def _call(function: Callable[..., Any], spec: str, num_classes: int) -> nn.Module:
    takes_classes = "num_classes" in inspect.signature(function).parameters
    try:
        model = function(num_classes=num_classes) if takes_classes else function()
    except Exception as error:
        raise ConfigError(f"{spec} failed: {_where(error, Path(spec.rpartition(':')[0]))}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{spec} returned {type(model).__name__}; expected a torch.nn.Module")
    return model


def _where(error: Exception, file: Path) -> str:
    """An error of the user's code in one line, with the line of their file that it came through last."""
    if isinstance(error, SyntaxError):
        return f"SyntaxError in line {error.lineno}: {error.msg}"
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file.resolve())
    ]
    place = f" (line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {_first_line(error)}{place}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]
