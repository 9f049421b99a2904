"""fused → QAT: modules are swapped in place of the float ones; the rest of the model is the user's own."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from qbench import linking, mappings
from qbench.errors import ConfigError, LinkError, PreparationError, QBenchError, QBenchWarning
from qbench.fake_quantize import FakeQuantize
from qbench.fusion import NOTES
from qbench.nn.frozen import known_types
from qbench.nn.intrinsic import Fused
from qbench.nn.qat.body import QatModule
from qbench.nn.qat.codes import check_finite
from qbench.numerics.qparams import in_groups
from qbench.qconfig import QConfig
from qbench.report.preparation import AppliedOverride, LeftInFloat, PreparationReport, QuantizedModule
from qbench.torch_ao import adopt

_REPORT = "_qbench_preparation"

Examples = tuple[Any, ...] | Sequence[tuple[Any, ...]]


def prepare_qat(
    model: nn.Module,
    mapping: Mapping[type[nn.Module], type[QatModule]] | None = None,
    inplace: bool = False,
    *,
    qconfig: QConfig | None = None,
    example_inputs: Examples | None = None,
) -> nn.Module:
    """Swap float modules for QAT modules and find out which quantizer each of them gets its input from.

    Argument order is that of `torch.ao.quantization.prepare_qat`. A module's `qconfig` attribute holds for it and what
    is below it; `qconfig = None` leaves that part in float.

    Args:
        model: A float model, fused or not; hooks, Python control flow and the names of its weights stay.
        mapping: {float type: QAT type} that come before the default ones.
        inplace: Change `model` itself.
        qconfig: The qconfig of the root; the default is `model.qconfig`. One of torch.ao, and its QConfigMapping, is
            translated, here and on modules (`qbench.translate_qconfig`).
        example_inputs: One tuple of inputs to record a forward with, or a list of tuples, one per path of control flow.
            Without it the first forward is recorded.

    Returns:
        The prepared model; `preparation_report(model)` says what was and was not quantized.

    Raises:
        PreparationError: there is no qconfig anywhere, nothing to quantize, or torch.ao has prepared the model.
        ConfigError: a qconfig of torch.ao without an equivalent.
        FusionError: a wrapper whose parts do not match.
        NumericsError: a weight or statistic is NaN or infinite.
        LinkError: quantizers that must become one differ, or learned quantizers are used without example_inputs.
    """
    if not isinstance(model, nn.Module):
        raise PreparationError(f"prepare_qat: got {type(model).__name__}, expected a torch.nn.Module")
    calls = None if example_inputs is None else _as_calls(example_inputs)
    notes = getattr(model, NOTES, {})
    fused = hasattr(model, NOTES) or any(isinstance(module, Fused) for module in model.modules())
    model = model if inplace else copy.deepcopy(model)
    if qconfig is not None:
        model.qconfig = qconfig  # type: ignore[assignment]
    model, adopted = adopt(model, [args for args, _ in calls or ()])
    if all(m.__dict__.get("qconfig") is None for m in model.modules()):
        raise PreparationError(
            "prepare_qat: neither the model nor any of its modules has a qconfig; set model.qconfig = "
            "qbench.get_qconfig() or pass qconfig="
        )
    known = {**mappings.default_mapping(), **_checked_mapping(mapping)}
    quantized: list[QuantizedModule] = []
    left: list[LeftInFloat] = [LeftInFloat(path, "forward", reason) for path, reason in {**notes, **adopted}.items()]
    for path, module, wanted in _to_swap(model, "", None, known, set()):
        # All modules before the first is swapped: a refusal leaves no model half prepared.
        check_finite(module, path or type(module).__name__)
        _check_groups(module, path, wanted)
    model = _swap(model, "", None, known, quantized, left, {})
    if not quantized:
        raise PreparationError(
            f"prepare_qat: nothing to quantize in {type(model).__name__}; known float types: "
            f"{', '.join(sorted(kind.__name__ for kind in known))}"
        )
    linking.label_quantizers(model)
    _move_to_device_of_parameters(model)
    report = PreparationReport(quantized=tuple(quantized), left_in_float=tuple(left))
    object.__setattr__(model, _REPORT, report)
    _warn_of_float_parameters(report)
    if not fused:
        _warn_of_batch_norms(report)
    if calls is not None:
        _link(model, calls)
    elif any(isinstance(m, FakeQuantize) and m.learned for m in model.modules()):
        raise LinkError(
            "prepare_qat: learned quantizers need example_inputs, as quantizers (and their parameters) may merge when "
            "links are recorded, after the optimizer was made: prepare_qat(model, qconfig=..., example_inputs=(x,))"
        )
    else:
        model.register_forward_pre_hook(_RecordFirstForward(), prepend=True, with_kwargs=True)
    return model


def preparation_report(model: nn.Module) -> PreparationReport:
    """What `prepare_qat` did to this model, and what the recorded forward found.

    Raises:
        PreparationError: the model was not prepared.
    """
    report = model.__dict__.get(_REPORT)
    if report is None:
        raise PreparationError(
            f"{type(model).__name__} was not made by prepare_qat; preparation_report(qbench.prepare_qat(model, ...)) "
            "works"
        )
    return report


def report_overrides(model: nn.Module, overrides: tuple[AppliedOverride, ...]) -> None:
    """Note in a prepared model's report which override hit which modules."""
    report = dataclasses.replace(preparation_report(model), overrides=overrides)
    object.__setattr__(model, _REPORT, report)


def _warn_of_float_parameters(report: PreparationReport) -> None:
    unasked = [found for found in report.left_in_float if found.parameters and not found.on_purpose]
    if unasked:
        listed = ", ".join(f"{found.path} [{found.kind}]" for found in unasked[:3])
        more = f" and {len(unasked) - 3} more" if len(unasked) > 3 else ""
        warnings.warn(
            f"prepare_qat leaves {len(unasked)} module(s) with parameters in float: {listed}{more}. The first because: "
            f"{unasked[0].reason}. qbench.preparation_report(model) says why for each; qconfig = None on a module says "
            "that it is meant to stay in float",
            QBenchWarning,
            stacklevel=3,
        )


def _warn_of_batch_norms(report: PreparationReport) -> None:
    alone = [found.path for found in report.quantized if found.float_type.startswith("BatchNorm")]
    if alone:
        more = f" and {len(alone) - 3} more" if len(alone) > 3 else ""
        warnings.warn(
            f"prepare_qat leaves {len(alone)} BatchNorm(s) to themselves ({', '.join(alone[:3])}{more}), each with a "
            "quantizer before it: qbench.fuse(model) first folds those that follow a layer",
            QBenchWarning,
            stacklevel=3,
        )


class _RecordFirstForward:
    """Forward pre-hook of a prepared model: records links once, with the arguments of that forward."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        linking.only_once(self, module)
        _link(module, [(args, kwargs)])


def _link(model: nn.Module, calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
    found = linking.link(model, calls)
    before = preparation_report(model)
    report = dataclasses.replace(
        before,
        float_inputs=found.float_inputs,
        shared=found.shared,
        unreached=found.unreached,
        requantized=found.requantized,
        links_recorded=True,
        float_operations=found.float_operations,
    )
    object.__setattr__(model, _REPORT, report)


def _as_calls(examples: Examples) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    several = isinstance(examples, list)
    tuples: Sequence[Any] = examples if several else [examples]
    if not tuples or not all(isinstance(example, tuple) for example in tuples):
        given = "a tensor" if isinstance(examples, Tensor) else repr(type(examples).__name__)
        raise ConfigError(
            f"example_inputs: got {given}, expected a tuple of the model's inputs, example_inputs=(x,), or a list of "
            "such tuples"
        )
    return [(example, {}) for example in tuples]


def _checked_mapping(
    mapping: Mapping[type[nn.Module], type[QatModule]] | None,
) -> Mapping[type[nn.Module], type[QatModule]]:
    for float_type, qat_type in (mapping or {}).items():
        if not (isinstance(qat_type, type) and issubclass(qat_type, QatModule)):
            raise ConfigError(
                f"mapping: {float_type!r} → {qat_type!r}; expected {{float type: QAT type}}, such as "
                "{torch.nn.Conv2d: qbench.nn.qat.Conv2d}"
            )
    return mapping or {}


def _swap(
    module: nn.Module,
    path: str,
    inherited: QConfig | None,
    known: Mapping[type[nn.Module], type[QatModule]],
    quantized: list[QuantizedModule],
    left: list[LeftInFloat],
    done: dict[int, nn.Module],
) -> nn.Module:
    if id(module) in done:
        return done[id(module)]
    qconfig = module.__dict__.get("qconfig", inherited)
    if qconfig is not None and not isinstance(qconfig, QConfig):
        raise PreparationError(
            f"{path or '(root)'}.qconfig is {type(qconfig).__module__}.{type(qconfig).__name__}; expected a "
            "qbench.QConfig: qbench.get_qconfig('onnxruntime')"
        )
    result = module
    qat_type = _qat_type(module, known)
    if isinstance(module, QatModule):
        left.append(LeftInFloat(path, type(module).__name__, "it is a QAT module already"))
    elif qat_type is not None and _is_quantized(module, qat_type, qconfig):
        assert qconfig is not None
        result, lost_hooks = _make_qat(module, path, qat_type, qconfig)
        if lost_hooks:
            left.append(LeftInFloat(path, "hooks", lost_hooks))
        fixed = qconfig.fixed_output(result.output_op)
        names = type(module).__name__, qat_type.__name__
        quantized.append(QuantizedModule(path, *names, qconfig.weight_only, fixed))
    else:
        reason = _reason_for_float(module, qat_type, qconfig)
        if reason:
            count = sum(parameter.numel() for parameter in module.parameters())
            on_purpose = qconfig is None or (qat_type is not None and qconfig.weight_only)
            left.append(LeftInFloat(path, type(module).__name__, reason, on_purpose, count))
        if not isinstance(module, Fused):
            # Not named_children, which leaves out the second name of a child.
            for name, child in list(module._modules.items()):
                if child is None:
                    continue
                below = f"{path}.{name}" if path else name
                swapped = _swap(child, below, qconfig, known, quantized, left, done)
                if swapped is not child:
                    setattr(module, name, swapped)
    done[id(module)] = result
    return result


def _to_swap(
    module: nn.Module,
    path: str,
    inherited: QConfig | None,
    known: Mapping[type[nn.Module], type[QatModule]],
    seen: set[int],
) -> Iterator[tuple[str, nn.Module, QConfig]]:
    """Paths and modules that `_swap` replaces, and what they are quantized to."""
    qconfig = module.__dict__.get("qconfig", inherited)
    if id(module) in seen or isinstance(module, QatModule):
        return
    seen.add(id(module))
    qat_type = _qat_type(module, known)
    if qconfig is not None and qat_type is not None and _is_quantized(module, qat_type, qconfig):
        yield path, module, qconfig
    elif not isinstance(module, Fused):
        for name, child in module.named_children():
            yield from _to_swap(child, f"{path}.{name}" if path else name, qconfig, known, seen)


def _qat_type(
    module: nn.Module, known: Mapping[type[nn.Module], type[QatModule]]
) -> type[QatModule] | None:
    return next((known[kind] for kind in known_types(module) if kind in known), None)


def _is_quantized(module: nn.Module, qat_type: type[QatModule], qconfig: QConfig | None) -> bool:
    """Whether there is something to quantize: weight-only, an operation without a weight stays as it is."""
    wanted = isinstance(qconfig, QConfig) and not qat_type.accepts(module, qconfig)
    return wanted and not qat_type.keeps_grid(module)


def _check_groups(module: nn.Module, path: str, qconfig: QConfig) -> None:
    size = qconfig.weight_spec.group_size if isinstance(qconfig, QConfig) else None
    weight = getattr(module[0] if isinstance(module, Fused) else module, "weight", None)
    if size is None or not isinstance(weight, Tensor):
        return
    try:
        in_groups(weight, size)
    except QBenchError as error:
        place = path or "(root)"
        raise type(error)(f"{place}: {error}. {place}.qconfig = … gives this module one of its own") from None


def _make_qat(
    module: nn.Module, path: str, qat_type: type[QatModule], qconfig: QConfig
) -> tuple[QatModule, str]:
    """The QAT module, and what became of hooks that have no place in it (empty if there are none)."""
    try:
        qat = qat_type.from_float(module, module.__dict__.get("qconfig", qconfig))
    except QBenchError as error:
        raise type(error)(f"{path or '(root)'}: {error}") from None
    homeless = _move_hooks(module, qat)
    if not homeless:
        return qat, ""
    reason = (
        f"hooks on {', '.join(homeless)} inside the wrapper are dropped: the layer and its BatchNorm are computed as "
        "one. Hooks on the wrapper itself are kept"
    )
    warnings.warn(f"{path or '(root)'}: {reason}", QBenchWarning, stacklevel=5)
    return qat, reason


def _move_hooks(module: nn.Module, qat: nn.Module) -> list[str]:
    """Give the QAT module the hooks of the module, in the order in which they ran.

    Of a wrapper's parts, the layer and a BatchNorm are no modules that are called any more: hooks before the first and
    after the last part become the wrapper's own. An activation is still called and keeps its hooks.

    Returns:
        Classes of the parts that have hooks in between.
    """
    parts = list(module) if isinstance(module, Fused) else []
    last = [] if parts and parts[-1] is qat.activation_module else parts[-1:]
    for holder in (module, *parts[:1]):
        _take(qat, holder, "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
    for holder in (*last, module):
        _take(qat, holder, "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
    _take(qat, module, "_backward_hooks", "_backward_pre_hooks")
    qat._is_full_backward_hook = module._is_full_backward_hook
    silent = (part for part in parts if part is not qat.activation_module)
    return [type(part).__name__ for part in silent if part._forward_hooks or part._forward_pre_hooks]


def _take(target: nn.Module, source: nn.Module, *names: str) -> None:
    for name in names:
        getattr(target, name).update(getattr(source, name))
        getattr(source, name).clear()


# They move, select or clip values to a bound that every grid has: nothing to quantize.
_TRANSPARENT = (
    nn.Identity,
    nn.ReLU,
    nn.Flatten,
    nn.Unflatten,
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.FractionalMaxPool2d, nn.FractionalMaxPool3d),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
    *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    *(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    *(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    *(nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
    nn.UpsamplingNearest2d,
    *(nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.Unfold),
)


def _reason_for_float(module: nn.Module, qat_type: type[QatModule] | None, qconfig: QConfig | None) -> str:
    """Why a module stays float; empty for what has nothing to quantize."""
    if qat_type is not None:
        if qat_type.keeps_grid(module):
            return ""
        if qconfig is None:
            return "its qconfig is None"
        # Without parameters, weight-only has nothing to say of it.
        parameters = any(True for _ in module.parameters())
        return qat_type.accepts(module, qconfig) if parameters or not qconfig.weight_only else ""
    if isinstance(module, Fused):
        return f"no QAT class is registered for {type(module).__name__}: qbench.register_pattern" if qconfig else ""
    leaf = not any(True for _ in module.children())
    # An empty Sequential is a branch that hands its input on.
    if not leaf or isinstance(module, _TRANSPARENT) or type(module) is nn.Sequential:
        return ""
    if type(module).__module__.startswith("torch.nn"):
        return f"no QAT class for {type(module).__name__}"
    if any(True for _ in module.parameters(recurse=False)):
        return f"{type(module).__name__} is not a known float type; map it: prepare_qat(model, mapping={{...}})"
    return ""


def _move_to_device_of_parameters(model: nn.Module) -> None:
    parameter = next(model.parameters(), None)
    if parameter is not None:
        for module in model.modules():
            if isinstance(module, FakeQuantize):
                module.to(parameter.device)


def quantized_modules(model: nn.Module) -> Iterator[tuple[str, QatModule]]:
    """Paths and QAT modules of a prepared model."""
    for name, module in model.named_modules():
        if isinstance(module, QatModule):
            yield name, module
