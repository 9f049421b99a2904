"""What a saved program holds: weight and bias codes, against those of training, and the grids of its outputs."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from qbench.errors import VerificationError
from qbench.fake_quantize.bias import BiasSpec
from qbench.graph.constants import Constants, constants_of
from qbench.graph.edit import module_path
from qbench.graph.layers import Layer, read_layer, weight_scales
from qbench.graph.recognise import find_grid, is_dequantize
from qbench.nn.qat.codes import ParameterCodes
from qbench.nn.qat.layer import QatLayer
from qbench.numerics.bias import bias_codes, bias_scale, dequantize_bias
from qbench.numerics.qparams import QParams
from qbench.report.data import Comparison


def compare_parameters(
    layers: dict[str, QatLayer], program: torch.export.ExportedProgram
) -> tuple[Comparison, ...]:
    """Weight and bias codes of each layer, as trained and as read from the program, by path of the layer.

    Raises:
        VerificationError: the program lacks a layer of the model that its forward reaches, or has another.
    """
    constants = constants_of(program)
    found: dict[str, list[Layer]] = {}
    for node in program.graph.nodes:
        layer = read_layer(node, constants)
        # A product with a stored factor may be an operation of the model: a MatMul with a parameter is no layer.
        if layer is not None and is_dequantize(layer.weight) and (layer.bias_name or module_path(node) in layers):
            found.setdefault(module_path(node), []).append(layer)
    strangers = sorted(set(found) - set(layers))
    if strangers or not found:
        raise VerificationError(
            f"verify: the program has layers {strangers[:3] or 'without codes'} that the model has not; "
            "verify(model, qbench.convert(model, inputs), inputs) compares a model with its own program"
        )
    comparisons = []
    for path, copies in found.items():
        codes, spec = layers[path].parameter_codes(), layers[path].qconfig.bias
        for layer in copies:
            weight = constants.get(layer.weight.all_input_nodes[0])
            comparisons.append(_difference(f"{path}.weight", codes.weight, weight))
            if codes.bias is not None:
                found_bias = _program_bias(layer, constants, codes, spec)
                comparisons.append(_difference(f"{path}.bias", codes.bias, found_bias))
            elif codes.bias_value is not None:
                stored = None if layer.bias is None else constants.get(layer.bias)
                bits = None if stored is None else stored.view(torch.int32)
                comparisons.append(_difference(f"{path}.bias", codes.bias_value.view(torch.int32), bits))
    return tuple(comparisons)


def _program_bias(layer: Layer, constants: Constants, codes: ParameterCodes, spec: BiasSpec) -> Tensor | None:
    """Codes of a program's bias, from the scales that the program itself holds."""
    bias = None if layer.bias is None else constants.get(layer.bias)
    grid, scales = find_grid(layer.input, constants), weight_scales(layer, constants)
    if bias is None or grid is None or scales is None or codes.bias is None or codes.bias_scale is None:
        return None
    # (out, values a channel) of equal scales -> (out,)
    scale = scales if scales.ndim == 0 else layer.per_output(scales)[:, 0]
    on_grid = bias_scale(grid.qparams.scale, scale) if spec.scale == "input_weight" else codes.bias_scale
    found = bias_codes(bias, on_grid, spec.bits)[0]
    # A value off the grid has no code: a bias that was left in float must not pass for a quantized one.
    return torch.where(dequantize_bias(found, on_grid, spec.bits) == bias, found, codes.bias + 1)


def output_grids(program: torch.export.ExportedProgram) -> list[QParams | None]:
    """Grid of each output of the program, None for an output in float."""
    constants = constants_of(program)
    outputs = next(node for node in program.graph.nodes if node.op == "output").args[0]
    user = {spec.arg.name for spec in program.graph_signature.output_specs if spec.kind.name == "USER_OUTPUT"}
    grids = []
    for node in outputs:
        if isinstance(node, fx.Node) and node.name in user:
            found = find_grid(node, constants)
            grids.append(None if found is None else found.qparams)
    return grids


def _difference(name: str, trained: Tensor, converted: Tensor | None) -> Comparison:
    if converted is None or converted.shape != trained.shape:
        shape = None if converted is None else tuple(converted.shape)
        raise VerificationError(
            f"verify: {name} has shape {tuple(trained.shape)} in the model and {shape} in the program: it is not a "
            "program of this model as convert returned it"
        )
    steps = (trained.long() - converted.long()).abs()
    return Comparison(name, steps.numel(), int((steps > 0).sum()), int(steps.max()) if steps.numel() else 0)
