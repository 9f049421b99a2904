"""Rewrites of the ONNX graph that torch.onnx wrote: what ONNX Runtime needs to see so that it computes on codes.

averages    over all spatial dims: GlobalAveragePool where its integer kernel takes the scales, else ReduceMean
pairs       a clip stands between two q–dq pairs on two grids, which would be merged to a third
weights     codes as asked, each with a zero point of its own
names       outputs as the program has them, nodes after the modules that they came from

Every function changes an `onnx_ir.Model` in place.
"""

from __future__ import annotations

import ast
import itertools
import math
from collections import Counter
from typing import Any

import numpy as np

from qbench.numerics.arithmetic.onnxruntime import ARITHMETIC


def choose_averages(model: Any) -> int:
    """Give every average over all spatial dims the operator that ONNX Runtime runs.

    GlobalAveragePool has an integer kernel, which ReduceMean has not. That kernel, and AveragePool's over one window,
    refuse some ratios of scales while they run: there a ReduceMean stays in float.

    Args:
        model: An `onnx_ir.Model`, changed in place.

    Returns:
        How many were replaced.
    """
    import onnx_ir

    replaced = 0
    for node in list(model.graph):
        pools = node.op_type in ("GlobalAveragePool", "AveragePool") and _pools_the_plane(node)
        if not pools and not (node.op_type == "ReduceMean" and _reduces_the_plane(node)):
            continue
        averages = _has_integer_average(node)
        if pools and not averages:
            axes = np.arange(2, len(node.inputs[0].shape), dtype=np.int64)
            inputs = [node.inputs[0], _initializer(model, f"axes_{'_'.join(map(str, axes))}", axes)]
            other = onnx_ir.node("ReduceMean", inputs, {"keepdims": 1}, name=node.name)
        elif not pools and averages:
            other = onnx_ir.node("GlobalAveragePool", [node.inputs[0]], name=node.name)
        else:
            continue
        other.metadata_props.update(node.metadata_props)
        old, new = node.outputs[0], other.outputs[0]
        new.shape, new.type, new.name = old.shape, old.type, old.name
        onnx_ir.convenience.replace_nodes_and_values(model.graph, node, [node], [other], [old], [new])
        replaced += 1
    return replaced


def _pools_the_plane(node: Any) -> bool:
    """Whether a pool has one window, over all spatial dims, in a tensor whose rank is known."""
    shape = node.inputs[0].shape
    if shape is None or node.op_type == "GlobalAveragePool":
        return shape is not None
    kernel, pads = (node.attributes.get(name) for name in ("kernel_shape", "pads"))
    return tuple(kernel.as_ints()) == tuple(shape[2:]) and (pads is None or not any(pads.as_ints()))


def _has_integer_average(node: Any) -> bool:
    """Whether the scales around an average over all spatial dims, as far as they are known, are in the kernel's limits.

    A size that may change is taken as 1.
    """
    source, reader = node.inputs[0].producer(), node
    while len(readers := [use.node for use in reader.outputs[0].uses()]) == 1:
        reader = readers[0]
        if reader.op_type not in ("Squeeze", "Reshape", "Flatten"):
            break
    if source is None or source.op_type != "DequantizeLinear" or reader.op_type != "QuantizeLinear":
        return True
    scales = [end.inputs[1].const_value for end in (source, reader)]
    if any(scale is None for scale in scales):
        return True
    scale, out = (float(value.numpy()) for value in scales)
    limit = ARITHMETIC.limits["global_average"]
    count = math.prod(size for size in node.inputs[0].shape[2:] if isinstance(size, int))
    return limit.low <= scale / (out * count) < limit.high


def _reduces_the_plane(node: Any) -> bool:
    import onnx_ir

    source = node.inputs[0]
    axes = onnx_ir.convenience.get_const_tensor(node.inputs[1]) if len(node.inputs) > 1 else None
    keep = node.attributes.get("keepdims")
    if source.shape is None or axes is None or (keep is not None and keep.as_int() == 0):
        return False
    rank = len(source.shape)
    return rank > 2 and sorted(int(axis) % rank for axis in axes.numpy().ravel()) == list(range(2, rank))


def keep_pairs_apart(model: Any) -> int:
    """Put a clip that changes no code behind each QuantizeLinear that directly reads another grid's DequantizeLinear.

    ONNX Runtime takes `Q → DQ → Q → DQ` on two grids for one pair and makes up a grid from both, which gives other
    values (95 % of the codes in a test). A clip between them is in its way.

    Args:
        model: An `onnx_ir.Model`, changed in place.

    Returns:
        How many clips were put.
    """
    import onnx_ir

    clips = 0
    for node in list(model.graph):
        if node.op_type != "QuantizeLinear" or not _repeats_pair(node):
            continue
        info = np.iinfo(node.inputs[2].dtype.numpy())
        extremes = [np.array(bound, info.dtype) for bound in (info.min, info.max)]
        bounds = [_initializer(model, f"{info.dtype}_{bound}", bound) for bound in extremes]
        clip = onnx_ir.Node("", "Clip", [node.outputs[0], *bounds])
        clip.metadata_props.update(node.metadata_props)
        clip.outputs[0].shape, clip.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
        for reader, index in list(node.outputs[0].uses()):
            reader.replace_input_with(index, clip.outputs[0])
        clip.replace_input_with(0, node.outputs[0])
        model.graph.insert_after(node, clip)
        clips += 1
    return clips


def _repeats_pair(quantize: Any) -> bool:
    """Whether a QuantizeLinear reads a DequantizeLinear of codes that the graph computes, on another grid."""
    source = quantize.inputs[0].producer()
    if source is None or source.op_type != "DequantizeLinear" or source.inputs[0].producer() is None:
        return False
    if len(quantize.inputs) < 3 or all(reader.op_type == "Clip" for reader, _ in quantize.outputs[0].uses()):
        return False
    grids = [[value.const_value for value in node.inputs[1:3]] for node in (source, quantize)]
    return any(
        one is None or other is None or not np.array_equal(one.numpy(), other.numpy())
        for one, other in itertools.zip_longest(*grids)
    )


def name_outputs(model: Any, names: list[str]) -> None:
    """Name the outputs of an `onnx_ir.Model`; values inside that had such a name get another one."""
    graph = model.graph
    inside = [*graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    for value in inside:
        if value.name in names:
            value.name = f"{value.name}_inside"
    for value, name in zip(graph.outputs, names, strict=True):
        if value not in graph.inputs:
            value.name = name


def name_nodes(model: Any) -> None:
    """Name every node of an `onnx_ir.Model` by the module it came from: `layer1.0.conv1/Conv`, then `…/Conv_1`."""
    taken: Counter[str] = Counter()
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        path = scopes[-2] if len(scopes) > 1 else ""
        name = f"{path}/{node.op_type}" if path else str(node.op_type)
        node.name = f"{name}_{taken[name]}" if taken[name] else name
        taken[name] += 1


def store_weights(model: Any, codes: str) -> int:
    """Store int8 weight codes as asked, each with a zero point of its own; returns how many there are.

    The codes of `"uint8"` are those of int8 + 128, with zero point 128: the same reals. Zero points are not shared,
    because `session.x64quantprecision` (see `open_session`) names what it adds after them and then fails to load.
    """
    import onnx_ir

    stored = 0
    for node in model.graph:
        if node.op_type != "DequantizeLinear" or len(node.inputs) < 3:
            continue
        if any(value.const_value is None or value.dtype != onnx_ir.DataType.INT8 for value in node.inputs[::2]):
            continue
        for index in (0, 2) if codes == "uint8" else (2,):
            array = node.inputs[index].const_value.numpy()
            if codes == "uint8":
                array = (array.astype("int16") + 128).astype("uint8")
            name = f"{node.inputs[index].name}_{codes}" if index == 0 else f"{node.inputs[0].name}_zero_point"
            node.replace_input_with(index, _initializer(model, name, array))
        stored += 1
    return stored


def _initializer(model: Any, name: str, array: Any) -> Any:
    """A new constant of the graph; one of that name that is there already is the same (a weight used twice)."""
    import onnx_ir

    if name in model.graph.initializers:
        return model.graph.initializers[name]
    value = onnx_ir.val(name, const_value=onnx_ir.tensor(array, name=name))
    model.graph.register_initializer(value)
    return value
