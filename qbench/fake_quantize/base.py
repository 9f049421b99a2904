"""The quantizer of a tensor: real in, real on the grid out.

In training it observes first and quantizes with the range that includes this batch, so what it hands out while training
is what the stored scale and zero point give in eval, and what `convert` writes down: there is one formula,
`qbench.numerics.qparams`, and one place, the buffers `scale` and `zero_point`.

Whether a quantizer observes follows from `model.train()` and `disable_observer`; a module in eval never changes.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qbench.errors import NumericsError, QBenchWarning
from qbench.fake_quantize.producers import note_producer
from qbench.numerics.blocks import at_hand, dense
from qbench.numerics.interval import Numbers
from qbench.numerics.qparams import QParams, QSpec
from qbench.numerics.straight_through import GridGradient, fake_quantize_ste
from qbench.observers import FixedObserver, Observer


def is_hooked(*modules: nn.Module) -> bool:
    """Whether somebody wants to see the calls of a module: then it has to be called."""
    return any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        for module in modules
    )


class FakeQuantize(nn.Module):
    """Fixed-range quantizer: an observer finds the grid, rounding passes gradients straight through.

    Args:
        spec: What is wanted.
        observer: Finds the range; its spec is this one.

    Raises:
        ConfigError: this kind of quantizer cannot meet the spec.

    Attributes:
        scale: float32 buffer, () or (channels,): the grid in use. A stateless observer (weights) keeps none.
        zero_point: int32 buffer of the same shape.
        observer_enabled: Whether training-mode forwards move the range.
        fake_quant_enabled: Whether the output is put on the grid.
        seen_data: Whether there is a grid at all.
        label: Path of this quantizer in the prepared model, for messages.
    """

    # Quantizers with parameters of their own set this: links must then be known before the optimizer is made.
    learned: ClassVar[bool] = False
    # What it can quantize, "activation" and "weight".
    roles: ClassVar[tuple[str, ...]] = ("activation", "weight")

    scale: Tensor
    zero_point: Tensor

    def __init__(self, spec: QSpec, observer: Observer) -> None:
        super().__init__()
        self.check_spec(spec)
        # An observer of power-of-two scales makes the grid one of them, unless it only finds where learning starts.
        power_of_two = spec.power_of_two or (observer.spec.power_of_two and not self.learned)
        self.spec = dataclasses.replace(spec, power_of_two=power_of_two)
        self.observer = observer
        self.observer_enabled = True
        self.fake_quant_enabled = True
        self.seen_data = self.stateless
        self.label = ""
        self._add_grid()

    @classmethod
    def check_spec(cls, spec: QSpec) -> None:
        """Raise ConfigError where this kind of quantizer cannot meet a spec; the message says what can."""

    def _add_grid(self) -> None:
        if not self.stateless:
            self.register_buffer("scale", torch.tensor(1.0))
            self.register_buffer("zero_point", torch.tensor(0, dtype=torch.int32))

    def fit_to(self, weight: Tensor) -> None:
        """Make room for the grid of this weight: called once, before an optimizer is made. Here: nothing to do."""

    @property
    def stateless(self) -> bool:
        """Whether the grid is that of the tensor at hand, so that there is none to keep."""
        return self.observer.stateless

    @property
    def clips(self) -> bool:
        """Whether values may lie outside the grid, or the gradient is not straight through for another reason."""
        return self.learned or self.observer.clips

    @property
    def known_grid(self) -> tuple[float, int] | None:
        """Scale and zero point where they are known before any data; else None."""
        observer = self.observer
        return observer.known if isinstance(observer, FixedObserver) and not self.learned else None

    @property
    def active(self) -> bool:
        """Whether the output lies on a grid: fake-quant is on and there is a grid."""
        return self.fake_quant_enabled and self.seen_data

    @property
    def scales_with_tensor(self) -> bool:
        """Whether codes stay the same when a channel is multiplied by a positive number.

        True for symmetric per-channel ranges of the tensor at hand, whose scale moves along. Then the codes of a folded
        weight are those of the weight itself. Where the lowest code can occur, a negative factor would need its
        opposite, which is one too many.
        """
        spec = self.spec
        plain = spec.signed and spec.symmetric and not spec.power_of_two
        mirrored = spec.narrow or not self.clips
        return (self.stateless or self.learned) and plain and mirrored and spec.axis is not None

    def shaped(self, weight: Tensor) -> Tensor:
        """The weight as it is folded and quantized, with its gradient. Here: the weight itself."""
        return weight

    def fake_quantize(self, x: Tensor, qparams: QParams) -> Tensor:
        """`x` on a grid, with this quantizer's gradient. Shape and dtype of `x`."""
        return fake_quantize_ste(x, qparams)

    def note_size(self, shape: Sequence[int]) -> None:
        """In training, take note of what matters of an activation's shape. Here: nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """Observe (in training), then put `x` on the grid. Shape and dtype of `x`."""
        if self.stateless:
            return self.fake_quantize(x, self.qparams_of(x)) if self.fake_quant_enabled else x
        if self.training:
            self.note_size(x.shape)
            if self.observer_enabled:
                self._observe(x)
        if not self.fake_quant_enabled:
            return x
        if not self.seen_data:
            warnings.warn(
                f"quantizer {self.label or '(unnamed)'} has seen no data: its input is passed on in float. Run "
                "training-mode forwards on real data first",
                QBenchWarning,
                stacklevel=2,
            )
            return x
        return note_producer(self.fake_quantize(x, self.snapshot()), self)

    def qparams_of(self, x: Tensor) -> QParams:
        """Grid that this quantizer uses for `x`: of `x` itself where the observer is stateless, else the stored one."""
        return self.observer(x) if self.stateless else self.snapshot()

    def snapshot(self) -> QParams:
        """The grid in use, as tensors of its own.

        A quantizer that is used twice in one step (pyramid levels, a branch) observes in between; what backward saved
        of the first use must not change.
        """
        spec = self.spec
        scale, zero_point = self.scale.float().clone(), self.zero_point.clone()
        return QParams(scale, zero_point, spec.qmin, spec.qmax, spec.axis, spec.group_size)

    def scale_in_use(self) -> Tensor:
        """The scale of `snapshot()`."""
        return self.scale.float().clone() if type(self).snapshot is FakeQuantize.snapshot else self.snapshot().scale

    def deployed_qparams(self) -> QParams:
        """The grid to deploy, checked.

        Raises:
            NumericsError: no data was seen, or a scale is not positive and finite.
        """
        if not self.seen_data:
            raise NumericsError(
                f"quantizer {self.label or '(unnamed)'} has seen no data: run the prepared model in training mode on "
                "real data before convert"
            )
        with torch.no_grad():
            qparams = self.snapshot()
        qparams.check(f"quantizer {self.label or '(unnamed)'}")
        return qparams

    def grid_from(self, found: QParams) -> QParams:
        """The grid to use where the observer found this one. Here: that one."""
        return found

    def _observe(self, x: Tensor) -> None:
        if self.scale.ndim == 0 and self.observer.by_ends and at_hand(x) and not is_hooked(self.observer):
            self._observe_ends(*torch.aminmax(dense(x.detach())))
        else:
            self.set_grid(self.grid_from(self.observer(x)))

    @property
    def grid_gradient(self) -> GridGradient | None:
        """How `fake_quantize` hands gradients to the grid; None where it is of no form that fused functions know."""
        return "none" if type(self).fake_quantize is FakeQuantize.fake_quantize else None

    @property
    def rounds_plainly(self) -> bool:
        """Whether a forward is `watch`, then rounding with `grid_gradient`, per tensor: a fused function may do it."""
        kind, base = type(self), FakeQuantize
        inherited = base.forward, base._observe, base.note_size
        plain = (kind.forward, kind._observe, kind.note_size) == inherited and self.grid_gradient == "none"
        ready = self.active or (self.fake_quant_enabled and self.training and self.observer_enabled)
        return plain and ready and self.scale.ndim == 0 and not is_hooked(self, self.observer)

    def watch(self, x: Tensor, ends: tuple[Tensor, Tensor] | None = None) -> QParams | Numbers:
        """Observe `x` (in training) and answer with the grid in use, in numbers where they are at hand.

        Args:
            x: What is quantized.
            ends: Its lowest and highest value, () each, where `observer.by_ends` and they are known.
        """
        if not (self.training and self.observer_enabled):
            return self.snapshot()
        if ends is None:
            self._observe(x)
            return self.snapshot()
        return self._observe_ends(*ends)

    def _observe_ends(self, low: Tensor, high: Tensor) -> QParams | Numbers:
        """`_observe` of a tensor with these ends; the grid, in numbers where they are at hand."""
        own = type(self).grid_from is not FakeQuantize.grid_from or self.scale.dtype != torch.float32
        seen = None if own else self.observer.numbers_of_ends(low, high)
        if seen is None:
            found = self.grid_from(self.observer.observe_ends(low, high))
            self.set_grid(found)
            return found if self.scale.dtype == found.scale.dtype else self.snapshot()
        self.scale.fill_(seen.scale)
        self.zero_point.fill_(seen.zero_point)
        self.seen_data = True
        return seen

    @torch.no_grad()
    def set_grid(self, qparams: QParams) -> None:
        """Use this grid from now on, one of a checkpoint for example; an observer that is enabled goes on from its own.

        Args:
            qparams: Of the spec's codes and axis.
        """
        if self.scale.shape == qparams.scale.shape:
            self.scale.copy_(qparams.scale)
            self.zero_point.copy_(qparams.zero_point)
        else:
            self.scale, self.zero_point = qparams.scale, qparams.zero_point
        self.seen_data = True

    def get_extra_state(self) -> Tensor:
        """The switches, as a uint8 tensor (3,): observer, fake-quant, seen data."""
        return torch.tensor([self.observer_enabled, self.fake_quant_enabled, self.seen_data], dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Restore the switches from a state dict."""
        self.observer_enabled, self.fake_quant_enabled, self.seen_data = (bool(value) for value in state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Per-channel buffers are scalars until data is seen: take the shape that is loaded.
        for module, place in ((self, prefix), (self.observer, f"{prefix}observer.")):
            for name, old in list(module._buffers.items()):
                new = state_dict.get(place + name)
                if old is not None and new is not None and old.shape != new.shape:
                    setattr(module, name, torch.empty_like(new, device=old.device, dtype=old.dtype))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """What is wanted and what was found."""
        parts = [str(self.spec)]
        if not self.stateless:
            if not self.seen_data:
                parts.append("no data seen")
            elif self.scale.ndim == 0:
                parts.append(f"scale={self.scale.item():.4g}, zero_point={self.zero_point.item()}")
        if not self.fake_quant_enabled:
            parts.append("fake-quant off")
        if not self.observer_enabled:
            parts.append("observer off")
        return ", ".join(parts)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"
