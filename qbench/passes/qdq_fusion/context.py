"""What every fusion rule reads around its anchor, and how it puts the fused operator in.

    c → dq ─┐
    c → dq ─┼─ anchor ─ [clamps] ─ q          becomes          fused(c, c, …)        with the codes of q
    …       ┘
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from qbench import targets
from qbench.graph.clamps import UNBOUNDED, Bounds, clamp_bounds, then
from qbench.graph.cleanup import read_instead
from qbench.graph.constants import Constants
from qbench.graph.dialect import packet
from qbench.graph.edit import insert_call
from qbench.graph.recognise import Quantize, is_dequantize, is_quantize, read_dequantize, read_quantize
from qbench.graph.rules import Refused
from qbench.numerics.arithmetic import Arithmetic, Grid
from qbench.numerics.qparams import QParams, quantize

_STORED = (torch.int8, torch.uint8)

#: Key of `node.meta` under which a fused node keeps the name of the quantize node whose codes it computes.
CODES_OF = "qbench_codes"

#: Key of `node.meta` of a node that moves codes through float32 because PyTorch has no 8-bit kernel for the move.
CODES_IN_FLOAT = "qbench_codes_in_float"


@dataclasses.dataclass(frozen=True, eq=False)
class Codes:
    """A tensor of codes that an operator reads: the node that computes them, and their grid."""

    node: fx.Node
    grid: Grid

    @property
    def arguments(self) -> tuple[Any, ...]:
        """How a fused operator takes it: codes, scale, zero point."""
        return self.node, self.grid.scale, self.grid.zero_point


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """A quantize node that reads the anchor, clamps between them included: `grid` holds the clamped range of codes."""

    quantize: fx.Node
    grid: Grid


@dataclasses.dataclass(frozen=True)
class FusionContext:
    """The graph's stored tensors and the target whose arithmetic the fused operators get."""

    constants: Constants
    target: targets.Target

    @property
    def arithmetic(self) -> Arithmetic:
        """The target's arithmetic, which `fuse_qdq` has made sure of."""
        assert self.target.arithmetic is not None
        return self.target.arithmetic

    def function(self, operation: str, *notes: str) -> Callable[..., Any]:
        """The target's function for an operation.

        Args:
            operation: A field of `Arithmetic`.
            notes: Keys of `Arithmetic.inexact` to look at too, `"hardswish"` for a table.

        Raises:
            Refused: the target has none, or says that its own result is not reproduced.
        """
        for key in (*notes, operation):
            if key in self.arithmetic.inexact:
                raise Refused(f"{self.target.name}: {self.arithmetic.inexact[key]}")
        function = getattr(self.arithmetic, operation)
        if function is None:
            raise Refused(f"target {self.target.name} states no integer arithmetic for {(*notes, operation)[0]}")
        return function

    def check_ratio(self, operation: str, ratio: float) -> None:
        """Refuse a ratio of scales that the target's runtime does not take on codes.

        Raises:
            Refused: it lies outside the limits of the operation.
        """
        limit = self.arithmetic.limits.get(operation)
        if limit is not None and not limit.low <= ratio < limit.high:
            raise Refused(
                f"{limit.ratio} is {ratio:.4g}, and {self.target.name} takes {limit.low:.4g} up to {limit.high:.4g}"
            )

    def codes(self, value: object, name: str = "input") -> Codes:
        """The codes that an argument of the anchor dequantizes.

        Raises:
            Refused: it is not a dequantize node per tensor of 8-bit codes, or something writes to it.
        """
        if not isinstance(value, fx.Node):
            raise Refused(f"its {name} is {value!r}, not a tensor")
        if not is_dequantize(value):
            raise Refused(f"its {name} is in float: {describe(value)}")
        found = read_dequantize(value, self.constants)
        if found is None:
            raise Refused(f"the scale of its {name} is not known before the program runs ({value.name})")
        if found.qparams.axis is not None:
            raise Refused(f"its {name} is quantized per channel, by {value.name}: there is no one s_in")
        if value in self.constants.written_off_grid:
            raise Refused(f"something writes to its {name} in place ({value.name})")
        self._check_dtypes(value, found.dtype, name)
        return Codes(found.source, grid_of(found.qparams, found.dtype))

    def results(self, anchor: fx.Node, bounds: Bounds = UNBOUNDED) -> list[Result]:
        """The quantize nodes that read the anchor, directly or through clamps: all that do, and nothing else may.

        Args:
            anchor: The node.
            bounds: What limits its value already.

        Raises:
            Refused: something reads the anchor's float value.
        """
        found: list[Result] = []
        waiting: list[tuple[fx.Node, Bounds]] = [(anchor, bounds)]
        while waiting:
            node, bounds = waiting.pop()
            for reader in node.users:
                inner = clamp_bounds(reader)
                if is_quantize(reader):
                    found.append(self.result(reader, bounds))
                elif inner is not None and reader.args[0] is node:
                    waiting.append((reader, then(bounds, inner)))
                else:
                    raise Refused(f"its float value is read by {describe(reader)}")
        return found

    def result(self, node: fx.Node, bounds: Bounds = UNBOUNDED) -> Result:
        """A quantize node whose input is limited to `bounds`.

        Raises:
            Refused: its grid is not known, not per tensor, or not of 8-bit codes.
        """
        read = read_quantize(node, self.constants)
        if read is None:
            raise Refused(f"the scale of its output is not known before the program runs ({node.name})")
        if read.qparams.axis is not None:
            raise Refused(f"its output is quantized per channel, by {node.name}")
        self._check_dtypes(node.args[0], read.dtype, "output")
        return Result(node, clamped_grid(read, bounds))

    def _check_dtypes(self, value: Any, dtype: torch.dtype, name: str) -> None:
        if dtype not in _STORED:
            raise Refused(f"the codes of its {name} are {dtype}; the integer operators take int8 and uint8")
        real = value.meta.get("val")
        if isinstance(real, Tensor) and real.dtype is not torch.float32:
            raise Refused(f"its {name} is {real.dtype} ({value.name}); the integer operators stand for float32 ones")

    def emit(self, result: Result, operator: Any, arguments: Sequence[Any]) -> fx.Node:
        """Put a fused operator in the place of a quantize node; every reader of its codes reads the new node.

        Args:
            result: The quantize node.
            operator: An overload of `torch.ops.qbench`.
            arguments: All but those that say the output's grid and the target, which end every such operator.
        """
        return self.replace(result.quantize, operator, (*arguments, *result.grid, self.target.name))

    def replace(self, node: fx.Node, operator: Any, arguments: Sequence[Any]) -> fx.Node:
        """Put a call in the place of a node that computes codes, and remember the name of that node in the new one."""
        # The codes of both have one shape and dtype: no need to trace the operator for them.
        new = insert_call(node, operator, arguments, value=node.meta.get("val"))
        new.meta[CODES_OF] = node.meta.get(CODES_OF, node.name)
        read_instead(node, new, self.constants)
        _erase(node)
        return new


def _erase(node: fx.Node) -> None:
    """Erase a node that nothing reads, and what only it read: no later rule shall look at the ruins of a match."""
    if node.users or node.op != "call_function" or node.is_impure():
        return
    sources = node.all_input_nodes
    node.graph.erase_node(node)
    for source in sources:
        _erase(source)


def grid_of(qparams: QParams, dtype: torch.dtype) -> Grid:
    """A per-tensor grid as plain numbers."""
    return Grid(float(qparams.scale), int(qparams.zero_point), qparams.qmin, qparams.qmax, dtype)


def clamped_grid(read: Quantize, bounds: Bounds) -> Grid:
    """The grid of a quantize node, its codes limited to those of real bounds."""
    grid = grid_of(read.qparams, read.dtype)
    if bounds == UNBOUNDED:
        return grid
    low, high = (int(code) for code in quantize(torch.tensor(bounds, dtype=torch.float32), read.qparams))
    return grid._replace(qmin=low, qmax=high)


def describe(node: fx.Node) -> str:
    """A node in a reason: its operator and its name."""
    if node.op != "call_function":
        return f"{node.op} {node.name}"
    operation = packet(node.target)
    return f"{node.target if operation is None else operation._qualified_op_name} ({node.name})"
