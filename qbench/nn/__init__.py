"""Float modules for functional operations; wrappers, QAT forms and deployed forms in the packages below."""

from qbench.nn.ops import Add, AddReLU, Cat, Mean, Mul, Sub

__all__ = ["Add", "AddReLU", "Cat", "Mean", "Mul", "Sub"]
