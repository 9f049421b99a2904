"""Kinds of linear parts: how each is called and where its weight keeps its output channels."""

from __future__ import annotations

from typing import Any, ClassVar, cast

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from qbench.errors import FusionError
from qbench.nn.frozen import known_types
from qbench.nn.intrinsic.fused import Fused, as_types
from qbench.nn.qat.body import adopt_state
from qbench.nn.qat.layer import QatLayer
from qbench.numerics.fold import WeightLayout
from qbench.numerics.layer_step import Convolution
from qbench.qconfig import QConfig


class ConvKind(QatLayer):
    """Convolutions: `_conv_forward` knows the padding modes."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(batch, in, …) -> (batch, out, …)."""
        return self._conv_forward(x, weight, bias)  # type: ignore[operator]

    def convolution(self) -> Convolution | None:
        """See `QatLayer.convolution`: where `linear` is this one, and it pads with zeros, as many on either side."""
        layer, kind, torch_kind = cast("Any", self), cast("Any", type(self)), cast("Any", self.linear_type)
        own = kind.linear is ConvKind.linear and kind._conv_forward is torch_kind._conv_forward
        if not own or "linear" in vars(self) or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            return None
        return Convolution(layer.stride, layer.padding, layer.dilation, layer.groups)


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


class ConvTranspose1dKind(ConvTransposeKind, nn.ConvTranspose1d):
    """ConvTranspose1d."""

    linear_type = nn.ConvTranspose1d
    channel_axis = -2


class ConvTranspose2dKind(ConvTransposeKind, nn.ConvTranspose2d):
    """ConvTranspose2d."""

    linear_type = nn.ConvTranspose2d
    channel_axis = -3


class ConvTranspose3dKind(ConvTransposeKind, nn.ConvTranspose3d):
    """ConvTranspose3d."""

    linear_type = nn.ConvTranspose3d
    channel_axis = -4


class LinearLayerKind(LinearKind, nn.Linear):  # type: ignore[misc]  # nn.Linear says that its bias is never None
    """Linear."""

    linear_type = nn.Linear


class BatchNormKind(QatLayer):
    """A BatchNorm that no layer before it can take: the depthwise 1 × 1 convolution of ones, folded with it.

        W = 1, (channels, 1, …)        W_f = k        b_f = β − k · μ

    Its weight codes are those of `k` alone, its bias an int32 one at `s_in · s_w`, and the runtimes know the operator.
    In training it normalises with the batch's statistics, the bias error outside, like every other layer. Parameters
    and statistics keep their names. It derives from no BatchNorm: convert_sync_batchnorm would replace one.
    """

    channel_axis = 1
    dims: ClassVar[int]
    num_features: int
    running_mean: Tensor

    def __init__(self, *args: Any, qconfig: QConfig, **kwargs: Any) -> None:
        nn.Module.__init__(self)
        adopt_state(self, self.linear_type(*args, **kwargs))
        self._complete(None, self.activation() if self.activation else None, qconfig)

    @classmethod
    def accepts(cls, module: nn.Module, qconfig: QConfig) -> str:
        """See `QatModule.accepts`."""
        bn: Any = module[0] if isinstance(module, Fused) else module
        if qconfig.weight_only:
            return "weight-only quantization takes convolutions and linear layers; a BatchNorm has a factor a channel"
        if bn.running_mean is None or bn.running_var is None:
            return "it has no running statistics, so there is no affine to deploy: track_running_stats=True"
        return ""

    def _adopt(self, module: nn.Module, qconfig: QConfig) -> None:
        parts = tuple(module) if isinstance(module, Fused) else (module,)
        if isinstance(module, Fused):
            module.check_parts(parts)
        reason = self.accepts(module, qconfig)
        if reason:
            raise FusionError(f"{type(self).__name__}.from_float({type(parts[0]).__name__}): {reason}")
        adopt_state(self, parts[0])
        kinds = as_types(self.float_type.part_types[0]) if issubclass(self.float_type, Fused) else (self.float_type,)
        # Of this very module: a wrapper takes one with statistics of its own, or one with fixed ones.
        self.linear_type = next(kind for kind in known_types(parts[0]) if kind in kinds)  # type: ignore[misc]
        self.num_features = len(self.running_mean)  # that of torchvision's frozen one is not kept
        self._complete(None, parts[1] if len(parts) > 1 else None, qconfig)

    @property
    def batch_norm(self) -> Any:
        """See `QatLayer.batch_norm`: the module itself."""
        return self

    @property
    def learns_statistics(self) -> bool:
        """See `QatLayer.learns_statistics`."""
        return issubclass(self.linear_type, _BatchNorm)

    @property
    def batch_norm_type(self) -> type[Any]:
        """See `QatLayer.batch_norm_type`."""
        return self.linear_type

    def _check_input_dim(self, input: Tensor) -> None:
        kind: Any = self.linear_type
        kind._check_input_dim(self, input)

    @property
    def linear_weight(self) -> Tensor:
        """See `QatLayer.linear_weight`: ones, (channels, 1, …)."""
        return self.running_mean.new_ones(self.num_features, 1, *[1] * self.dims)

    @property
    def linear_bias(self) -> None:
        """See `QatLayer.linear_bias`: none, as the BatchNorm's own is what is folded."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(batch, channels, …) -> the same shape."""
        if bias is None:
            # In training. The same products, and not the convolution, which CPUs compute channel by channel.
            return x * weight.reshape(1, -1, *[1] * (x.ndim - 2))
        if x.ndim == 2:  # (batch, channels) -> (batch, channels, 1), or it would be one image without a batch
            return F.conv1d(x.unsqueeze(-1), weight, bias, groups=weight.shape[0]).squeeze(-1)
        call = (F.conv1d, F.conv2d, F.conv3d)[weight.ndim - 3]
        return call(x, weight, bias, groups=weight.shape[0])


class BatchNorm1dKind(BatchNormKind):
    """BatchNorm1d."""

    linear_type: ClassVar[type[nn.Module]] = nn.BatchNorm1d
    dims = 1


class BatchNorm2dKind(BatchNormKind):
    """BatchNorm2d."""

    linear_type: ClassVar[type[nn.Module]] = nn.BatchNorm2d
    dims = 2


class BatchNorm3dKind(BatchNormKind):
    """BatchNorm3d."""

    linear_type: ClassVar[type[nn.Module]] = nn.BatchNorm3d
    dims = 3
