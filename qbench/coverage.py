"""How much of a prepared model is quantized: counted from its modules and from what preparation reported.

    fused        BatchNorms that QAT layers compute        of all
    quantized    QAT layers                                of all modules with a weight of two axes or more
    linked       QAT layers whose input is on the grid of a quantizer before them
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import Tensor, nn

from qbench.nn.frozen import is_batch_norm
from qbench.nn.qat.body import QatModule
from qbench.nn.qat.kinds import BatchNormKind
from qbench.nn.qat.layer import QatLayer
from qbench.preparation import preparation_report
from qbench.report.coverage import Coverage


def quantization_coverage(model: nn.Module) -> Coverage:
    """What of a prepared model became integers; `print` shows it.

    Args:
        model: What `prepare_qat` returned, after its links were recorded (`example_inputs`, or a first forward).

    Raises:
        PreparationError: the model was not prepared.
    """
    report = preparation_report(model)
    layers = [module for module in model.modules() if isinstance(module, QatLayer)]
    quantized = [module for module in model.modules() if isinstance(module, QatModule)]
    held = {id(parameter) for module in quantized for parameter in module.parameters()}
    parameters = {id(parameter): parameter.numel() for parameter in model.parameters()}
    affine = sum(isinstance(layer, BatchNormKind) for layer in layers)
    return Coverage(
        model=type(model).__name__,
        batch_norms=affine + sum(is_batch_norm(type(module)) for module in model.modules()),
        folded=sum(layer.bn is not None for layer in layers),
        affine=affine,
        layers=sum(1 for _ in _with_weight(model)),
        quantized_layers=sum(isinstance(module, QatModule) for module in _with_weight(model)),
        linked_layers=sum(_is_linked(module) for module in _with_weight(model)),
        parameters=sum(parameters.values()),
        quantized_parameters=sum(count for key, count in parameters.items() if key in held),
        quantized=dict(Counter(found.qat_type for found in report.quantized)),
        left_in_float=report.left_in_float,
        float_inputs=report.float_inputs,
        float_operations=report.float_operations,
        unreached=report.unreached,
    )


def _with_weight(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim > 1:
            yield module


def _is_linked(module: nn.Module) -> bool:
    """Whether a layer reads codes; of a layer that takes no codes (an index, weight-only) nothing is missing."""
    if not isinstance(module, QatModule):
        return False
    needs_none = module.output_quantizer is None or module.data_inputs == 0
    return needs_none or (bool(module.sources) and len(module.input_quantizers) == 0)
