"""What a module does, found out once: it holds as long as nothing about the module is switched.

Which function serves a layer depends on some thirty things: switches, hooks, kinds of quantizers, settings of their
observers. Asking for all of them takes longer than a small layer computes. So they are asked for once, and in each step
only whether they are the same objects as then.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

_T = TypeVar("_T")
_M = TypeVar("_M", bound=nn.Module)

# By module, and not on it: one that is copied or stored takes no code along.
_PREPARED: weakref.WeakKeyDictionary[nn.Module, tuple[Unchanged, Any]] = weakref.WeakKeyDictionary()


def prepared(module: _M, prepare: Callable[[_M], _T], others: Callable[[_M], tuple[nn.Module | None, ...]]) -> _T:
    """What `prepare` made of a module, in this call or in an earlier one.

    Args:
        module: One whose mode, attributes and submodules matter; its hooks do not. Always with the same `prepare`.
        prepare: Makes it; must not keep the module.
        others: Further modules that matter, with their hooks.
    """
    known = _PREPARED.get(module)
    if known is None or not known[0](module):
        known = _PREPARED[module] = Unchanged(module, *others(module)), prepare(module)
    found: _T = known[1]
    return found


class Unchanged:
    """Whether a module and others are as they were: of the same classes, with the same attributes and submodules.

    Tensors in parameters and buffers may be others.

    Args:
        module: One that is called; not kept.
        others: Modules that must not be watched either, as they are not called; None is left out.
    """

    def __init__(self, module: nn.Module, *others: nn.Module | None) -> None:
        self._others = [other for other in others if other is not None]
        self._hooks = [hooks for other in self._others for hooks in _hooks(other)]
        # Views: they show what there is when they are read.
        self._views = [view for one in (module, *self._others) for view in (vars(one).values(), one._modules.values())]
        self._before = self._now(module)

    def __call__(self, module: nn.Module) -> bool:
        """Ask."""
        now = self._now(module)
        return len(now) == len(self._before) and all(map(operator.is_, now, self._before)) and not any(self._hooks)

    def _now(self, module: nn.Module) -> list[Any]:
        return [type(module), *map(type, self._others), *itertools.chain.from_iterable(self._views)]


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
