"""What both exports do with a program: check it, copy it, name its outputs, keep other libraries quiet."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from qbench.errors import ExportError
from qbench.export import graphs
from qbench.graph.qdq import quantized_decomposed


def check_program(program: object, *, call: str) -> ExportedProgram:
    """`program`, once it is sure that it is a Q/DQ program.

    Args:
        program: What the user gave.
        call: The call that would work, for the message: `"to_onnx(program, path)"`.

    Raises:
        ExportError: not an ExportedProgram, or one without a quantize op.
    """
    way_out = f"program = qbench.convert(qat_model, example_inputs), then qbench.export.{call}"
    if not isinstance(program, ExportedProgram):
        raise ExportError(
            f"expected the torch.export.ExportedProgram of a converted model, got {_describe(program)}: {way_out}"
        )
    if not any(graphs.is_quantize(node) or graphs.is_dequantize(node) for node in program.graph.nodes):
        raise ExportError(
            f"this program holds no quantize or dequantize op, so it is a float model; convert it first: {way_out}"
        )
    return program


def _describe(thing: object) -> str:
    if isinstance(thing, torch.nn.Module):
        return f"a module ({type(thing).__name__})"
    return f"{type(thing).__name__}"


def copy_program(program: ExportedProgram) -> ExportedProgram:
    """A program that can be rewritten without a trace in the caller's (weights are copied too)."""
    with quiet():
        copied = copy.deepcopy(program)
    placeholders = (node for node in copied.graph.nodes if node.op == "placeholder")
    for node, spec in zip(placeholders, copied.graph_signature.input_specs, strict=True):
        # Copying a graph renames what is called like a builtin (`input`, the name that Sequential gives its own).
        node.name = node.target = spec.arg.name
    copied.graph_module.recompile()
    return copied


def load_program(path: str | os.PathLike[str]) -> ExportedProgram:
    """Read a Q/DQ program or an integer program that `torch.export.save` wrote.

    `torch.export.load` alone fails in a process in which no library has registered the operators of
    `quantized_decomposed` and `qbench`, which `import torch` does not do.

    Raises:
        ExportError: there is no such file, or it is not a saved program.
    """
    file = Path(path)
    if not file.is_file():
        raise ExportError(f"there is no file {file}; torch.export.save(program, {str(file)!r}) writes one")
    import qbench.ops  # noqa: F401 - defines the operators of integer programs

    quantized_decomposed()
    try:
        with quiet():
            return torch.export.load(file)
    except Exception as error:  # torch.export raises whatever the archive's reader raises.
        raise ExportError(f"{file} is not a program that torch.export.save wrote: {error}") from error


def output_names(program: ExportedProgram) -> list[str]:
    """A name per output tensor, in order: `output` for the only one, else the path in what the model returns.

    `{"out": …, "aux": …}` gives `out, aux`; a tuple gives `output_0, output_1`. A name that an input has gets `_out`.
    """
    inputs = set(program.graph_signature.user_inputs)
    spec = program.call_spec.out_spec
    count = len(program.graph_signature.user_outputs)
    if count == 1:
        names = ["output"]
    elif spec is None or spec.num_leaves != count:
        names = [f"output_{index}" for index in range(count)]
    else:
        leaves, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(count)), spec))
        names = ["_".join(_key_name(key) for key in path) for path, _ in leaves]
        names = [name if not name[:1].isdigit() else f"output_{name}" for name in names]
    return [f"{name}_out" if name in inputs else name for name in names]


def _key_name(key: object) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what other libraries say about themselves (deprecations, libraries for other machines).

    What they say about the program is not lost by it: the reports are read from the files that they made.
    """
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning, UserWarning):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        logging.disable(before)
