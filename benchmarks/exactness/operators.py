"""Our side of every sweep: the integer operators of `torch.ops.qbench`, called with the numbers of a case.

A program that `fuse_qdq` made holds these operators with these arguments, so what a sweep counts is what a program
computes: kernels, plans of exact sums and per-layer constants included, not the target's functions alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import qbench.ops  # noqa: F401  (defines the operators)
from benchmarks.exactness.cases import LayerData, all_codes
from qbench import targets
from qbench.numerics.arithmetic import Grid, Window
from qbench.numerics.arithmetic.base import dequantize_codes


@dataclasses.dataclass(frozen=True)
class Operators:
    """The operators with one target's arithmetic; every method returns codes of `out`."""

    target: str

    def quantize(self, x: Tensor, out: Grid) -> Tensor:
        """Codes of floats."""
        return _call("quantize_q8to", x, *out, self.target)

    def layer(self, data: LayerData, bias: Tensor | None = None) -> Tensor:
        """A convolution or matrix product; `bias` is int32 codes in place of the data's."""
        of = data.layer
        given = (
            data.codes,
            data.source.scale,
            data.source.zero_point,
            data.weight,
            data.weight_scales,
            data.bias if bias is None else bias,
        )
        if of.dims == 0:
            return _call("linear_q8ta_q8csw_q8to", *given, *data.out, self.target)
        if of.transposed:
            sizes = (of.stride, of.padding, of.output_padding, of.groups, of.dilation)
            return _call(f"conv_transpose{of.dims}d_q8ta_q8csw_q8to", *given, *sizes, *data.out, self.target)
        sizes = (of.stride, of.padding, of.dilation, of.groups)
        return _call(f"conv{of.dims}d_q8ta_q8csw_q8to", *given, *sizes, *data.out, self.target)

    def binary(self, name: str, a: Tensor, a_grid: Grid, b: Tensor, b_grid: Grid, out: Grid) -> Tensor:
        """`"add"`, `"sub"` or `"mul"`; shapes broadcast."""
        grids = (a_grid.scale, a_grid.zero_point, b, b_grid.scale, b_grid.zero_point)
        return _call(f"{name}_q8ta_q8ta_q8to", a, *grids, *out, self.target)

    def matmul(self, a: Tensor, a_grid: Grid, b: Tensor, b_grid: Grid, out: Grid) -> Tensor:
        """The product of two matrices of codes; leading dims broadcast."""
        grids = (a_grid.scale, a_grid.zero_point, b, b_grid.scale, b_grid.zero_point)
        return _call("matmul_q8ta_q8ta_q8to", a, *grids, *out, self.target)

    def cat(self, parts: Sequence[Tensor], grids: Sequence[Grid], dim: int, out: Grid) -> Tensor:
        """Parts on grids of their own, along `dim`."""
        scales, zero_points = [grid.scale for grid in grids], [grid.zero_point for grid in grids]
        return _call("cat_q8ta_q8to", list(parts), scales, zero_points, dim, *out, self.target)

    def rescale(self, codes: Tensor, source: Grid, out: Grid) -> Tensor:
        """The same reals on another grid."""
        return _call("requantize_q8ta_q8to", codes, source.scale, source.zero_point, *out, self.target)

    def global_average(self, codes: Tensor, source: Grid, out: Grid) -> Tensor:
        """The mean over all dims but the first two, which stay as 1."""
        dims = list(range(2, codes.ndim))
        grid = (source.scale, source.zero_point)
        return _call("global_avg_pool_q8ta_q8to", codes, *grid, dims, True, *out, self.target)

    def average_pool(self, codes: Tensor, source: Grid, out: Grid, window: Window) -> Tensor:
        """The mean over windows in two dims."""
        return _call("avg_pool2d_q8ta_q8to", codes, source.scale, source.zero_point, *window, *out, self.target)

    def max_pool(
        self, codes: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], ceil: bool = False
    ) -> Tensor:
        """The greatest code of windows in two dims."""
        return _call("max_pool2d_q8ta", codes, kernel, stride, padding, [1, 1], ceil)

    def function(self, name: str, parameters: Sequence[float], source: Grid, out: Grid) -> Tensor:
        """A unary function of all 256 codes of `source`, ascending, (256,)."""
        table = targets.get(self.target).arithmetic.table(name, parameters, source, out)
        return _call("unary_q8ta_q8to", all_codes(source.dtype), table)

    def in_float(self, function: Callable[[Tensor], Tensor], codes: Tensor, source: Grid, out: Grid) -> Tensor:
        """A function of reals between dequantize and quantize: what the program computes where there is no operator."""
        return self.quantize(function(dequantize_codes(codes, source)), out)


def _call(name: str, *arguments: object) -> Tensor:
    codes: Tensor = getattr(torch.ops.qbench, name)(*arguments)
    return codes
