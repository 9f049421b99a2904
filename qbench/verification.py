"""Counting what differs between the forms of a model, on the same inputs.

    parameters          weight and bias codes that training used  |  those read back from the saved program
    eval_vs_program     values of the QAT model in eval           |  the saved program, reloaded in a fresh process
    program_vs_RUNTIME  codes of that program                     |  the exported file, run in a fresh process

The sides share no code under test: the QAT model computes with `qbench.numerics`, the program with aten and
`quantized_decomposed` operators, a runtime with its own kernels. A zero counts only where codes are varied, so how
varied they were is part of the result.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from qbench.errors import MissingDependencyError, VerificationError
from qbench.export.program import load_program
from qbench.export.runtimes import get_runtime, run_file, run_program
from qbench.fake_quantize.bias import BiasSpec
from qbench.graph.constants import Constants, constants_of
from qbench.graph.edit import module_path
from qbench.graph.layers import Layer, read_layer, weight_scales
from qbench.graph.recognise import find_grid, is_dequantize
from qbench.nn.qat.body import ParameterCodes, QatLayer
from qbench.numerics.bias import bias_codes, bias_scale, dequantize_bias
from qbench.numerics.qparams import QParams, inside_range, quantize
from qbench.preparation import quantized_modules
from qbench.report.data import CodeSpread, Comparison, Verification

Inputs = tuple[Tensor, ...] | Iterable[tuple[Tensor, ...]]


def verify(
    model: nn.Module,
    program: torch.export.ExportedProgram,
    inputs: Inputs,
    runtimes: Sequence[str] = ("onnxruntime", "executorch"),
    *,
    files: Mapping[str, str | os.PathLike[str]] | None = None,
) -> Verification:
    """Compare a QAT model, the program that `convert` made of it, and the files that runtimes run.

    Args:
        model: The QAT model, on the CPU; its modes are put back afterwards.
        program: What `convert(model, …)` returned, without further passes.
        inputs: One tuple of tensors, or an iterable of them, of the shapes that the program takes.
        runtimes: Names of `qbench.export.RUNTIMES`; one that is not installed is noted in the result.
        files: Files that exist already, to check those that ship instead of writing others: by name of a runtime, and
            `"program"` for what `torch.export.save` wrote.

    Returns:
        Counts of compared and different codes; `print` shows a table.

    Raises:
        VerificationError: the model was not prepared, the inputs are not tuples of tensors, or the program is not of
            this model.
        ExportError: a runtime refuses the file.
    """
    started = time.perf_counter()
    layers = {path: m for path, m in quantized_modules(model) if isinstance(m, QatLayer)}
    batches = _as_batches(inputs)
    for runtime in runtimes:
        get_runtime(runtime)
    if not layers:
        raise VerificationError("verify: the model has no QAT layer; its first argument is what convert was given")
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="qbench-verify-") as folder:
        given = {name: Path(path) for name, path in (files or {}).items()}
        saved = given.get("program", Path(folder) / "model.pt2")
        if "program" not in given:
            torch.export.save(program, saved)
        reloaded = load_program(saved)
        parameters = compare_parameters(layers, reloaded)
        trained, spread = _run_eval(model, batches)
        ran = run_program(saved, batches, threads=threads)
        eval_vs_program = _compare_values("eval_vs_program", trained, list(ran))
        grids = output_grids(reloaded)
        found, notes = [], []
        for name in runtimes:
            try:
                path = given.get(name, Path(folder) / f"model{get_runtime(name).suffix}")
                if name not in given:
                    get_runtime(name).export(program, path)
                outputs = run_file(name, path, batches, threads=threads)
            except MissingDependencyError as error:
                notes.append(f"{name} was not compared: {error}")
                continue
            found.append(_compare_codes(name, list(ran), list(outputs), grids))
            notes.append(f"{name} {outputs.version} on {', '.join(outputs.cpu) or 'an unknown CPU'}")
    return Verification(
        parameters=Comparison.total("parameters", parameters),
        eval_vs_program=eval_vs_program,
        runtimes=tuple(found),
        layers=parameters,
        spread=spread,
        seconds=time.perf_counter() - started,
        notes=tuple(notes),
    )


def compare_parameters(
    layers: dict[str, QatLayer], program: torch.export.ExportedProgram
) -> tuple[Comparison, ...]:
    """Weight and bias codes of each layer, as trained and as read from the program, by path of the layer.

    Raises:
        VerificationError: the program lacks a layer of the model that its forward reaches, or has another.
    """
    constants = constants_of(program)
    found: dict[str, list[Layer]] = {}
    for node in program.graph.nodes:
        layer = read_layer(node, constants)
        if layer is not None and is_dequantize(layer.weight):
            found.setdefault(module_path(node), []).append(layer)
    strangers = sorted(set(found) - set(layers))
    if strangers or not found:
        raise VerificationError(
            f"verify: the program has layers {strangers[:3] or 'without codes'} that the model has not; "
            "verify(model, qbench.convert(model, inputs), inputs) compares a model with its own program"
        )
    comparisons = []
    for path, copies in found.items():
        codes, spec = layers[path].parameter_codes(), layers[path].qconfig.bias
        for layer in copies:
            weight = constants.get(layer.weight.all_input_nodes[0])
            comparisons.append(_difference(f"{path}.weight", codes.weight, weight))
            comparisons.append(_difference(f"{path}.bias", codes.bias, _program_bias(layer, constants, codes, spec)))
    return tuple(comparisons)


def _program_bias(layer: Layer, constants: Constants, codes: ParameterCodes, spec: BiasSpec) -> Tensor | None:
    """Codes of a program's bias, from the scales that the program itself holds."""
    bias = None if layer.bias is None else constants.get(layer.bias)
    grid, scales = find_grid(layer.input, constants), weight_scales(layer, constants)
    if bias is None or grid is None or scales is None:
        return None
    # (out, values a channel) of equal scales -> (out,)
    scale = scales if scales.ndim == 0 else layer.per_output(scales)[:, 0]
    on_grid = bias_scale(grid.qparams.scale, scale) if spec.scale == "input_weight" else codes.bias_scale
    found = bias_codes(bias, on_grid, spec.bits)[0]
    # A value off the grid has no code: a bias that was left in float must not pass for a quantized one.
    return torch.where(dequantize_bias(found, on_grid) == bias, found, codes.bias + 1)


def output_grids(program: torch.export.ExportedProgram) -> list[QParams | None]:
    """Grid of each output of the program, None for an output in float."""
    constants = constants_of(program)
    outputs = next(node for node in program.graph.nodes if node.op == "output").args[0]
    user = {spec.arg.name for spec in program.graph_signature.output_specs if spec.kind.name == "USER_OUTPUT"}
    grids = []
    for node in outputs:
        if isinstance(node, fx.Node) and node.name in user:
            found = find_grid(node, constants)
            grids.append(None if found is None else found.qparams)
    return grids


def _as_batches(inputs: Inputs) -> list[tuple[Tensor, ...]]:
    batches = [inputs] if isinstance(inputs, tuple) else inputs
    if isinstance(batches, Tensor):
        raise VerificationError("verify: inputs is a tensor, expected a tuple of tensors: verify(model, program, (x,))")
    batches = list(batches)
    for batch in batches:
        if not isinstance(batch, tuple) or not all(isinstance(value, Tensor) for value in batch):
            raise VerificationError(
                f"verify: a batch is {type(batch).__name__}, expected a tuple of tensors: verify(model, program, "
                "[(x,), …])"
            )
    if not batches:
        raise VerificationError("verify: no inputs were given; a zero over no codes says nothing")
    return batches


def _run_eval(
    model: nn.Module, batches: list[tuple[Tensor, ...]]
) -> tuple[list[list[np.ndarray]], tuple[CodeSpread, ...]]:
    """Outputs of the model in eval, and how varied the codes of each QAT module were."""
    counts: dict[str, list[Any]] = {}

    def watch(path: str) -> Any:
        def hook(quantizer: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            qparams = quantizer.snapshot()
            codes = quantize(output, qparams).long().flatten() - qparams.qmin
            seen = counts.setdefault(path, [0, torch.zeros(qparams.qmax - qparams.qmin + 1, dtype=torch.bool), 0])
            seen[0] += codes.numel()
            seen[1][codes.unique()] = True
            seen[2] += int((~inside_range(args[0], qparams)).sum())

        return hook

    modes = [(module, module.training) for module in model.modules()]
    with contextlib.ExitStack() as stack:
        stack.callback(_restore, modes)
        model.eval()
        stack.enter_context(torch.no_grad())
        for path, module in quantized_modules(model):
            if module.output_quantizer.spec.bits <= 16:
                stack.callback(module.output_quantizer.register_forward_hook(watch(path)).remove)
        outputs = [[value.detach().numpy().copy() for value in _tensors(model(*batch))] for batch in batches]
    return outputs, tuple(CodeSpread(path, n, int(seen.sum()), out) for path, (n, seen, out) in counts.items())


def _restore(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, mode in modes:
        module.training = mode


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _difference(name: str, trained: Tensor, converted: Tensor | None) -> Comparison:
    if converted is None or converted.shape != trained.shape:
        shape = None if converted is None else tuple(converted.shape)
        raise VerificationError(
            f"verify: {name} has shape {tuple(trained.shape)} in the model and {shape} in the program: it is not a "
            "program of this model as convert returned it"
        )
    steps = (trained.long() - converted.long()).abs()
    return Comparison(name, steps.numel(), int((steps > 0).sum()), int(steps.max()) if steps.numel() else 0)


def _pairs(
    first: list[list[np.ndarray]], second: list[list[np.ndarray]]
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    for one, other in zip(first, second, strict=True):
        if len(one) != len(other) or any(a.shape != b.shape for a, b in zip(one, other, strict=True)):
            raise VerificationError(
                f"verify: outputs have shapes {[a.shape for a in one]} and {[b.shape for b in other]}; they must be "
                "equal"
            )
        yield from ((i, a, b) for i, (a, b) in enumerate(zip(one, other, strict=True)))


def _compare_values(name: str, first: list[list[np.ndarray]], second: list[list[np.ndarray]]) -> Comparison:
    """Values that are not equal; NaN at the same place on both sides is equal."""
    compared = different = 0
    for _, a, b in _pairs(first, second):
        compared += a.size
        different += int((~((a == b) | (np.isnan(a) & np.isnan(b)))).sum())
    return Comparison(name, compared, different, 1 if different else 0)


def _compare_codes(
    name: str, first: list[list[np.ndarray]], second: list[list[np.ndarray]], grids: list[QParams | None]
) -> Comparison:
    """Codes that are not equal, on the grid of each output; an output in float is compared by value."""
    compared = different = largest = 0
    for index, a, b in _pairs(first, second):
        grid = grids[index] if index < len(grids) else None
        if grid is None:
            steps = (a != b).astype(np.int64)
        else:
            steps = np.abs(_codes(a, grid) - _codes(b, grid))
        compared += steps.size
        different += int((steps > 0).sum())
        largest = max(largest, int(steps.max(initial=0)))
    return Comparison(name, compared, different, largest)


def _codes(values: np.ndarray, grid: QParams) -> np.ndarray:
    """Steps of values on a grid, not clamped: a runtime's value off the range must not be hidden."""
    return np.rint(values.astype(np.float64) / float(grid.scale)).astype(np.int64)
