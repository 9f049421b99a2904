"""What quantizers that learn their grid have in common: where they start, and how a gradient reaches what is learned.

    v = v₀ + δ          what is learned: a scale, a clipping bound, the logarithm of a threshold
    v₀                  buffer `start`: what the observer finds in the data (of the first batches)
    δ                   parameter `change`: 0 until the optimizer moves it;  ∂/∂δ = ∂/∂v

The parameter is there, and has its shape, before any data is seen, so an optimizer can be made at once. Writing `v₀`
into a parameter instead would give each process of DDP a start of its own, since only buffers are broadcast; and weight
decay would pull a scale to 0, where it now pulls it to its start.

    while δ = 0         each training forward observes and sets v₀ (and the zero point), like a fixed quantizer
    once δ ≠ 0          the optimizer's alone; decided on the device, element by element, without a host sync

So calibration is any training-mode forward before the first step, the start takes in every use of a shared quantizer,
and `disable_observer` holds the start. Observing stops as soon as a gradient has come (`learning`); in compiled code,
where that is not seen, it costs its time until `disable_observer`, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from qbench.errors import ConfigError, NumericsError
from qbench.fake_quantize.base import FakeQuantize, is_hooked
from qbench.numerics.qparams import SMALLEST_SCALE, LearnedScale, QParams, QSpec
from qbench.numerics.straight_through import GridGradient


class LearnedGrid(NamedTuple):
    """A grid per tensor that is learned.

    Attributes:
        scale: `s`.
        zero_point: `z` as float32 with its gradient, (); None where it is not learned.
        place: `z` as it is, int32, ().
    """

    scale: LearnedScale
    zero_point: Tensor | None
    place: Tensor


class LearnedFakeQuantize(FakeQuantize):
    """Base of the quantizers that learn. Subclasses say what `v` is: `start_from` and `scale_of`.

    Attributes:
        start: float32 buffer, () or (channels,): `v₀`.
        change: float32 parameter of the same shape: `δ`.
        start_zero_point: int32 buffer of the same shape: that of the observer.
        learning: Whether a gradient has come.
    """

    learned: ClassVar[bool] = True

    start: Tensor
    start_zero_point: Tensor

    @classmethod
    def check_spec(cls, spec: QSpec) -> None:
        """Refuse grids of powers of two: what is learned here takes any value."""
        if spec.power_of_two:
            raise ConfigError(
                f"{cls.__name__} learns a scale of any size, and {spec} asks for a power of two; TQT learns those: "
                "method='tqt'"
            )

    def _add_grid(self) -> None:
        self.learning = False
        self.register_buffer("start", torch.tensor(1.0))
        self.register_buffer("start_zero_point", torch.tensor(0, dtype=torch.int32))
        self.change = nn.Parameter(torch.tensor(0.0))

    def fit_to(self, weight: Tensor) -> None:
        """Give what is learned the shape of the scales of this weight: () or (channels,) or (out, in/group_size)."""
        spec = self.spec
        shape: tuple[int, ...] = () if spec.axis is None else (weight.shape[spec.axis],)
        if spec.group_size is not None:
            shape = (weight.shape[0], weight.shape[1] // spec.group_size)
        self.start = self.start.new_ones(shape)
        self.start_zero_point = self.start_zero_point.new_zeros(shape)
        self.change = nn.Parameter(self.change.new_zeros(shape))

    @property
    def stateless(self) -> bool:
        """Never: the grid is kept, whatever the observer does."""
        return False

    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        """The scale in use, float32, without a gradient."""
        return self.scale_of(self.value()).detach()

    @property
    def zero_point(self) -> Tensor:  # type: ignore[override]
        """The zero point in use, int32."""
        return self.start_zero_point

    def value(self) -> Tensor:
        """`v = v₀ + δ`, float32, with the gradient to `δ`."""
        value = self.start.float() + self.change.float()
        return value if torch.compiler.is_compiling() else _Notice.apply(value, self)

    @property
    def grid_gradient(self) -> GridGradient | None:
        """See `FakeQuantize.grid_gradient`."""
        return "residual" if type(self).fake_quantize is FakeQuantize.fake_quantize else None

    @property
    def rounds_plainly(self) -> bool:
        """See `FakeQuantize.rounds_plainly`; not while it looks for its start, which takes the tensor."""
        if type(self).forward is not FakeQuantize.forward or self.grid_gradient is None:
            return False
        looking = self.training and self.observer_enabled and not self.learning
        return self.active and not looking and self.change.ndim == 0 and not is_hooked(self, self.observer)

    def zero_point_of(self, grid: QParams) -> Tensor | None:
        """The zero point of a `snapshot` as float32 with its gradient, where it is learned. Here: None."""
        return None

    def regularized(self, y: Tensor) -> Tensor:
        """What it puts out, and what it adds to the gradient of what is learned. Here: nothing."""
        return y

    # What a kind of quantizer says of itself.

    def start_from(self, found: QParams) -> Tensor:
        """`v₀` that gives the grid of the observer, shape of its scale."""
        raise NotImplementedError(f"{type(self).__name__} must implement start_from(qparams) -> value")

    def scale_of(self, value: Tensor) -> Tensor:
        """The scale that follows from `v`, positive, with the gradient."""
        raise NotImplementedError(f"{type(self).__name__} must implement scale_of(value) -> scale")

    # The grid.

    def qparams_of(self, x: Tensor) -> QParams:
        """The grid for a weight: in training, a start may be found in it; without any start, that of `x` itself."""
        if self.training and self.observer_enabled:
            self._observe(x)
        if self.seen_data:
            return self.snapshot()
        found = self.observer(x)
        return self._grid(self.scale_of(self.start_from(found)), found.zero_point)

    def snapshot(self) -> QParams:
        """The grid in use, with the gradient to what is learned; see `FakeQuantize.snapshot`."""
        return self._grid(self.scale_in_use(), self.zero_point.clone())

    def scale_in_use(self) -> Tensor:
        """The scale of `snapshot()`."""
        return self.scale_of(self.value())

    # The same for functions that hand gradients to what is learned themselves.

    def learned_scale(self) -> LearnedScale:
        """The scale of `snapshot()`."""
        return LearnedScale(self.scale_in_use())

    def learned_scale_of(self, weight: Tensor) -> LearnedScale:
        """The scale of `qparams_of(weight)`."""
        return LearnedScale(self.qparams_of(weight).scale)

    def learned_grid(self, shape: Sequence[int]) -> LearnedGrid:
        """The grid for an activation of this shape."""
        if self.training:
            self.note_size(shape)
        return self._learned_grid()

    def _learned_grid(self) -> LearnedGrid:
        snapshot = self.snapshot()
        return LearnedGrid(LearnedScale(snapshot.scale), self.zero_point_of(snapshot), snapshot.zero_point)

    def _grid(self, scale: Tensor, zero_point: Tensor) -> QParams:
        spec = self.spec
        return QParams(scale, zero_point, spec.qmin, spec.qmax, spec.axis, spec.group_size)

    @torch.no_grad()
    def set_grid(self, qparams: QParams) -> None:
        """Start from this grid, one of a checkpoint for example; what was learned before is forgotten."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("change"):
                parameter.zero_()
        self._check_shape(qparams)
        self._set_start(qparams, torch.zeros_like(self.change, dtype=torch.bool))
        self.seen_data = True

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        if self.learning:
            return
        found = self.observer(x)
        self._check_shape(found)
        self._set_start(found, self.change != 0)
        self.seen_data = True

    def _check_shape(self, found: QParams) -> None:
        if found.scale.shape != self.change.shape:
            raise NumericsError(
                f"quantizer {self.label or '(unnamed)'} has room for scales of shape {tuple(self.change.shape)}, and "
                f"the tensor at hand has {tuple(found.scale.shape)}; {type(self).__name__}.fit_to(weight) "
                "before the optimizer is made gives it the shape, as QConfig.make_weight(axis=..., weight=...) does"
            )

    def _set_start(self, found: QParams, moved: Tensor) -> None:
        """Write the start of what the optimizer has not moved."""
        self.start.copy_(torch.where(moved, self.start, self.start_from(found)))
        self.start_zero_point.copy_(torch.where(moved, self.start_zero_point, found.zero_point))


class _Notice(torch.autograd.Function):
    """The identity, which tells a quantizer that a gradient has come."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, quantizer: LearnedFakeQuantize) -> Tensor:
        ctx.quantizer = quantizer
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.quantizer.learning = True
        return grads[0], None


def positive(scale: Tensor, factor: Tensor | None = None) -> Tensor:
    """|scale|, at least the smallest scale; ∂/∂scale = ±1, never 0 (a scale of 0 could not move).

    A step of the optimizer that overshoots zero lands as far on the other side, as if reflected, so a learned scale is
    positive whatever the learning rate; NaN and infinity stay, to be found by `QParams.check`.

    Args:
        scale: float32, any shape.
        factor: What its gradient is multiplied by, of the same shape; None for 1.
    """
    out: Tensor = _Positive.apply(scale, factor)
    return out


class _Positive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scale: Tensor, factor: Tensor | None) -> Tensor:
        ctx.save_for_backward(scale, factor)
        return scale.abs().clamp(min=SMALLEST_SCALE)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        scale, factor = ctx.saved_tensors
        grad = torch.where(scale < 0, -grads[0], grads[0])
        return grad if factor is None else grad * factor, None
