"""Which of torch.ao's classes a module is, by the names of the class and of its file."""

from __future__ import annotations

from torch import nn

# Where torch.ao keeps float modules that are prepared, and what was prepared or converted already.
_FLOAT = ("torch.ao.nn.intrinsic.modules.", "torch.ao.nn.quantizable.", "torch.ao.quantization.stubs")
_FUNCTIONAL = ("FloatFunctional", "FXFloatFunctional")
_STUBS = ("QuantStub", "DeQuantStub")


def from_torch_ao(module: nn.Module) -> bool:
    """Whether the module's class is torch.ao's own."""
    return type(module).__module__.startswith("torch.ao.")


def is_functional(module: nn.Module) -> bool:
    """A FloatFunctional: methods in place of functions, so that torch.ao can observe them."""
    return from_torch_ao(module) and type(module).__name__ in _FUNCTIONAL


def is_stub(module: nn.Module) -> bool:
    """A QuantStub or DeQuantStub: where torch.ao's quantized part begins and ends."""
    return from_torch_ao(module) and type(module).__name__ in _STUBS


def is_wrapper(module: nn.Module) -> bool:
    """A chain fused by torch.ao's fuse_modules, in float; not one that is called with two tensors (ConvAdd2d)."""
    is_chain = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
    return is_chain and type(module).__module__.startswith("torch.ao.nn.intrinsic.modules.")


def is_prepared(module: nn.Module) -> bool:
    """A QAT or quantized module of torch.ao, an observer or a fake-quantize: no float module any more."""
    if is_functional(module):
        return False
    file = type(module).__module__
    return file.startswith(("torch.ao.nn.", "torch.ao.quantization.")) and not file.startswith(_FLOAT)
