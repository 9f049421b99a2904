"""Parameters by NumPy against the definition, `training_parameters`: the same bits, or left to that."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qbench
from qbench.nn.qat.fast_parameters import StraightParameters, channel_parameters
from qbench.nn.qat.parameters import Folding, training_parameters
from qbench.numerics.channels import ChannelParameters
from qbench.numerics.fold import BatchNormTensors, WeightLayout
from qbench.numerics.generated import same_bits

EPS = 1e-5


def folding_of(weight: Tensor, **options: object) -> Folding:
    qconfig = qbench.get_qconfig(**options)
    return Folding(WeightLayout(), qconfig.make_weight(axis=0, weight=weight), qconfig.make_bias())


def drawn(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, list[Tensor | None]]:
    """A weight, then b, γ, β, μ and σ²."""
    generator = torch.Generator().manual_seed(seed)
    channels = torch.randn(4, shape[0], generator=generator)
    return torch.randn(shape, generator=generator), [*channels, torch.rand(shape[0], generator=generator) + 0.01]


def by_both(
    folding: Folding, weight: Tensor, given: list[Tensor | None], scale: Tensor | None
) -> tuple[tuple[Tensor | None, ...] | None, tuple[Tensor | None, ...]]:
    bias, gamma, beta, mean, var = given
    assert mean is not None and var is not None
    wanted = training_parameters(folding, weight, bias, BatchNormTensors(gamma, beta, mean, var, EPS), scale)
    parameters = channel_parameters(folding, weight, EPS)
    assert parameters is not None and wanted.qparams is not None
    found = parameters(weight, bias, gamma, beta, mean, var, scale)
    return found, (wanted.weight, wanted.qparams.scale, wanted.error)


@pytest.mark.parametrize(
    "shape", [(32, 3, 3, 3), (96, 1, 3, 3), (64, 33, 1, 1), (8, 5, 7), (4, 3, 2, 2, 2), (512, 512, 3, 3)]
)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("absent", [(), (0,), (1,), (2,), (0, 1, 2)])
def test_bits_are_those_of_the_definition(shape: tuple[int, ...], last: bool, absent: tuple[int, ...]) -> None:
    weight, given = drawn(shape)
    if last and len(shape) == 4:
        weight = weight.to(memory_format=torch.channels_last)
    given = [None if place in absent else one for place, one in enumerate(given)]
    found, wanted = by_both(folding_of(weight), weight, given, torch.tensor(0.013))
    assert found is not None
    assert all(map(same_bits, found, wanted))
    assert found[0] is not None and found[0].stride() == weight.stride()


@pytest.mark.parametrize("options", [{"weight_bits": 4}, {"weight_bits": 2}, {"bias_bits": 16}])
def test_other_widths_have_their_bits(options: dict[str, int]) -> None:
    weight, given = drawn((16, 8, 3, 3))
    given = [None if one is None else one * 1e-3 for one in given[:4]] + given[4:]
    found, wanted = by_both(folding_of(weight, **options), weight, given, torch.tensor(0.5))
    assert found is not None
    assert all(map(same_bits, found, wanted))


def test_an_input_in_float_has_no_bias_error() -> None:
    weight, given = drawn((16, 8, 3, 3))
    found, wanted = by_both(folding_of(weight), weight, given, None)
    assert found is not None and found[2] is None and wanted[2] is None
    assert all(map(same_bits, found, wanted))


@pytest.mark.parametrize(
    ("place", "value"),
    [(1, 0.0), (2, 1e6), (2, float("nan")), (2, float("inf")), (3, float("nan")), (4, float("nan")), (1, 1e-38)],
)
def test_a_bias_that_may_not_fit_is_left_to_the_definition(place: int, value: float) -> None:
    weight, given = drawn((16, 8, 3, 3))
    given[place][5] = value  # type: ignore[index]
    found, _ = by_both(folding_of(weight), weight, given, torch.tensor(0.02))
    assert found is None


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), 1e35])
def test_weights_that_are_none_are_left_to_the_definition(value: float) -> None:
    weight, given = drawn((16, 8, 3, 3))
    weight[5] = value
    found, _ = by_both(folding_of(weight), weight, given, torch.tensor(0.02))
    assert found is None


def test_a_weight_with_gaps_in_memory_is_left_to_the_definition() -> None:
    weight, given = drawn((16, 8, 3, 3))
    found, _ = by_both(folding_of(weight), weight.transpose(2, 3), given, torch.tensor(0.02))
    assert found is None


@pytest.mark.parametrize("options", [{"method": "lsq"}, {"bias_bits": 8, "bias_scale": "own"}])
def test_other_kinds_of_parameters_are_left_to_the_definition(options: dict[str, object]) -> None:
    weight, _ = drawn((16, 8, 3, 3))
    assert channel_parameters(folding_of(weight, **options), weight, EPS) is None


def test_other_bits_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(self: ChannelParameters, *given: Tensor | None) -> object:
        found = right(self, *given)  # type: ignore[arg-type]
        return found and found._replace(step=found.step * 2)

    right = ChannelParameters.__call__
    monkeypatch.setattr(ChannelParameters, "__call__", off)
    weight, _ = drawn((16, 8, 3, 3))
    assert channel_parameters(folding_of(weight, weight_bits=7), weight, 3e-5) is None


def test_layers_of_a_plain_model_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[bool] = []

    def counted(self: ChannelParameters, *given: Tensor | None) -> object:
        found = call(self, *given)  # type: ignore[arg-type]
        served.append(found is not None)
        return found

    call = ChannelParameters.__call__
    images = torch.randn(4, 3, 12, 12)
    layers = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
    model = nn.Sequential(*layers)
    model = qbench.prepare_qat(qbench.fuse(model), qconfig=qbench.get_qconfig(), example_inputs=(images,)).train()
    monkeypatch.setattr(ChannelParameters, "__call__", counted)
    model(images).square().mean().backward()
    assert served == [True, True]


@pytest.mark.parametrize("huge", [False, True])
def test_weights_are_rounded_again_to_the_same_values(huge: bool) -> None:
    weight, _ = drawn((600, 64, 3, 3))
    if huge:
        weight[5, 0, 0, 0] = 1e38  # beyond what the largest step can hold: clipped
    bn = nn.BatchNorm2d(600)
    parameters = StraightParameters.of(folding_of(weight), bn, None, weight)
    assert parameters is not None
    with torch.no_grad():
        found = parameters(weight, None, bn.weight, bn.bias, torch.empty_like(weight))
    assert found.qparams is not None
    again = parameters.again(weight, found.qparams, torch.empty_like(weight))
    assert same_bits(again, found.weight)
    assert float((again / found.qparams.scale.view(-1, 1, 1, 1)).round().abs().max()) == 127.0
