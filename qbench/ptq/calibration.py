"""Calibration: quantizers see data, and nothing else moves.

    layers, BatchNorm, dropout      eval: running statistics, which stay
    quantizers                      training: each observes what it is given
    fake-quant of activations       off while observing
    fake-quant of weights           as it is

Weights are known without data, so the ranges to find are those that the deployed weights give (with `DoReFaWeight` far
from those of the float weights). The grid of an activation is what is being found: were it applied meanwhile, the
unsettled grid of the first batch would distort what all later quantizers see, and the result would depend on the order
of the batches. Learned quantizers start from what their observer finds; once trained, they keep their grid.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from qbench.errors import ConfigError, NumericsError, PreparationError
from qbench.fake_quantize import FakeQuantize
from qbench.fake_quantize.learned import LearnedFakeQuantize
from qbench.fake_quantize.switches import switched_off
from qbench.modes import evaluating
from qbench.preparation import preparation_report, quantized_modules
from qbench.report.text import bullets

#: Each batch is the tuple of the model's inputs, or the tensor where there is one.
Batches = Iterable[tuple[Any, ...] | Tensor]


@dataclasses.dataclass(frozen=True)
class CalibrationReport:
    """What calibration did.

    Attributes:
        batches: How many batches were seen.
        observed: Quantizers that were given data.
        held: Those that kept their grid: their observer is disabled, or they are trained.
        unreached: Those that no batch reached; they have no data, or that of before.
        without_grid: Those that have no grid after it: fake-quant passes their input on in float, `convert` refuses.
    """

    batches: int
    observed: tuple[str, ...]
    held: tuple[str, ...]
    unreached: tuple[str, ...]
    without_grid: tuple[str, ...]

    def __str__(self) -> str:
        notes = [f"{name}: keeps its grid (trained, or its observer is disabled)" for name in self.held]
        notes += [f"{name}: no batch reached it" for name in self.unreached]
        notes += [f"{name}: has no grid" for name in self.without_grid]
        return "\n".join([f"{len(self.observed)} quantizers saw {self.batches} batches", *bullets(notes)])


def calibrate(prepared_model: nn.Module, batches: Batches) -> CalibrationReport:
    """Let every quantizer observe the batches; no weight, BatchNorm statistic, mode or switch changes.

    Args:
        prepared_model: What `prepare_qat(…, example_inputs=…)` returned, in either mode; changed in place.
        batches: Inputs, one tuple for each forward, or a tensor where the model has one input. Of a loader with labels:
            `(x for x, _ in loader)`. They are taken one at a time.

    Returns:
        How many batches and which quantizers; `print` shows it.

    Raises:
        PreparationError: the model was not prepared, or its links are not recorded yet.
        ConfigError: there is no batch, or `batches` is a tensor.
    """
    check_linked(prepared_model, "calibrate")
    quantizers = named_quantizers(prepared_model)
    weights = weight_quantizers(prepared_model)
    held = {name for name, module in quantizers.items() if _keeps_grid(module)}
    called: set[FakeQuantize] = set()
    count = 0
    with evaluating(prepared_model), _observing(quantizers.values(), weights, called):
        for inputs in as_tuples(batches, "calibrate"):
            prepared_model(*inputs)
            count += 1
    if not count:
        raise ConfigError("calibrate: got no batch; an iterator that was used up before gives none: calibrate(m, [x])")
    return CalibrationReport(
        batches=count,
        observed=tuple(name for name, q in quantizers.items() if _saw(q, called, weights) and name not in held),
        held=tuple(sorted(held)),
        unreached=tuple(name for name, q in quantizers.items() if q not in called and q not in weights),
        without_grid=tuple(name for name, q in quantizers.items() if not q.seen_data),
    )


def named_quantizers(model: nn.Module) -> dict[str, FakeQuantize]:
    """Quantizers that keep a grid, by path; those of the tensor at hand have nothing to find."""
    return {name: m for name, m in model.named_modules() if isinstance(m, FakeQuantize) and not m.stateless}


def weight_quantizers(model: nn.Module) -> set[FakeQuantize]:
    """The quantizers that are given weights."""
    found = (getattr(module, "weight_quantizer", None) for _, module in quantized_modules(model))
    return {quantizer for quantizer in found if isinstance(quantizer, FakeQuantize)}


def as_tuples(batches: Batches, caller: str) -> Iterator[tuple[Any, ...]]:
    """Each batch as the tuple of the model's inputs.

    Raises:
        ConfigError: `batches` is a tensor, whose items would be taken for batches, or a batch is neither.
    """
    if isinstance(batches, Tensor):
        raise ConfigError(f"{caller}: got a tensor, expected an iterable of batches; {caller}(model, [x]) works")
    for inputs in batches:
        if not isinstance(inputs, (tuple, Tensor)):
            raise ConfigError(
                f"{caller}: a batch is a {type(inputs).__name__}, expected a tuple of the model's inputs or a tensor; "
                f"{caller}(model, (x for x, _ in loader)) leaves out the labels"
            )
        yield inputs if isinstance(inputs, tuple) else (inputs,)


def check_linked(model: nn.Module, caller: str) -> None:
    """Raise PreparationError unless the model is prepared and its links are known: they may still merge quantizers."""
    if not preparation_report(model).links_recorded:
        raise PreparationError(
            f"{caller}: the links of {type(model).__name__} are not recorded yet; prepare_qat(model, qconfig=..., "
            "example_inputs=(x,)) records them"
        )


def check_calibrated(model: nn.Module, caller: str) -> None:
    """Raise an error unless every quantizer of a prepared model has a grid.

    Raises:
        PreparationError: as `check_linked`.
        NumericsError: a quantizer has seen no data.
    """
    check_linked(model, caller)
    empty = [name for name, quantizer in named_quantizers(model).items() if not quantizer.seen_data]
    if empty:
        raise NumericsError(
            f"{caller}: {len(empty)} quantizer(s) have seen no data, the first is {empty[0]}; "
            "qbench.ptq.calibrate(model, batches) first"
        )


@contextlib.contextmanager
def in_float(model: nn.Module) -> Iterator[None]:
    """The model computes in float inside the block: every fake-quant is off; the switches are put back."""
    with switched_off(m for m in model.modules() if isinstance(m, FakeQuantize)):
        yield


def _saw(quantizer: FakeQuantize, called: set[FakeQuantize], weights: set[FakeQuantize]) -> bool:
    # A layer asks the quantizer of its weight for the grid only, and does so in any forward.
    return quantizer in called or (quantizer in weights and quantizer.seen_data)


def _keeps_grid(quantizer: FakeQuantize) -> bool:
    trained = isinstance(quantizer, LearnedFakeQuantize) and (quantizer.learning or bool((quantizer.change != 0).any()))
    return trained or not quantizer.observer_enabled


@contextlib.contextmanager
def _observing(
    quantizers: Iterable[FakeQuantize], weights: set[FakeQuantize], called: set[FakeQuantize]
) -> Iterator[None]:
    """Quantizers are in training mode, their modes are put back by `evaluating`; `called` gets those with data."""
    chosen = list(quantizers)
    with switched_off(q for q in chosen if q not in weights), contextlib.ExitStack() as stack:
        for quantizer in chosen:
            quantizer.train()
            hook = quantizer.register_forward_pre_hook(lambda module, _: called.add(module))
            stack.callback(hook.remove)
        yield
