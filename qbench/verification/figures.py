"""Figures of a QAT model, layer by layer, on held-out inputs: what `report.html` shows.

The float model that activations are compared with is the same model without its quantizers: the trained weights and
biases, folded, in float.
"""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qbench.fake_quantize import disable_fake_quant
from qbench.modes import evaluating
from qbench.nn.qat.body import QatModule
from qbench.nn.qat.layer import QatLayer
from qbench.preparation import quantized_modules
from qbench.report.figures import ActivationFigures, BiasFigures, LayerFigures, WeightFigures, sqnr
from qbench.verification.trained import CodeCounts, counting_codes


def layer_figures(model: nn.Module, inputs: Iterable[tuple[Tensor, ...]]) -> tuple[LayerFigures, ...]:
    """Bias errors, ranges, code histograms and SQNR of every quantized module, in the order of the model.

    Args:
        model: A trained QAT model on the CPU; it is not changed.
        inputs: Batches; the activations of one are held at a time.

    Raises:
        LinkError: a layer does not know the quantizer of its input.
        NumericsError: a quantizer has seen no data, a value is not finite.
    """
    noise, codes = _run(model, inputs)
    found = []
    for path, module in quantized_modules(model):
        bias, weight = _parameters(module) if isinstance(module, QatLayer) else (None, None)
        activation = _activation(module, codes[path], noise[path]) if path in codes else None
        found.append(LayerFigures(path, bias, weight, activation))
    return tuple(found)


@torch.no_grad()
def _parameters(layer: QatLayer) -> tuple[BiasFigures | None, WeightFigures]:
    grid, bias, scale = layer.quantized_parameters()
    exact, deployed = grid.folded_float().double(), grid.folded().double()
    weight = WeightFigures(
        float(exact.min()),
        float(exact.max()),
        float(grid.qparams.scale.min()),
        float(grid.qparams.scale.max()),
        sqnr(float((exact**2).sum()), float(((exact - deployed) ** 2).sum())),
    )
    if scale is None or layer.bias_quantizer is None:
        return None, weight
    error = (layer.bias_quantizer(bias, scale).double() - bias.double()).abs()
    size = float(bias.double().norm())
    quantizer: Any = layer.output_quantizer
    step = float(quantizer.snapshot().scale) if quantizer is not None else float("nan")
    return BiasFigures(
        float((error / scale.double()).max()),
        float(error.max()) / step,
        float(error.norm()) / size if size else 0.0,
        bias.numel(),
    ), weight


def _activation(module: QatModule, counts: CodeCounts, noise: list[float]) -> ActivationFigures:
    quantizer: Any = module.output_quantizer  # there is one: its codes were counted
    qparams = quantizer.snapshot()
    scale, zero = float(qparams.scale), int(qparams.zero_point)
    return ActivationFigures(
        counts.low,
        counts.high,
        (qparams.qmin - zero) * scale,
        (qparams.qmax - zero) * scale,
        tuple(counts.counts.tolist()),
        counts.saturated,
        sqnr(*noise),
    )


def _run(
    model: nn.Module, inputs: Iterable[tuple[Tensor, ...]]
) -> tuple[dict[str, list[float]], dict[str, CodeCounts]]:
    """By path: the sums of squares of the float model's outputs and of the distances to them; the counts of codes."""
    twin = copy.deepcopy(model)
    twin.apply(disable_fake_quant)
    noise: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    exact: dict[str, list[Tensor]] = defaultdict(list)

    def remember(path: str, output: Tensor) -> None:
        exact[path].append(output)

    def compare(path: str, output: Tensor) -> None:
        value = exact[path].pop(0).double()
        noise[path][0] += float((value**2).sum())
        noise[path][1] += float(((value - output) ** 2).sum())

    with counting_codes(model) as codes, _watching(twin, remember), _watching(model, compare):
        for batch in inputs:
            for each in (twin, model):
                with evaluating(each):
                    each(*batch)
    return noise, codes


@contextlib.contextmanager
def _watching(model: nn.Module, tell: Callable[[str, Tensor], None]) -> Any:
    """Tell the output of every quantized module, with its path."""
    with contextlib.ExitStack() as stack:
        for path, module in quantized_modules(model):

            def hook(called: nn.Module, args: Any, output: Any, path: str = path) -> None:
                if isinstance(output, Tensor):
                    tell(path, output)

            stack.callback(module.register_forward_hook(hook).remove)
        yield
