"""Weights whose rounding is learned: up or down, one variable for each (AdaRound).

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020, arXiv:2004.10568, section 3.

    h(V) = clip(σ(V)·(ζ − γ) + γ, 0, 1)             ζ = 1.1, γ = −0.1: it reaches 0 and 1            rectified sigmoid
    Ŵ(V) = s·(clip(floor(W/s) + h(V), low, high))   while learning; h(V₀) = W/s − floor(W/s), so Ŵ(V₀) = W
    f(V) = mean(1 − |2·h(V) − 1|^β)                 0 where every h is 0 or 1; β falls from 20 to 2

    q    = clip(floor(W/s) + [h(V) ≥ ½], low, high) + z       the learned codes
    W'   = (q − z)·s/k                              the weight that ordinary rounding gives these codes

`W` is the weight with the BatchNorm factor k folded in, `s` and `z` its grid. Where the range is that of the weight at
hand, this grid must also be that of W': the weights that span it (the smallest and the largest of those that share a
scale) are rounded to nearest, and symmetric codes stay in [−qmax, qmax].
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from qbench.fake_quantize import FakeQuantize
from qbench.nn.qat.layer import QatLayer
from qbench.numerics.qparams import QParams, in_groups
from qbench.observers import LatestMinMaxObserver

ZETA, GAMMA = 1.1, -0.1


def rectified_sigmoid(v: Tensor) -> Tensor:
    """`h(V)`, in [0, 1]."""
    return torch.clamp(torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)


def inverse_rectified_sigmoid(h: Tensor) -> Tensor:
    """`V` with `h(V) = h`, for h in [0, 1]."""
    return torch.logit((h - GAMMA) / (ZETA - GAMMA))


def regularizer(v: Tensor, beta: float) -> Tensor:
    """`f(V)`, ()."""
    return (1.0 - (2.0 * rectified_sigmoid(v) - 1.0).abs().pow(beta)).mean()


class LearnedRounding(FakeQuantize):
    """Stands in for the weight quantizer of a layer while rounding is learned: the same grid, soft codes.

    Args:
        layer: The layer that it is for, in eval; its quantizers have a grid.

    Attributes:
        v: `V`, float32 parameter, shape of the weight.
    """

    def __init__(self, layer: QatLayer) -> None:
        original = layer.weight_quantizer
        super().__init__(original.spec, LatestMinMaxObserver(original.spec))
        with torch.no_grad():
            grid = layer.quantized_parameters()[0]
            folded = grid.folded_float().float()
        own = grid.qparams
        self.grid = dataclasses.replace(own, scale=own.scale.detach().clone(), zero_point=own.zero_point.clone())
        low, high = self._bounds(folded, original.stateless)
        position = folded * own.spread(1.0 / self.grid.scale, folded)
        self.nearest = torch.round(position).clamp(low, high)
        self.floor = torch.floor(position).clamp(low, high)
        self.up = (self.floor + 1.0).clamp(max=high)
        self.fixed = (position <= low) | (position >= high)
        if original.stateless:
            self.fixed |= spans_range(folded, own)
        self.v = nn.Parameter(inverse_rectified_sigmoid((position - self.floor).clamp(0.0, 1.0)))

    def _bounds(self, x: Tensor, of_tensor: bool) -> tuple[Tensor, Tensor]:
        """Lowest and highest code less the zero point; `of_tensor`: the range is that of the weight at hand."""
        zero_point = self.grid.spread(self.grid.zero_point, x)
        lowest = max(self.grid.qmin, -self.grid.qmax) if of_tensor and self.spec.symmetric else self.grid.qmin
        return lowest - zero_point, self.grid.qmax - zero_point

    @property
    def scales_with_tensor(self) -> bool:
        """Never: the grid is that of the folded weight, as it was."""
        return False

    def qparams_of(self, x: Tensor) -> QParams:
        """The grid as it was when learning began."""
        return self.grid

    def steps(self) -> Tensor:
        """Codes less the zero point, soft where they are learned; shape of the weight."""
        soft = self.floor + (self.up - self.floor) * rectified_sigmoid(self.v)
        return torch.where(self.fixed, self.nearest, soft)

    def fake_quantize(self, x: Tensor, qparams: QParams) -> Tensor:
        """`Ŵ(V)`, with the gradient to `V`."""
        return (self.steps() * qparams.spread(qparams.scale, x)).to(x.dtype)

    @torch.no_grad()
    def learned_steps(self) -> Tensor:
        """`q − z`, float32, shape of the weight."""
        chosen = torch.where(rectified_sigmoid(self.v) >= 0.5, self.up, self.floor)
        return torch.where(self.fixed, self.nearest, chosen)


def spans_range(weight: Tensor, grid: QParams) -> Tensor:
    """Bool, shape of the weight: the smallest and the largest of those that share a scale."""
    if grid.group_size is not None:
        rows = in_groups(weight, grid.group_size)
        found = (rows == rows.amax(-1, keepdim=True)) | (rows == rows.amin(-1, keepdim=True))
        return found.flatten(1)
    dims = [dim for dim in range(weight.ndim) if grid.axis is None or dim != grid.axis]
    return (weight == weight.amax(dims, keepdim=True)) | (weight == weight.amin(dims, keepdim=True))


@torch.no_grad()
def bake(layer: QatLayer, steps: Tensor) -> int:
    """Write the weight that ordinary rounding gives these codes; how many codes differ all the same.

    Args:
        layer: In eval, with its own weight quantizer.
        steps: `q − z`, shape of the weight.
    """
    grid = layer.quantized_parameters()[0]
    wanted = steps + grid.qparams.spread(grid.qparams.zero_point, steps)
    weight = steps.double() * grid.qparams.spread(grid.qparams.scale, steps).double()
    if grid.factor is not None:
        factor = grid.layout.spread(grid.factor.double(), weight)
        # k = 0: the codes are 0 whatever the weight is, which may come alive again in training.
        weight = torch.where(factor == 0, layer.weight.double(), weight / torch.where(factor == 0, 1.0, factor))
    layer.weight.copy_(weight)
    return int((layer.quantized_parameters()[0].codes().float() != wanted).sum())
