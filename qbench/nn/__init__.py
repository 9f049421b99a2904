"""Float modules for functional operations; wrappers, QAT forms and deployed forms in the packages below."""

from qbench.nn.ops import Add, AddReLU, Cat, Mul

__all__ = ["Add", "AddReLU", "Cat", "Mul"]
