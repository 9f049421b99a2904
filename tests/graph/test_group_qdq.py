"""q and dq per group: our definitions against PyTorch's, and what the reader makes of their nodes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qbench.graph import qdq
from qbench.graph.constants import constants_of
from qbench.graph.qdq import quantized_decomposed
from qbench.graph.recognise import Dequantize, Quantize, read_dequantize, read_quantize, same_grid

OPS = quantized_decomposed()
OUT, IN, GROUP = 6, 32, 8
SHAPES = {"(out, groups)": (OUT, IN // GROUP), "one row": (OUT * IN // GROUP,)}


def grid(shape: tuple[int, ...], dtype: torch.dtype = torch.int64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.rand(shape) * 0.1 + 1e-3, torch.randint(-3, 4, shape).to(dtype)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_our_kernels_are_those_of_pytorch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    scales, zeros = grid(shape, dtype)
    x = torch.randn(OUT, IN)
    limits = (-8, 7, torch.int8, GROUP)
    codes = qdq._quantize_per_channel_group(x, scales, zeros, *limits)
    assert torch.equal(codes, OPS.quantize_per_channel_group.default(x, scales, zeros, *limits))
    assert len(codes.unique()) == 16
    for zero_points in (zeros, None):
        for out in (torch.float32, torch.float16):
            found = qdq._dequantize_per_channel_group(codes, scales, zero_points, *limits, out)
            expected = OPS.dequantize_per_channel_group.default(codes, scales, zero_points, *limits, out)
            assert found.dtype == out and torch.equal(found, expected)


def test_our_kernels_on_codes_whose_difference_leaves_int8() -> None:
    codes = torch.tensor([[-128, 127] * 4], dtype=torch.int8)
    scales, zeros = torch.tensor([[0.5, 0.25]]), torch.tensor([[100, -100]], dtype=torch.int8)
    found = qdq._dequantize_per_channel_group(codes, scales, zeros, -128, 127, torch.int8, 4, torch.float32)
    assert found.tolist() == [[-114.0, 13.5, -114.0, 13.5, -7.0, 56.75, -7.0, 56.75]]


def test_schemas_are_those_of_pytorch() -> None:
    for name in ("quantize_per_channel_group", "dequantize_per_channel_group"):
        theirs = getattr(OPS, name).default._schema
        ours = torch._C.parse_schema(name + qdq._SCHEMAS[name])
        assert [(a.name, str(a.type)) for a in ours.arguments] == [
            ("input" if a.name == "w_int8" else a.name, str(a.type)) for a in theirs.arguments
        ]


class Both(torch.nn.Module):
    def __init__(self, shape: tuple[int, ...], zeros: bool = True) -> None:
        super().__init__()
        scales, zero_points = grid(shape)
        self.register_buffer("codes", torch.randint(-8, 8, (OUT, IN), dtype=torch.int8))
        self.register_buffer("scales", scales)
        self.register_buffer("zero_points", zero_points if zeros else None)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tail = (-8, 7, torch.int8, GROUP)
        y = OPS.dequantize_per_channel_group.default(self.codes, self.scales, self.zero_points, *tail, torch.float32)
        zero_points = torch.zeros_like(self.scales) if self.zero_points is None else self.zero_points
        return y, OPS.quantize_per_channel_group.default(y, self.scales, zero_points, *tail)


def nodes(model: Both) -> tuple[Dequantize, Quantize]:
    program = torch.export.export(model, (torch.zeros(1),), strict=False)
    constants = constants_of(program)
    read = [(read_dequantize(n, constants), read_quantize(n, constants)) for n in program.graph.nodes]
    return next(d for d, _ in read if d is not None), next(q for _, q in read if q is not None)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_group_node_is_read(shape: tuple[int, ...]) -> None:
    model = Both(shape)
    model_scales, model_zeros = (value.reshape(OUT, -1) for value in (model.scales, model.zero_points))
    found, _ = nodes(model)
    assert found.qparams.group_size == GROUP and found.qparams.axis == 0 and not found.literal
    assert torch.equal(found.qparams.scale, model_scales) and torch.equal(found.qparams.zero_point.long(), model_zeros)
    assert (found.qparams.qmin, found.qparams.qmax, found.dtype) == (-8, 7, torch.int8)


def test_zero_points_that_are_left_out_are_zeros() -> None:
    found, _ = nodes(Both(SHAPES["(out, groups)"], zeros=False))
    assert found.qparams.zero_point.shape == found.qparams.scale.shape and not found.qparams.zero_point.any()


def test_the_same_scales_on_other_groups_are_another_grid() -> None:
    first, second = nodes(Both(SHAPES["(out, groups)"]))
    assert same_grid(first.qparams, second.qparams)
    other = type(first.qparams)(
        first.qparams.scale, first.qparams.zero_point, -8, 7, first.qparams.axis, group_size=2 * GROUP
    )
    assert not same_grid(first.qparams, other)
