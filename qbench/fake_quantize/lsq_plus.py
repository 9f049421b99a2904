"""LSQ+: learned scale and offset, for activations (Y. Bhalgat et al., CVPR workshops 2020, arXiv:2004.09576).

    x̂ = (clamp(rne(x/s) + z, qmin, qmax) − z)·s          z = clamp(rne(−β/s), qmin, qmax)

    ∂x̂/∂x = 1  inside, else 0
    ∂x̂/∂s = rne(x/s) − x/s  inside,   qmin − r below,   qmax − r above        r = z + β/s, the residual of z, held
    ∂x̂/∂β = 0  inside,   1 outside
    both times g = 1/sqrt(N·Q_P),  Q_P = qmax − z₀

The paper's grid, `x̂ = s·rne((x − β)/s) + β`, has its zero at any place. Integer hardware has an integer zero point, so
`β` is rounded to whole steps and the gradient passes straight through: the paper's equations 4 and 5, up to `r`. A zero
point that would leave the codes stays at their end, and the gradient still passes, so that `β` can come back.

The start is the range of the data: s₀ = (max − min)/(qmax − qmin) and β₀ = −z₀·s₀ (the paper's section 3.2 minimises
the squared error instead: `observer="mse"`). A scale that turns negative is reflected, as in LSQ.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qbench.errors import ConfigError
from qbench.fake_quantize.lsq import LSQ
from qbench.numerics.qparams import QParams, QSpec
from qbench.numerics.straight_through import GridGradient, fake_quantize_ste, scale_gradient, straight_through


class LSQPlus(LSQ):
    """Activation quantizer with a learned scale and a learned zero point.

    Attributes:
        offset_start: float32 buffer (): `β₀`.
        offset_change: float32 parameter (): what was learned of `β`.
    """

    roles = ("activation",)

    offset_start: Tensor

    @classmethod
    def check_spec(cls, spec: QSpec) -> None:
        """Refuse symmetric specs, which have no zero point to learn, and grids of powers of two."""
        super().check_spec(spec)
        if spec.symmetric:
            raise ConfigError(f"LSQ+ learns a zero point, and {spec} has none; LSQ learns the scale: method='lsq'")

    def _add_grid(self) -> None:
        super()._add_grid()
        self.register_buffer("offset_start", torch.tensor(0.0))
        self.offset_change = nn.Parameter(torch.tensor(0.0))

    @property
    def zero_point(self) -> Tensor:  # type: ignore[override]
        """The zero point in use, int32, ()."""
        return self._zero_point(self.scale).detach().to(torch.int32)

    def snapshot(self) -> QParams:
        """The grid in use, with the gradient to the scale."""
        scale = self.scale_in_use()
        return self._grid(scale, self._zero_point(scale).detach().to(torch.int32))

    def fake_quantize(self, x: Tensor, qparams: QParams) -> Tensor:
        """`x` on the grid, with the gradients to `s` and `β`."""
        return fake_quantize_ste(x, qparams, self.zero_point_of(qparams))

    @property
    def grid_gradient(self) -> GridGradient | None:
        """See `FakeQuantize.grid_gradient`."""
        return "residual" if type(self).fake_quantize is LSQPlus.fake_quantize else None

    def zero_point_of(self, grid: QParams) -> Tensor | None:
        """See `LearnedFakeQuantize.zero_point_of`."""
        return self._zero_point(grid.scale)

    def _zero_point(self, scale: Tensor) -> Tensor:
        """`z`, float32, (), with the gradients to `s` and `β`."""
        offset = self.offset_start.float() + self.offset_change.float()
        exact = -scale_gradient(offset, self.gradient_scale()) / scale
        return straight_through(exact, torch.round(exact).clamp(self.spec.qmin, self.spec.qmax))

    def _set_start(self, found: QParams, moved: Tensor) -> None:
        moved = moved | (self.offset_change != 0)
        super()._set_start(found, moved)
        offset = -found.zero_point * found.scale
        self.offset_start.copy_(torch.where(moved, self.offset_start, offset))
