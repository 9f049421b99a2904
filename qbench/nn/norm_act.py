"""A BatchNorm with an activation inside, as two modules.

Some model libraries (timm) write `act(drop(batch_norm(x)))` as one subclass of BatchNorm with the activation in `act`.
Written as two, the first folds into the layer before it and the second is fused or quantized like any other.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import cast

import torch
from torch import Tensor, nn

_BASES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_SHAPES = {nn.BatchNorm1d: (3,), nn.BatchNorm2d: (3, 2), nn.BatchNorm3d: (3, 2, 2)}


class NormAct(nn.Sequential):
    """A BatchNorm `bn` and an activation `act`, which stand for one module of the user's model."""


def split_norm_acts(model: nn.Module) -> dict[str, str]:
    """Replace every BatchNorm with an activation inside by a `NormAct` with the same tensors, in place.

    Outputs do not change: each pair is compared with what it replaces, bit for bit.

    Returns:
        Path -> why it was left alone, of those that look alike and are not.
    """
    notes: dict[str, str] = {}
    made: dict[int, NormAct | None] = {}
    for path, module in list(model.named_modules()):
        for name, child in list(module._modules.items()):
            if child is None or not _looks_alike(child):
                continue
            below = f"{path}.{name}" if path else name
            if id(child) not in made:
                made[id(child)] = _pair(child)
                if made[id(child)] is None:
                    notes[below] = f"{type(child).__name__} is a BatchNorm, but not one with its `act` behind it"
            pair = made[id(child)]
            if pair is not None:
                setattr(module, name, pair)
    return notes


def _looks_alike(module: nn.Module) -> bool:
    own = isinstance(module, _BASES) and type(module) not in _BASES
    return own and isinstance(getattr(module, "act", None), nn.Module)


def _pair(module: nn.Module) -> NormAct | None:
    """The pair for a module, or None where it computes something else, such as a dropout in between."""
    kind = next(base for base in _BASES if isinstance(module, base))
    bn = kind.__new__(kind)
    nn.Module.__init__(bn)
    bn.__dict__.update({name: value for name, value in vars(module).items() if not name.startswith("_")})
    bn._parameters.update(module._parameters)
    bn._buffers.update(module._buffers)
    pair = NormAct(OrderedDict(bn=bn, act=cast(nn.Module, module.act)))
    if "qconfig" in vars(module):
        pair.qconfig = module.qconfig
    return pair if _compute_the_same(*copy.deepcopy((module, pair)), _SHAPES[kind]) else None


def _compute_the_same(module: nn.Module, pair: NormAct, size: tuple[int, ...]) -> bool:
    """Whether both give the same bits for a tensor of random numbers, in training and then in eval."""
    reference = next(iter([*module.parameters(), *module.buffers()]), torch.zeros(()))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, module.num_features, *size, generator=generator).to(reference)  # type: ignore[call-overload]
    for training in (True, False):
        try:
            with torch.no_grad(), torch.random.fork_rng():
                first, second = module.train(training)(x.clone()), pair.train(training)(x.clone())
        except Exception:  # whatever a forward of the user raises: then it cannot be split
            return False
        if not (isinstance(first, Tensor) and torch.equal(first, second)):
            return False
    return True
