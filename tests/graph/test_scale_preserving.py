"""Every entry of the list is checked with numbers: values on a grid go in, values on the same grid come out."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx

from qbench.graph.scale_preserving import SCALE_PRESERVING, grid_source, is_scale_joining, is_scale_preserving

aten = torch.ops.aten
X = torch.randint(-128, 128, (2, 4, 6, 6))
LINE, MAP, VOLUME = X[0, 0], X, X.reshape(2, 4, 6, 2, 3)

# Packet -> (overload, input, further arguments). The others take an input alone.
CALLS = {
    aten.view: ("default", MAP, [(2, -1)]),
    aten.view_as: ("default", MAP, [torch.empty(8, 36)]),
    aten._unsafe_view: ("default", MAP, [(2, 144)]),
    aten._reshape_alias: ("default", MAP, [(2, 144), (144, 1)]),
    aten.reshape: ("default", MAP, [(2, -1)]),
    aten.reshape_as: ("default", MAP, [torch.empty(8, 36)]),
    aten.flatten: ("using_ints", MAP, [1]),
    aten.unflatten: ("int", MAP, [1, (2, 2)]),
    aten.squeeze: ("dims", MAP, [[1]]),
    aten.squeeze_copy: ("default", MAP, []),
    aten.unsqueeze: ("default", MAP, [0]),
    aten.unsqueeze_: ("default", MAP, [0]),
    aten.unsqueeze_copy: ("default", MAP, [0]),
    aten.permute: ("default", MAP, [(0, 2, 3, 1)]),
    aten.permute_copy: ("default", MAP, [(0, 2, 3, 1)]),
    aten.transpose: ("int", MAP, [1, 2]),
    aten.transpose_: ("default", MAP, [1, 2]),
    aten.transpose_copy: ("int", MAP, [1, 2]),
    aten.swapaxes: ("default", MAP, [1, 2]),
    aten.swapaxes_: ("default", MAP, [1, 2]),
    aten.swapdims: ("default", MAP, [1, 2]),
    aten.swapdims_: ("default", MAP, [1, 2]),
    aten.movedim: ("int", MAP, [1, 2]),
    aten.moveaxis: ("int", MAP, [1, 2]),
    aten.t: ("default", LINE, []),
    aten.t_: ("default", LINE, []),
    aten.t_copy: ("default", LINE, []),
    aten.numpy_T: ("default", LINE, []),
    aten.expand: ("default", MAP, [(3, 2, 4, 6, 6)]),
    aten.expand_copy: ("default", MAP, [(3, 2, 4, 6, 6)]),
    aten.expand_as: ("default", MAP, [torch.empty(3, 2, 4, 6, 6)]),
    aten.view_copy: ("default", MAP, [(2, -1)]),
    aten.slice: ("Tensor", MAP, [3, 1, 5]),
    aten.slice_copy: ("Tensor", MAP, [3, 1, 5]),
    aten.select: ("int", MAP, [1, 2]),
    aten.select_copy: ("int", MAP, [1, 2]),
    aten.narrow: ("default", MAP, [1, 1, 2]),
    aten.narrow_copy: ("default", MAP, [1, 1, 2]),
    aten.unfold: ("default", MAP, [3, 3, 1]),
    aten.unfold_copy: ("default", MAP, [3, 3, 1]),
    aten.index: ("Tensor", MAP, [[torch.tensor([1, 0])]]),
    aten.embedding: ("default", LINE, [torch.tensor([[1, 0, 4]])]),
    aten.index_select: ("default", MAP, [1, torch.tensor([1, 0])]),
    aten.gather: ("default", MAP, [1, torch.zeros(2, 1, 6, 6, dtype=torch.int64)]),
    aten.take_along_dim: ("default", MAP, [torch.zeros(2, 1, 6, 6, dtype=torch.int64), 1]),
    aten.chunk: ("default", MAP, [2, 1]),
    aten.split: ("Tensor", MAP, [2, 1]),
    aten.split_copy: ("Tensor", MAP, [2, 1]),
    aten.split_with_sizes: ("default", MAP, [[1, 3], 1]),
    aten.split_with_sizes_copy: ("default", MAP, [[1, 3], 1]),
    aten.tensor_split: ("sections", MAP, [2, 1]),
    aten.unsafe_chunk: ("default", MAP, [2, 1]),
    aten.unsafe_split: ("Tensor", MAP, [2, 1]),
    aten.unsafe_split_with_sizes: ("default", MAP, [[1, 3], 1]),
    aten.unbind: ("int", MAP, [1]),
    aten.unbind_copy: ("int", MAP, [1]),
    aten.flip: ("default", MAP, [[2]]),
    aten.roll: ("default", MAP, [[2]]),
    aten.rot90: ("default", MAP, [1, [2, 3]]),
    aten.repeat: ("default", MAP, [(2, 1, 1, 1)]),
    aten.repeat_interleave: ("self_int", MAP, [2, 1]),
    aten.tile: ("default", MAP, [(2, 1)]),
    aten.im2col: ("default", MAP, [[3, 3], [1, 1], [1, 1], [1, 1]]),
    aten.pixel_shuffle: ("default", MAP, [2]),
    aten.pixel_unshuffle: ("default", MAP, [2]),
    aten.channel_shuffle: ("default", MAP, [2]),
    aten.native_channel_shuffle: ("default", MAP, [2]),
    aten.upsample_nearest1d: ("default", X[0], [[9]]),
    aten.upsample_nearest2d: ("default", MAP, [[9, 9]]),
    aten.upsample_nearest3d: ("default", VOLUME, [[9, 9, 9]]),
    aten._upsample_nearest_exact1d: ("default", X[0], [[9]]),
    aten._upsample_nearest_exact2d: ("default", MAP, [[9, 9]]),
    aten._upsample_nearest_exact3d: ("default", VOLUME, [[9, 9, 9]]),
    aten.pad: ("default", MAP, [[1, 1]]),
    aten.constant_pad_nd: ("default", MAP, [[1, 1]]),
    aten.reflection_pad1d: ("default", X[0], [[1, 1]]),
    aten.reflection_pad2d: ("default", MAP, [[1, 1, 1, 1]]),
    aten.reflection_pad3d: ("default", VOLUME, [[1, 1, 1, 1, 1, 1]]),
    aten.replication_pad1d: ("default", X[0], [[1, 1]]),
    aten.replication_pad2d: ("default", MAP, [[1, 1, 1, 1]]),
    aten.replication_pad3d: ("default", VOLUME, [[1, 1, 1, 1, 1, 1]]),
    aten._pad_circular: ("default", MAP, [[1, 1, 1, 1]]),
    aten.max_pool1d: ("default", X[0], [[3], [1], [1]]),
    aten.max_pool1d_with_indices: ("default", X[0], [[3], [1], [1]]),
    aten.max_pool2d: ("default", MAP, [[3, 3], [2, 2], [1, 1]]),
    aten.max_pool2d_with_indices: ("default", MAP, [[3, 3], [2, 2], [1, 1]]),
    aten.max_pool3d: ("default", VOLUME, [[2, 2, 2]]),
    aten.max_pool3d_with_indices: ("default", VOLUME, [[2, 2, 2]]),
    aten.adaptive_max_pool1d: ("default", X[0], [[4]]),
    aten.adaptive_max_pool2d: ("default", MAP, [[4, 4]]),
    aten.adaptive_max_pool3d: ("default", VOLUME, [[2, 2, 2]]),
    aten.fractional_max_pool2d: ("default", MAP, [[2, 2], [3, 3], torch.full((2, 4, 2), 0.5)]),
    aten.fractional_max_pool3d: ("default", VOLUME, [[1, 1, 1], [2, 1, 2], torch.full((2, 4, 3), 0.5)]),
    aten.amax: ("default", MAP, [[2, 3]]),
    aten.amin: ("default", MAP, [[2, 3]]),
    **{op: ("default", MAP, [0.5, False]) for op in SCALE_PRESERVING if "dropout" in str(op)},
}


@pytest.mark.parametrize("op", SCALE_PRESERVING, ids=str)
def test_values_stay_on_the_grid(op: torch._ops.OpOverloadPacket) -> None:
    name, codes, rest = CALLS.get(op, ("default", LINE, []))
    scale, zero_point = 0.037, 5
    real = (codes.float() - zero_point) * scale
    overload = getattr(op, name)
    assert is_scale_preserving(op) and is_scale_preserving(overload, [real, *rest])
    result = overload(real.clone(), *rest)
    for index, part in enumerate(result if isinstance(result, (tuple, list)) else [result]):
        if index == 1 and ("with_indices" in str(op) or "adaptive_max" in str(op) or "fractional" in str(op)):
            continue
        if index == 1 and "native_dropout" in str(op):
            continue
        found = torch.round(part / scale) + zero_point
        assert torch.equal((found - zero_point) * scale, part)
        assert part.numel() and found.min() >= -128 and found.max() <= 127


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ((aten.constant_pad_nd.default, [X, [1, 1], 0.0]), True),
        ((aten.constant_pad_nd.default, [X, [1, 1], 0.5]), False),
        ((aten.pad.default, [X, [1, 1], "constant", 0.5]), False),
        ((aten.pad.default, [X, [1, 1], "reflect"]), True),
        ((aten.dropout.default, [X, 0.5, True]), False),
        ((aten.dropout.default, [X, 0.5, False]), True),
        ((aten.native_dropout.default, [X, 0.5, None]), False),
        ((aten.view.dtype, [X, torch.int32]), False),
        ((aten.avg_pool2d.default, [X, [2, 2]]), False),
        ((aten.relu6.default, [X]), False),
        ((aten.hardtanh.default, [X]), False),
        ((aten.add.Tensor, [X, X]), False),
        ((aten.cat.default, [[X, X]]), False),
        ((aten.to.dtype, [X, torch.float16]), False),
        ((torch.relu, [X]), False),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, tuple) else "",
)
def test_arguments_decide(call: tuple, expected: bool) -> None:
    assert is_scale_preserving(*call) is expected


def test_cat_joins() -> None:
    assert is_scale_joining(aten.cat.default) and is_scale_joining(aten.stack)
    assert not is_scale_joining(aten.add.Tensor)


def test_getitem_is_looked_through_to_the_input_of_its_operator() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    pool = graph.call_function(aten.max_pool2d_with_indices.default, (x, [2, 2]))
    parts = graph.call_function(aten.chunk.default, (x, 2))
    items = [graph.call_function(operator.getitem, (p, i)) for p in (pool, parts) for i in (0, 1)]
    assert [grid_source(item) for item in items] == [x, None, x, x]
    assert grid_source(x) is None
