"""Gradients of rounding: values bit for bit those of torch, gradients against closed forms in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qbench.numerics import blocks
from qbench.numerics import straight_through as straight_through_module
from qbench.numerics.qparams import QParams
from qbench.numerics.straight_through import fake_quantize_bias_ste, fake_quantize_ste, straight_through

from .support import NARROW_GRIDS, Grid, generator, same_bits, values_on_and_between

SCALE = 0.0371


def leaf(values: Tensor) -> Tensor:
    return values.clone().requires_grad_()


def cotangent(like: Tensor) -> Tensor:
    return torch.from_numpy(generator(7).standard_normal(tuple(like.shape))).to(like.dtype)


def per_channel(axis: int, channels: int) -> QParams:
    scale = torch.linspace(0.01, 0.09, channels)
    zero_point = torch.arange(channels, dtype=torch.int32) * 5 - 8
    return QParams(scale, zero_point, -128, 127, axis)


def slopes(x: Tensor, scale: np.ndarray, zero: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """∂/∂x and ∂/∂s of s·clamp(round(x/s)) with the rounding residual held constant, one number per value."""
    position = x.numpy().astype(np.float64) / scale
    code = np.rint(position)
    low, high = grid.qmin - zero, grid.qmax - zero
    inside = (code >= low) & (code <= high)
    return inside.astype(np.float64), np.where(inside, code - position, np.clip(code, low, high))


class TestStraightThrough:
    def test_forward_is_the_value_and_backward_the_identity_to_the_source(self) -> None:
        source, value = leaf(torch.tensor([1.0, -2.0, 3.0])), torch.tensor([0.9999999, -2.5, 1e20])
        out = straight_through(source, value)
        assert same_bits(out.detach(), value)
        gradient = torch.tensor([3.0, -1.0, 0.5])
        out.backward(gradient)
        assert same_bits(source.grad, gradient)

    def test_the_value_gets_no_gradient(self) -> None:
        source, value = leaf(torch.ones(2)), leaf(torch.zeros(2))
        straight_through(source, value).sum().backward()
        assert value.grad is None

    def test_the_usual_detach_trick_would_change_bits(self) -> None:
        # Why this is a function of its own: x + (q − x) rounds once more where q is not close to x.
        x = torch.randn(10_000)
        q = (torch.round(x / SCALE) * SCALE).clamp(-0.3, 0.3)
        assert not torch.equal(x + (q - x), q)
        assert same_bits(straight_through(x, q), q)


class TestFakeQuantizeForward:
    @pytest.mark.parametrize("grid", NARROW_GRIDS, ids=lambda grid: grid.name)
    def test_per_tensor_bits_are_those_of_torch(self, grid: Grid) -> None:
        x = values_on_and_between(SCALE, grid)
        x = x[torch.isfinite(x)]
        ours = fake_quantize_ste(x, grid.qparams(SCALE, grid.zero_point))
        scale = torch.tensor(SCALE).item()  # torch takes a double and rounds it to float32
        torchs = torch.fake_quantize_per_tensor_affine(x, scale, grid.zero_point, grid.qmin, grid.qmax)
        assert torch.equal(ours, torchs)

    @pytest.mark.parametrize("axis", [0, 1, 2])
    def test_per_channel_bits_are_those_of_torch(self, axis: int) -> None:
        x = torch.randn(6, 6, 6) * 3
        qparams = per_channel(axis, 6)
        torchs = torch.fake_quantize_per_channel_affine(
            x, qparams.scale, qparams.zero_point, axis, qparams.qmin, qparams.qmax
        )
        assert torch.equal(fake_quantize_ste(x, qparams), torchs)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_dtypes_are_computed_in_float32_and_keep_their_dtype(self, dtype: torch.dtype) -> None:
        x = torch.randn(1000).to(dtype)
        qparams = NARROW_GRIDS[4].qparams(SCALE, 131)
        expected = fake_quantize_ste(x.float(), qparams).to(dtype)
        assert same_bits(fake_quantize_ste(x, qparams).float(), expected.float())
        assert fake_quantize_ste(x, qparams).dtype == dtype

    def test_nan_stays_nan_and_has_no_gradient(self) -> None:
        x = leaf(torch.tensor([float("nan"), 1.0]))
        out = fake_quantize_ste(x, NARROW_GRIDS[2].qparams(SCALE, 0))
        assert torch.isnan(out[0])
        out[1].backward()
        assert x.grad.tolist() == [0.0, 1.0]

    @pytest.mark.parametrize("zero_point", [1, -1, 2**30, -(2**30)])
    def test_a_32_bit_range_with_a_zero_point_does_not_wrap(self, zero_point: int) -> None:
        # qmin − z in int32 would wrap to the other end and clip everything.
        qparams = QParams(torch.tensor(0.5), torch.tensor(zero_point, dtype=torch.int32), -(2**31), 2**31 - 1)
        x = leaf(torch.tensor([-3.0, 0.0, 7.5]))
        out = fake_quantize_ste(x, qparams)
        out.sum().backward()
        assert out.tolist() == [-3.0, 0.0, 7.5]
        assert x.grad.tolist() == [1.0, 1.0, 1.0]


class TestFakeQuantizeBackward:
    @pytest.mark.parametrize("grid", NARROW_GRIDS, ids=lambda grid: grid.name)
    def test_inside_passes_and_clipped_is_zero(self, grid: Grid) -> None:
        x = leaf((torch.rand(4001) - 0.5) * 2 * (grid.qmax - grid.qmin) * SCALE)
        gradient = cotangent(x)
        fake_quantize_ste(x, grid.qparams(SCALE, grid.zero_point)).backward(gradient)
        mask, _ = slopes(x.detach(), np.float64(np.float32(SCALE)), np.float64(grid.zero_point), grid)
        assert 0.2 < mask.mean() < 0.8  # both kinds occur
        np.testing.assert_array_equal(x.grad.numpy(), (gradient.numpy() * mask).astype(np.float32))

    def test_mask_is_torchs_mask(self) -> None:
        x, theirs = (leaf(torch.linspace(-6, 6, 9999)) for _ in range(2))
        fake_quantize_ste(x, NARROW_GRIDS[2].qparams(SCALE, -17)).sum().backward()
        scale = torch.tensor(SCALE).item()
        torch.fake_quantize_per_tensor_affine(theirs, scale, -17, -128, 127).sum().backward()
        assert torch.equal(x.grad, theirs.grad)

    def test_scale_gradient_per_tensor(self) -> None:
        grid = NARROW_GRIDS[2]
        x = torch.randn(500) * 3
        scale = leaf(torch.tensor(SCALE))
        zero_point = torch.tensor(-17, dtype=torch.int32)
        gradient = cotangent(x)
        fake_quantize_ste(x, QParams(scale, zero_point, grid.qmin, grid.qmax)).backward(gradient)
        _, slope = slopes(x, np.float64(scale.item()), np.float64(-17), grid)
        expected = (slope * gradient.numpy().astype(np.float64)).sum()
        assert scale.grad.shape == ()
        assert scale.grad.item() == pytest.approx(expected, rel=1e-4)

    @pytest.mark.parametrize("axis", [0, 1, 2])
    def test_scale_gradient_per_channel(self, axis: int) -> None:
        x = torch.randn(4, 4, 4) * 4
        found = per_channel(axis, 4)
        scale = leaf(found.scale)
        gradient = cotangent(x)
        fake_quantize_ste(x, QParams(scale, found.zero_point, found.qmin, found.qmax, axis)).backward(gradient)
        shape = [4 if dim == axis else 1 for dim in range(3)]
        wide = found.scale.double().numpy().reshape(shape), found.zero_point.double().numpy().reshape(shape)
        _, slope = slopes(x, *wide, NARROW_GRIDS[2])
        expected = (slope * gradient.numpy().astype(np.float64)).sum(tuple(d for d in range(3) if d != axis))
        np.testing.assert_allclose(scale.grad.numpy(), expected, rtol=1e-4, atol=1e-4)

    def test_what_backward_reads_is_a_snapshot_of_its_own_arguments(self) -> None:
        # Two uses with different grids, backward afterwards: each uses its own mask.
        x = leaf(torch.tensor([0.4, 3.0, 50.0]))
        narrow = NARROW_GRIDS[2].qparams(0.01, 0)
        wide = NARROW_GRIDS[2].qparams(1.0, 0)
        (fake_quantize_ste(x, narrow).sum() * 10 + fake_quantize_ste(x, wide).sum()).backward()
        assert x.grad.tolist() == [11.0, 1.0, 1.0]


class TestFakeQuantizeBias:
    BITS = 8

    def reference(self, bias: Tensor, scale: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Value, mask and slope of the scale, by numpy."""
        b, s = bias.numpy().astype(np.float64), scale.numpy().astype(np.float64)
        rounded = np.rint(b / s)
        codes = np.clip(rounded, -128, 127)
        value = codes.astype(np.float32) * scale.numpy()
        saturated = codes != rounded
        return value, ~saturated, np.where(saturated, codes, codes - b / s)

    @pytest.mark.parametrize("shared", [False, True], ids=["a scale per channel", "one scale"])
    def test_value_and_gradients(self, shared: bool) -> None:
        bias = torch.randn(64) * 2
        scale = torch.tensor(0.02) if shared else torch.linspace(0.005, 0.05, 64)
        value, mask, slope = self.reference(bias, scale)
        assert 0 < mask.sum() < 64  # some saturate, some do not
        bias, scale = leaf(bias), leaf(scale)
        out = fake_quantize_bias_ste(bias, scale, self.BITS)
        assert same_bits(out.detach(), torch.from_numpy(value))
        gradient = cotangent(out)
        out.backward(gradient)
        np.testing.assert_array_equal(bias.grad.numpy(), gradient.numpy() * mask)
        expected = slope * gradient.numpy().astype(np.float64)
        expected = expected.sum() if shared else expected
        assert scale.grad.shape == scale.shape
        np.testing.assert_allclose(scale.grad.numpy(), expected, rtol=1e-5, atol=1e-6)

    def test_division_is_in_float64(self) -> None:
        # 3.5000002 in float32 arithmetic, 3.49999… exactly: a float32 division would round to another code.
        random = generator(3)
        scale = torch.from_numpy(random.uniform(0.01, 0.02, 200_000).astype(np.float32))
        ties = (random.integers(-1000, 1000, 200_000) + 0.5) * scale.numpy().astype(np.float64)
        bias = torch.from_numpy(ties.astype(np.float32))
        codes = np.rint(bias.numpy().astype(np.float64) / scale.numpy().astype(np.float64))
        in_float32 = np.rint(bias.numpy() / scale.numpy())
        assert (codes != in_float32).any()
        out = fake_quantize_bias_ste(bias, scale, 32)
        assert same_bits(out, torch.from_numpy(codes.astype(np.int64).astype(np.float32) * scale.numpy()))


@pytest.mark.parametrize("axis", [None, 0])
def test_gradients_in_blocks_are_those_of_the_whole_tensor(axis: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 512)
    monkeypatch.setattr(blocks, "_largest_cache", lambda: 0)
    torch.manual_seed(0)
    x, given = torch.randn(37, 5, 9, 3) * 1.5, torch.randn(37, 5, 9, 3)
    start = torch.rand(37) * 0.02 + 0.01 if axis == 0 else torch.tensor(0.02)
    zero_point = torch.zeros_like(start) if axis == 0 else torch.tensor(3.0)
    found = []
    for whole in (False, True):
        if whole:
            monkeypatch.setattr(straight_through_module, "at_hand", lambda _: False)
        values, scale, zero = leaf(x), leaf(start), leaf(zero_point)
        grid = QParams(scale, zero.detach().to(torch.int32), -100, 90, axis)
        fake_quantize_ste(values, grid, zero).backward(given)
        found.append((values.grad, scale.grad, zero.grad))
    for ours, theirs in zip(*found, strict=True):
        assert ours is not None and theirs is not None and theirs.count_nonzero() > 0.5 * theirs.numel()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert same_bits(found[0][0], found[1][0])
    assert 0 < int((found[0][0] == 0).sum()) < x.numel()
