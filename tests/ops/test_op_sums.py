"""Convolutions and linear layers: sums and codes against int64 loops, whatever kernel the bound chooses."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import reference
import torch
from reference import different, extreme_codes, integers, random_codes
from torch import Tensor

from qbench.numerics.arithmetic import Grid
from qbench.ops import conv, exact
from qbench.ops.geometry import Geometry

OUT = (0.5, -7, -128, 127)
TARGETS = ("onnxruntime", "xnnpack")

# input (batch, in, …), outputs, kernel, stride, padding, dilation, groups
CONVS = {
    "conv1d": ((3, 4, 19), 5, (3,), (2,), (1,), (2,), 1),
    "conv1d grouped": ((2, 6, 9), 4, (4,), (1,), (2,), (1,), 2),
    "conv2d 3x3": ((2, 8, 7, 9), 6, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "conv2d one image of 3x3, small": ((1, 8, 3, 3), 8, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "conv2d 5x5 where FFT tiles would fit": ((1, 4, 20, 20), 4, (5, 5), (1, 1), (2, 2), (1, 1), 1),
    "conv2d uneven": ((2, 3, 11, 8), 4, (3, 2), (2, 1), (2, 0), (1, 3), 1),
    "depthwise": ((2, 16, 8, 8), 16, (3, 3), (1, 1), (1, 1), (1, 1), 16),
    "depthwise, two filters a channel": ((2, 4, 8, 8), 8, (3, 3), (2, 2), (1, 1), (1, 1), 4),
    "grouped": ((2, 12, 6, 6), 8, (3, 3), (1, 1), (1, 1), (1, 1), 4),
    "1x1": ((2, 32, 5, 5), 16, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "1x1 with a stride": ((2, 8, 7, 5), 8, (1, 1), (2, 3), (0, 0), (1, 1), 1),
    "split in channels": ((2, 160, 4, 4), 3, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "too many positions to split": ((1, 1, 26, 26), 2, (25, 25), (1, 1), (1, 1), (1, 1), 1),
    "conv3d": ((2, 3, 5, 6, 4), 4, (3, 2, 3), (1, 2, 1), (1, 0, 1), (1, 1, 1), 1),
}
# input, out / groups, kernel, stride, padding, output_padding, dilation, groups
TRANSPOSED = {
    "transposed1d": ((2, 4, 9), 3, (3,), (2,), (1,), (1,), (1,), 1),
    "transposed2d": ((2, 6, 5, 4), 4, (3, 3), (2, 2), (1, 1), (1, 0), (1, 1), 1),
    "transposed2d grouped": ((2, 6, 5, 4), 2, (2, 3), (2, 1), (0, 1), (0, 0), (1, 2), 3),
    "transposed3d": ((1, 4, 3, 3, 4), 2, (2, 2, 3), (2, 1, 2), (0, 0, 1), (1, 0, 0), (1, 1, 1), 2),
}
CODES: dict[str, Callable[..., Tensor]] = {"random": random_codes, "extreme": extreme_codes}


def check_conv(name: str, make: Callable[..., Tensor], dtype: torch.dtype, zero_point: int, target: str) -> int:
    shape, outputs, kernel, stride, padding, dilation, groups = CONVS[name]
    x, w = make(*shape, dtype=dtype), make(outputs, shape[1] // groups, *kernel).clamp(min=-127)
    bias = torch.randint(-(2**22), 2**22, (outputs,), dtype=torch.int32)
    grid = Grid(0.1, zero_point, torch.iinfo(dtype).min, torch.iinfo(dtype).max, dtype)
    geometry = Geometry(stride, padding, dilation, groups)
    sums = reference.conv(integers(x, zero_point), integers(w), stride, padding, dilation, groups)
    sums += integers(bias).reshape(-1, *[1] * len(kernel))
    found = conv.exact_sum(x, grid, w, conv.plan_of(w, bias, grid, geometry), geometry)
    assert different(found, sums) == 0, "the sum"
    scales = torch.rand(outputs) * 1e-3 + 1e-5
    call = getattr(torch.ops.qbench, f"conv{len(kernel)}d_q8ta_q8csw_q8to")
    codes = call(x, 0.1, zero_point, w, scales, bias, stride, padding, dilation, groups, *OUT, torch.int8, target)
    spread = scales.numpy().reshape(-1, *[1] * len(kernel))
    assert different(codes, reference.requantized(sums, 0.1, spread, OUT)) == 0, "the codes"
    return codes.numel()


def check_transposed(name: str, make: Callable[..., Tensor], zero_point: int, target: str) -> int:
    shape, outputs, kernel, stride, padding, extra, dilation, groups = TRANSPOSED[name]
    x, w = make(*shape), make(shape[1], outputs, *kernel).clamp(min=-127)
    bias = torch.randint(-(2**20), 2**20, (outputs * groups,), dtype=torch.int32)
    spread = (-1, *[1] * len(kernel))
    sums = reference.conv_transposed(integers(x, zero_point), integers(w), stride, padding, extra, dilation, groups)
    sums += integers(bias).reshape(spread)
    scales = torch.rand(outputs * groups) * 1e-3 + 1e-5
    call = getattr(torch.ops.qbench, f"conv_transpose{len(kernel)}d_q8ta_q8csw_q8to")
    sizes = stride, padding, extra, groups, dilation
    codes = call(x, 0.1, zero_point, w, scales, bias, *sizes, *OUT, torch.int8, target)
    expected = reference.requantized(sums, 0.1, scales.numpy().reshape(spread), OUT)
    assert different(codes, expected) == 0
    return codes.numel()


@pytest.mark.parametrize("make", CODES.values(), ids=CODES)
@pytest.mark.parametrize("name", CONVS)
def test_convolution(name: str, make: Callable[..., Tensor]) -> None:
    check_conv(name, make, torch.int8, -128, "onnxruntime")
    check_conv(name, make, torch.uint8, 131, "xnnpack")


@pytest.mark.parametrize("make", CODES.values(), ids=CODES)
@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed_convolution(name: str, make: Callable[..., Tensor]) -> None:
    check_transposed(name, make, 9, "xnnpack")


def linear_codes(x: Tensor, w: Tensor, bias: Tensor | None, zero_point: int) -> tuple[Tensor, np.ndarray]:
    """What the operator gives and what int64 gives."""
    scales = torch.rand(w.shape[0]) * 1e-3 + 1e-5
    call = torch.ops.qbench.linear_q8ta_q8csw_q8to
    codes = call(x, 0.1, zero_point, w, scales, bias, *OUT, torch.int8, "onnxruntime")
    sums = integers(x, zero_point) @ integers(w).T + (0 if bias is None else integers(bias))
    return codes, reference.requantized(sums, 0.1, scales.numpy(), OUT)


@pytest.mark.parametrize("make", CODES.values(), ids=CODES)
@pytest.mark.parametrize("shape", [(5,), (3, 64), (2, 3, 5000), (0, 7)], ids=str)
def test_linear(shape: tuple[int, ...], make: Callable[..., Tensor]) -> None:
    bias = torch.randint(-(2**22), 2**22, (6,), dtype=torch.int32)
    for given in (bias, None):
        codes, expected = linear_codes(make(*shape), make(6, shape[-1]).clamp(min=-127), given, -128)
        assert different(codes, expected) == 0


@pytest.mark.parametrize(("bias", "parts"), [(1, 1), (2, 2)])
def test_the_bound_is_two_to_the_24(bias: int, parts: int) -> None:
    """255 · (518 · 127 + 7) + 1 = 2²⁴ is the last sum that one float32 run may have."""
    w = torch.full((1, 519), 127, dtype=torch.int8)
    w[0, -1] = 7
    x, biases = torch.full((4, 519), 127, dtype=torch.int8), torch.tensor([bias], dtype=torch.int32)
    grid = Grid(1.0, -128, -128, 127)
    plan = exact.plan(w[..., None], biases, grid, float32=True)
    assert [part.dtype for part in plan] == [torch.float32] * parts
    acc = exact.add_parts(
        x, grid, 1, plan, lambda run, index: torch.nn.functional.linear(run, plan[index].floats(w), plan[index].bias)
    )
    assert acc.tolist() == [[2**24 + bias - 1]] * 4


@pytest.mark.parametrize("zero_point", [-128, 0, 5, 127])
def test_runs_fit_and_are_as_long_as_they_can_be(zero_point: int) -> None:
    weight = torch.randint(-127, 128, (7, 400, 9), dtype=torch.int8)
    bias = torch.randint(-(2**22), 2**22, (7,), dtype=torch.int32)
    lo, hi = -128 - zero_point, 127 - zero_point
    codes, biases = integers(weight), integers(bias)

    def widest(start: int, stop: int) -> int:
        ends = [codes[:, start:stop] * lo, codes[:, start:stop] * hi]
        offset = biases if start == 0 else np.zeros_like(biases)
        upper = np.maximum(*ends).clip(0).sum((1, 2)) + offset.clip(0)
        lower = np.minimum(*ends).clip(None, 0).sum((1, 2)) + offset.clip(None, 0)
        return int(max(upper.max(), -lower.min()))

    runs = exact.split(weight, bias, Grid(1.0, zero_point, -128, 127))
    assert runs is not None and len(runs) > 1
    assert runs[0][0] == 0 and all(a + n == b for (a, n), (b, _) in itertools.pairwise(runs))
    assert sum(runs[-1]) == 400
    assert all(widest(start, start + count) <= 2**24 for start, count in runs)
    assert all(widest(start, start + count + 1) > 2**24 for start, count in runs[:-1])


def test_what_one_channel_cannot_hold_is_not_split() -> None:
    weight = torch.full((1, 2, 519), 127, dtype=torch.int8)
    assert exact.split(weight, None, Grid(1.0, -128, -128, 127)) is None
    huge = torch.tensor([2**24 + 1], dtype=torch.int32)
    assert exact.split(weight[..., :9], huge, Grid(1.0, -128, -128, 127)) is None


def image_codes(x: Tensor, w: Tensor, stride: int = 1) -> Tensor:
    scales = torch.full((w.shape[0],), 1e-3)
    sizes = [stride] * 2, [1, 1], [1, 1], 1
    codes: Tensor = torch.ops.qbench.conv2d_q8ta_q8csw_q8to(
        x, 0.1, 3, w, scales, None, *sizes, *OUT, torch.int8, "onnxruntime"
    )
    return codes


@pytest.mark.parametrize("channels", [8, 160])
def test_layout_threads_batches_and_autocast_change_nothing(channels: int) -> None:
    x, w = random_codes(4, channels, 9, 8), random_codes(16, channels, 3, 3)
    expected = image_codes(x, w).numpy()
    last = x.contiguous(memory_format=torch.channels_last)
    found = image_codes(last, w)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert different(found, expected) == 0
    assert different(image_codes(x.transpose(2, 3).contiguous().transpose(2, 3), w), expected) == 0
    assert different(image_codes(x, w.contiguous(memory_format=torch.channels_last)), expected) == 0
    assert different(torch.cat([image_codes(image, w) for image in x[:, None]]), expected) == 0
    assert different(torch.stack([image_codes(image, w) for image in x]), expected) == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert different(image_codes(x, w), expected) == 0
    with torch.inference_mode():
        assert different(image_codes(x.clone(), w.clone()), expected) == 0
    before = torch.get_num_threads()
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert different(image_codes(x, w), expected) == 0
    finally:
        torch.set_num_threads(before)


def test_many_images_are_summed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = random_codes(5, 8, 9, 8), random_codes(16, 8, 3, 3)
    expected = image_codes(x, w).numpy()
    monkeypatch.setattr(conv, "_BLOCK", 2 * 16 * 9 * 8)
    assert different(image_codes(x, w), expected) == 0
    found = image_codes(x.contiguous(memory_format=torch.channels_last), w)
    assert different(found, expected) == 0 and found.is_contiguous(memory_format=torch.channels_last)


def test_no_images_give_no_codes() -> None:
    assert image_codes(random_codes(0, 8, 9, 8), random_codes(16, 8, 3, 3), 2).shape == (0, 16, 5, 4)


def test_reduced_precision_in_float32_kernels_is_not_taken() -> None:
    device = torch.device("cpu")
    assert exact.float32_is_summed(torch.device("cuda"), "conv") is False
    before = torch.backends.mkldnn.conv.fp32_precision
    try:
        torch.backends.mkldnn.conv.fp32_precision = "bf16"
        assert not exact.float32_is_summed(device, "conv")
        test_convolution("conv2d 3x3", extreme_codes)
    finally:
        torch.backends.mkldnn.conv.fp32_precision = before


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_a_million_codes(target: str) -> None:
    count = 0
    while count < 1_000_000:
        for name in CONVS:
            for make in CODES.values():
                count += check_conv(name, make, torch.int8, int(torch.randint(-128, 128, ())), target)
        for name in TRANSPOSED:
            for make in CODES.values():
                count += check_transposed(name, make, int(torch.randint(-128, 128, ())), target)


@pytest.mark.slow
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [3, 64, 512])
def test_a_million_sums_of_wide_layers(channels: int, stride: int) -> None:
    """Sums alone, of shapes that networks have, all extremes: Winograd or bfloat16 would show in most of them."""
    size = 60 if channels < 512 else 28
    count = 0
    while count < 1_000_000:
        x, w = extreme_codes(4, channels, size, size), extreme_codes(64, channels, 3, 3, low=-127)
        grid, geometry = Grid(1.0, -128, -128, 127), Geometry((stride, stride), (1, 1), (1, 1))
        found = conv.exact_sum(x, grid, w, conv.plan_of(w, None, grid, geometry), geometry)
        exact_sums = torch.nn.functional.conv2d(x.double() + 128, w.double(), None, stride, 1)
        assert different(found, exact_sums.numpy()) == 0
        count += found.numel()
