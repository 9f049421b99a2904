"""The one place where a QAT class, a pattern or a functional operation is added.

`QAT_CLASSES` is an explicit tuple. A QAT class whose `float_type` is a wrapper (`qbench.nn.intrinsic.Fused`) is also a
pattern: its `part_types` are the chain that `fuse` looks for, the longest chain first.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from qbench.errors import ConfigError, FusionError
from qbench.nn import ops
from qbench.nn import qat as nnqat
from qbench.nn.intrinsic import Fused
from qbench.nn.intrinsic import qat as nniqat
from qbench.nn.intrinsic.fused import as_types, matches_part
from qbench.nn.qat.body import QatModule

QAT_CLASSES: tuple[type[QatModule], ...] = (
    nniqat.ConvBnReLU1d,
    nniqat.ConvBnReLU2d,
    nniqat.ConvBnReLU3d,
    nniqat.ConvTransposeBnReLU1d,
    nniqat.ConvTransposeBnReLU2d,
    nniqat.ConvTransposeBnReLU3d,
    nniqat.LinearBnReLU1d,
    nniqat.ConvBn1d,
    nniqat.ConvBn2d,
    nniqat.ConvBn3d,
    nniqat.ConvTransposeBn1d,
    nniqat.ConvTransposeBn2d,
    nniqat.ConvTransposeBn3d,
    nniqat.LinearBn1d,
    nniqat.ConvReLU1d,
    nniqat.ConvReLU2d,
    nniqat.ConvReLU3d,
    nniqat.ConvTransposeReLU1d,
    nniqat.ConvTransposeReLU2d,
    nniqat.ConvTransposeReLU3d,
    nniqat.LinearReLU,
    nniqat.BnReLU1d,
    nniqat.BnReLU2d,
    nniqat.BnReLU3d,
    nnqat.Conv1d,
    nnqat.Conv2d,
    nnqat.Conv3d,
    nnqat.ConvTranspose1d,
    nnqat.ConvTranspose2d,
    nnqat.ConvTranspose3d,
    nnqat.Linear,
    nnqat.BatchNorm1d,
    nnqat.BatchNorm2d,
    nnqat.BatchNorm3d,
    nnqat.FrozenBatchNorm1d,
    nnqat.FrozenBatchNorm2d,
    nnqat.FrozenBatchNorm3d,
    nnqat.Add,
    nnqat.AddReLU,
    nnqat.Sub,
    nnqat.Mul,
    nnqat.Cat,
    nnqat.Mean,
    nnqat.AdaptiveAvgPool2d,
    nnqat.AvgPool2d,
    nnqat.Div,
    nnqat.MatMul,
    nnqat.Stack,
    nnqat.Clamp,
    nnqat.AdaptiveAvgPool1d,
    nnqat.AdaptiveAvgPool3d,
    nnqat.AvgPool1d,
    nnqat.AvgPool3d,
    nnqat.LPPool1d,
    nnqat.LPPool2d,
    nnqat.LPPool3d,
    nnqat.Interpolate,
    nnqat.Upsample,
    nnqat.UpsamplingBilinear2d,
    nnqat.Embedding,
    nnqat.EmbeddingBag,
    nnqat.LayerNorm,
    nnqat.GroupNorm,
    nnqat.InstanceNorm1d,
    nnqat.InstanceNorm2d,
    nnqat.InstanceNorm3d,
    nnqat.LocalResponseNorm,
    nnqat.RMSNorm,
    nnqat.NormalizeGroups,
    nnqat.NormalizeLayer,
    nnqat.CELU,
    nnqat.ELU,
    nnqat.GELU,
    nnqat.GLU,
    nnqat.Hardshrink,
    nnqat.Hardsigmoid,
    nnqat.Hardswish,
    nnqat.Hardtanh,
    nnqat.LeakyReLU,
    nnqat.LogSigmoid,
    nnqat.LogSoftmax,
    nnqat.Mish,
    nnqat.PReLU,
    nnqat.RReLU,
    nnqat.ReLU6,
    nnqat.SELU,
    nnqat.SiLU,
    nnqat.Sigmoid,
    nnqat.Softmax,
    nnqat.Softmax2d,
    nnqat.Softmin,
    nnqat.Softplus,
    nnqat.Softshrink,
    nnqat.Softsign,
    nnqat.Tanh,
    nnqat.Tanhshrink,
    nnqat.Threshold,
    nnqat.ScaledLinear,
    nnqat.CosineProduct,
    nnqat.Normalize,
    nnqat.MaskedSoftmax,
    nnqat.RelativePositionBias,
    nnqat.ContinuousPositionBias,
)

# Operations on two tensors, or on a tensor and a number, that become modules; those in place have names of their own.
TENSOR_OPS: dict[Any, Callable[[], nn.Module]] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), ops.Add),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, torch.subtract, "sub", "sub_"), ops.Sub),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_"), ops.Mul),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div, torch.true_divide, "div", "div_"), ops.Div),
    **dict.fromkeys((operator.matmul, torch.matmul, torch.bmm, torch.mm, "matmul", "bmm", "mm"), ops.MatMul),
}
# Changes of sign, which are a product with −1.
NEGATIONS = frozenset({operator.neg, torch.neg, torch.negative, "neg"})
# Functions of a list of tensors and an axis.
LIST_OPS: dict[Any, Callable[[int], nn.Module]] = {
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), ops.Cat),
    torch.stack: ops.Stack,
}

# Functions and methods of one tensor, and what computes the same from their other arguments, in the same order. A chain
# may end in such a call instead of a module; one that stands alone becomes a module if that has a QAT class.
MODULE_CALLS: dict[Any, type[nn.Module]] = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, "relu", "relu_"), nn.ReLU),
    F.relu6: nn.ReLU6,
    F.hardtanh: nn.Hardtanh,
    **dict.fromkeys((torch.clamp, torch.clip, "clamp", "clip"), ops.Clamp),
    F.hardswish: nn.Hardswish,
    F.hardsigmoid: nn.Hardsigmoid,
    F.silu: nn.SiLU,
    F.gelu: nn.GELU,
    F.mish: nn.Mish,
    F.elu: nn.ELU,
    **dict.fromkeys((F.selu, torch.selu), nn.SELU),
    **dict.fromkeys((F.celu, torch.celu), nn.CELU),
    F.glu: nn.GLU,
    F.leaky_relu: nn.LeakyReLU,
    F.logsigmoid: nn.LogSigmoid,
    F.softplus: nn.Softplus,
    F.softsign: nn.Softsign,
    F.softshrink: nn.Softshrink,
    F.hardshrink: nn.Hardshrink,
    F.tanhshrink: nn.Tanhshrink,
    F.threshold: nn.Threshold,
    **dict.fromkeys((F.sigmoid, torch.sigmoid, torch.sigmoid_, "sigmoid", "sigmoid_"), nn.Sigmoid),
    **dict.fromkeys((F.tanh, torch.tanh, torch.tanh_, "tanh", "tanh_"), nn.Tanh),
    **dict.fromkeys((F.softmax, torch.softmax, "softmax"), nn.Softmax),
    **dict.fromkeys((F.log_softmax, torch.log_softmax, "log_softmax"), nn.LogSoftmax),
    F.softmin: nn.Softmin,
    F.adaptive_avg_pool1d: nn.AdaptiveAvgPool1d,
    F.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d,
    F.adaptive_avg_pool3d: nn.AdaptiveAvgPool3d,
    F.avg_pool1d: nn.AvgPool1d,
    F.avg_pool2d: nn.AvgPool2d,
    F.avg_pool3d: nn.AvgPool3d,
    F.lp_pool1d: nn.LPPool1d,
    F.lp_pool2d: nn.LPPool2d,
    F.local_response_norm: nn.LocalResponseNorm,
    **dict.fromkeys((torch.mean, "mean"), ops.Mean),
}


def _resample(size: Any = None, scale_factor: Any = None, *args: Any, **kwargs: Any) -> tuple[nn.Module, list[Any]]:
    return ops.Interpolate(None, scale_factor, *args, **kwargs), [size]


def _layer_norm(
    normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> tuple[nn.Module, list[Any]]:
    return ops.NormalizeLayer(normalized_shape, eps), [weight, bias]


def _group_norm(
    num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> tuple[nn.Module, list[Any]]:
    return ops.NormalizeGroups(num_groups, eps), [weight, bias]


# Functions of one tensor and of values that come with the call: the module, and what it is called with besides.
CALLS_WITH_VALUES: dict[Any, Callable[..., tuple[nn.Module, list[Any]]]] = {
    F.interpolate: _resample,
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
}

# Calls that write to their first tensor, besides those that are told to: inplace=True.
IN_PLACE_CALLS = frozenset(
    {
        *(operator.iadd, operator.isub, operator.imul, operator.itruediv, "add_", "sub_", "mul_", "div_"),
        *(torch.relu_, "relu_", torch.sigmoid_, "sigmoid_", torch.tanh_, "tanh_"),
    }
)

_REGISTERED: list[type[QatModule]] = []


def register_pattern(qat_class: type[QatModule]) -> type[QatModule]:
    """Add a QAT class: its `float_type` is prepared to it, and if that is a wrapper, `fuse` looks for its chain.

    Usable as a decorator. Registering a class of the same name again replaces it (a notebook cell that is run twice).

    Raises:
        ConfigError: the class is not a QAT class, has no `float_type`, or its float type or chain is taken.
    """
    if not (isinstance(qat_class, type) and issubclass(qat_class, QatModule)):
        raise ConfigError(
            f"register_pattern({qat_class!r}): expected a QAT class, such as a subclass of "
            "qbench.nn.intrinsic.qat.ConvBn2d"
        )
    float_type = qat_class.__dict__.get("float_type")
    if float_type is None:
        raise ConfigError(
            f"register_pattern({qat_class.__name__}): the class must say its own float_type = <the float wrapper>"
        )
    if issubclass(float_type, Fused) and not float_type.part_types:
        raise ConfigError(
            f"register_pattern({qat_class.__name__}): {float_type.__name__} names no part_types; for example "
            "part_types = (nn.Conv2d, nn.BatchNorm2d, nn.Hardswish)"
        )
    others = [known for known in _REGISTERED if _name(known) != _name(qat_class)]
    for known in (*others, *QAT_CLASSES):
        if known is not qat_class and _chains(known) & _chains(qat_class):
            raise ConfigError(
                f"register_pattern({qat_class.__name__}): {known.__name__} already handles "
                f"{known.float_type.__name__}; to use another class for it in one model, prepare_qat(model, "
                f"mapping={{{known.float_type.__name__}: {qat_class.__name__}}})"
            )
    _REGISTERED[:] = [*others, qat_class]
    return qat_class


def qat_classes() -> tuple[type[QatModule], ...]:
    """Registered classes, then the built-in ones."""
    return (*_REGISTERED, *QAT_CLASSES)


def default_mapping() -> dict[type[nn.Module], type[QatModule]]:
    """Float type → QAT type."""
    return {qat_class.float_type: qat_class for qat_class in reversed(qat_classes())}


def wrappers() -> tuple[type[Fused], ...]:
    """The float wrappers of all patterns, longest chain first."""
    found = [known.float_type for known in qat_classes() if issubclass(known.float_type, Fused)]
    return tuple(sorted(found, key=lambda wrapper: -len(wrapper.part_types)))


def wrapper_of(parts: tuple[nn.Module, ...]) -> type[Fused]:
    """The wrapper for these very modules.

    Raises:
        FusionError: no pattern has this chain; the message lists the chains that start alike.
    """
    for wrapper in wrappers():
        if len(wrapper.part_types) == len(parts) and all(
            matches_part(part, wanted) for part, wanted in zip(parts, wrapper.part_types, strict=True)
        ):
            return wrapper
    given = ", ".join(type(part).__name__ for part in parts)
    alike = [w.describe() for w in wrappers() if matches_part(parts[0], w.part_types[0])] if parts else []
    raise FusionError(
        f"no pattern is ({given}); patterns that start alike: {'; '.join(alike) or 'none'}. A new one is class data "
        "and qbench.register_pattern, see docs/patterns.md"
    )


def _name(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__


def _chains(qat_class: type[QatModule]) -> set[tuple[type[nn.Module], ...]]:
    """All chains of plain types that a class handles; a single module is a chain of one."""
    chains: set[tuple[type[nn.Module], ...]] = {()}
    for part in getattr(qat_class.float_type, "part_types", (qat_class.float_type,)):
        chains = {(*chain, kind) for chain in chains for kind in as_types(part)}
    return chains
