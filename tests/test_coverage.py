"""What quantization_coverage counts, on models whose counts are known."""

from __future__ import annotations

import pytest
import torch
from models import Calls
from torch import nn

import qbench
from qbench.errors import PreparationError

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def covered(model: nn.Module, **options: object) -> object:
    prepared = qbench.prepare_qat(
        qbench.fuse(model), qconfig=qbench.get_qconfig(**options), example_inputs=(X,)
    )
    return qbench.quantization_coverage(prepared)


def test_everything_is_counted_once() -> None:
    shared = nn.Conv2d(8, 8, 3, padding=1)
    found = covered(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), shared, nn.ReLU(), shared, nn.BatchNorm2d(8))
    )
    assert (found.batch_norms, found.folded, found.affine) == (2, 1, 1)
    assert (found.layers, found.quantized_layers, found.linked_layers) == (2, 2, 1)
    assert found.parameters == found.quantized_parameters == 3 * 8 * 9 + 8 + 16 + 8 * 8 * 9 + 8 + 16
    assert [left.kind for left in found.left_in_float] == ["forward"] and "more than once" in str(found)
    assert found.float_operations == () and len(found.float_inputs) == 1
    assert "1 of 2 (50 %) BatchNorms are folded, 1 are layers of their own" in str(found)
    assert "quantized where it is read: an input of the model" in str(found)


def test_what_stays_float_is_named_with_its_reason() -> None:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        spectrum = torch.fft.rfft(m.conv(x)).real
        return m.head(spectrum, spectrum)

    model = Calls(forward, conv=nn.Conv2d(3, 4, 1), head=nn.Bilinear(5, 5, 2))
    with pytest.warns(qbench.errors.QBenchWarning, match="leaves 1 module"):
        found = covered(model)
    assert (found.layers, found.quantized_layers, found.linked_layers) == (2, 1, 0)
    assert [(left.path, left.kind) for left in found.left_in_float] == [("head", "Bilinear")]
    text = str(found)
    assert "left in float: Bilinear: " in text and "computed in float: aten._fft_r2c" in text
    assert "1 of 2 (50 %) layers with a weight" in text


def test_weight_only_layers_need_no_link() -> None:
    found = covered(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)), activation_bits=None)
    assert (found.layers, found.quantized_layers, found.linked_layers) == (2, 2, 2)


def test_a_model_that_was_not_prepared_is_refused() -> None:
    with pytest.raises(PreparationError, match="was not made by prepare_qat"):
        qbench.quantization_coverage(nn.Conv2d(3, 4, 1))
