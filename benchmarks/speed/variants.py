"""One network in every form that is timed: float, qbench, and the peers, each with the same activations and data.

A form is made from the float network; what it is made with and how is all that a form says. One that cannot be made,
because a peer is not installed or refuses the network, is named with the reason and left out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import qbench
from benchmarks.speed.passes import passes_alone
from qbench._torchvision import import_torchvision

Images = tuple[Tensor, ...]
Form = Callable[[str, nn.Module, Images], nn.Module]


def float_network(name: str) -> nn.Module:
    """A torchvision classifier with random weights; ReLU in place of ReLU6, which some of the peers cannot fuse."""
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = import_torchvision().models.get_model(name, weights=None, **options)
    for module in list(model.modules()):
        for child, part in module.named_children():
            if isinstance(part, nn.ReLU6):
                setattr(module, child, nn.ReLU(inplace=True))
    return model.train()


def eager(name: str, model: nn.Module, images: Images) -> nn.Module:
    """The float network itself."""
    return model


def compiled(name: str, model: nn.Module, images: Images) -> nn.Module:
    """The float network, compiled whole."""
    return torch.compile(model, fullgraph=True)  # type: ignore[return-value]


def qbench_plain(name: str, model: nn.Module, images: Images) -> nn.Module:
    """The QAT form by qbench, without a compiler."""
    return qbench.prepare_qat(qbench.fuse(model), qconfig=qbench.get_qconfig(), example_inputs=images).train()


def qbench_fast(name: str, model: nn.Module, images: Images) -> nn.Module:
    """The same with generated code, layer by layer."""
    return qbench_plain(name, model, images).apply(qbench.enable_fast_path)


def qbench_low_memory(name: str, model: nn.Module, images: Images) -> nn.Module:
    """The same, saving codes for backward."""
    return qbench_fast(name, model, images).apply(qbench.enable_low_memory)


def qbench_lsq(name: str, model: nn.Module, images: Images) -> nn.Module:
    """The fast path with learned scales."""
    qconfig = qbench.get_qconfig(method="lsq")
    learning = qbench.prepare_qat(qbench.fuse(model), qconfig=qconfig, example_inputs=images).train()
    return learning.apply(qbench.enable_fast_path)


def qbench_compiled(name: str, model: nn.Module, images: Images) -> nn.Module:
    """The fast path, compiled whole."""
    return torch.compile(qbench_fast(name, model, images), fullgraph=True)  # type: ignore[return-value]


def passes(name: str, model: nn.Module, images: Images) -> nn.Module:
    """The least that PyTorch's operators can do: a bound for `qbench plain`."""
    return passes_alone(model)


def torch_ao(name: str, model: nn.Module, images: Images) -> nn.Module:
    """The eager QAT of torch.ao: the quantizable twin of the network, weights taken over."""
    quantizable = import_torchvision().models.quantization
    if not hasattr(quantizable, name):
        raise ValueError("torchvision has no quantizable form of it")
    twin = getattr(quantizable, name)(weights=None, quantize=False).train()
    twin.load_state_dict(model.state_dict(), strict=False)
    twin.fuse_model(is_qat=True)
    twin.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
    return torch.ao.quantization.prepare_qat(twin, inplace=True).train()  # type: ignore[no-any-return]


def pt2e(name: str, model: nn.Module, images: Images) -> nn.Module:
    """The PT2E flow of torchao with the quantizer for XNNPACK."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e import move_exported_model_to_train
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

    config = get_symmetric_quantization_config(is_qat=True, is_per_channel=True)
    exported = torch.export.export(model, images).module()
    prepared = prepare_qat_pt2e(exported, XNNPACKQuantizer().set_global(config))
    return move_exported_model_to_train(prepared)  # type: ignore[no-any-return]


def brevitas(name: str, model: nn.Module, images: Images) -> nn.Module:
    """Brevitas: convolutions, linear layers and activations swapped for its own; BatchNorm stays, the bias is in float.

    Activations learn their scale. It starts at a quantile of what the first steps see, 300 of them by default: one
    here, so that what is timed are the steps behind it.
    """
    import brevitas.nn as qnn
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat, Uint8ActPerTensorFloat

    signed, unsigned = (kind.let(collect_stats_steps=1) for kind in (Int8ActPerTensorFloat, Uint8ActPerTensorFloat))
    shared = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    for module in list(model.modules()):
        for child, part in module.named_children():
            if isinstance(part, nn.ReLU):
                setattr(module, child, qnn.QuantReLU(act_quant=unsigned))
            elif isinstance(part, nn.SiLU):
                setattr(module, child, nn.Sequential(part, qnn.QuantIdentity(act_quant=signed)))
            elif isinstance(part, (nn.Conv2d, nn.Linear)):
                kind = qnn.QuantConv2d if isinstance(part, nn.Conv2d) else qnn.QuantLinear
                keys = shared if isinstance(part, nn.Conv2d) else ("in_features", "out_features")
                options = {key: getattr(part, key) for key in keys}
                swapped = kind(**options, bias=part.bias is not None, weight_quant=Int8WeightPerChannelFloat)
                swapped.load_state_dict(part.state_dict(), strict=False)
                setattr(module, child, swapped)
    return nn.Sequential(qnn.QuantIdentity(act_quant=signed), model).train()


def made(form: Form, name: str, model: nn.Module, images: Images, memory_format: torch.memory_format) -> nn.Module:
    """A form of a copy of the network, in a memory format."""
    found = form(name, copy.deepcopy(model), images)
    return found.to(memory_format=memory_format)  # type: ignore[call-overload, no-any-return]


FORMS: dict[str, Form] = {
    "float": eager,
    "float compiled": compiled,
    "passes alone": passes,
    "qbench plain": qbench_plain,
    "qbench fast": qbench_fast,
    "qbench low memory": qbench_low_memory,
    "qbench lsq": qbench_lsq,
    "qbench compiled": qbench_compiled,
    "torch.ao": torch_ao,
    "torchao PT2E": pt2e,
    "Brevitas": brevitas,
}
