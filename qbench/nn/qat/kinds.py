"""Kinds of linear parts: how each is called and where its weight keeps its output channels."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from qbench.errors import FusionError
from qbench.nn.qat.body import QatLayer
from qbench.numerics.fold import WeightLayout


class ConvKind(QatLayer):
    """Convolutions: `_conv_forward` knows the padding modes."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(batch, in, …) -> (batch, out, …)."""
        return self._conv_forward(x, weight, bias)  # type: ignore[operator]


class ConvTransposeKind(QatLayer):
    """Transposed convolutions: the weight is (in, out/groups, …)."""

    groups: int

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: list[int] | None = None) -> Tensor:
        """(batch, in, …) -> (batch, out, …)."""
        layer: Any = self
        dims = weight.ndim - 2
        padding = layer._output_padding(
            x, output_size, layer.stride, layer.padding, layer.kernel_size, dims, layer.dilation
        )
        call = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
        return call(x, weight, bias, layer.stride, layer.padding, padding, layer.groups, layer.dilation)

    def layout(self) -> WeightLayout:
        """Output channels along axis 1, for each group."""
        return WeightLayout(transposed=True, groups=self.groups)


class LinearKind(QatLayer):
    """Fully connected layers."""

    channel_axis = -1

    def forward(self, input: Tensor, *args: Any) -> Tensor:
        """Input on its grid -> output on its grid.

        Raises:
            FusionError: BatchNorm1d follows, and the input has more than two axes: it would normalise axis 1.
        """
        if self.bn is not None and input.ndim > 2:
            raise FusionError(
                f"{type(self).__name__}: input {tuple(input.shape)} has {input.ndim} axes; Linear puts its channels "
                "last, BatchNorm1d takes axis 1, so the two do not fold there: flatten the input to (batch, features)"
            )
        return super().forward(input, *args)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(…, in) -> (…, out)."""
        return F.linear(x, weight, bias)


class Conv1dKind(ConvKind, nn.Conv1d):
    """Conv1d."""

    linear_type = nn.Conv1d
    channel_axis = -2


class Conv2dKind(ConvKind, nn.Conv2d):
    """Conv2d."""

    linear_type = nn.Conv2d
    channel_axis = -3


class Conv3dKind(ConvKind, nn.Conv3d):
    """Conv3d."""

    linear_type = nn.Conv3d
    channel_axis = -4


class ConvTranspose2dKind(ConvTransposeKind, nn.ConvTranspose2d):
    """ConvTranspose2d."""

    linear_type = nn.ConvTranspose2d
    channel_axis = -3


class LinearLayerKind(LinearKind, nn.Linear):  # type: ignore[misc]  # nn.Linear says that its bias is never None
    """Linear."""

    linear_type = nn.Linear
