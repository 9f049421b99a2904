"""The parameters of a convolution with BatchNorm, by NumPy where there is one number a channel: eager PyTorch on a CPU.

    t      = max|W| / qmax                           k = γ / sqrt(σ² + ε)      b_f = β + k · (b − μ)
    s_b    = s_in · |k|·t                            e = f32(rne(b_f / s_b) · s_b) − b_f
    Ŵ/k    = rne(W · (1/t)) · t

The definition is `qbench.nn.qat.parameters`. Of its fifty operators, six are on the weight, and the others on so few
numbers that calling them is all that they cost: a third of that by NumPy. What is rare is left to the definition: a
bias that may not fit its codes, steps of infinite weights.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qbench.numerics.blocks import at_hand, channels_are_last, in_rows
from qbench.numerics.qparams import SMALLEST_SCALE
from qbench.numerics.scalars import quietly
from qbench.numerics.straight_through import round_to_grid
from qbench.numerics.weights import LARGEST_STEP


class Found(NamedTuple):
    """What `ChannelParameters` found.

    Attributes:
        value: `Ŵ/k`.
        step: `t`, (out,).
        error: `e`, (out,); None where the bias stays float.
    """

    value: Tensor
    step: Tensor
    error: Tensor | None


@dataclasses.dataclass(frozen=True)
class ChannelParameters:
    """Of a layer whose weight has a symmetric range a channel, and whose bias follows from it.

    Attributes:
        qmax: Highest code of the weight.
        clear_limit: Largest |q_b| that clearly fits; 0 where the bias stays float.
        clear_scale: Smallest scale of a bias that is clearly of use.
        eps: The BatchNorm's.
    """

    qmax: int
    clear_limit: float
    clear_scale: float
    eps: float

    def __call__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        mean: Tensor,
        var: Tensor,
        input_scale: Tensor | None,
        room: Tensor | None = None,
    ) -> Found | None:
        """As `qbench.nn.qat.parameters.training_parameters`, without gradients; None where this is for that.

        Args:
            weight: `W`, (out, …), float32 on a CPU, like all others.
            bias: `b`, (out,), or None.
            gamma: `γ`, (out,), or None.
            beta: `β`, (out,), or None.
            mean: `μ_r`, (out,).
            var: `σ²_r`, (out,).
            input_scale: `s_in`, (), or None.
            room: Where to put the value, like `W`; None for memory of its own.
        """
        channels = bias, gamma, beta, mean, var
        if channels_are_last(weight) is None or not all(one is None or at_hand(one) for one in (weight, *channels)):
            return None
        rows = in_rows(weight)
        low, high = rows.amin(1).numpy(), rows.amax(1).numpy()
        with quietly():
            step = np.maximum(np.maximum(-low, high) / self.qmax, np.float32(SMALLEST_SCALE))
            if not step.max() < LARGEST_STEP:
                return None
            error = None
            if input_scale is not None and self.clear_limit:
                error = self._error(step, np.float32(input_scale.item()), *channels)
                if error is None:
                    return None
        found = torch.from_numpy(step)
        value = round_to_grid(weight, found.view(-1, *[1] * (weight.ndim - 1)), None, None, room)
        return Found(value, found, None if error is None else torch.from_numpy(error))

    def _error(
        self,
        step: np.ndarray,
        input_scale: np.float32,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        mean: Tensor,
        var: Tensor,
    ) -> np.ndarray | None:
        """`e`; None where the bias may not fit its codes."""
        deviation = np.sqrt(_array(var).astype(np.float64) + self.eps).astype(np.float32)
        factor = (np.float32(1.0) if gamma is None else _array(gamma)) / deviation
        folded = factor * (-_array(mean) if bias is None else _array(bias) - _array(mean))
        if beta is not None:
            folded = _array(beta) + folded
        scale = input_scale * np.maximum(np.abs(factor) * step, np.float32(SMALLEST_SCALE))
        codes = np.rint(folded.astype(np.float64) / scale.astype(np.float64))
        # As `BiasQuantizer.surely_fits`; of NaN, neither is true.
        if not (scale.min() >= self.clear_scale and np.abs(codes).max() <= self.clear_limit):
            return None
        found: np.ndarray = (codes + 0.0).astype(np.float32) * scale - folded
        return found


def _array(tensor: Tensor) -> np.ndarray:
    found: np.ndarray = tensor.detach().numpy()
    return found
