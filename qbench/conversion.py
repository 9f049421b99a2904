"""QAT → Q/DQ program: every QAT module becomes its deployed form, and the model is exported.

The program is a `torch.export.ExportedProgram` of aten and `quantized_decomposed` operators with the user's inputs and
outputs. Every quantized operation has a dequantize directly at each input and a quantize at its output; weights are
integer codes; each bias is a float32 tensor that lies on its grid, which a runtime's own rounding recovers
(docs/equations.md) and `qbench.passes.quantize_bias` turns into int32 codes. Layers that quantize their weight
only have dq(weight codes) alone and the bias as it was trained; the program notes their paths, so that no pass takes
such a bias for one that was trained on a grid.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from qbench import targets
from qbench.errors import ConfigError, ConversionError, LinkError, NumericsError, QBenchError, QBenchWarning
from qbench.fake_quantize import FakeQuantize
from qbench.graph.cleanup import remove_redundant_qdq
from qbench.graph.constants import constants_of
from qbench.graph.qdq import quantized_decomposed
from qbench.graph.recognise import is_dequantize, is_quantize
from qbench.nn.qat.body import QatModule, QatOp
from qbench.nn.qat.codes import ParameterCodes
from qbench.nn.qat.layer import QatLayer
from qbench.nn.reference import reference_of
from qbench.numerics.bias import accumulator_bound, fits_accumulator
from qbench.numerics.shifts import bias_shift, requantization_shift
from qbench.preparation import quantized_modules
from qbench.report.conversion import ConversionReport, DeployedLayer


def convert(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    *,
    target: str | targets.Target | None = None,
    dynamic_shapes: Any = None,
) -> torch.export.ExportedProgram:
    """Export a trained QAT model as a Q/DQ program.

    Args:
        model: A prepared model whose quantizers have seen data; it is not changed.
        example_inputs: One tuple of inputs, float32 where the model takes images.
        target: What the program is for; the default is that of the qconfig. It is recorded in the program.
        dynamic_shapes: As for `torch.export.export`.

    Returns:
        The program; `program.graph_module.meta["custom"]["qbench"]` holds the target's name, `node.meta["custom"]` of
        its operators the target's `annotation`.

    Raises:
        ConversionError: the model was not prepared, cannot be exported (a branch that depends on data), or a layer
            does not fit
            its accumulator.
        LinkError: a layer does not know the quantizer of its input.
        NumericsError: a quantizer has seen no data, a value is NaN or infinite, a bias does not fit.
    """
    if not isinstance(example_inputs, tuple):
        raise ConfigError(
            f"convert: example_inputs is {type(example_inputs).__name__}, expected a tuple: convert(model, (x,))"
        )
    report = conversion_report(model, target=target)
    _warn_of_coarse_weights(report)
    _warn_of_limits(report)
    quantized_decomposed()
    reference = _reference_model(model)
    program = _export(reference, example_inputs, dynamic_shapes)
    _store_codes(program)
    remove_redundant_qdq(program)
    _annotate(program, targets.get(report.target))
    custom = program.graph_module.meta.setdefault("custom", {})
    custom["qbench"] = {"target": report.target}
    weight_only = [path for path, module in quantized_modules(model) if module.qconfig.weight_only]
    if weight_only:
        custom["qbench"]["weight_only"] = weight_only
    return program


def _store_codes(program: torch.export.ExportedProgram) -> None:
    """Store the codes of what the program would quantize alike in every run: parameters that an operation reads."""
    constants = constants_of(program)
    stored = 0
    for node in list(program.graph.nodes):
        value = constants.get(node.args[0]) if is_quantize(node) else None
        if value is None:
            continue
        codes = constants.add(f"{node.args[0].name}_codes", node.target(value, *node.args[1:]), node)
        node.replace_all_uses_with(codes)
        stored += 1
    if stored:
        program.graph.eliminate_dead_code()
        constants.drop_unused()
        constants.finish()


def conversion_report(model: nn.Module, *, target: str | targets.Target | None = None) -> ConversionReport:
    """What `convert` would deploy: scales, bias codes, accumulators, and what the bias floor cost, layer by layer.

    Args:
        model: A prepared model whose quantizers have seen data.
        target: What the program is for; the default is that of the qconfig.

    Raises:
        ConversionError: the model has no QAT module, is for several targets, or a layer does not fit its accumulator.
        LinkError: a layer does not know the quantizer of its input.
        NumericsError: a quantizer has seen no data, a value is NaN or infinite, a bias does not fit.
    """
    modules = dict(quantized_modules(model))
    if not modules:
        raise ConversionError(
            f"convert: {type(model).__name__} has no QAT module; convert(qbench.prepare_qat(model, ...), inputs) after "
            "training works"
        )
    found = _target(modules, target)
    _check_weight_only(modules, found)
    layers = [_check_module(path, module, found) for path, module in modules.items()]
    return ConversionReport(found.name, tuple(layer for layer in layers if layer is not None))


def _annotate(program: torch.export.ExportedProgram, target: targets.Target) -> None:
    """Put what the target's backend looks for into every operator node that is no q or dq."""
    for node in program.graph.nodes:
        if target.annotation and node.op == "call_function" and not (is_quantize(node) or is_dequantize(node)):
            # A file keeps `custom` where it holds plain values only.
            node.meta.setdefault("custom", {}).update(copy.deepcopy(dict(target.annotation)))


# A channel that the bias floor makes this much coarser has lost a bit of its weights.
_NOTABLE_COARSENING = 2.0


def _warn_of_coarse_weights(report: ConversionReport) -> None:
    notable = [layer for layer in report.coarsened if layer.largest_coarsening >= _NOTABLE_COARSENING]
    if notable:
        worst = max(notable, key=lambda layer: layer.largest_coarsening)
        warnings.warn(
            f"the bias of {len(notable)} layer(s) needs coarser weights than training would choose; the worst is "
            f"{worst.path}, up to {worst.largest_coarsening:.3g}x in {worst.coarsened} channel(s). "
            "qbench.conversion_report(model) lists them; a wider bias or bias_scale='own' avoids it",
            QBenchWarning,
            stacklevel=3,
        )


def _warn_of_limits(report: ConversionReport) -> None:
    beyond = report.beyond_limits
    if beyond:
        warnings.warn(
            f"{len(beyond)} layer(s) lie outside what target {report.target} can shift, so its compiler will change "
            f"their codes; the first is {beyond[0].path}: {beyond[0].beyond[0]}. qbench.conversion_report(model) lists "
            "them",
            QBenchWarning,
            stacklevel=3,
        )


def _target(modules: dict[str, QatModule], target: str | targets.Target | None) -> targets.Target:
    if target is not None:
        return targets.get(target)
    found = {module.qconfig.deployment.name: module.qconfig.deployment for module in modules.values()}
    if len(found) > 1:
        raise ConversionError(
            f"convert: parts of the model are for different targets ({', '.join(found)}); say which: convert(..., "
            "target=...)"
        )
    return next(iter(found.values()))


def _check_weight_only(modules: dict[str, QatModule], target: targets.Target) -> None:
    paths = [path or "(root)" for path, module in modules.items() if module.qconfig.weight_only]
    if paths and not target.weight_only:
        raise ConversionError(
            f"convert: {', '.join(paths[:3])} quantizes its weight only, and target {target.name} computes on integers "
            f"alone; prepare it with get_qconfig({target.name!r})"
        )


def _check_module(path: str, module: QatModule, target: targets.Target) -> DeployedLayer | None:
    """Raise for everything that would make a wrong program, with the path of the module."""
    try:
        if module.sources is None and module.output_quantizer is not None:
            raise LinkError(
                "the quantizer of its input is not known: no recorded forward reached it. Give prepare_qat one example "
                "per path of control flow, example_inputs=[(x, True), (x, False)]"
            )
        disabled = [q for q in module.modules() if isinstance(q, FakeQuantize) and not q.fake_quant_enabled]
        if disabled:
            raise NumericsError(
                f"fake-quant of {disabled[0].label} is disabled; model.apply(qbench.enable_fake_quant) before convert"
            )
        only_integers = isinstance(module, QatOp) and not module.sources
        if module.output_quantizer is not None and not only_integers:
            module.output_quantizer.deployed_qparams()
        return _deployed(path, module, target) if isinstance(module, QatLayer) else None
    except QBenchError as error:
        message = str(error)
        raise type(error)(message if message.startswith(path) else f"{path or '(root)'}: {message}") from None


def _deployed(path: str, layer: QatLayer, target: targets.Target) -> DeployedLayer:
    codes = layer.parameter_codes()
    scales = (float(codes.weight_qparams.scale.min()), float(codes.weight_qparams.scale.max()))
    if codes.bias is None:
        return DeployedLayer(path, scales, None, None, 0, 1.0, 0)
    source = layer.input_qparams()
    zero = int(source.zero_point)
    largest = max(source.qmax - zero, zero - source.qmin)
    grid, layout = codes.weight_qparams, layer.layout()
    weight = codes.weight.long() - grid.spread(grid.zero_point, codes.weight)
    if layout.transposed:
        # (in, out/groups, …) -> (groups, in/groups, out/groups, …) -> (out, in/groups, …)
        grouped = weight.reshape(layout.groups, -1, *weight.shape[1:]).transpose(1, 2)
        weight = grouped.reshape(layout.out_channels(weight), -1)
    bound = accumulator_bound(weight, codes.bias, largest)
    bad = ~fits_accumulator(bound, target.accumulator_bits)
    if bool(bad.any()):
        channel = int(bad.nonzero()[0])
        raise ConversionError(
            f"output channel {channel} can reach |accumulator| = {int(bound[channel])}, more than the "
            f"{target.accumulator_bits} bits of target {target.name}; fewer weight or activation bits fit: "
            "get_qconfig(weight_bits=4)"
        )
    coarsened = codes.coarsened
    if coarsened.shape == codes.silenced.shape:
        coarsened = torch.where(codes.silenced, 1.0, coarsened)  # a factor means nothing where no code is left
    return DeployedLayer(
        path,
        scales,
        int(codes.bias.abs().max()),
        int(bound.max()),
        int((coarsened > 1).sum()),
        float(coarsened.max()),
        int(codes.silenced.sum()),
        _beyond_limits(layer, codes, target),
    )


def _beyond_limits(layer: QatLayer, codes: ParameterCodes, target: targets.Target) -> tuple[str, ...]:
    quantizer = layer.pre_activation_quantizer or layer.output_quantizer
    if target.shifts is None or quantizer is None or codes.bias is None or codes.bias_scale is None:
        return ()
    input_scale = layer.input_qparams().scale
    weight_scale = layer.layout().per_channel(codes.weight_qparams.scale)
    requantize = requantization_shift(input_scale, weight_scale, quantizer.deployed_qparams().scale)
    bias = bias_shift(input_scale, weight_scale, codes.bias_scale) if bool(codes.bias.any()) else None
    return tuple(target.shifts.broken(requantize, bias))


def _reference_model(model: nn.Module) -> nn.Module:
    """A copy of the model in eval with every QAT module in its deployed form."""
    memo: dict[int, Any] = {}
    for _, module in quantized_modules(model):
        # Deployed modules replace QAT modules in the copy: parameters of layers are never copied.
        memo[id(module)] = _eval_reference(module)
    with torch.no_grad():
        reference = copy.deepcopy(model, memo)
    for name in [name for name, value in reference.__dict__.items() if name.startswith("_qbench")]:
        del reference.__dict__[name]
    _make_contiguous(reference, set(model.modules()))
    return reference.eval()


def _make_contiguous(reference: nn.Module, theirs: set[nn.Module]) -> None:
    """Give each tensor contiguous memory, whatever training had: XNNPACK takes no weight with channels last.

    Args:
        reference: The deployed form.
        theirs: Modules that may be part of it, and stay as they are.
    """
    made: dict[Any, Any] = {}
    for module in reference.modules():
        if module in theirs:
            continue
        for tensors in (module._parameters, module._buffers):
            for name, value in tensors.items():
                if value is not None and not value.is_contiguous():
                    if value not in made:
                        other = value.detach().contiguous()
                        is_parameter = isinstance(value, nn.Parameter)
                        made[value] = nn.Parameter(other, value.requires_grad) if is_parameter else other
                    tensors[name] = made[value]


def _eval_reference(module: QatModule) -> nn.Module:
    reference = reference_of(module)
    # Hooks belong to the module's place in the model.
    reference._forward_pre_hooks.update(module._forward_pre_hooks)
    reference._forward_pre_hooks_with_kwargs.update(module._forward_pre_hooks_with_kwargs)
    reference._forward_hooks.update(module._forward_hooks)
    reference._forward_hooks_with_kwargs.update(module._forward_hooks_with_kwargs)
    return reference.eval()


def _export(
    reference: nn.Module, example_inputs: tuple[Any, ...], dynamic_shapes: Any
) -> torch.export.ExportedProgram:
    # A file keeps the order of memory of its example for its inputs: ExecuTorch would read others in it.
    given = tree_map_only(torch.Tensor, torch.Tensor.contiguous, example_inputs)
    try:
        with torch.no_grad():
            return torch.export.export(reference, given, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        way_out = (
            "a branch that depends on the values of a tensor cannot be deployed as it is: export one path (a module "
            "whose forward takes it), or write the branch with torch.cond"
            if _is_data_dependent(error)
            else "torch.export.export(model.eval(), example_inputs, strict=False) of the float model must work first"
        )
        raise ConversionError(f"convert: {type(reference).__name__} cannot be exported: {reason}. {way_out}") from error


def _is_data_dependent(error: Exception) -> bool:
    text = f"{type(error).__name__} {error}"
    return any(word in text for word in ("DataDependent", "data-dependent", "Could not guard", "control flow"))
