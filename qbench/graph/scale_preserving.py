"""Operators whose output lies on the grid of their first input: links and passes look through them.

    x = (c − z)·s  for codes c in [qmin, qmax]     ⇒     op(x) = (c' − z)·s  for codes c' in [qmin, qmax]

That holds for everything that moves, selects or repeats values, and for what puts in the real 0, which every grid has.
It does not hold for an average, for a clamp at a bound that is not on the grid, or for a change of dtype.

`SCALE_PRESERVING` is the one list. Its entries are `OpOverloadPacket`s, both the composite operators that a program in
training IR holds (`aten.max_pool2d`) and what they become when they are dispatched or decomposed
(`aten.max_pool2d_with_indices`). A few of them hold for some arguments only, so ask `is_scale_preserving`, which also
reads ExecuTorch's edge dialect.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverloadPacket

from qbench.graph.dialect import argument, has_argument, packet

aten = torch.ops.aten

SCALE_PRESERVING: tuple[OpOverloadPacket[Any, Any], ...] = (
    # Views: the same values in another shape.
    aten.view,
    aten.view_as,
    aten._unsafe_view,
    aten._reshape_alias,
    aten.reshape,
    aten.reshape_as,
    aten.flatten,
    aten.ravel,
    aten.unflatten,
    aten.squeeze,
    aten.squeeze_,
    aten.unsqueeze,
    aten.unsqueeze_,
    aten.permute,
    aten.transpose,
    aten.transpose_,
    aten.swapaxes,
    aten.swapaxes_,
    aten.swapdims,
    aten.swapdims_,
    aten.movedim,
    aten.moveaxis,
    aten.t,
    aten.t_,
    aten.numpy_T,
    aten.mT,
    aten.adjoint,
    aten.expand,
    aten.expand_as,
    aten.atleast_1d,
    aten.atleast_2d,
    aten.atleast_3d,
    # The same views without aliasing, as ExecuTorch's edge dialect writes them.
    aten.view_copy,
    aten.squeeze_copy,
    aten.unsqueeze_copy,
    aten.permute_copy,
    aten.transpose_copy,
    aten.t_copy,
    aten.expand_copy,
    aten.slice_copy,
    aten.select_copy,
    aten.narrow_copy,
    aten.unfold_copy,
    aten.alias_copy,
    aten.detach_copy,
    aten.split_copy,
    aten.split_with_sizes_copy,
    aten.unbind_copy,
    # Copies and identities.
    aten.alias,
    aten.clone,
    aten.contiguous,
    aten.detach,
    aten.detach_,
    aten.lift_fresh,
    aten.lift_fresh_copy,
    # A part of the values. Some return several tensors, each of them on the grid: `getitem` is looked through.
    aten.slice,
    aten.select,
    aten.narrow,
    aten.diagonal,
    aten.index,
    aten.index_select,
    aten.embedding,
    aten.gather,
    aten.take_along_dim,
    aten.chunk,
    aten.split,
    aten.split_with_sizes,
    aten.tensor_split,
    aten.unsafe_chunk,
    aten.unsafe_split,
    aten.unsafe_split_with_sizes,
    aten.unbind,
    # The same values in another order, or several times.
    aten.flip,
    aten.roll,
    aten.rot90,
    aten.repeat,
    aten.repeat_interleave,
    aten.tile,
    aten.unfold,
    aten.im2col,
    aten.pixel_shuffle,
    aten.pixel_unshuffle,
    aten.channel_shuffle,
    aten.native_channel_shuffle,
    aten.upsample_nearest1d,
    aten.upsample_nearest2d,
    aten.upsample_nearest3d,
    aten._upsample_nearest_exact1d,
    aten._upsample_nearest_exact2d,
    aten._upsample_nearest_exact3d,
    # Padding with values of the tensor, or with zeros (only with zeros: see `is_scale_preserving`).
    aten.pad,
    aten.constant_pad_nd,
    aten.reflection_pad1d,
    aten.reflection_pad2d,
    aten.reflection_pad3d,
    aten.replication_pad1d,
    aten.replication_pad2d,
    aten.replication_pad3d,
    aten._pad_circular,
    # The largest or smallest of some values. The `*_with_indices` return indices as well, at position 1.
    aten.max_pool1d,
    aten.max_pool2d,
    aten.max_pool3d,
    aten.max_pool1d_with_indices,
    aten.max_pool2d_with_indices,
    aten.max_pool3d_with_indices,
    aten.adaptive_max_pool1d,
    aten.adaptive_max_pool2d,
    aten.adaptive_max_pool3d,
    aten.fractional_max_pool2d,
    aten.fractional_max_pool3d,
    aten.amax,
    aten.amin,
    # max(x, 0): 0 is a real value of every grid. relu6 and hardtanh are not here: 6 need not be one.
    aten.relu,
    aten.relu_,
    # Identities in eval (only then: see `is_scale_preserving`).
    aten.dropout,
    aten.dropout_,
    aten.feature_dropout,
    aten.feature_dropout_,
    aten.alpha_dropout,
    aten.alpha_dropout_,
    aten.feature_alpha_dropout,
    aten.feature_alpha_dropout_,
    aten.native_dropout,
)

#: Operators that put several tensors (a list, their first argument) into one: on a grid if all of them lie on that one.
SCALE_JOINING: tuple[OpOverloadPacket[Any, Any], ...] = (aten.cat, aten.concat, aten.concatenate, aten.stack)

# Operators of the edge dialect that no aten operator stands for: by name, as only ExecuTorch registers them.
_EDGE_COPIES = frozenset({"dim_order_ops::_clone_dim_order"})

# These return several parts of their input; the other operators with several results return indices or a mask as well.
_SPLITS = frozenset(
    {
        aten.chunk,
        aten.split,
        aten.split_with_sizes,
        aten.tensor_split,
        aten.unsafe_chunk,
        aten.unsafe_split,
        aten.unsafe_split_with_sizes,
        aten.unbind,
        aten.split_copy,
        aten.split_with_sizes_copy,
        aten.unbind_copy,
    }
)
_PACKETS = frozenset(SCALE_PRESERVING)


def is_scale_preserving(target: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> bool:
    """Whether the output of this call lies on the grid of its first argument.

    Args:
        target: An `OpOverload`, an operator of the edge dialect, or a packet (then the arguments are not looked at).
        args: Arguments of the call, to tell a zero pad from another and a dropout in eval from one in training.
        kwargs: Keyword arguments of the call.
    """
    found = packet(target)
    if found is None:
        return False
    if found not in _PACKETS:
        return found._qualified_op_name in _EDGE_COPIES
    if found is target or not args:
        return True
    return not any(disturbs(target, args, kwargs or {}) for disturbs in (_pads_nonzero, _drops, _reinterprets))


def is_scale_joining(target: object) -> bool:
    """Whether the call puts the tensors of a list, its first argument, into one."""
    return packet(target) in SCALE_JOINING


def grid_source(node: fx.Node) -> fx.Node | None:
    """The node on whose grid the values of `node` lie by the operator's nature, one step up; else None.

    `getitem` of an operator with several results is one step together with that operator.
    """
    if node.op != "call_function":
        return None
    call, position = node, 0
    if node.target is operator.getitem:
        call, position = node.args  # type: ignore[assignment]
        if not isinstance(call, fx.Node) or (position != 0 and packet(call.target) not in _SPLITS):
            return None
    if not call.args or not is_scale_preserving(call.target, call.args, call.kwargs):
        return None
    source = call.args[0]
    return source if isinstance(source, fx.Node) else None


def _pads_nonzero(target: object, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    if packet(target) not in (aten.pad, aten.constant_pad_nd):
        return False
    if packet(target) is aten.pad and argument(target, args, kwargs, "mode") != "constant":
        return False
    return argument(target, args, kwargs, "value") not in (None, 0)


def _drops(target: object, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    # native_dropout's `train` may be None, which means true.
    return has_argument(target, "train") and argument(target, args, kwargs, "train") is not False


def _reinterprets(target: object, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    # view(dtype) reads the same bits as other numbers.
    return has_argument(target, "dtype") and argument(target, args, kwargs, "dtype") is not None
