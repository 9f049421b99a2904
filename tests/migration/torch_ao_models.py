"""torch.ao, where this PyTorch still has it, and small models written for it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    ao = pytest.importorskip("torch.ao.quantization", reason="this PyTorch has no torch.ao any more")
    nni = pytest.importorskip("torch.ao.nn.intrinsic")

# What torch.ao says of itself; pytest makes errors of warnings.
QUIET = [
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Please use quant_min and quant_max:UserWarning"),
]


class Block(nn.Module):
    """Everything that torch.ao asks of a model: stubs, FloatFunctionals, chains to fuse."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.quant, self.dequant = ao.QuantStub(), ao.DeQuantStub()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.skip_add, self.gate, self.join = (functional() for _ in range(3))
        self.sigmoid = nn.Sigmoid()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(self.quant(x))))
        y = self.skip_add.add_relu(self.bn2(self.conv2(x)), x)
        y = self.gate.mul(y, self.sigmoid(y))
        y = self.join.cat([x, y], dim=1)
        return self.dequant(self.fc(torch.flatten(self.pool(y), 1)))

    def fuse_model(self) -> Block:
        return ao.fuse_modules_qat(self, [["conv1", "bn1", "relu1"], ["conv2", "bn2"]], inplace=True)


def functional() -> Any:
    return torch.ao.nn.quantized.FloatFunctional()
