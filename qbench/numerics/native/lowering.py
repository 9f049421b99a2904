"""What Inductor makes of the operators: it is free in the order of memory, as it is with those of PyTorch.

    qbench::layer_forward     in the order that is faster, whatever it would be in eager mode
    qbench::layer_backward    the gradient is made in the order of the output, by what makes it

Models are traced in the order of eager mode, so that what looks at strides (`view`) finds what it expects; Inductor
looks after that itself where it gives memory another order.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
from typing import Any

import torch
from torch import Tensor

from qbench.numerics.blocks import CHANNELS_LAST, channels_are_last
from qbench.numerics.layer_step import Convolution

_LOG = logging.getLogger("qbench")

# A dense convolution whose weight has more values than this many of an image stays contiguous.
_WEIGHTS_PER_VALUE = 8


def takes_channels_last(linear: Convolution, x: Tensor, weight: Tensor, last: bool) -> bool:
    """Whether a convolution is faster with channels last.

    For groups it is, and for dense ones on large maps. On small ones of many channels, weights and their gradients
    would have to change places, which costs more than it wins. Of one value a map, a weight lies in both orders; the
    input decides then.

    Args:
        linear: The convolution.
        x: (batch, in, …).
        weight: (out, in/groups, …).
        last: Whether `x` is to have channels last.
    """
    order = CHANNELS_LAST.get(x.ndim)
    if order is None:
        return False
    if linear.groups > 1 or not weight.is_contiguous():
        return not linear.is_better_turned(x, weight)
    if weight.is_contiguous(memory_format=order):
        return last
    return bool(_WEIGHTS_PER_VALUE * math.prod(x.shape[1:]) > weight.numel())


@functools.cache
def register() -> None:
    """Tell Inductor, once; without a way to do so, orders stay those of eager mode, and the log says so."""
    try:
        inductor, ir, virtualized = (
            importlib.import_module(f"torch._inductor.{name}") for name in ("lowering", "ir", "virtualized")
        )
        forward, backward = torch.ops.qbench.layer_forward.default, torch.ops.qbench.layer_backward.default
        run_forward, run_backward = inductor.fallback_handler(forward), inductor.fallback_handler(backward)

        @inductor.register_lowering(forward, type_promotion_kind=None)
        def _(*arguments: Any) -> Any:
            return run_forward(*arguments[:-1], _takes_channels_last(virtualized.V.graph, forward))

        @inductor.register_lowering(backward, type_promotion_kind=None)
        def _(grad: Any, x: Any, weight: Any, y: Any, *others: Any) -> Any:
            order = ir.get_stride_order(y.get_stride(), virtualized.V.graph.sizevars.shape_env)
            return run_backward(ir.ExternKernel.require_stride_order(grad, order), x, weight, y, *others)

    except (ImportError, AttributeError) as error:
        _LOG.info("compiled layers keep the order of memory of eager mode: %s", error)


def _takes_channels_last(graph: Any, forward: Any) -> bool:
    """Whether the layer that is lowered takes channels last; what follows then, up to the next layers, keeps them.

    Args:
        graph: What is lowered.
        forward: The operator of layers.
    """
    node, preferred = graph.current_node, graph.nodes_prefer_channels_last
    x, weight = (one.meta["val"] for one in node.args[:2])
    last = node.args[0] in preferred or bool(channels_are_last(x))
    found = takes_channels_last(Convolution(*node.args[13:17]), x, weight, last)
    waiting = [node] if found else []
    while waiting:
        for user in waiting.pop().users:
            if user.target is not forward and user not in preferred:
                preferred.add(user)
                waiting.append(user)
    return found
