"""The methods of torch.ao's FloatFunctional, on qbench's operations.

A model written for torch.ao says `self.skip.add(x, y)`, where `skip` is a FloatFunctional. Once `skip` is a
`qbench.nn.Add` under the same name, that line calls it: `add(x, y)` is `self(x, y)`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from qbench.errors import PreparationError

# Method of a FloatFunctional → the operation that computes it.
OPERATIONS = {
    "add": "Add",
    "add_relu": "AddReLU",
    "add_scalar": "Add",
    "mul": "Mul",
    "mul_scalar": "Mul",
    "cat": "Cat",
    "matmul": "MatMul",
}


class FunctionalCalls(nn.Module):
    """Base of operations: answers to the FloatFunctional method that computes the same, and refuses the others."""

    def _operation(self) -> nn.Module:
        """What says which operation this is; another module in the deployed form."""
        return self

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """`x + y`, where this is an Add."""
        self._check_call("add")
        return self(x, y)

    def add_relu(self, x: Tensor, y: Tensor) -> Tensor:
        """`relu(x + y)`, where this is an AddReLU."""
        self._check_call("add_relu")
        return self(x, y)

    def mul(self, x: Tensor, y: Tensor) -> Tensor:
        """`x · y`, where this is a Mul."""
        self._check_call("mul")
        return self(x, y)

    def add_scalar(self, x: Tensor, y: float) -> Tensor:
        """`x + y` for a number, where this is an Add."""
        self._check_call("add_scalar")
        return self(x, y)

    def mul_scalar(self, x: Tensor, y: float) -> Tensor:
        """`x · y` for a number, where this is a Mul."""
        self._check_call("mul_scalar")
        return self(x, y)

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        """`x @ y`, where this is a MatMul."""
        self._check_call("matmul")
        return self(x, y)

    def cat(self, x: Sequence[Tensor], dim: int = 0) -> Tensor:
        """Concatenation along `dim`, where this is a Cat along the same axis."""
        self._check_call("cat")
        own = getattr(self._operation(), "dim", dim)
        if own != dim:
            raise PreparationError(
                f"cat(…, dim={dim}): this Cat joins along {own}; put a qbench.nn.Cat({dim}) of its own there"
            )
        return self(*x)

    def _check_call(self, method: str) -> None:
        wanted = OPERATIONS[method]
        # The QAT form of Add is an Add too; the nearest known name is what it computes (an AddReLU derives from Add).
        kinds = type(self._operation()).__mro__
        if next((kind.__name__ for kind in kinds if kind.__name__ in OPERATIONS.values()), "") != wanted:
            raise PreparationError(
                f"{kinds[0].__name__}.{method}(…) was not called when the model was prepared, so there is no quantizer "
                f"for it: put a qbench.nn.{wanted}() there, or give fuse and prepare_qat example_inputs that reach it"
            )
