"""float → float: attention modules whose operations nothing can see become modules that can be quantized.

What is computed is the same, by the same equations; the order of some floating-point sums is not, so outputs move by
rounding. That is why this is a step of its own and no part of `fuse`, which changes no bit.
"""

from __future__ import annotations

import copy
import warnings

from torch import nn

from qbench.errors import FusionError, QBenchWarning
from qbench.nn import attention
from qbench.report.attention import AttentionReport, ReplacedAttention
from qbench.report.preparation import LeftInFloat

_REPORT = "_qbench_attention"

#: What is known; a new one is a class with `stands_for`, `parts` and `from_module`, and an entry here.
EXPLICIT: tuple[type[attention.ExplicitAttention], ...] = (
    attention.ExplicitMultiheadAttention,
    attention.ExplicitShiftedWindowAttention,
    attention.ExplicitShiftedWindowAttentionV2,
    attention.ExplicitRelativePositionalAttention,
)
_BY_NAME = {kind.stands_for: kind for kind in EXPLICIT}

# What hooks a module has.
_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks"),
)


def explicit_attention(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """A copy of `model` in which every known attention module is written out as modules that can be quantized.

    Known are `torch.nn.MultiheadAttention` and torchvision's `ShiftedWindowAttention`, `ShiftedWindowAttentionV2` and
    `RelativePositionalMultiHeadAttention`, by the name of their class and of their parts. Outputs are equal up to
    floating-point rounding, parameters keep their values under other names: load a checkpoint of the float model first.

    Args:
        model: A float model, before `fuse`.
        inplace: Change `model` itself; its parameters are then shared where they stay whole.

    Returns:
        The model; `attention_report` says what was replaced, what was left and why.

    Raises:
        FusionError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise FusionError(f"explicit_attention: got {type(model).__name__}, expected a torch.nn.Module")
    model = model if inplace else copy.deepcopy(model)
    replaced: list[ReplacedAttention] = []
    left: list[LeftInFloat] = []
    result = _replace(model, "", replaced, left, {})
    object.__setattr__(result, _REPORT, AttentionReport(tuple(replaced), tuple(left)))
    if left:
        warnings.warn(
            f"explicit_attention leaves {len(left)} attention module(s) as they are; the first is {left[0].path}: "
            f"{left[0].reason}. What they compute stays in float; qbench.attention_report(model) lists them",
            QBenchWarning,
            stacklevel=2,
        )
    return result


def attention_report(model: nn.Module) -> AttentionReport:
    """What `explicit_attention` replaced and left in this model, which may have been fused and prepared since.

    Raises:
        FusionError: the model was not made by `explicit_attention`.
    """
    report = model.__dict__.get(_REPORT)
    if report is None:
        raise FusionError(
            f"{type(model).__name__} was not made by explicit_attention; "
            "attention_report(qbench.explicit_attention(model)) works"
        )
    found: AttentionReport = report
    return found


def _replace(
    module: nn.Module,
    path: str,
    replaced: list[ReplacedAttention],
    left: list[LeftInFloat],
    done: dict[int, nn.Module],
) -> nn.Module:
    if id(module) in done:
        return done[id(module)]
    result = module
    kind = _known(module)
    reason = _reason_to_leave(module, kind)
    if kind is not None and not reason:
        result = _made(kind, module)
        replaced.append(ReplacedAttention(path, type(module).__name__, kind.__name__))
    else:
        if reason:
            count = sum(parameter.numel() for parameter in module.parameters())
            left.append(LeftInFloat(path, type(module).__name__, reason, parameters=count))
        # Not named_children, which leaves out the second name of a child.
        for name, child in list(module._modules.items()):
            if child is not None:
                setattr(module, name, _replace(child, f"{path}.{name}".lstrip("."), replaced, left, done))
    done[id(module)] = result
    return result


def _known(module: nn.Module) -> type[attention.ExplicitAttention] | None:
    """By its class's name, or that of one that it derives from."""
    return next((_BY_NAME[kind.__name__] for kind in type(module).__mro__ if kind.__name__ in _BY_NAME), None)


def _reason_to_leave(module: nn.Module, kind: type[attention.ExplicitAttention] | None) -> str:
    if kind is None or isinstance(module, attention.ExplicitAttention):
        return ""
    if type(module).__name__ != kind.stands_for:
        return f"it derives from {kind.stands_for}, and may compute something else"
    parts = set(module._modules)
    if parts != kind.parts:
        return f"its submodules are {sorted(parts)}, those of the {kind.stands_for} that is known {sorted(kind.parts)}"
    return kind.refusal(module)


def _made(kind: type[attention.ExplicitAttention], module: nn.Module) -> nn.Module:
    made = kind.from_module(module)
    if "qconfig" in vars(module):
        made.qconfig = module.qconfig
    for name in _HOOKS:
        getattr(made, name).update(getattr(module, name))
    made._is_full_backward_hook = module._is_full_backward_hook
    return made.train(module.training)
