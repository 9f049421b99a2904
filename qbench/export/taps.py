"""Taps: the codes of every activation, put out by a program beside what it returns.

    q(x) ─▶ dq ─▶ …            becomes            q(x) ─▶ dq ─▶ …
                                                    └──▶ dq ─▶ q ─▶ one more output

A tapped program returns `(what it returned, (codes, …))`. The same taps, by name, can be had of

    the Q/DQ program       tap_program(program)                  a tap at every quantize node per tensor
    an integer program     tap_program(integer)                  at every node that keeps `meta["qbench_codes"]`
    a runtime's file       tap_program(program, torch.uint8)     then exported as the program itself is

The pair behind a tap gives the same codes again. It is there because the rewrites of the exports ask whether codes are
read by dequantize nodes alone: so they make of every other node what they make of it in the program that ships.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind, OutputSpec, TensorArgument
from torch.utils import _pytree as pytree

from qbench.errors import ExportError
from qbench.export import graphs
from qbench.export.program import copy_program
from qbench.graph.edit import module_path
from qbench.graph.qdq import quantized_decomposed

#: Key of `node.meta` under which an integer operator keeps the name of the quantize node whose codes it computes.
CODES = "qbench_codes"


@dataclass(frozen=True)
class Tap:
    """One tapped tensor of codes.

    Attributes:
        name: Name of its quantize node in the Q/DQ program: the same in every program that was made of that one.
        label: What reports call it: the path of the module that it was traced in, with its name where several taps are
            of one module.
        zero: What its codes count from: 0 for signed codes, 128 for unsigned ones of 8 bits.
        per_image: How many codes there are for one image (one index of the first axis).
        inexact: Why these codes need not be the runtime's; empty where they must.
    """

    name: str
    label: str
    zero: int
    per_image: int
    inexact: str = ""


@dataclass(frozen=True)
class Tapped:
    """A program with taps.

    Attributes:
        program: The tapped copy: its first outputs are those of the program, the others are the taps.
        taps: In the order of the program and of the further outputs.
        inexact: As of a tap, for each output of the program itself.
    """

    program: ExportedProgram
    taps: tuple[Tap, ...]
    inexact: tuple[str, ...]


def tap_program(
    program: ExportedProgram, dtype: torch.dtype | None = None, *, left_float: Mapping[str, str] | None = None
) -> Tapped:
    """A copy of a program that also returns the codes of every activation.

    Args:
        program: A Q/DQ program, or an integer program before it is saved (a file keeps no `meta["qbench_codes"]`).
        dtype: uint8 or int8: what codes of 8 bits are stored in, for a runtime's file; None leaves them as they are.
        left_float: Name of a node of the program → why its values need not be those of the runtime. Every tap that
            depends on such a node says so.
    """
    kept = {node.name: node.meta[CODES] for node in program.graph.nodes if CODES in node.meta}
    copied = copy_program(program)
    for node in copied.graph.nodes:
        if node.name in kept:
            node.meta[CODES] = kept[node.name]
    if dtype is not None:
        graphs.shift_codes(copied, dtype)
    found = _nodes_of_codes(copied)
    doubts = _doubts(copied, left_float or {})
    labels = _labels(found)
    taps = tuple(
        Tap(name, labels[name], _zero(node), _per_image(node), doubts.get(node, "")) for name, node in found.items()
    )
    inexact = tuple(doubts.get(node, "") for node in _user_outputs(copied))
    _put_out(copied, [_codes_of_its_own(node) for node in found.values()])
    return Tapped(graphs.finish(copied), taps, inexact)


def _nodes_of_codes(program: ExportedProgram) -> dict[str, fx.Node]:
    """The nodes that compute codes of activations, by the name of their quantize node in the Q/DQ program."""
    return {
        str(node.meta.get(CODES, node.name)): node
        for node in program.graph.nodes
        if node.op == "call_function" and (CODES in node.meta or graphs.is_quantize(node))
    }


def _labels(found: Mapping[str, fx.Node]) -> dict[str, str]:
    # A deployed module quantizes its output in a submodule of that name: the module is what people know.
    paths = {name: module_path(node).removesuffix(".output") for name, node in found.items()}
    times = Counter(paths.values())
    return {name: path if path and times[path] == 1 else f"{path}/{name}".lstrip("/") for name, path in paths.items()}


def _doubts(program: ExportedProgram, left_float: Mapping[str, str]) -> dict[fx.Node, str]:
    """For every node that depends on one of `left_float`: why, by the first of them in the order of the program."""
    doubts: dict[fx.Node, str] = {}
    for node in program.graph.nodes:
        if node.name in left_float:
            doubts[node] = left_float[node.name]
        for source in node.all_input_nodes:
            if source in doubts:
                doubts[node] = doubts[source]
                break
    return doubts


def _zero(node: fx.Node) -> int:
    return 128 if node.meta["val"].dtype is torch.uint8 else 0


def _per_image(node: fx.Node) -> int:
    return math.prod(int(size) for size in node.meta["val"].shape[1:])


def _user_outputs(program: ExportedProgram) -> list[fx.Node]:
    names = program.graph_signature.user_outputs
    by_name = {node.name: node for node in program.graph.nodes}
    return [by_name[str(name)] for name in names]


def _codes_of_its_own(node: fx.Node) -> fx.Node:
    """What is put out for a node of codes: codes that nothing else reads."""
    if not graphs.is_quantize(node):
        return node  # An integer operator: no export rewrites what is around it.
    parameters = node.args[1:]
    real = graphs.insert_after(node, quantized_decomposed().dequantize_per_tensor.default, (node, *parameters))
    return graphs.insert_after(real, node.target, (real, *parameters))


def _put_out(program: ExportedProgram, nodes: list[fx.Node]) -> None:
    """Let a program return `(what it returned, tuple of nodes)`."""
    output = next(node for node in program.graph.nodes if node.op == "output")
    output.args = ((*output.args[0], *nodes),)
    program.graph_signature.output_specs.extend(
        OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(name=node.name), None) for node in nodes
    )
    signature = program.module_call_graph[0].signature
    if signature is None:
        raise ExportError("the program does not say what it returns; tap_program takes what qbench.convert returned")
    returned = pytree.tree_unflatten([0] * signature.out_spec.num_leaves, signature.out_spec)
    signature.out_spec = pytree.tree_structure((returned, tuple(0 for _ in nodes)))
