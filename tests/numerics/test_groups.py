"""Grids per group of input features: (out, in/group_size) scales on a weight (out, in)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qbench.errors import ConfigError, NumericsError
from qbench.numerics.fold import WeightLayout
from qbench.numerics.qparams import (
    QParams,
    QSpec,
    along_axis,
    dequantize,
    fake_quantize,
    in_groups,
    inside_range,
    quantize,
)
from qbench.numerics.straight_through import fake_quantize_ste
from qbench.numerics.weights import folded_grid, moving_grid
from qbench.observers import LatestMinMaxObserver

OUT, IN = 6, 24
SPECS = {
    "int4": QSpec(bits=4, symmetric=True, axis=0, group_size=8),
    "int4 narrow": QSpec(bits=4, symmetric=True, axis=0, narrow=True, group_size=4),
    "int8": QSpec(bits=8, symmetric=True, axis=0, group_size=12),
    "uint4": QSpec(bits=4, signed=False, axis=0, group_size=8),
    "power of two": QSpec(bits=8, symmetric=True, axis=0, power_of_two=True, group_size=6),
}
SYMMETRIC = ("int4", "int4 narrow", "int8")


def weight(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-3, 1, OUT * IN).reshape(OUT, IN)
    return torch.randn(OUT, IN, generator=generator) * sizes[torch.randperm(OUT, generator=generator)]


def same_bits(a: Tensor, b: np.ndarray) -> bool:
    return np.array_equal(a.detach().numpy().view(np.int32), np.asarray(b, np.float32).view(np.int32))


def rows_of(w: Tensor, size: int) -> list[Tensor]:
    """Each group as a tensor of its own, in the order of a flattened (out, in/group_size)."""
    return [w[row, start : start + size] for row in range(OUT) for start in range(0, IN, size)]


@pytest.mark.parametrize("name", SPECS)
def test_every_group_is_quantized_as_if_it_were_alone(name: str) -> None:
    spec, w = SPECS[name], weight()
    size = spec.group_size
    assert size is not None
    alone = QSpec(spec.bits, spec.signed, spec.symmetric, None, spec.narrow, spec.power_of_two)
    found = LatestMinMaxObserver(spec)(w)
    assert found.scale.shape == found.zero_point.shape == (OUT, IN // size)
    codes, values, inside = quantize(w, found), fake_quantize(w, found), inside_range(w, found)
    back = dequantize(codes, found)
    for index, part in enumerate(rows_of(w, size)):
        row, column = divmod(index, IN // size)
        here = slice(column * size, (column + 1) * size)
        grid = LatestMinMaxObserver(alone)(part)
        assert found.scale[row, column] == grid.scale and found.zero_point[row, column] == grid.zero_point
        assert torch.equal(codes[row, here], quantize(part, grid))
        assert same_bits(back[row, here], dequantize(quantize(part, grid), grid).numpy())
        assert torch.equal(values[row, here], fake_quantize(part, grid))
        assert torch.equal(inside[row, here], inside_range(part, grid))
    assert torch.equal(values, back)
    assert len(codes.unique()) > 12


def test_values_are_spread_over_their_group() -> None:
    values = torch.arange(6.0).reshape(2, 3)
    assert along_axis(values, 0, 2, 2).tolist() == [[0, 0, 1, 1, 2, 2], [3, 3, 4, 4, 5, 5]]


def test_in_groups_keeps_the_order() -> None:
    assert in_groups(torch.arange(12).reshape(2, 6), 3).tolist() == [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]]


@pytest.mark.parametrize("signs", [(1, 1, 1, 1, 1, 1), (1, -1, 1, -1, -1, 1), (0, 1, -1, 1, 0, 1)])
@pytest.mark.parametrize("name", SYMMETRIC)
def test_codes_of_a_folded_weight_are_those_of_the_weight(name: str, signs: tuple[int, ...]) -> None:
    spec, w = SPECS[name], weight(1)
    k = torch.tensor(signs) * torch.tensor([0.3, 2.0, 1e-3, 7.0, 1.0, 40.0])
    own = LatestMinMaxObserver(spec)(w)
    grid = moving_grid(w, k, WeightLayout(), own, None)
    expected = quantize(w, own).long() * torch.tensor(signs)[:, None]
    assert torch.equal(grid.codes().long(), expected)
    step = k.abs()[:, None] * own.scale
    live = k != 0
    assert torch.equal(grid.qparams.scale[live], step[live])
    assert (grid.qparams.scale > 0).all()
    assert torch.equal(grid.folded()[live], dequantize(grid.codes(), grid.qparams)[live])
    assert torch.equal(grid.unfolded(), dequantize(quantize(w, own), own))
    assert grid.silenced.shape == (OUT,) and not grid.silenced.any() and (grid.coarsened == 1).all()


@pytest.mark.parametrize("name", ["uint4", "power of two"])
def test_other_grids_take_the_folded_weight(name: str) -> None:
    spec, w = SPECS[name], weight(2)
    k = torch.tensor([0.3, -2.0, 1e-3, 0.0, 1.0, -40.0])
    choose = LatestMinMaxObserver(spec)
    grid = folded_grid(w, k, WeightLayout(), choose, None, power_of_two=spec.power_of_two)
    folded = w * k[:, None]
    assert torch.equal(grid.codes(), quantize(folded, choose(folded)))
    assert grid.silenced.shape == (OUT,) and not grid.silenced.any() and (grid.coarsened == 1).all()
    assert torch.equal(grid.unfolded()[3], w[3])  # k = 0: the weight as it is


def test_gradient_of_a_learned_scale_is_summed_over_its_group() -> None:
    w = weight(3).requires_grad_()
    found = LatestMinMaxObserver(SPECS["int4"])(w)
    scale = (found.scale * 0.7).requires_grad_()  # some values are clipped
    gradient = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(4))
    fake_quantize_ste(w, QParams(scale, found.zero_point, -8, 7, 0, 8)).backward(gradient)
    assert scale.grad is not None and w.grad is not None and scale.grad.shape == (OUT, 3)
    for row in range(OUT):
        for column in range(3):
            here = slice(8 * column, 8 * column + 8)
            part = w.detach()[row, here].clone().requires_grad_()
            own = scale.detach()[row, column].clone().requires_grad_()
            one = QParams(own, torch.tensor(0, dtype=torch.int32), -8, 7)
            fake_quantize_ste(part, one).backward(gradient[row, here])
            assert part.grad is not None and own.grad is not None
            assert torch.equal(w.grad[row, here], part.grad)
            assert scale.grad[row, column].item() == pytest.approx(own.grad.item(), rel=1e-5, abs=1e-6)
    assert 0 < int((w.grad == 0).sum()) < OUT * IN


WRONG_SPECS = {
    "a group of one": (lambda: QSpec(axis=0, group_size=1), "group_size=1.*2 or more.*group_size=32"),
    "no number": (lambda: QSpec(axis=0, group_size=8.0), "group_size=8.0"),  # type: ignore[arg-type]
    "per tensor": (lambda: QSpec(group_size=32), r"axis=None, group_size=32.*QSpec\(axis=0, group_size=32\)"),
    "other axis": (lambda: QSpec(axis=1, group_size=32), r"QSpec\(axis=0, group_size=32\)"),
}


@pytest.mark.parametrize("case", WRONG_SPECS)
def test_wrong_specs(case: str) -> None:
    make, message = WRONG_SPECS[case]
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("columns", "size", "nearest"), [(24, 16, "group_size=12"), (24, 5, "group_size=4"), (64, 48, "group_size=32")]
)
def test_a_group_size_that_does_not_divide_names_the_nearest_that_does(columns: int, size: int, nearest: str) -> None:
    with pytest.raises(NumericsError, match=f"group_size={size}.*{columns} input features.*{nearest} is the nearest"):
        LatestMinMaxObserver(QSpec(bits=4, symmetric=True, axis=0, group_size=size))(torch.ones(3, columns))


def test_a_convolution_has_no_groups_of_weights() -> None:
    with pytest.raises(NumericsError, match=r"shape \(4, 8, 3, 3\).*group_size=None"):
        in_groups(torch.ones(4, 8, 3, 3), 4)


def test_shapes_of_a_grid_per_group() -> None:
    with pytest.raises(NumericsError, match=r"group_size=8.*\(6,\).*\(out, in/group_size\)"):
        QParams(torch.ones(6), torch.zeros(6, dtype=torch.int32), -8, 7, 0, 8)
    assert str(SPECS["int4"]) == "int4 symmetric per group of 8"
