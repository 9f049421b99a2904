"""What follows the linear part: which steps, in which order, along which axis."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qbench.numerics.epilogue import epilogue

from .support import same_bits


def doubled(y: Tensor) -> Tensor:
    return y * 2


def squared(y: Tensor) -> Tensor:
    return y * y


def halved(y: Tensor) -> Tensor:
    return y / 2


def shifted(y: Tensor) -> Tensor:
    return y + 100


def test_without_steps_it_is_the_input() -> None:
    y = torch.randn(2, 3)
    assert epilogue(y) is y


def test_order_is_normalize_error_pre_quantize_activation_quantize() -> None:
    # The steps do not commute: each order gives another number.
    y = torch.full((1, 2, 1), 3.0)
    out = epilogue(
        y,
        normalize=doubled,
        bias_error=torch.tensor([1.0, 2.0]),
        channel_axis=1,
        pre_quantize=squared,
        activation=halved,
        quantize=shifted,
    )
    assert out.flatten().tolist() == [(3 * 2 + 1) ** 2 / 2 + 100, (3 * 2 + 2) ** 2 / 2 + 100]


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((4, 3, 5, 5), -3),
        ((4, 3, 5, 5), 1),
        ((3, 5, 5), -3),
        ((4, 3, 5), -2),
        ((4, 3, 5, 5, 5), -4),
        ((4, 3), -1),
        ((4, 7, 3), -1),
    ],
)
def test_bias_error_goes_to_the_channels(shape: tuple[int, ...], axis: int) -> None:
    y, error = torch.randn(shape), torch.randn(3)
    out = epilogue(y, bias_error=error, channel_axis=axis)
    for channel in range(3):
        assert same_bits(out.select(axis, channel), y.select(axis, channel) + error[channel])


def test_bias_error_takes_the_dtype_of_the_activation() -> None:
    y = torch.randn(2, 3, 4, dtype=torch.bfloat16)
    assert epilogue(y, bias_error=torch.ones(3), channel_axis=1).dtype == torch.bfloat16


def batch_norm(y: Tensor) -> Tensor:
    return F.batch_norm(y, None, None, training=True)


@pytest.mark.parametrize("scale", [1e-3, 1e-2, 1.0])
def test_error_before_the_norm_is_cancelled_after_it_stays(scale: float) -> None:
    y = torch.randn(32, 4, 8, 8, dtype=torch.float64)
    error = torch.linspace(-1, 1, 4, dtype=torch.float64) * scale
    wide = error.reshape(1, 4, 1, 1)
    clean = epilogue(y, normalize=batch_norm)
    outside = epilogue(y, normalize=batch_norm, bias_error=error, channel_axis=-3)
    inside = epilogue(y + wide, normalize=batch_norm)
    torch.testing.assert_close(outside - clean, wide.expand_as(y), rtol=0, atol=1e-12)
    assert (inside - clean).abs().max() < 1e-12


@pytest.mark.parametrize("step", ["normalize", "pre_quantize", "activation", "quantize"])
def test_each_step_alone(step: str) -> None:
    y = torch.randn(2, 3)
    arguments: dict[str, Callable[[Tensor], Tensor]] = {step: doubled}
    assert same_bits(epilogue(y, **arguments), y * 2)
