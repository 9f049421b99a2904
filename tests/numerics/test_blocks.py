"""Blocks: cut alike, whole where that is no gain, and the same bits as on the whole tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qbench.numerics import blocks
from qbench.numerics.blocks import Room, RoomOfBackward, dense, in_blocks, in_parts
from qbench.numerics.qparams import QParams, fake_quantize, inside_range
from qbench.numerics.straight_through import fake_quantize_ste


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few values, so that small tensors have many of them."""
    monkeypatch.setattr(blocks, "BLOCK", 16)
    monkeypatch.setattr(blocks, "_largest_cache", lambda: 0)


@pytest.mark.parametrize("shape", [(7, 3, 5, 5), (1, 64), (64,), (3, 0), ()])
def test_blocks_cover_every_value_once(small_blocks: None, shape: tuple[int, ...]) -> None:
    x = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    seen = torch.zeros_like(x)
    for part, count in in_blocks(x, seen):
        assert part.shape == count.shape
        count += 1
    assert bool((seen == 1).all())


def test_what_broadcasts_is_cut_only_where_it_has_the_first_axis(small_blocks: None) -> None:
    x, per_row, per_column, single = torch.rand(8, 8), torch.rand(8, 1), torch.rand(1, 8), torch.tensor(2.0)
    result = torch.empty_like(x)
    parts = list(in_blocks(x, result, per_row, per_column, single))
    assert len(parts) > 1
    for source, target, row, column, scalar in parts:
        target.copy_(source * row * column * scalar)
    assert torch.equal(result, x * per_row * per_column * single)


def test_chains_in_place_take_the_whole_of_what_a_cache_holds(
    small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, result = torch.rand(64, 8), torch.empty(64, 8)
    assert len(list(in_parts(x, result))) == len(list(in_blocks(x, result))) == 32
    monkeypatch.setattr(blocks, "_largest_cache", lambda: x.nbytes + result.nbytes)
    ((first, second, other),) = in_parts(x, result, x)
    assert first is x and second is result and other is x
    monkeypatch.setattr(blocks, "_largest_cache", lambda: x.nbytes)
    assert len(list(in_parts(x, result))) == 32


def test_the_largest_cache_is_that_of_the_system() -> None:
    largest = blocks._largest_cache.__wrapped__()
    assert largest == 0 or 1 << 15 <= largest < 1 << 33


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_dense_views_are_contiguous(memory_format: torch.memory_format) -> None:
    x = torch.rand(2, 3, 4, 5).contiguous(memory_format=memory_format)
    assert dense(x).is_contiguous()
    assert dense(x).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_fake_quantize_gives_the_bits_of_the_whole_tensor(
    small_blocks: None, dtype: torch.dtype, memory_format: torch.memory_format, axis: int | None
) -> None:
    torch.manual_seed(0)
    x = (torch.randn(8, 6, 5, 5) * 3).to(dtype).contiguous(memory_format=memory_format)
    channels = () if axis is None else (x.shape[axis],)
    qparams = QParams(torch.rand(channels) * 0.02 + 0.01, torch.randint(-20, 20, channels).int(), -128, 127, axis)
    x.requires_grad_()
    y = fake_quantize_ste(x, qparams)
    gradient = torch.randn(x.shape).to(dtype)
    y.backward(gradient)
    inside = inside_range(x.detach().float(), qparams)
    assert 0 < int(inside.sum()) < x.numel()
    assert torch.equal(y, fake_quantize(x.detach().float(), qparams).to(dtype))
    assert y.stride() == x.stride()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.where(inside, gradient, 0))


class _Doubled(torch.autograd.Function):
    """Doubles a gradient in a room, and notes where that was; fails where that cannot be noted."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, room: RoomOfBackward, places: list[int] | None) -> Tensor:
        ctx.room, ctx.places = room, places
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        found = torch.mul(grads[0], 2.0, out=ctx.room.like(grads[0]))
        ctx.places.append(found.data_ptr())
        return found.clone(), None, None


def test_a_room_of_backward_is_shared_by_its_nodes_and_let_go() -> None:
    room, places = RoomOfBackward(), list[int]()
    x = torch.rand(4, 5, requires_grad=True)
    for _ in range(2):
        wide = _Doubled.apply(x, room, places).repeat(3, 1)
        (_Doubled.apply(wide, room, places) * torch.ones_like(wide)).sum().backward()
        assert room._values is None
    assert x.grad is not None and torch.equal(x.grad, torch.full_like(x, 2 * 12.0))
    assert places[0] == places[1] and places[2] == places[3]
    with pytest.raises(AttributeError):
        (_Doubled.apply(x, room, None) * torch.ones_like(x)).sum().backward()
    assert room._values is not None  # which the next one lets go
    (_Doubled.apply(x, room, places) * torch.ones_like(x)).sum().backward()
    assert room._values is None
    outside, other = room.like(x), room.like(x)
    assert outside.data_ptr() != other.data_ptr() and room._values is None


@pytest.mark.parametrize("x", [torch.rand(4, 6)[:, ::2], torch.rand(3, 4).double()])
def test_there_is_no_room_for_gaps_and_other_types(x: Tensor) -> None:
    assert Room().like(x) is None
