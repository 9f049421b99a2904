"""Deployed form of QAT modules: the float operation between explicit dequantize and quantize operators.

    layer   q → dq(input) ─┐
            dq(weight) ────┼─ op ─ [q → dq] ─ [activation] ─ q → dq
            bias on grid ──┘

    weight-only     dq(weight) ─ op(x, ·, float bias) ─ [activation]

Weight codes are stored as integers. The q → dq before the input restates the grid that the producer has; `convert`
removes the pairs that repeat one.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.graph.qdq import quantized_decomposed
from qbench.nn.functional_calls import FunctionalCalls
from qbench.nn.qat.body import QatModule, QatOp, adopt_state, replaced
from qbench.nn.qat.kinds import BatchNormKind
from qbench.nn.qat.layer import QatLayer
from qbench.numerics.qparams import QParams


class QuantizeDequantize(nn.Module):
    """q then dq on one per-tensor grid; the scale is a literal of the program."""

    def __init__(self, qparams: QParams) -> None:
        super().__init__()
        self.grid = (
            float(qparams.scale.item()),
            int(qparams.zero_point.item()),
            qparams.qmin,
            qparams.qmax,
            qparams.dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Float -> float on the grid."""
        ops = quantized_decomposed()
        return ops.dequantize_per_tensor.default(ops.quantize_per_tensor.default(x, *self.grid), *self.grid)

    def extra_repr(self) -> str:
        """Scale, zero point, codes."""
        scale, zero_point, qmin, qmax, _ = self.grid
        return f"scale={scale:.4g}, zero_point={zero_point}, codes [{qmin}, {qmax}]"


class ReferenceModule(nn.Module):
    """Inputs on their grids, a float operation, the output on its grid."""

    inputs: nn.ModuleList
    output: QuantizeDequantize | None

    def _add_grids(self, qat: QatModule) -> None:
        count = len(qat.sources or ())
        self.inputs = nn.ModuleList(QuantizeDequantize(qat.input_qparams(i)) for i in range(count))
        quantizer = qat.output_quantizer
        # Without a source it is only ever called with integers.
        self.output = None if quantizer is None or not count else QuantizeDequantize(quantizer.deployed_qparams())

    def quantized_inputs(self, tensors: tuple[Tensor, ...]) -> list[Tensor]:
        """Each input on its grid; as it comes where activations stay float."""
        if self.output is None:
            return list(tensors)
        return [grid(tensor) for grid, tensor in zip(self.inputs, tensors, strict=True)]


class ReferenceOp(ReferenceModule, FunctionalCalls):
    """Deployed form of an operation; parameters that it has, those of a norm, stay float."""

    def __init__(self, qat: QatOp) -> None:
        super().__init__()
        # A copy: a program that shared the parameters would train on with the model.
        self.op = copy.deepcopy(qat.deployed_float()).requires_grad_(False)
        self.data_tensors = type(qat).data_tensors
        self._add_grids(qat)

    def _operation(self) -> nn.Module:
        return self.op

    def forward(self, *inputs: Any) -> Tensor:
        """What the operation is called with -> its output on its grid."""
        tensors = self.data_tensors(inputs)
        y = self.op(*replaced(inputs, tensors, self.quantized_inputs(tensors)))
        return y if self.output is None else self.output(y)


class ReferenceLayer(ReferenceModule):
    """Deployed form of a layer with a weight: integer weight codes, a float bias, on its grid if it has one."""

    weight_codes: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    bias: Tensor | None

    def __init__(self, qat: QatLayer) -> None:
        super().__init__()
        codes = qat.parameter_codes()
        grid = codes.weight_qparams
        self.call = FloatCall(qat)
        self.register_buffer("weight_codes", codes.weight)
        self.register_buffer("weight_scale", grid.scale)
        self.register_buffer("weight_zero_point", grid.zero_point.to(torch.int64))
        # A parameter, not a buffer: ExecuTorch's own bias pass reads only parameters of a program.
        self.bias = None if codes.bias_value is None else nn.Parameter(codes.bias_value.clone(), requires_grad=False)
        self.weight_grid = (grid.qmin, grid.qmax, grid.dtype)
        self.axis, self.group_size = grid.axis, grid.group_size
        self.per_tensor_grid = None if grid.axis is not None else QuantizeDequantize(grid).grid
        before = qat.pre_activation_quantizer
        self.pre_activation = None if before is None else QuantizeDequantize(before.deployed_qparams())
        self.activation = _out_of_place(qat.activation_module)
        self._add_grids(qat)

    def weight(self) -> Tensor:
        """`Ŵ`: the dequantized codes."""
        ops = quantized_decomposed()
        if self.per_tensor_grid is not None:
            return ops.dequantize_per_tensor.default(self.weight_codes, *self.per_tensor_grid)
        stored = self.weight_codes, self.weight_scale, self.weight_zero_point
        if self.group_size is not None:
            return ops.dequantize_per_channel_group.default(*stored, *self.weight_grid, self.group_size, torch.float32)
        return ops.dequantize_per_channel.default(*stored, self.axis, *self.weight_grid)

    def forward(self, input: Tensor, *args: Any) -> Tensor:
        """Input -> output on its grid."""
        (x,) = self.quantized_inputs((input,))
        if self.call.padding is not None:
            (x,) = self.quantized_inputs((self.call.pad(x),))
        flat = self.call.lacks_length and x.ndim == 2
        if flat:  # (batch, channels) -> (batch, channels, 1), which must not stand between the dq and the convolution
            (x,) = self.quantized_inputs((x.unsqueeze(-1),))
        y = self.call(x, self.weight(), self.bias, *args)
        if self.pre_activation is not None:
            y = self.pre_activation(y)
        if self.activation is not None:
            y = self.activation(y)
        y = y if self.output is None else self.output(y)
        return y.squeeze(-1) if flat else y


def _out_of_place(activation: nn.Module | None) -> nn.Module | None:
    """A copy of the activation without in-place writes, which passes over a program would have to see through."""
    activation = copy.deepcopy(activation)  # its mode must not be that of the trained module
    if getattr(activation, "inplace", False):
        activation.inplace = False  # type: ignore[union-attr]
    return activation


class FloatCall:
    """The linear part of a layer as a call that is given its weight and bias.

    Not a module, so that in the program the innermost module of the convolution is the layer itself.
    """

    def __init__(self, qat: QatLayer) -> None:
        # An empty layer of PyTorch's own class holds stride, padding and the like.
        shell: Any = qat.linear_type.__new__(qat.linear_type)
        nn.Module.__init__(shell)
        adopt_state(shell, qat)
        shell._parameters.clear()
        self.padding: tuple[list[int], str] | None = None
        if getattr(shell, "padding_mode", "zeros") != "zeros":
            # An operator of its own, which must not stand between the dq and the convolution.
            self.padding = shell._reversed_padding_repeated_twice, shell.padding_mode
            shell.padding, shell.padding_mode = (0,) * len(shell.kernel_size), "zeros"
        self.kind = type(qat)
        self.shell = shell
        self.lacks_length = issubclass(self.kind, BatchNormKind)

    def pad(self, x: Tensor) -> Tensor:
        """Reflection, replication or circular padding."""
        return x if self.padding is None else F.pad(x, self.padding[0], mode=self.padding[1])

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
        """The convolution or matrix product."""
        return self.kind.linear(self.shell, x, weight, bias, *args)
