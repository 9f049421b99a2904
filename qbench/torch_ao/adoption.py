"""A model written for torch.ao's eager quantization → the same model in qbench's modules, names and weights kept.

    intrinsic.ConvBnReLU2d, …      the qbench wrapper of the same parts
    FloatFunctional                the operation whose method is called on it: `skip.add(x, y)` calls a qbench Add
    QuantStub, DeQuantStub         Identity: an input is quantized where it is first used
    a qconfig of torch.ao          the qbench QConfig, see `translate_qconfig`
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from qbench import mappings
from qbench.errors import FusionError, PreparationError
from qbench.nn import ops
from qbench.nn.functional_calls import OPERATIONS, FunctionalCalls
from qbench.torch_ao import functionals
from qbench.torch_ao.kinds import from_torch_ao, is_functional, is_prepared, is_stub, is_wrapper
from qbench.torch_ao.qconfigs import adopt_qconfigs


def adopt(model: nn.Module, examples: Sequence[tuple[Any, ...]] = ()) -> tuple[nn.Module, dict[str, str]]:
    """Replace what torch.ao put into a float model, in place. A model without any of it is handed back as it is.

    Args:
        model: A float model, fused by torch.ao or not.
        examples: Tuples of inputs, to find out what FloatFunctionals compute where tracing does not tell.

    Returns:
        The model (another object if it was a torch.ao module itself), and path → reason for what was left in float.

    Raises:
        PreparationError: the model was prepared by torch.ao already, or a FloatFunctional serves two operations.
        ConfigError: a qconfig of torch.ao that has no equivalent; the message names the nearest.
    """
    adopt_qconfigs(model)
    named = dict(model.named_modules())
    for path, module in named.items():
        if is_prepared(module):
            raise PreparationError(
                f"{path or '(root)'} is a {type(module).__module__}.{type(module).__name__}: torch.ao has prepared "
                "this model. Prepare the float model with qbench, then qbench.load_qat_checkpoint(model, "
                "torch_ao_model.state_dict()) takes over what was trained"
            )
    if not any(from_torch_ao(module) for module in named.values()):
        return model, {}
    calls = functionals.calls_of(model, examples)
    notes: dict[str, str] = {}
    made = {module: _adopted(module, path, calls, notes) for path, module in named.items()}
    for parent in named.values():
        # Not named_children, which leaves out the second name of a child.
        for name, child in parent._modules.items():
            if child is not None:
                parent._modules[name] = made[child]
    return made[model], notes


def _adopted(
    module: nn.Module, path: str, calls: dict[int, set[functionals.Call] | None], notes: dict[str, str]
) -> nn.Module:
    """What takes the place of one module; most are their own."""
    if is_stub(module):
        return _as(nn.Identity, module)
    if is_functional(module):
        operation, reason = _operation(path, calls[id(module)])
        if operation is None:
            notes[path] = reason
            return module
        operation.__dict__.update({name: value for name, value in vars(module).items() if name != "_modules"})
        return operation
    return _wrapper(module, path) if is_wrapper(module) else module


def _wrapper(module: nn.Module, path: str) -> nn.Module:
    parts = tuple(module.children())
    try:
        kind = mappings.wrapper_of(parts)
    except FusionError:
        return _as(nn.Sequential, module)  # LinearTanh, say: each part has a QAT form of its own, or is named as float
    try:
        kind.check_parts(parts)
    except FusionError as error:
        raise FusionError(f"{path or '(root)'}: {error}") from None
    return _as(kind, module)


def _as(kind: type[nn.Module], module: nn.Module) -> nn.Module:
    """The module's parts, hooks, mode and attributes in another class."""
    made = kind.__new__(kind)
    made.__dict__.update(vars(module))
    return made


def _operation(path: str, calls: set[functionals.Call] | None) -> tuple[nn.Module | None, str]:
    if calls is not None and not calls:
        return FunctionalCalls(), ""  # unused, as in a block that has no shortcut
    if calls is None:
        return None, (
            "no operation was seen being called on this FloatFunctional, so it stays as it is; example_inputs=(x,) "
            "that reach it would show which, or a qbench.nn.Add() in its place"
        )
    if len(calls) > 1:
        listed = ", ".join(f"{name}(dim={dim})" if name == "cat" else name for name, dim in sorted(calls))
        raise PreparationError(
            f"{path}: this FloatFunctional serves {listed}; one quantizer serves one operation, so give each a "
            "FloatFunctional, or a qbench.nn operation, of its own"
        )
    name, dim = next(iter(calls))
    kind: Any = getattr(ops, OPERATIONS.get(name, ""), None)
    if kind is None:
        return None, f"FloatFunctional.{name} has no operation that is quantized: it is computed in float"
    return kind(dim) if name == "cat" else kind(), ""
