"""Sums of activations: no backward needs their result, so it is rectified and quantized where it lies."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from qbench.nn import ops
from qbench.nn.qat.body import QatOp
from qbench.nn.qat.epilogue import epilogue


class Sum(QatOp):
    """Base of QAT sums and differences."""

    sum_type: ClassVar[type[ops.Operation]]
    rectified: ClassVar[bool] = False
    owns_output = True

    def quantized_output(self, *inputs: Any) -> Tensor:
        """See `QatOp.quantized_output`."""
        y: Tensor = self.sum_type.forward(self, *inputs)
        bounds = (0.0 if self.rectified else -math.inf, math.inf)
        found = self.where_it_lies(y, bounds)
        if found is not None:
            return found
        return epilogue(y, F.relu if self.rectified else None, self.output_quantizer)
