"""The two nets of the ablation: small enough that digits of 8 x 8 pixels are not all told apart.

    dense      3 → w → w/2 → 2w/2          conv 3x3, BN, ReLU each         (/2: stride 2)
    depthwise  3 → w → w → 2w/2 → 2w/2     the first is dense, then depthwise 3x3, BN, ReLU, pointwise 1x1, BN, ReLU

Both end in the mean over the pixels and a linear layer. Each BN gives its layer a folded bias, which is what the
ablation is about; the depthwise net has twice as many of them, with nine weights a channel beside each.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

CLASSES = 10


def dense(width: int = 4) -> nn.Sequential:
    """Three dense convolutions; images (batch, 3, height, width) -> (batch, 10)."""
    return nn.Sequential(
        *_conv_bn_relu(3, width, 3),
        *_conv_bn_relu(width, width, 3, stride=2),
        *_conv_bn_relu(width, 2 * width, 3, stride=2),
        *_head(2 * width),
    )


def depthwise(width: int = 6) -> nn.Sequential:
    """A dense convolution and three depthwise-separable ones; images (batch, 3, height, width) -> (batch, 10)."""
    return nn.Sequential(
        *_conv_bn_relu(3, width, 3),
        *_separable(width, width, 1),
        *_separable(width, 2 * width, 2),
        *_separable(2 * width, 2 * width, 2),
        *_head(2 * width),
    )


def _separable(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    return [
        *_conv_bn_relu(inputs, inputs, 3, stride=stride, groups=inputs),
        *_conv_bn_relu(inputs, outputs, 1),
    ]


def _conv_bn_relu(inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


def _head(inputs: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES)]


NETS: dict[str, Callable[[], nn.Module]] = {"dense": dense, "depthwise": depthwise}
