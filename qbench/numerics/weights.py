"""The grid of a folded weight: one definition per layer, used in train, eval and convert.

Per-channel symmetric min–max scales move along with the tensor, so the codes of `k·W` are those of `W`:

    t   = max|W| / qmax              per output channel
    t   = max(t, floor/|k|)          so that the bias fits (qbench.numerics.bias)
    q_w = rne(W · (1/t)) · sign(k)   s_w = |k|·t        Ŵ = q_w · s_w        Ŵ/k = rne(W · (1/t)) · t

A scale per group of input features moves along in the same way. Groups have no floor: no hardware adds a bias at a
scale that changes inside a channel, so they come with a float bias.

There is no division by `k` (γ = 0 gives codes 0 and no NaN), nothing is clipped, so the straight-through gradient is
the identity. By rounding, codes of `k·W` computed directly differ in about two of a million: the two are never mixed.

A step `t` of `W` that is learned, or found by an observer that clips, moves along in the same way if the codes are
symmetric per channel; its quantizer then says what the gradient is:

    Ŵ/k = FQ(W; t)        Ŵ = k · FQ(W; t)        s_w = |k|·t carries the gradient to t into the bias

Every other quantizer (per tensor, power-of-two) takes the general way: quantize `W_f = k·W`, divide safely.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from qbench.numerics.fold import WeightLayout, fold_weight
from qbench.numerics.qparams import SMALLEST_SCALE, QParams, in_groups, next_power_of_two, quantize
from qbench.numerics.straight_through import fake_quantize_ste, round_to_grid, straight_through

# Codes of any real weight are 0 at this step.
LARGEST_STEP = 2.0**100

# A quantizer's values with its gradient: to the tensor and, where it is learned, to the scale of the grid.
Rounding = Callable[[Tensor, QParams], Tensor]


@dataclasses.dataclass(frozen=True)
class FloorEffect:
    """What the bias floor did to a grid.

    Attributes:
        coarsened: Factor (≥ 1) by which it raised the scale, shape of the scale.
        silenced: Bool (out,): channels whose codes it sent to 0.
    """

    coarsened: Tensor
    silenced: Tensor


@dataclasses.dataclass(frozen=True)
class WeightGrid:
    """A weight, the factor to fold into it, and the grid of the product.

    Attributes:
        weight: `W`.
        factor: `k`, (out,), or None without a BatchNorm.
        layout: Where the output channels lie.
        qparams: Grid of `W_f`.
        effect: What the bias floor did; None where there is no floor, or none that is above the scale.
    """

    weight: Tensor
    factor: Tensor | None
    layout: WeightLayout
    qparams: QParams
    effect: FloorEffect | None

    @property
    def coarsened(self) -> Tensor:
        """Factor (≥ 1) by which the bias floor raised the scale, shape of the scale."""
        return torch.ones_like(self.qparams.scale.detach()) if self.effect is None else self.effect.coarsened

    @property
    def silenced(self) -> Tensor:
        """Bool (out,): channels whose codes the bias floor sent to 0."""
        if self.effect is not None:
            return self.effect.silenced
        return torch.zeros(self.layout.out_channels(self.weight), dtype=torch.bool, device=self.weight.device)

    def codes(self) -> Tensor:
        """Integer codes of `W_f`."""
        raise NotImplementedError

    def folded(self) -> Tensor:
        """`Ŵ`, with the gradient to `W` and `k`."""
        raise NotImplementedError

    def unfolded(self, room: Tensor | None = None) -> Tensor:
        """`Ŵ/k`, with the gradient to `W`: what is convolved where BN normalises with the batch's statistics.

        Args:
            room: Where it may be put, like `W`; None for memory of its own.
        """
        raise NotImplementedError

    def unfolded_qparams(self) -> QParams | None:
        """Grid of `unfolded()`, or None where it lies on none."""
        return self.qparams if self.factor is None else None

    def channel_scale(self) -> Tensor:
        """`s_w` for each output channel, (out,) or () per tensor."""
        return self.layout.per_channel(self.qparams.scale)

    def folded_float(self) -> Tensor:
        """`W_f = k · W`, not quantized."""
        return self.weight if self.factor is None else fold_weight(self.weight, self.factor, self.layout)


@dataclasses.dataclass(frozen=True)
class MovingGrid(WeightGrid):
    """Symmetric per-channel codes: the grid of `W` itself, scaled by |k|.

    Attributes:
        step: `t`, shape of the scale.
        rounding: The gradient of a quantizer that clips or learns; None is the identity, of one that does neither.
    """

    step: Tensor
    rounding: Rounding | None = None

    def codes(self) -> Tensor:
        """Integer codes of `W_f`."""
        return self._float_codes().to(self.qparams.dtype)

    def folded(self) -> Tensor:
        """`Ŵ`, with the gradient to `W` and `k`."""
        scale = self.qparams.spread(self.qparams.scale, self.weight)
        with torch.no_grad():
            value = self._float_codes().mul_(scale)
        if self.rounding is None:
            return straight_through(self.folded_float(), value)
        unfolded = self.unfolded()
        return straight_through(
            unfolded if self.factor is None else fold_weight(unfolded, self.factor, self.layout), value
        )

    def unfolded(self, room: Tensor | None = None) -> Tensor:
        """`Ŵ/k`, with the gradient to `W`."""
        if self.rounding is not None:
            return self.rounding(self.weight, self.unfolded_qparams())
        with torch.no_grad():
            step = self.qparams.spread(self.step, self.weight)
            value = round_to_grid(self.weight.detach(), step, self.qparams.qmin, self.qparams.qmax, room)
        return straight_through(self.weight, value)

    def unfolded_qparams(self) -> QParams:
        """Grid of `unfolded()`."""
        return dataclasses.replace(self.qparams, scale=self.step)

    def _unsigned_codes(self) -> Tensor:
        inverse = self.qparams.spread(1.0 / self.step.detach(), self.weight)
        return (self.weight.detach().float() * inverse).round_().clamp_(self.qparams.qmin, self.qparams.qmax)

    def _float_codes(self) -> Tensor:
        codes = self._unsigned_codes()
        if self.factor is None:
            return codes
        # sign(k)·0 may be −0.0: adding 0.0 makes it +0.0, the value that an integer code dequantizes to.
        return codes * self.layout.spread(torch.sign(self.factor.detach()), self.weight) + 0.0


@dataclasses.dataclass(frozen=True)
class FoldedGrid(WeightGrid):
    """Any other quantizer: the grid of the folded weight.

    Attributes:
        rounding: The quantizer's values and gradient.
    """

    rounding: Rounding = fake_quantize_ste

    def codes(self) -> Tensor:
        """Integer codes of `W_f`."""
        return quantize(self.folded_float(), self.qparams)

    def folded(self) -> Tensor:
        """`Ŵ`, with the gradient to `W` and `k`."""
        return self.rounding(self.folded_float(), self.qparams)

    def unfolded(self, room: Tensor | None = None) -> Tensor:
        """`Ŵ/k`, with the gradient to `W`; a channel with k = 0 keeps `W`, so that its statistics stay alive."""
        if self.factor is None:
            return self.folded()
        factor = self.layout.spread(self.factor.detach(), self.weight)
        quantized = self.rounding(self.weight * factor, self.qparams)
        return torch.where(factor == 0, self.weight, quantized / torch.where(factor == 0, 1.0, factor))


def moving_grid(
    weight: Tensor,
    factor: Tensor | None,
    layout: WeightLayout,
    own: QParams,
    floor: Tensor | None,
    rounding: Rounding | None = None,
) -> MovingGrid:
    """Grid of a quantizer that scales with its tensor.

    Args:
        weight: `W`.
        factor: `k`, (out,), or None.
        layout: Not transposed with several groups (there, one scale serves several output channels).
        own: Grid of `W` itself, one scale per output channel, or per group of it (then without a floor).
        floor: Smallest `s_w`, (out,), or None.
        rounding: Values and gradient of a quantizer that clips or learns; None where it does neither.
    """
    if floor is None:
        step = own.scale if factor is None else own.scale.clamp(max=LARGEST_STEP)
        size = None if factor is None else factor.detach().float().abs()
        if size is not None and own.group_size is not None:
            size = size[:, None]  # (out,) -> (out, 1)
        scale = step if size is None else (size * step).clamp(min=SMALLEST_SCALE)
        return MovingGrid(weight, factor, layout, dataclasses.replace(own, scale=scale), None, step, rounding)
    # Of a range that clips nothing, the scale says how large the weights are.
    largest = own.scale * own.qmax if rounding is None else _largest(weight, own)
    if factor is None:
        step = torch.maximum(own.scale, floor)
        scale, live = step, torch.ones_like(step, dtype=torch.bool)
    else:
        size = factor.detach().float().abs()
        live = size > 0
        step = torch.maximum(own.scale, torch.where(live, floor / torch.where(live, size, 1.0), 0.0))
        step = step.clamp(max=LARGEST_STEP)
        # Where |k| is next to nothing, floor/|k| would overflow: the codes are 0 as for k = 0, the scale is the floor.
        scale = torch.where(live & (step < LARGEST_STEP), size * step, floor).clamp(min=SMALLEST_SCALE)
    # A channel of zeros has no codes to coarsen, however high the floor.
    with torch.no_grad():
        raised = (step > own.scale) & (own.scale > SMALLEST_SCALE)
        silenced = live & raised & (largest > 0) & (largest * (1.0 / step) <= 0.5)
        effect = FloorEffect(torch.where(raised, step / own.scale, 1.0), silenced)
    return MovingGrid(weight, factor, layout, dataclasses.replace(own, scale=scale), effect, step, rounding)


def folded_grid(
    weight: Tensor,
    factor: Tensor | None,
    layout: WeightLayout,
    choose: Callable[[Tensor], QParams],
    floor: Tensor | None,
    *,
    power_of_two: bool,
    rounding: Rounding = fake_quantize_ste,
) -> FoldedGrid:
    """Grid that `choose` finds for the folded weight, raised to the floor.

    Args:
        weight: `W`.
        factor: `k`, (out,), or None.
        layout: Where the output channels lie.
        choose: The quantizer's `qparams_of`.
        floor: Smallest `s_w`, (out,), or None.
        power_of_two: Whether scales must stay powers of two.
        rounding: The quantizer's values and gradient.
    """
    folded = weight if factor is None else fold_weight(weight, factor.detach(), layout)
    found = choose(folded)
    scale = found.scale
    if floor is None:
        return FoldedGrid(weight, factor, layout, found, None, rounding)
    least = floor.amax() if scale.ndim == 0 else layout.reduce_max(floor)
    scale = torch.maximum(scale, next_power_of_two(least.clamp(min=SMALLEST_SCALE)) if power_of_two else least)
    qparams = dataclasses.replace(found, scale=scale)
    raised = (scale > found.scale) & (found.scale > SMALLEST_SCALE)
    coarsened = torch.where(raised, scale.detach() / found.scale.detach(), 1.0)
    effect = FloorEffect(coarsened, _silenced_channels(folded, qparams, layout, raised))
    return FoldedGrid(weight, factor, layout, qparams, effect, rounding)


def _largest(weight: Tensor, own: QParams) -> Tensor:
    """max|W| of the weights that share a scale, shape of the scale."""
    sizes = weight.detach().float().abs()
    if own.group_size is not None:
        return in_groups(sizes, own.group_size).amax(-1)
    return sizes.movedim(own.axis or 0, 0).flatten(1).amax(1)


def _silenced_channels(folded: Tensor, qparams: QParams, layout: WeightLayout, raised: Tensor) -> Tensor:
    sizes = folded.detach().float().abs()
    axis = layout.axis
    if layout.transposed:
        # (in, out/groups, …) -> (groups, in/groups, out/groups, …) -> (groups, out/groups) -> (out,)
        sizes = sizes.reshape(layout.groups, -1, *sizes.shape[1:]).flatten(3).amax(dim=(1, 3)).flatten()
    else:
        sizes = sizes.movedim(axis, 0).flatten(1).amax(1)
    scale = layout.per_channel(qparams.scale.detach())
    return layout.per_channel(raised) & (sizes > 0) & (sizes * (1.0 / scale) <= 0.5)
