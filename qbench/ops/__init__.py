"""Operators on codes that `qbench.passes.fuse_qdq` emits, in the namespace `qbench` of torch.library.

    torch.ops.qbench.conv2d_q8ta_q8csw_q8to(x, s_in, z_in, w, s_w, bias, stride, padding, dilation, groups, *out)

Names say what is quantized how: q, bits, granularity (t tensor, c channel, g group), s symmetric, role (a activation,
w weight, o output), d dynamic. Importing this package defines them, which a program that holds them needs to be loaded.
"""

# One module per family; importing it defines the family's operators.
from qbench.ops import boundary, conv, elementwise, linear, matmul, pooling, unary, weight_only

__all__ = ["boundary", "conv", "elementwise", "linear", "matmul", "pooling", "unary", "weight_only"]
