"""A layer as one function: the bits of its parts one after the other; what was found out is asked for again."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qbench
from qbench.nn.qat import step as step_module
from qbench.nn.qat.layer import QatLayer
from qbench.numerics import layer_step
from qbench.observers import MinMaxObserver

from .support import CASES, Case, batch, case_named, make_layer

FORMATS = (torch.contiguous_format, torch.channels_last)


def trained(layer: nn.Module, images: list[Tensor]) -> list[Tensor]:
    """Outputs, gradients of inputs and parameters of two steps, and the state behind them."""
    layer = copy.deepcopy(layer).train()
    found: list[Tensor] = []
    for x in images:
        x = x.clone().requires_grad_()
        layer.zero_grad()
        y = layer(x)
        given = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
        y.backward(torch.empty_like(y).copy_(given))
        found += [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]  # type: ignore[list-item]
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.sub_(0.01 * parameter.grad if parameter.grad is not None else 0.0)
    return [*found, *(value for value in layer.state_dict().values())]


def calls_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often a layer was one function."""
    calls: list[int] = []
    plain = layer_step.layer_step

    def counted(*args: Any) -> Any:
        calls.append(1)
        return plain(*args)

    monkeypatch.setattr(step_module, "layer_step", counted)
    return calls


def apart(layer: QatLayer) -> QatLayer:
    """The same layer, whose convolution is a function of its own."""
    other = copy.deepcopy(layer)
    other.convolution = lambda: None  # type: ignore[method-assign]
    return other


@pytest.mark.parametrize("case", [case for case in CASES if case.has_bn], ids=lambda case: case.name)
@pytest.mark.parametrize("switch", [None, qbench.enable_low_memory, qbench.enable_fast_path], ids=str)
def test_one_function_has_the_bits_of_its_parts(
    case: Case, switch: Callable[[nn.Module], None] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_step, "KEPT_WEIGHTS", 20)  # some are kept, some are rounded again
    layer, _ = make_layer(case)
    if switch is not None:
        layer.apply(switch)
    images = [batch(case.shape, seed=seed) for seed in (5, 6)]
    calls = calls_of(monkeypatch)
    found = trained(layer, images)
    assert len(calls) == (2 if layer.convolution() is not None else 0)
    expected = trained(apart(layer), images)
    assert len(calls) in (0, 2)  # not once more
    assert len(found) == len(expected) > 6
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_memory_order(memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_named("conv bias bn")
    layer, _ = make_layer(case)
    layer = layer.to(memory_format=memory_format)
    images = [batch(case.shape, seed=seed).contiguous(memory_format=memory_format) for seed in (5, 6)]
    calls = calls_of(monkeypatch)
    found, expected = trained(layer, images), trained(apart(layer), images)
    assert len(calls) == 2 and all(map(torch.equal, found, expected))


def scheduled(layer: QatLayer) -> None:
    assert layer.output_quantizer is not None
    layer.output_quantizer.observer.averaging_constant = 0.5


def exchanged(layer: QatLayer) -> None:
    assert layer.output_quantizer is not None
    layer.output_quantizer.observer = MinMaxObserver(layer.output_quantizer.spec)


def without_source(layer: QatLayer) -> None:
    assert layer.sources is not None
    layer.sources[0].fake_quant_enabled = False


SWITCHES: dict[str, Callable[[Any], Any]] = {
    "observer off": lambda layer: layer.apply(qbench.disable_observer),
    "fake-quant off": lambda layer: layer.apply(qbench.disable_fake_quant),
    "statistics frozen": lambda layer: layer.apply(qbench.freeze_bn_stats),
    "low memory": lambda layer: layer.apply(qbench.enable_low_memory),
    "another averaging constant": scheduled,
    "another observer": exchanged,
    "another momentum": lambda layer: setattr(layer.bn, "momentum", 0.9),
    "another eps": lambda layer: setattr(layer.bn, "eps", 0.5),
    "a BatchNorm in eval": lambda layer: layer.bn.eval(),
    "the input in float": without_source,
    "another activation": lambda layer: setattr(layer, "activation_module", nn.ReLU6()),
    "another stride": lambda layer: setattr(layer, "stride", (2, 2)),
    "a new weight": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.detach() * 2)),
}


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
@pytest.mark.parametrize("name", SWITCHES)
def test_what_is_switched_later_counts(name: str, fast: bool) -> None:
    """A layer that has taken a step and is switched then does what one does that has never taken any."""
    case = case_named("depthwise bn relu")
    layer, _ = make_layer(case)
    layer.train()
    if fast:
        layer.apply(qbench.enable_fast_path)
    x = batch(case.shape, seed=5)
    layer(x)
    fresh = copy.deepcopy(layer)  # what is known of a layer is not copied
    SWITCHES[name](layer), SWITCHES[name](fresh)
    before = [layer(x), *layer.state_dict().values()]
    expected = [fresh(x), *fresh.state_dict().values()]
    assert all(map(torch.equal, before, expected))


@pytest.mark.parametrize("watched", ["bn", "activation_module", "output_quantizer", "weight_quantizer"])
def test_a_hook_that_is_added_later_is_called(watched: str) -> None:
    case = case_named("depthwise bn relu")
    layer, _ = make_layer(case)
    layer.train()
    x = batch(case.shape, seed=5)
    layer(x)
    seen: list[object] = []
    handle = getattr(layer, watched).register_forward_hook(lambda *_: seen.append(1))
    layer(x)
    # A weight's quantizer is a definition of its grid: training never calls it.
    assert bool(seen) == (watched != "weight_quantizer")
    handle.remove()
    layer(x)
    assert len(seen) <= 1


def test_layers_are_stored_without_what_was_found_out_and_are_freed() -> None:
    case = case_named("conv bias bn")
    layer, _ = make_layer(case)
    layer.train()(batch(case.shape, seed=5))
    other = pickle.loads(pickle.dumps(layer))
    assert torch.equal(other(batch(case.shape, seed=6)), layer(batch(case.shape, seed=6)))
    reference = weakref.ref(layer)
    del layer
    gc.collect()
    assert reference() is None


def test_a_weight_that_was_written_to_is_refused_in_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """As autograd does of what it saved: rounding another weight again would give a wrong gradient."""
    monkeypatch.setattr(layer_step, "KEPT_WEIGHTS", 0)
    case = case_named("conv bias bn")
    layer, _ = make_layer(case)
    y = layer.train()(batch(case.shape, seed=5))
    with torch.no_grad():
        layer.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_autocast_and_a_batch_of_one_value_a_channel_take_the_ways_of_pytorch() -> None:
    case = case_named("conv bias bn")
    layer, _ = make_layer(case)
    layer.train()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(batch(case.shape, seed=5)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(batch((1, *case.shape[1:]), seed=5)[..., :1, :1])
