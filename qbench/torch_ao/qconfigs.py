"""A qconfig of torch.ao → the qbench QConfig of the same grids, or an error that names the nearest.

    quant_min … quant_max     2^bits codes, with the codes' own numbering: 0 … 255 is int8 here, zero point 128 lower
    reduce_range              7 bits
    per_*_symmetric           symmetric; s = max|x| / qmax, where torch.ao divides by qmax + ½
    per_channel_*             one scale per output channel
    moving average, min–max   of activations; the range of a weight is that of the weight at hand
    fixed                     that scale and zero point; an input that arrives in float has a range of its own
"""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from typing import Any

import torch
from torch import nn

from qbench import targets
from qbench.errors import ConfigError
from qbench.nn.intrinsic import Fused
from qbench.numerics.qparams import QSpec
from qbench.observers import FixedGridObserver, LatestMinMaxObserver, MinMaxObserver, MovingAverageMinMaxObserver
from qbench.qconfig import QConfig, QuantizerConfig
from qbench.torch_ao.kinds import is_wrapper

_SYMMETRIC = (torch.per_tensor_symmetric, torch.per_channel_symmetric)
_PER_CHANNEL = (torch.per_channel_affine, torch.per_channel_symmetric)
_PER_TENSOR = (torch.per_tensor_affine, torch.per_tensor_symmetric)
_WEIGHT_OBSERVERS = (
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "PerChannelMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
)
# Classes of MQBench, which puts them into torch.ao's QConfig, and of torch.ao → what learns alike here.
_METHODS = {
    "LearnableFakeQuantize": "lsq",
    "_LearnableFakeQuantize": "lsq",
    "DoReFaFakeQuantize": "dorefa",
    "DSQFakeQuantize": "dsq",
    "PACTFakeQuantize": "pact",
    "TqtFakeQuantize": "tqt",
    "FixedFakeQuantize": "fixed",
}
_FAKE_QUANTIZES = ("FakeQuantize", "FusedMovingAvgObsFakeQuantize", "FixedQParamsFakeQuantize")


def translate_qconfig(qconfig: Any, target: str | targets.Target = "onnxruntime") -> QConfig | None:
    """The qbench QConfig that quantizes as a QConfig of torch.ao does.

    Args:
        qconfig: A `torch.ao.quantization.QConfig`, such as `get_default_qat_qconfig("fbgemm")`. It names no runtime.
        target: Where the model will run; it says what torch.ao leaves to the backend, the bias among it.

    Returns:
        The QConfig; None for None.

    Raises:
        ConfigError: dynamic or float16 quantization, an observer or a scheme that has no equivalent here, codes that
            the target does not have. The message names the nearest call.
    """
    if qconfig is None or isinstance(qconfig, QConfig):
        return qconfig
    if not is_torch_ao_qconfig(qconfig):
        raise ConfigError(
            f"translate_qconfig: got {type(qconfig).__name__}, expected a torch.ao.quantization.QConfig; "
            "qbench.get_qconfig() makes a QConfig without torch.ao"
        )
    found = targets.get(target)
    activation = _activation(qconfig.activation, found)
    own_input = None
    if activation is not None and activation.observer is FixedGridObserver:
        own_input = dataclasses.replace(found.activation or QSpec(), bits=activation.spec.bits)
    return QConfig(target, activation, _weight(qconfig.weight, found), input=own_input)


def is_torch_ao_qconfig(value: Any) -> bool:
    """Whether a value is torch.ao's named tuple (activation, weight)."""
    return type(value).__module__.startswith("torch.ao.") and getattr(value, "_fields", ()) == ("activation", "weight")


def adopt_qconfigs(model: nn.Module, target: str | targets.Target = "onnxruntime") -> None:
    """Translate every torch.ao qconfig that a module of the model holds, in place.

    Raises:
        ConfigError: as `translate_qconfig`; the message begins with the path of the module.
    """
    for path, module in model.named_modules():
        held = module.__dict__.get("qconfig")
        try:
            if type(held).__module__.startswith("torch.ao.") and type(held).__name__ == "QConfigMapping":
                _spread(model, module, held, target)
            elif is_torch_ao_qconfig(held):
                module.qconfig = translate_qconfig(held, target)
        except ConfigError as error:
            raise ConfigError(f"{path or '(root)'}.qconfig: {error}") from None


def _spread(model: nn.Module, holder: nn.Module, mapping: Any, target: str | targets.Target) -> None:
    """A QConfigMapping as qconfigs of modules: name before pattern before type before global, as torch.ao has it."""
    if mapping.module_name_object_type_order_qconfigs:
        raise ConfigError(
            "a QConfigMapping by module name, object type and position has no equivalent: a QAT module holds its own "
            "qconfig, so name the module, mapping.set_module_name('layer1.conv1', …)"
        )
    for key, qconfig in mapping.object_type_qconfigs.items():
        same = getattr(qconfig, "activation", None) == getattr(mapping.global_qconfig, "activation", None)
        if not isinstance(key, type) and not same and not _is_backend_rule(qconfig):
            raise ConfigError(
                f"a QConfigMapping for the call of {key!r}: qbench.fuse makes a module of it, which takes a qconfig "
                "by its name; fuse first, then set the module's qconfig"
            )
    held = {path: _asked(mapping, path, module) for path, module in model.named_modules()}
    for path, module in model.named_modules():
        module.qconfig = translate_qconfig(held[path], target)
    holder.qconfig = translate_qconfig(mapping.global_qconfig, target)  # type: ignore[assignment]


def _asked(mapping: Any, path: str, module: nn.Module) -> Any:
    """The qconfig that a mapping gives one module; a name holds for what is below it, too."""
    steps = path.split(".")
    for end in range(len(steps), 0, -1):
        if path and ".".join(steps[:end]) in mapping.module_name_qconfigs:
            return mapping.module_name_qconfigs[".".join(steps[:end])]
    for pattern, qconfig in mapping.module_name_regex_qconfigs.items():
        if re.match(pattern, path):
            return qconfig
    # What is said of a layer holds for the chain that it begins.
    kind = type(next(module.children(), module)) if is_wrapper(module) or isinstance(module, Fused) else type(module)
    qconfig = mapping.object_type_qconfigs.get(kind, mapping.global_qconfig)
    return mapping.global_qconfig if _is_backend_rule(qconfig) else qconfig


def _is_backend_rule(qconfig: Any) -> bool:
    """Entries of torch.ao's default mappings that state what a kernel of its own needs: here the target says it."""
    kinds = (_class_name(getattr(qconfig, role, None)) for role in ("activation", "weight"))
    return any(kind in ("FixedQParamsFakeQuantize", "ReuseInputObserver", "PlaceholderObserver") for kind in kinds)


def _class_name(factory: Any) -> str:
    """Name of the class that a factory makes, `with_args` or not."""
    factory = getattr(factory, "p", factory)
    return str(getattr(getattr(factory, "func", factory), "__name__", ""))


def _activation(factory: Any, target: targets.Target) -> QuantizerConfig | None:
    if _class_name(factory) in ("Identity", "NoopObserver"):
        return None
    observer = _observer("activation", factory)
    if getattr(observer, "is_dynamic", False):
        raise ConfigError(
            "activation: dynamic quantization finds its ranges while the model runs, and trains nothing of them; "
            "get_qconfig() trains fixed ranges, get_qconfig(activation_bits=None) quantizes weights only"
        )
    bits, symmetric, axis = _grid("activation", observer)
    signed = target.activation is None or target.activation.signed
    spec = QSpec(bits, signed, symmetric, axis, narrow=signed and observer.quant_min == -observer.quant_max)
    kind = type(observer).__name__
    if kind == "FixedQParamsObserver":
        return _fixed(observer, spec, target)
    if kind == "MovingAverageMinMaxObserver":
        constant = float(observer.averaging_constant)
        return QuantizerConfig(spec, MovingAverageMinMaxObserver, observer_options={"averaging_constant": constant})
    if kind == "MinMaxObserver":
        return QuantizerConfig(spec, MinMaxObserver)
    near = "; get_qconfig(observer='mse') minimises the same error" if kind == "HistogramObserver" else ""
    raise ConfigError(
        f"activation: {kind} has no equivalent, MovingAverageMinMaxObserver and MinMaxObserver have{near}"
    )


def _fixed(observer: Any, spec: QSpec, target: targets.Target) -> QuantizerConfig:
    scale = float(observer.scale)
    zero_point = int(observer.zero_point) - observer.quant_min + spec.qmin
    spec = dataclasses.replace(
        spec,
        symmetric=zero_point == (0 if spec.signed else (spec.qmax + 1) // 2),
        power_of_two=target.activation is not None and target.activation.power_of_two and math.frexp(scale)[0] == 0.5,
    )
    try:
        FixedGridObserver(spec, scale, zero_point)
    except ConfigError as error:
        raise ConfigError(f"activation: {type(observer).__name__}: {error}") from None
    return QuantizerConfig(
        spec, FixedGridObserver, observer_options={"scale": scale, "zero_point": zero_point}
    )


def _weight(factory: Any, target: targets.Target) -> QuantizerConfig:
    if _class_name(factory) in ("Identity", "NoopObserver"):
        raise ConfigError(
            "weight: torch.ao leaves the weight in float here; integer layers need both, so set qconfig = None on "
            "modules that stay in float"
        )
    observer = _observer("weight", factory)
    bits, symmetric, axis = _grid("weight", observer)
    kind = type(observer).__name__
    if kind not in _WEIGHT_OBSERVERS:
        raise ConfigError(f"weight: {kind} has no equivalent; PerChannelMinMaxObserver and its like have")
    spec = dataclasses.replace(
        target.weight, bits=bits, symmetric=symmetric, axis=axis, narrow=symmetric and target.weight.narrow
    )
    return QuantizerConfig(spec, LatestMinMaxObserver)


def _observer(role: str, factory: Any) -> Any:
    """The observer of a quantizer that the factory makes, or the observer that it makes itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao's words about its own defaults; nothing of the user's runs in here
        made = factory()
    kind = type(made).__name__
    if not type(made).__module__.startswith("torch.ao."):
        raise ConfigError(f"{role}: {kind} is not a class of torch.ao; {_equivalent(kind)}")
    inner = getattr(made, "activation_post_process", None)
    if kind in _METHODS:
        raise ConfigError(f"{role}: {kind} learns its grid; {_equivalent(kind)}")
    if inner is not None and kind not in _FAKE_QUANTIZES:
        raise ConfigError(
            f"{role}: {kind} has no equivalent, as ranges are found here from what is seen; FakeQuantize with a "
            "moving average or min–max observer has"
        )
    return made if inner is None else inner


def _equivalent(kind: str) -> str:
    if kind in _METHODS:
        return f"get_qconfig(method={_METHODS[kind]!r}) has its equivalent"
    return "get_qconfig() makes a QConfig without it"


def _grid(role: str, observer: Any) -> tuple[int, bool, int | None]:
    """Bits, symmetric, channel axis."""
    scheme = getattr(observer, "qscheme", None)
    low, high = getattr(observer, "quant_min", None), getattr(observer, "quant_max", None)
    if scheme not in (*_PER_TENSOR, *_PER_CHANNEL) or low is None or high is None:
        raise ConfigError(
            f"{role}: {type(observer).__name__} with scheme {scheme} makes no integer codes; per_tensor_affine, "
            "per_channel_symmetric and their like do"
        )
    bits = int(high - low).bit_length()
    whole = high - low + 1 == 2**bits or (low == -high and high == 2 ** (bits - 1) - 1)
    if bits < 2 or not whole:
        near = f"{-(2 ** (bits - 1))} … {2 ** (bits - 1) - 1}" if low < 0 else f"0 … {2**bits - 1}"
        raise ConfigError(
            f"{role}: codes {low} … {high} are not all codes of one width; {near} are those of {bits} bits"
        )
    axis = None if scheme in _PER_TENSOR else max(0, int(observer.ch_axis))
    return bits, scheme in _SYMMETRIC, axis
