"""The grid of a folded weight: codes, scales and floors, by loops over the channels in numpy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qbench.numerics.fold import WeightLayout
from qbench.numerics.qparams import SMALLEST_SCALE, QParams, QSpec, choose_qparams
from qbench.numerics.weights import FoldedGrid, MovingGrid, WeightGrid, folded_grid, moving_grid

from .support import generator, same_bits

CONV, TRANSPOSED = WeightLayout(), WeightLayout(transposed=True)
layouts = pytest.mark.parametrize("layout", [CONV, TRANSPOSED], ids=["conv", "transposed"])
OUT = 6


def example(layout: WeightLayout, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight with OUT output channels, and a factor with both signs."""
    random = generator(seed)
    weight = random.standard_normal((OUT, 4, 3, 3) if not layout.transposed else (4, OUT, 3, 3)).astype(np.float32)
    factor = (random.uniform(0.2, 3, OUT) * random.choice([-1, 1], OUT)).astype(np.float32)
    return torch.from_numpy(weight), torch.from_numpy(factor)


def channel(weight: Tensor, layout: WeightLayout, index: int) -> np.ndarray:
    return weight.detach().select(layout.axis, index).numpy()


def own_grid(weight: Tensor, layout: WeightLayout, bits: int = 8) -> QParams:
    """Symmetric min–max of the weight itself."""
    qmax = 2 ** (bits - 1) - 1
    largest = [np.abs(channel(weight, layout, index)).max() for index in range(OUT)]
    scale = np.maximum(np.array(largest, np.float32) / np.float32(qmax), np.float32(SMALLEST_SCALE))
    return QParams(torch.from_numpy(scale), torch.zeros(OUT, dtype=torch.int32), -qmax, qmax, layout.axis)


def moving(
    weight: Tensor, factor: Tensor | None, layout: WeightLayout, floor: Tensor | None = None, bits: int = 8
) -> MovingGrid:
    return moving_grid(weight, factor, layout, own_grid(weight, layout, bits), floor)


def by_loops(
    weight: Tensor, factor: Tensor | None, layout: WeightLayout, floor: Tensor | None, bits: int
) -> tuple[list[np.ndarray], list[np.float32], list[np.float32]]:
    """Codes, s_w and t of each output channel."""
    qmax = 2 ** (bits - 1) - 1
    codes, scales, steps = [], [], []
    for index in range(OUT):
        values = channel(weight, layout, index)
        step = np.maximum(np.abs(values).max() / np.float32(qmax), np.float32(SMALLEST_SCALE))
        k = np.float32(1) if factor is None else factor.numpy()[index]
        least = np.float32(0) if floor is None else floor.numpy()[index]
        if k != 0:
            step = max(step, least / abs(k))
        codes.append(np.clip(np.rint(values * (np.float32(1) / step)), -qmax, qmax) * np.sign(k))
        scales.append(max(abs(k) * step if k != 0 else least, np.float32(SMALLEST_SCALE)))
        steps.append(step)
    return codes, scales, steps


@layouts
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("with_floor", [False, True])
@pytest.mark.parametrize("with_factor", [False, True])
class TestMovingGrid:
    def build(self, layout: WeightLayout, bits: int, with_floor: bool, with_factor: bool):
        weight, factor = example(layout)
        factor[2] = 0.0
        floor = torch.tensor([0.0, 1e-6, 0.05, 0.3, 50.0, 1e-3]) if with_floor else None
        used = factor if with_factor else None
        return moving(weight, used, layout, floor, bits), by_loops(weight, used, layout, floor, bits)

    def test_codes_scales_and_values(self, layout, bits, with_floor, with_factor) -> None:
        grid, (codes, scales, steps) = self.build(layout, bits, with_floor, with_factor)
        assert grid.codes().dtype == torch.int8
        np.testing.assert_array_equal(grid.qparams.scale.numpy(), np.array(scales))
        np.testing.assert_array_equal(grid.step.numpy(), np.array(steps))
        np.testing.assert_array_equal(grid.channel_scale().numpy(), np.array(scales))
        for index in range(OUT):
            np.testing.assert_array_equal(channel(grid.codes(), layout, index), codes[index])
            np.testing.assert_array_equal(channel(grid.folded(), layout, index), codes[index] * scales[index])
            k = 1.0 if grid.factor is None else float(grid.factor[index])
            if k != 0:
                np.testing.assert_array_equal(
                    channel(grid.unfolded(), layout, index), codes[index] * np.float32(np.sign(k)) * steps[index]
                )

    def test_what_the_floor_did_is_said(self, layout, bits, with_floor, with_factor) -> None:
        grid, (codes, _, steps) = self.build(layout, bits, with_floor, with_factor)
        plain = own_grid(grid.weight, layout, bits).scale.numpy()
        np.testing.assert_array_equal(grid.coarsened.numpy(), np.array(steps) / plain)
        live = np.ones(OUT, bool) if grid.factor is None else grid.factor.numpy() != 0
        zero = np.array([(np.asarray(code) == 0).all() for code in codes])
        np.testing.assert_array_equal(grid.silenced.numpy(), zero & live)
        assert grid.silenced.any().item() == with_floor

    def test_values_on_the_grid_have_one_zero(self, layout, bits, with_floor, with_factor) -> None:
        # sign(k)·0 must be +0.0: integer codes have no other zero.
        grid, _ = self.build(layout, bits, with_floor, with_factor)
        if with_factor:
            folded = grid.folded()
            assert not torch.signbit(folded[folded == 0]).any()

    def test_gradients(self, layout, bits, with_floor, with_factor) -> None:
        grid, _ = self.build(layout, bits, with_floor, with_factor)
        weight = grid.weight.clone().requires_grad_()
        factor = None if grid.factor is None else grid.factor.clone().requires_grad_()
        live = moving_grid(weight, factor, layout, own_grid(weight, layout, bits), None)
        gradient = torch.randn_like(weight)
        live.unfolded().backward(gradient)
        assert same_bits(weight.grad, gradient)  # the identity
        weight.grad = None
        live.folded().backward(gradient)
        if factor is None:
            assert same_bits(weight.grad, gradient)
            return
        wide = factor.detach().reshape([-1 if dim == layout.axis else 1 for dim in range(4)])
        torch.testing.assert_close(weight.grad, gradient * wide)
        others = [dim for dim in range(4) if dim != layout.axis]
        torch.testing.assert_close(factor.grad, (gradient * weight.detach()).sum(others))


class TestMovingGridProperties:
    @given(
        st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=12),
        st.floats(-50, 50, width=32),
        st.sampled_from([2, 3, 4, 8]),
    )
    def test_a_code_is_within_half_a_step_of_the_folded_weight(self, values: list[float], k: float, bits: int) -> None:
        weight = torch.tensor([values])
        qmax = 2 ** (bits - 1) - 1
        own = choose_qparams(weight.amin(1), weight.amax(1), QSpec(bits=bits, symmetric=True, narrow=True, axis=0))
        grid = moving_grid(weight, torch.tensor([k]), CONV, own, None)
        codes, scale = grid.codes().double(), grid.qparams.scale.double()
        assert codes.abs().max() <= qmax
        folded = weight.double() * np.float64(np.float32(k))
        # half a step, and what float32 loses in t, 1/t and s_w
        bound = scale * (0.5 + 4 * qmax * 2.0**-24)
        assert ((codes * scale - folded).abs() <= bound + qmax * SMALLEST_SCALE).all()

    @given(st.floats(2.0**-20, 1e6, width=32), st.floats(-1e3, 1e3, width=32), st.floats(2.0**-30, 1e3, width=32))
    def test_the_scale_is_below_the_floor_by_roundings_at_most(self, size: float, k: float, least: float) -> None:
        weight = torch.tensor([[size, -size / 3]])
        own = choose_qparams(weight.amin(1), weight.amax(1), QSpec(symmetric=True, narrow=True, axis=0))
        grid = moving_grid(weight, torch.tensor([k]), CONV, own, torch.tensor([least]))
        assert torch.isfinite(grid.qparams.scale).all()
        assert grid.qparams.scale.item() >= np.float32(least) * (1 - 2.0**-22)
        assert grid.coarsened.item() >= 1


def minmax(spec: QSpec) -> Callable[[Tensor], QParams]:
    @torch.no_grad()
    def choose(folded: Tensor) -> QParams:
        if spec.axis is None:
            return choose_qparams(folded.amin(), folded.amax(), spec)
        flat = folded.movedim(spec.axis, 0).flatten(1)
        return choose_qparams(flat.amin(1), flat.amax(1), spec)

    return choose


class TestFoldedGrid:
    SPECS = (
        QSpec(bits=8, symmetric=True, narrow=True),
        QSpec(bits=8, symmetric=True, narrow=True, power_of_two=True),
        QSpec(bits=8),
        QSpec(bits=8, axis=0),
        QSpec(bits=8, symmetric=True, narrow=True, axis=0, power_of_two=True),
    )
    specs = pytest.mark.parametrize("spec", SPECS, ids=str)

    def build(self, spec: QSpec, floor: Tensor | None = None, zero: int | None = None) -> FoldedGrid:
        weight, factor = example(CONV)
        if zero is not None:
            factor[zero] = 0.0
        return folded_grid(weight, factor, CONV, minmax(spec), floor, power_of_two=spec.power_of_two)

    @specs
    def test_codes_are_those_of_the_product(self, spec: QSpec) -> None:
        grid = self.build(spec)
        folded = grid.weight.numpy() * grid.factor.numpy().reshape(-1, 1, 1, 1)
        scale, zero = grid.qparams.scale.numpy(), grid.qparams.zero_point.numpy()
        if spec.axis is not None:
            scale, zero = scale.reshape(-1, 1, 1, 1), zero.reshape(-1, 1, 1, 1)
        codes = np.clip(np.rint(folded * (np.float32(1) / scale)) + zero, spec.qmin, spec.qmax)
        np.testing.assert_array_equal(grid.codes().numpy(), codes)
        hat = (codes - zero).astype(np.float32) * scale
        assert torch.equal(grid.folded(), torch.from_numpy(hat))
        torch.testing.assert_close(
            grid.unfolded(), torch.from_numpy(hat / grid.factor.numpy().reshape(-1, 1, 1, 1)), rtol=1e-6, atol=0
        )

    @specs
    def test_a_factor_of_zero_divides_nothing(self, spec: QSpec) -> None:
        grid = self.build(spec, zero=2)
        assert (grid.folded()[2] == 0).all()
        assert torch.equal(grid.unfolded()[2], grid.weight[2])
        assert torch.isfinite(grid.unfolded()).all()

    @specs
    def test_gradients_with_a_factor_of_zero(self, spec: QSpec) -> None:
        weight, factor = example(CONV)
        factor[2] = 0.0
        weight.requires_grad_(), factor.requires_grad_()
        grid = folded_grid(weight, factor, CONV, minmax(spec), None, power_of_two=spec.power_of_two)
        gradient = torch.randn_like(weight)
        grid.unfolded().backward(gradient)
        torch.testing.assert_close(weight.grad, gradient)
        weight.grad = None
        grid.folded().backward(gradient)
        torch.testing.assert_close(weight.grad, gradient * factor.detach().reshape(-1, 1, 1, 1))
        torch.testing.assert_close(factor.grad, (gradient * weight.detach()).sum((1, 2, 3)))

    @specs
    def test_floor(self, spec: QSpec) -> None:
        floor = torch.tensor([0.0, 0.0, 0.0, 0.3, 0.0, 0.0])
        plain, grid = self.build(spec), self.build(spec, floor)
        raised = grid.qparams.scale if spec.axis is None else grid.qparams.scale[3]
        if spec.power_of_two:
            assert raised.item() == 0.5
        else:
            assert raised.item() == np.float32(0.3)
        if spec.axis is not None:
            others = [0, 1, 2, 4, 5]
            assert same_bits(grid.qparams.scale[others], plain.qparams.scale[others])
        torch.testing.assert_close(grid.coarsened, grid.qparams.scale / plain.qparams.scale)
        assert (plain.coarsened == 1).all() and not plain.silenced.any()

    @specs
    def test_silenced_channels(self, spec: QSpec) -> None:
        grid = self.build(spec, torch.full((OUT,), 1e4))
        assert grid.silenced.all()
        values = grid.folded()
        assert (values.abs() <= 1e-3).all()

    def test_transposed_in_groups_shares_a_scale(self) -> None:
        layout = WeightLayout(transposed=True, groups=2)
        random = generator(3)
        weight = torch.from_numpy(random.standard_normal((4, 3, 2, 2)).astype(np.float32))
        factor = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.1, -0.7])
        spec = QSpec(symmetric=True, narrow=True, axis=1)
        floor = torch.zeros(6)
        floor[4] = 0.2  # group 1, channel 1: the scale of channel 1 in both groups
        grid = folded_grid(weight, factor, layout, minmax(spec), floor, power_of_two=False)
        folded = weight.numpy().copy()
        for row in range(4):
            for out in range(3):
                folded[row, out] *= factor.numpy()[(row // 2) * 3 + out]
        scale = np.abs(folded).max((0, 2, 3)) / np.float32(127)
        scale[1] = 0.2
        np.testing.assert_array_equal(grid.qparams.scale.numpy(), scale)
        np.testing.assert_array_equal(grid.codes().numpy(), np.rint(folded / scale.reshape(1, 3, 1, 1)))
        np.testing.assert_array_equal(grid.channel_scale().numpy(), np.tile(scale, 2))
        assert grid.silenced.shape == (6,)


class TestPruned:
    @pytest.mark.parametrize("floor", [None, 1e-3, 1e3])
    @pytest.mark.parametrize("k", [1.0, -2.0, 0.0])
    def test_a_channel_of_zeros(self, floor: float | None, k: float) -> None:
        weight, factor = example(CONV)
        weight[1], factor[1] = 0.0, k
        least = None if floor is None else torch.full((OUT,), floor)
        spec = QSpec(symmetric=True, narrow=True, axis=0)
        grids: list[WeightGrid] = [
            moving(weight, factor, CONV, least),
            folded_grid(weight, factor, CONV, minmax(spec), least, power_of_two=False),
        ]
        for grid in grids:
            assert (grid.codes()[1] == 0).all() and (grid.folded()[1] == 0).all() and (grid.unfolded()[1] == 0).all()
            assert grid.coarsened[1] == 1 and not grid.silenced[1]
            assert grid.qparams.scale[1].item() >= (floor or 0)
            grid.qparams.check("weight")
