"""The int32 bias: a float bias behind a quantized input and weight becomes codes and a dequantize operator.

    s_b = f32(s_in · s_w)        s_in: grid of the input        s_w: per tensor, or one per output channel
    q_b = rne(f64(b) / f64(s_b)), saturated to `bits`           zero point 0

    dq(x), dq(w), b  ->  layer(dq(x), dq(w), dq(q_b; s_b, 0))

The input's grid is looked for through scale-preserving operators, the weight's scales through views. A layer of which
either is not known is refused with a reason; nothing is guessed. All layers are planned before the first edit, so an
error leaves the graph as it was.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from qbench.errors import ConfigError, NumericsError, PassError
from qbench.graph.constants import Constants, ModuleConstants, constants_of
from qbench.graph.dialect import like, overload
from qbench.graph.edit import insert_call, module_path, refresh, set_argument, shape_of
from qbench.graph.layers import Layer, read_layer, uses_dequantize, weight_scales
from qbench.graph.qdq import quantized_decomposed
from qbench.graph.recognise import cast_source, find_grid, is_dequantize, origin
from qbench.graph.scale_preserving import grid_source
from qbench.numerics.bias import bias_codes, bias_scale, dequantize_bias, weight_scale_floor
from qbench.passes.bias_report import BiasReport, LayerNote, QuantizedBias, SaturatedBias


@dataclasses.dataclass(frozen=True)
class _Options:
    default_zero_bias: bool
    symmetric: bool
    bits: int

    @property
    def limits(self) -> tuple[int, int]:
        high = 2 ** (self.bits - 1) - 1
        return (-high if self.symmetric else -high - 1), high


@dataclasses.dataclass(frozen=True, eq=False)
class _Plan:
    """What will be done to one layer."""

    layer: Layer
    codes: Tensor
    scale: Tensor
    dtype: torch.dtype
    saturated: SaturatedBias | None


class _NotDone(Exception):
    """Why a layer is left as it is; `kind` is the list of the report that it goes to."""

    def __init__(self, kind: str, reason: str = "") -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason


def quantize_bias(
    program: ExportedProgram | fx.GraphModule,
    *,
    default_zero_bias: bool = False,
    symmetric_quant: bool = False,
    bits: int = 32,
) -> BiasReport:
    """Quantize the bias of every convolution and linear layer whose input and weight are quantized, in place.

    Args:
        program: A Q/DQ program, or a GraphModule of one (`program.module()`, or what a PT2E flow converted), in aten
            operators, decomposed or not, or in ExecuTorch's edge dialect.
        default_zero_bias: Give zeros to a quantized layer that has no bias: some runtimes want one everywhere.
        symmetric_quant: Leave out the lowest code, so that codes are in [−(2^(bits−1) − 1), 2^(bits−1) − 1].
        bits: Width of a code, 8 to 32; the codes are stored as int32 whatever it is.

    Returns:
        What was quantized, what was not and why, what saturated. A second call changes nothing.

    Raises:
        ConfigError: `bits` is not 8 to 32.
        NumericsError: a bias is NaN or infinite, or a scale is not positive and finite; nothing was changed.
        PassError: `program` is neither a program nor a GraphModule.
    """
    if not isinstance(bits, int) or not 8 <= bits <= 32:
        raise ConfigError(f"quantize_bias(bits={bits!r}): a bias code is 8 to 32 bits wide, bits=32 for example")
    constants = constants_of(program)
    options = _Options(default_zero_bias, symmetric_quant, bits)
    plans: list[_Plan] = []
    weight_only = constants.graph_module.meta.get("custom", {}).get("qbench", {}).get("weight_only", ())
    notes: dict[str, list[LayerNote]] = {"refused": [], "already": [], "without_bias": [], "left_float": []}
    for node in constants.graph.nodes:
        layer = read_layer(node, constants)
        if layer is None:
            continue
        if module_path(node) in weight_only:
            reason = "it quantizes its weight only: its bias was trained in float"
            notes["left_float"].append(LayerNote(node.name, module_path(node), reason))
            continue
        try:
            plans.append(_plan(layer, constants, options))
        except _NotDone as why:
            notes[why.kind].append(LayerNote(node.name, module_path(node), why.reason))
    notes["refused"] += _inside_branches(constants.graph_module)
    replaced = [_apply(plan, constants, options) for plan in plans]
    constants.drop_unused(key for bias in replaced if bias is not None for key in _forget(bias, constants))
    if plans:
        constants.finish()
    return BiasReport(
        quantized=tuple(_record(plan) for plan in plans),
        saturated=tuple(plan.saturated for plan in plans if plan.saturated is not None),
        bits=bits,
        **{kind: tuple(found) for kind, found in notes.items()},
    )


class QuantizeFusedConvBnBiasAtenPass(PassBase):
    """`quantize_bias` with the name, the arguments and the calling convention of ExecuTorch's pass of this name.

        QuantizeFusedConvBnBiasAtenPass()(graph_module)
        QuantizeFusedConvBnBiasAtenPass(program)(program.graph_module)

    Args:
        exported_program: The program, where the graph module is a program's own and its parameters are placeholders.
        default_zero_bias: See `quantize_bias`.
        symmetric_quant: See `quantize_bias`.

    Attributes:
        report: What the last call did; None before the first.
    """

    def __init__(
        self,
        exported_program: ExportedProgram | None = None,
        default_zero_bias: bool = False,
        symmetric_quant: bool = False,
    ) -> None:
        super().__init__()
        self.exported_program = exported_program
        self.default_zero_bias = default_zero_bias
        self.symmetric_quant = symmetric_quant
        self.report: BiasReport | None = None

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Quantize the biases of `graph_module` in place.

        Raises:
            PassError: `graph_module` is not the one of the program that the pass was made with.
            ConfigError, NumericsError: see `quantize_bias`.
        """
        program = self.exported_program
        if program is not None and program.graph_module is not graph_module:
            raise PassError(
                "QuantizeFusedConvBnBiasAtenPass(program) was called with a graph module that is not the program's, "
                "whose parameters it therefore cannot find: call it with program.graph_module, or use "
                "qbench.passes.quantize_bias(program)"
            )
        self.report = quantize_bias(
            graph_module if program is None else program,
            default_zero_bias=self.default_zero_bias,
            symmetric_quant=self.symmetric_quant,
        )
        return PassResult(graph_module, self.report.modified)


def _plan(layer: Layer, constants: Constants, options: _Options) -> _Plan:
    """Codes and scale of a layer's bias.

    Raises:
        _NotDone: there is nothing to do, or it cannot be done.
        NumericsError: the values cannot be quantized.
    """
    if layer.bias is not None and _is_integer(layer.bias):
        raise _NotDone("already")
    scale, input_scale = _bias_scale(layer, constants)
    if layer.bias is None:
        return _plan_zeros(layer, scale, constants, options)
    bias = constants.get(layer.bias)
    if bias is None:
        raise _NotDone("refused", _why_unknown(layer.bias, constants))
    if not bias.is_floating_point():
        raise _NotDone("already")
    channels = bias.shape[-1] if bias.ndim else 0
    if bias.numel() != channels or (scale.ndim and scale.numel() != channels):
        expected = f"({scale.numel()},)" if scale.ndim else "(out,)"
        raise _NotDone("refused", f"its bias has shape {tuple(bias.shape)}, expected {expected}")
    _check_finite(layer.node, bias)
    codes, saturated = _codes(layer.node, bias, scale, options)
    record = _record_saturated(layer.node, bias, codes, saturated, scale, input_scale, options)
    return _Plan(layer, codes.to(torch.int32).to(bias.device), scale, bias.dtype, record)


def _plan_zeros(layer: Layer, scale: Tensor, constants: Constants, options: _Options) -> _Plan:
    if not options.default_zero_bias:
        raise _NotDone("without_bias")
    if layer.bias_name is None and overload(layer.node.target) is not torch.ops.aten.mm.default:
        raise _NotDone("without_bias", "a batched product takes no bias")
    shape = shape_of(layer.weight)
    if shape is None:
        stored = constants.get(layer.weight)
        shape = None if stored is None else stored.shape
    if shape is None:
        raise _NotDone("refused", "it has no bias, and how many zeros it wants is not known: its weight has no shape")
    channels = layer.per_output(torch.empty(shape, device="meta")).shape[0]
    value = layer.weight.meta.get("val")
    dtype = value.dtype if isinstance(value, Tensor) and value.is_floating_point() else torch.float32
    return _Plan(layer, torch.zeros(channels, dtype=torch.int32), scale, dtype, None)


def _bias_scale(layer: Layer, constants: Constants) -> tuple[Tensor, Tensor]:
    """`s_b`, () or (out,), and `s_in`, ()."""
    scales = weight_scales(layer, constants)
    grid = find_grid(layer.input, constants)
    if scales is None:
        if not uses_dequantize(layer.weight):
            raise _NotDone("left_float", "its weight is float")
        raise _NotDone("refused", f"its weight is not a view of a dequantized one: {_named(origin(layer.weight))}")
    if grid is None:
        raise _NotDone("refused", f"its input lies on no known grid: {_named(origin(layer.input))}")
    if grid.qparams.axis is not None:
        raise _NotDone("refused", f"its input is quantized per channel, by {grid.node.name}: there is no one s_in")
    per_output = scales if scales.ndim == 0 else _one_per_output(layer, scales)
    return bias_scale(grid.qparams.scale, per_output), grid.qparams.scale


def _one_per_output(layer: Layer, scales: Tensor) -> Tensor:
    gathered = layer.per_output(scales)  # (out, values a channel)
    if bool((gathered != gathered[:, :1]).any()):
        where = "along its input channels (axis 0 of a transposed convolution)" if layer.transposed else "inside them"
        raise _NotDone("refused", f"the scales of its weight differ within an output channel: they lie {where}")
    return gathered[:, 0].contiguous()


def _codes(node: fx.Node, bias: Tensor, scale: Tensor, options: _Options) -> tuple[Tensor, Tensor]:
    values = bias.reshape(-1).cpu()
    steps = scale.cpu().expand_as(values)
    # Two scales at their floor can have a product below float32; only a zero can be written on that grid.
    vanished = steps == 0
    if bool((vanished & (values != 0)).any()):
        raise NumericsError(
            f"{_place(node)}: input scale times weight scale is 0 in float32, yet the bias is up to "
            f"{float(values[vanished].abs().max()):.4g}; the weight scale of a channel with a bias needs a floor "
            "(qbench.numerics.bias.weight_scale_floor)"
        )
    return bias_codes(values, torch.where(vanished, 1.0, steps), options.bits, symmetric=options.symmetric)


def _check_finite(node: fx.Node, bias: Tensor) -> None:
    bad = ~torch.isfinite(bias.reshape(-1))
    if bool(bad.any()):
        channels = bad.nonzero().flatten().tolist()
        value = bias.reshape(-1)[channels[0]].item()
        listed = ", ".join(map(str, channels[:8])) + (" …" if len(channels) > 8 else "")
        raise NumericsError(
            f"{_place(node)}: its bias is {value} (channels {listed}); only a finite bias has codes. Look at the "
            "BatchNorm that was folded into it (variance, γ), or train again with a smaller learning rate"
        )


def _record_saturated(
    node: fx.Node,
    bias: Tensor,
    codes: Tensor,
    mask: Tensor,
    scale: Tensor,
    input_scale: Tensor,
    options: _Options,
) -> SaturatedBias | None:
    channels = mask.nonzero().flatten()
    if not len(channels):
        return None
    values = bias.reshape(-1).cpu()[channels]
    held = dequantize_bias(codes, scale.cpu())[channels]
    floor = weight_scale_floor(values, input_scale.cpu(), options.bits)
    return SaturatedBias(
        node=node.name,
        path=module_path(node),
        channels=tuple(channels.tolist()),
        values=tuple(values.tolist()),
        held=tuple(held.tolist()),
        weight_scales=tuple(floor.tolist()),
    )


def _record(plan: _Plan) -> QuantizedBias:
    node = plan.layer.node
    return QuantizedBias(node.name, module_path(node), plan.codes, plan.scale, added=plan.layer.bias is None)


def _is_integer(bias: fx.Node) -> bool:
    """Whether a bias is dequantized, or integer itself."""
    source: fx.Node | None = bias
    while source is not None:
        value = source.meta.get("val")
        if is_dequantize(source) or (isinstance(value, Tensor) and not value.is_floating_point()):
            return True
        source = grid_source(source) or cast_source(source)
    return False


def _why_unknown(bias: fx.Node, constants: Constants) -> str:
    if bias.op == "placeholder" and isinstance(constants, ModuleConstants):
        return (
            f"its bias {bias.name} is an input of the graph module; if it is a parameter of a program, "
            "call quantize_bias(program)"
        )
    return f"its bias is computed while the program runs: {_named(bias)}"


def _named(node: fx.Node) -> str:
    return f"{node.target} ({node.name})" if node.op == "call_function" else f"{node.op} {node.name}"


def _place(node: fx.Node) -> str:
    return str(LayerNote(node.name, module_path(node)))


def _inside_branches(graph_module: fx.GraphModule) -> list[LayerNote]:
    """Layers of the graphs that control flow (`torch.cond`) calls: their parameters are not known there."""
    notes = []
    for path, module in graph_module.named_modules():
        if module is graph_module or not isinstance(module, fx.GraphModule):
            continue
        constants = ModuleConstants(module)
        dequantized: set[fx.Node] = set()  # nodes that a dequantize operator takes part in computing
        for node in module.graph.nodes:
            if is_dequantize(node) or not dequantized.isdisjoint(node.all_input_nodes):
                dequantized.add(node)
            if node in dequantized and read_layer(node, constants) is not None:
                reason = "it is inside a branch of control flow, which the pass does not enter"
                notes.append(LayerNote(node.name, path, reason))
    return notes


def _apply(plan: _Plan, constants: Constants, options: _Options) -> fx.Node | None:
    """Rewrite one layer; returns the node of the float bias that it read."""
    node, old = plan.layer.node, plan.layer.bias
    codes = _store_codes(plan, constants)
    neighbour = _nearest_dequantize(plan.layer)
    arguments = _dequantize_arguments(plan, codes, constants, options)
    value = constants.fake(plan.codes.to(plan.dtype))
    dequantize = insert_call(node, *arguments, neighbour=neighbour, value=value)
    if plan.layer.bias_name is None:
        # A product takes no bias: mm(x, w) becomes addmm(bias, x, w), other products have no such form.
        node.target, node.args = like(torch.ops.aten.addmm.default, node.target), (dequantize, *node.args)
        refresh(node)
    else:
        set_argument(node, plan.layer.bias_name, dequantize)
    return old


def _store_codes(plan: _Plan, constants: Constants) -> fx.Node:
    """Node of the stored codes: in the place of the float bias where nothing else reads that, else of their own."""
    node, old = plan.layer.node, plan.layer.bias
    codes = plan.codes
    if old is None:
        return constants.add(f"{node.name}_default_zero_bias", codes, before=node)
    if constants.key(old) is None or len(constants.readers(old)) > 1:
        return constants.add(f"{node.name}_bias", codes, before=node)
    constants.replace(old, codes)
    return old


def _dequantize_arguments(
    plan: _Plan, codes: fx.Node, constants: Constants, options: _Options
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Operator, arguments and keyword arguments of the bias's dequantize node."""
    node, scale = plan.layer.node, plan.scale
    tail = (*options.limits, torch.int32)
    ops = quantized_decomposed()
    if scale.ndim == 0 and plan.dtype == torch.float32:
        return ops.dequantize_per_tensor.default, (codes, float(scale), 0, *tail), {}
    # In half precision the operator per tensor casts the codes before it multiplies, and they overflow.
    scale = scale.expand(plan.codes.shape).contiguous()
    zero_points = torch.zeros(scale.shape, dtype=torch.int64, device=scale.device)
    scales = constants.add(f"{node.name}_bias_scale", scale, before=node)
    zeros = constants.add(f"{node.name}_bias_zero_point", zero_points, before=node)
    kwargs = {} if plan.dtype == torch.float32 else {"out_dtype": plan.dtype}
    return ops.dequantize_per_channel.default, (codes, scales, zeros, 0, *tail), kwargs


def _nearest_dequantize(layer: Layer) -> fx.Node:
    """A dequantize node that feeds the layer: what is emitted is of its dialect."""
    node = layer.weight
    while not is_dequantize(node):
        node = node.all_input_nodes[0]
    return node


def _forget(bias: fx.Node, constants: Constants) -> list[str]:
    """Drop what only computed the float bias; returns the keys of the stored tensors that may have lost a reader."""
    key = constants.key(bias)
    if key is not None:
        return [key]
    if bias.users or bias._erased:
        return []
    sources = bias.all_input_nodes
    constants.graph.erase_node(bias)
    return [key for source in sources for key in _forget(source, constants)]
