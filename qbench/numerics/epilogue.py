"""Everything that follows the linear part of a QAT layer, as one pure function.

    train     y = BN_batch(conv)  →  + e  →  [pre-activation quantizer]  →  activation  →  output quantizer
    eval      y = conv            →         [pre-activation quantizer]  →  activation  →  output quantizer

The bias error `e = b̂ − b_f` stands outside what BN normalises: before it, `e` would be a constant per channel that the
batch mean removes, and training would never see it.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Step = Callable[[Tensor], Tensor]


def epilogue(
    y: Tensor,
    *,
    normalize: Step | None = None,
    bias_error: Tensor | None = None,
    channel_axis: int = 1,
    pre_quantize: Step | None = None,
    activation: Step | None = None,
    quantize: Step | None = None,
) -> Tensor:
    """Apply the steps that are given, in the order above.

    Args:
        y: Output of the linear part, (batch, out, …) for a convolution, (…, out) for Linear.
        normalize: BatchNorm over the batch's own statistics.
        bias_error: `e`, (out,).
        channel_axis: Axis of `y` that holds the output channels.
        pre_quantize: Quantizer before an activation that the target cannot fuse.
        activation: The activation.
        quantize: Output quantizer: observes, then quantizes with the range that includes this batch.
    """
    if normalize is not None:
        y = normalize(y)
    if bias_error is not None:
        y = y + bias_error.reshape(*[-1 if axis == channel_axis % y.ndim else 1 for axis in range(y.ndim)]).to(y.dtype)
    for step in (pre_quantize, activation, quantize):
        if step is not None:
            y = step(y)
    return y
