"""Writing a grid into a quantizer, whether it observes its range or learns its scale."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from qbench.checkpoints.source import SourceQuantizer
from qbench.fake_quantize import FakeQuantize
from qbench.fake_quantize.learned import LearnedFakeQuantize
from qbench.nn.qat.layer import QatLayer
from qbench.numerics.fold import fold_factor
from qbench.numerics.qparams import QParams


def set_grid(quantizer: FakeQuantize, qparams: QParams, source: SourceQuantizer | None) -> None:
    """Give an activation quantizer a grid, and the range and switches of the source's quantizer if there is one."""
    device = quantizer.scale.device
    qparams = dataclasses.replace(qparams, scale=qparams.scale.to(device), zero_point=qparams.zero_point.to(device))
    _start_at(quantizer, qparams)
    for name in ("min_val", "max_val"):
        value = None if source is None else source.find(name)
        if value is None:  # a grid without a range: the one that it covers
            code = qparams.qmin if name == "min_val" else qparams.qmax
            value = (code - qparams.zero_point) * qparams.scale
        if hasattr(quantizer.observer, name):
            getattr(quantizer.observer, name).copy_(value.reshape(()).to(device))
    for name in ("observer_enabled", "fake_quant_enabled"):
        flag = None if source is None else source.find(name)
        if flag is not None:
            setattr(quantizer, name, bool(flag.any()))


def _start_at(quantizer: FakeQuantize, qparams: QParams) -> None:
    """Set a grid; the observer of a learned quantizer, which would find another start, has then done its part."""
    quantizer.set_grid(qparams)
    if isinstance(quantizer, LearnedFakeQuantize):
        quantizer.learning = True


def set_weight_scale(layer: QatLayer, scale: Tensor) -> None:
    """A scale of the folded weight `k·W`, learned elsewhere, as that of `W`, which is what scales along here."""
    quantizer, bn = layer.weight_quantizer, layer._bn_tensors()
    assert isinstance(quantizer, LearnedFakeQuantize)
    scale = scale.detach().abs().to(quantizer.scale.device).reshape(quantizer.scale.shape).float()
    if bn is not None and quantizer.scales_with_tensor:
        factor = fold_factor(bn).abs()
        scale = torch.where(factor > 0, scale / factor, scale)
    spec = quantizer.spec
    zero_point = torch.zeros_like(scale, dtype=torch.int32)
    _start_at(quantizer, QParams(scale, zero_point, spec.qmin, spec.qmax, spec.axis))
