"""The bias quantizer as a module: scale rule, floor, values and codes, against numpy."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

import qbench
from qbench.errors import ConfigError
from qbench.fake_quantize import BiasQuantizer

WIDTHS = [(16, "input_weight"), (24, "input_weight"), (32, "input_weight"), (8, "own"), (16, "own"), (8, "own_pow2")]
widths = pytest.mark.parametrize(("bits", "rule"), WIDTHS)
S_IN = torch.tensor(0.0231)


def example() -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(2)
    return torch.randn(50, generator=made) * 0.2, torch.rand(50, generator=made) * 1e-2 + 1e-3


@widths
def test_scale_value_and_codes(bits: int, rule: str) -> None:
    quantizer = BiasQuantizer(qbench.BiasSpec(bits, rule))
    bias, weight_scale = example()
    scale = quantizer.scale(bias, S_IN, weight_scale)
    if rule == "input_weight":
        np.testing.assert_array_equal(scale.numpy(), S_IN.numpy() * weight_scale.numpy())
    else:
        wanted = bias.abs().max().item() / (2 ** (bits - 1) - 1)
        wanted = wanted if rule == "own" else 2.0 ** np.ceil(np.log2(wanted))
        assert scale.item() == pytest.approx(wanted, rel=1e-6)
    rounded = np.rint(bias.numpy().astype(np.float64) / scale.numpy().astype(np.float64))
    wanted_codes = np.clip(rounded, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).astype(np.int64)
    codes, saturated = quantizer.codes(bias, scale)
    np.testing.assert_array_equal(codes.numpy(), wanted_codes)
    np.testing.assert_array_equal(saturated.numpy(), wanted_codes != rounded)
    np.testing.assert_array_equal(quantizer(bias, scale).numpy(), wanted_codes.astype(np.float32) * scale.numpy())


@widths
def test_floor(bits: int, rule: str) -> None:
    quantizer = BiasQuantizer(qbench.BiasSpec(bits, rule))
    bias, _ = example()
    floor = quantizer.weight_scale_floor(bias, S_IN)
    if rule != "input_weight":
        assert floor is None
        return
    limit = min(2 ** (bits - 1) - 1, 2**22)
    wanted = np.abs(bias.numpy().astype(np.float64)) / (limit * np.float64(S_IN.item()))
    np.testing.assert_allclose(floor.numpy(), wanted, rtol=1e-6)
    codes, saturated = quantizer.codes(bias, quantizer.scale(bias, S_IN, floor))
    assert not saturated.any() and codes.abs().max() <= limit
    assert codes.abs().min() >= limit * 0.9999 - 1  # and no higher than needed


def test_floor_keeps_the_scale_of_dead_tensors_above_zero() -> None:
    quantizer = BiasQuantizer(qbench.BiasSpec())
    smallest = torch.tensor(2.0**-100)
    bias = torch.zeros(3)
    floor = quantizer.weight_scale_floor(bias, smallest)
    scale = quantizer.scale(bias, smallest, torch.maximum(floor, smallest))
    assert (scale > 0).all()
    codes, saturated = quantizer.codes(bias, scale)
    assert not saturated.any() and (codes == 0).all() and (quantizer(bias, scale) == 0).all()


@pytest.mark.parametrize("rule", ["own", "own_pow2"])
def test_a_bias_of_zeros_has_a_scale(rule: str) -> None:
    quantizer = BiasQuantizer(qbench.BiasSpec(8, rule))
    scale = quantizer.scale(torch.zeros(4), S_IN, torch.ones(4))
    assert scale.item() == 1.0 and (quantizer(torch.zeros(4), scale) == 0).all()


def test_it_has_no_state_and_copies() -> None:
    quantizer = BiasQuantizer(qbench.BiasSpec(16))
    assert not quantizer.state_dict()
    for twin in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
        assert twin.spec == quantizer.spec
    assert repr(quantizer) == "BiasQuantizer(int16 at input_weight scale)"


class TestSpec:
    def test_it_is_a_value(self) -> None:
        assert qbench.BiasSpec() == qbench.BiasSpec(32, "input_weight") and hash(qbench.BiasSpec()) is not None
        assert str(qbench.BiasSpec(8, "own")) == "int8 at own scale"
        with pytest.raises(dataclasses.FrozenInstanceError):
            qbench.BiasSpec().bits = 8  # type: ignore[misc]

    LIMITS = ((16, 2**15 - 1), (22, 2**21 - 1), (23, 2**22 - 1), (24, 2**22), (32, 2**22), (40, 2**39 - 1), (64, 2**52))

    @pytest.mark.parametrize(("bits", "limit"), LIMITS)
    def test_code_limit(self, bits: int, limit: int) -> None:
        assert qbench.BiasSpec(bits).code_limit == limit

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((8,), r"would force weight scales so coarse.*get_qconfig\(bias_bits=8, bias_scale='own'\)"),
            ((7, "own"), "a bias of 7 bits: expected 8 to 64"),
            ((65,), "a bias of 65 bits"),
            ((None,), "a bias of None bits"),
            ((32, "other"), "bias scale 'other' is unknown; expected one of input_weight, own, own_pow2"),
        ],
    )
    def test_refusals(self, arguments: tuple, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            qbench.BiasSpec(*arguments)
