"""Modules: functional operations here; wrappers in `intrinsic`; QAT forms in `qat` and `intrinsic.qat`; deployed ones in `reference`."""

from qbench.nn.ops import Add, AddReLU, Cat, Mul

__all__ = ["Add", "AddReLU", "Cat", "Mul"]
