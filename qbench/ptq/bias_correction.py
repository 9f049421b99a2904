"""Empirical bias correction: the mean of each output channel becomes that of the float model again.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, arXiv:1906.04721,
section 4.2. `y` is what a layer puts out before its activation, its BatchNorm folded, over all samples and positions:

    c = E[y_float] − E[y_quantized]                                          (out,)
    β ← β + c      with a BatchNorm                b ← b + c      without one
    b ← b + c/k    with a BatchNorm without β      (where k = 0 nothing can be corrected)

In sequence, layer after layer in the order of the forward: E[y_quantized] is that of a model whose earlier layers are
corrected, so that each layer makes up for what is left. In one pass, every layer also makes up for what the correction
of the layers before it removes already; it costs one forward a batch instead of one a batch and layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qbench.errors import ConfigError, NumericsError
from qbench.fake_quantize import FakeQuantize
from qbench.modes import evaluating
from qbench.nn.qat.layer import QatLayer
from qbench.numerics.fold import BatchNormTensors, fold_factor
from qbench.preparation import quantized_modules
from qbench.ptq.calibration import Batches, as_tuples, check_calibrated, in_float
from qbench.ptq.chains import SkippedLayer
from qbench.report.text import bullets, columns


@dataclasses.dataclass(frozen=True)
class CorrectedLayer:
    """A layer, and the mean error of its channels, |E[y_float] − E[y_quantized]| averaged over channels.

    Attributes:
        path: Of the layer.
        where: What took the correction, `"bn.bias"` or `"bias"`.
        created: Whether the layer had no such bias before: the state dict has a new key.
        before: Mean error before any layer was corrected.
        after: Mean error after all were.
    """

    path: str
    where: str
    created: bool
    before: float
    after: float


@dataclasses.dataclass(frozen=True)
class BiasCorrectionReport:
    """What bias correction did.

    Attributes:
        layers: The layers that were corrected, in the order of the forward.
        skipped: Every other layer, and why.
        batches: How many batches were seen.
    """

    layers: tuple[CorrectedLayer, ...]
    skipped: tuple[SkippedLayer, ...]
    batches: int

    def __str__(self) -> str:
        rows = [("layer", "corrected", "mean error before", "after")]
        for layer in self.layers:
            where = f"{layer.where}, new" if layer.created else layer.where
            rows.append((layer.path, where, f"{layer.before:.3g}", f"{layer.after:.3g}"))
        head = f"{len(self.layers)} layers corrected on {self.batches} batches"
        notes = bullets([f"{skipped.path}: {skipped.reason}" for skipped in self.skipped])
        return "\n".join([head, *columns(rows, frozenset({2, 3})), *notes])


def correct_biases(prepared: nn.Module, batches: Batches, *, sequential: bool = True) -> BiasCorrectionReport:
    """Add to each layer's bias what quantization took from the mean of its output. The model is changed in place.

    Once, and before training: the float model that it is compared with is the model itself with fake-quant off, which
    the correction moves along, so a second call would correct against the first one's result.

    Args:
        prepared: A prepared model whose quantizers have seen data (`qbench.ptq.calibrate`), in either mode.
        batches: Inputs, as for `calibrate`; they are kept until the end.
        sequential: Layer after layer, or all in one pass.

    Returns:
        Each layer's mean error before and after; `print` shows it.

    Raises:
        PreparationError: the model was not prepared, or its links are not recorded yet.
        NumericsError: a quantizer has seen no data.
        ConfigError: there is no batch, or a weight quantizer (DoReFa) has no float layer to compare with.
    """
    check_calibrated(prepared, "correct_biases")
    kept = list(as_tuples(batches, "correct_biases"))
    if not kept:
        raise ConfigError("correct_biases: got no batch; correct_biases(model, [x]) works")
    layers = {path: m for path, m in quantized_modules(prepared) if isinstance(m, QatLayer)}
    _check_comparable(layers)
    with evaluating(prepared):
        with in_float(prepared):
            wanted = _means(prepared, kept, [layer for layer in layers.values() if not _computes_bias(layer)])
        before = _means(prepared, kept, wanted)
        created = {layer: _make_room(layer) for layer in wanted}
        if sequential:
            for layer in wanted:
                _correct(layer, wanted[layer] - _means(prepared, kept, [layer])[layer])
        else:
            for layer in wanted:
                _correct(layer, wanted[layer] - before[layer])
        after = _means(prepared, kept, wanted)
    paths = {layer: path for path, layer in layers.items()}
    found = (
        CorrectedLayer(paths[layer], _where(layer), created[layer], *_errors(mean, before[layer], after[layer]))
        for layer, mean in wanted.items()
    )
    skipped = (SkippedLayer(path, _why_not(layer)) for path, layer in layers.items() if layer not in wanted)
    return BiasCorrectionReport(tuple(found), tuple(skipped), len(kept))


def check_float_weight(layer: QatLayer, path: str, caller: str) -> None:
    """Raise ConfigError where the quantizer of a weight quantizes something else than the weight.

    Raises:
        ConfigError: as said; the message names the quantizer.
    """
    quantizer = layer.weight_quantizer
    if type(quantizer).shaped is not FakeQuantize.shaped:
        raise ConfigError(
            f"{caller}: {path} has weights of {type(quantizer).__name__}, which quantizes a function of the weight, so "
            "that the float layer computes something else; get_qconfig(weight_method='fixed') or 'lsq' works"
        )


def _check_comparable(layers: Mapping[str, QatLayer]) -> None:
    for path, layer in layers.items():
        check_float_weight(layer, path, "correct_biases")


class _ChannelMean:
    """Mean over samples and positions of what a layer puts out before its activation: a forward pre-hook of it."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def __call__(self, layer: QatLayer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given, *rest = (*args, *kwargs.values())
        (x,) = layer.quantized_inputs((given,))
        # (…, out, …) -> (out, values) -> (out,)
        channels = layer.folded_output(x, *rest).double().movedim(layer.channel_axis, 0).flatten(1)
        total = channels.sum(1)
        self.total = total if self.total is None else self.total + total
        self.count += channels.shape[1]


def _means(
    model: nn.Module, batches: Iterable[tuple[Any, ...]], layers: Iterable[QatLayer]
) -> dict[QatLayer, Tensor]:
    """E[y] of the layers that are reached, float64 (out,), in the order in which they are called."""
    found: dict[QatLayer, _ChannelMean] = {}
    hooks = []
    for chosen in layers:

        def note(layer: QatLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.setdefault(layer, _ChannelMean())(layer, args, kwargs)

        hooks.append(chosen.register_forward_pre_hook(note, with_kwargs=True))
    try:
        for inputs in batches:
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: mean.total / mean.count for layer, mean in found.items() if mean.total is not None}


def _computes_bias(layer: QatLayer) -> bool:
    return layer.batch_norm is not layer and layer.linear_bias is not layer.bias


def _why_not(layer: QatLayer) -> str:
    return "its bias is computed from its parameters" if _computes_bias(layer) else "no batch reached it"


def _where(layer: QatLayer) -> str:
    return "bn.bias" if layer.bn is not None and layer.batch_norm.bias is not None else "bias"


def _make_room(layer: QatLayer) -> bool:
    """Give a layer without any bias one of zeros; whether it was needed."""
    if _where(layer) == "bn.bias" or layer.bias is not None:
        return False
    weight = layer.linear_weight
    layer.bias = nn.Parameter(weight.new_zeros(layer.layout().out_channels(weight)))
    return True


def _correct(layer: QatLayer, error: Tensor) -> None:
    """Add `c`, (out,), to what the layer adds."""
    bn = layer.batch_norm
    if not bool(torch.isfinite(error).all()):
        raise NumericsError(f"correct_biases: {layer.label} puts out NaN or infinity on these batches")
    if bn is not None and bn.bias is not None:
        bn.bias.add_(error.to(bn.bias.dtype))
        return
    if bn is not None:
        factor = fold_factor(BatchNormTensors(bn.weight, None, bn.running_mean, bn.running_var, bn.eps)).double()
        error = torch.where(factor == 0, 0.0, error / torch.where(factor == 0, 1.0, factor))
    assert layer.bias is not None
    layer.bias.add_(error.to(layer.bias.dtype))


def _errors(wanted: Tensor, *found: Tensor) -> tuple[float, ...]:
    return tuple(float((wanted - mean).abs().mean()) for mean in found)
