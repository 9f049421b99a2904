"""Bad input gets an error of qbench that says what was expected; it is the same while a program is traced."""

from __future__ import annotations

import pytest
import torch
from reference import random_codes
from torch._subclasses.fake_tensor import FakeTensorMode

import qbench.ops  # noqa: F401  (defines the operators)
from qbench.errors import ConfigError, NumericsError, QBenchError

X, W = random_codes(2, 4, 6, 6), random_codes(8, 4, 3, 3)
SCALES, BIAS = torch.rand(8) + 0.1, torch.zeros(8, dtype=torch.int32)
SIZES = ([1, 1], [1, 1], [1, 1], 1)
OUT = (0.5, 0, -128, 127, torch.int8, "onnxruntime")
ops, NAN = torch.ops.qbench, float("nan")
matmul = ops.matmul_q8ta_q8ta_q8to
add, linear, turn = ops.add_q8ta_q8ta_q8to, ops.linear_q8ta_q8csw_q8to, ops.conv_transpose2d_q8ta_q8csw_q8to


def conv(x=X, z=0, w=W, scales=SCALES, bias=BIAS, sizes=SIZES, out=OUT, s=0.1):  # type: ignore[no-untyped-def]
    return ops.conv2d_q8ta_q8csw_q8to(x, s, z, w, scales, bias, *sizes, *out)


REFUSED = {
    "float input": (lambda: conv(x=X.float()), "quantize_q8to"),
    "zero point beyond the codes": (lambda: conv(z=300), "input_zero_point is 300"),
    "scale of zero": (lambda: conv(s=0.0), "input_scale is 0.0"),
    "float weight": (lambda: conv(w=W.float()), "weight has dtype torch.float32"),
    "weight of other channels": (lambda: conv(w=W[:, :3].clone()), "takes 3"),
    "groups that do not divide": (lambda: conv(sizes=(*SIZES[:3], 3)), "divisible by groups"),
    "scales of another length": (lambda: conv(scales=SCALES[:5].clone()), "weight_scales"),
    "float bias": (lambda: conv(bias=BIAS.float()), "quantize_bias"),
    "bias of another length": (lambda: conv(bias=BIAS[:5].clone()), r"shape \(8,\)"),
    "three strides": (lambda: conv(sizes=([1, 1, 1], *SIZES[1:])), "stride is"),
    "stride of zero": (lambda: conv(sizes=([0, 1], *SIZES[1:])), "at least 1"),
    "negative padding": (lambda: conv(sizes=([1, 1], [-1, 0], [1, 1], 1)), "padding is"),
    "kernel larger than the input": (lambda: conv(sizes=([1, 1], [0, 0], [4, 4], 1)), "too small"),
    "output padding": (lambda: turn(X, 0.1, 0, W[:4], SCALES, None, [2], [1], [2], 1, [1], *OUT), "output_padding is"),
    "input without channels": (lambda: conv(x=X[0, 0].clone()), "expected"),
    "int32 output": (lambda: conv(out=(0.5, 0, -128, 127, torch.int32, "onnxruntime")), "dtype is torch.int32"),
    "empty range": (lambda: conv(out=(0.5, 0, 5, 4, torch.int8, "onnxruntime")), "no range"),
    "output scale of nan": (lambda: conv(out=(NAN, 0, -128, 127, torch.int8, "xnnpack")), "output_scale is nan"),
    "linear of other features": (lambda: linear(X, 0.1, 0, W[..., 0, 0].clone(), SCALES, BIAS, *OUT), r"\(out, in\)"),
    "shapes that do not broadcast": (lambda: add(X, 1.0, 0, X[:, :3].clone(), 1.0, 0, *OUT), "broadcast"),
    "factors that do not fit": (lambda: matmul(X, 1.0, 0, X[:, :, :5].clone(), 1.0, 0, *OUT), r"inner, columns\)"),
    "a vector as a factor": (lambda: matmul(X, 1.0, 0, X[0, 0, 0].clone(), 1.0, 0, *OUT), r"inner, columns\)"),
    "stacks that do not broadcast": (lambda: matmul(X, 1.0, 0, X[:, :3].clone(), 1.0, 0, *OUT), "last 2 dims"),
    "a float factor": (lambda: matmul(X, 1.0, 0, X.float(), 1.0, 0, *OUT), "b has dtype torch.float32"),
    "cat of nothing": (lambda: ops.cat_q8ta_q8to([], [], [], 0, *OUT), "at least one input"),
    "cat without a scale": (lambda: ops.cat_q8ta_q8to([X, X], [1.0], [0, 0], 0, *OUT), "one scale"),
    "cat along no dim": (lambda: ops.cat_q8ta_q8to([X, X], [1.0, 1.0], [0, 0], 4, *OUT), "dim is 4"),
    "cat that does not fit": (lambda: ops.cat_q8ta_q8to([X, X[:1].clone()], [1.0, 1.0], [0, 0], 1, *OUT), "do not fit"),
    "mean over no dim": (lambda: ops.global_avg_pool_q8ta_q8to(X, 1.0, 0, [4], False, *OUT), "dim is"),
    "mean of nothing": (lambda: ops.global_avg_pool_q8ta_q8to(X[..., :0], 1.0, 0, [3], False, *OUT), "no value"),
    "padding beyond half a window": (lambda: ops.max_pool2d_q8ta(X, [2], [1], [2], [1], False), "half"),
    "window larger than the input": (lambda: ops.max_pool2d_q8ta(X, [9], [1], [0], [1], False), "too small"),
    "divisor of zero": (
        lambda: ops.avg_pool2d_q8ta_q8to(X, 1.0, 0, [2, 2], [2, 2], [0, 0], False, True, 0, *OUT), "divisor_override"),
    "table of 255": (lambda: ops.unary_q8ta_q8to(X, random_codes(255)), "256"),
    "integers to quantize": (lambda: ops.quantize_q8to(X, *OUT), "float32"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(NumericsError, match=message):
        call()


def test_refused_while_traced() -> None:
    with FakeTensorMode() as mode:
        x, w, scales = (mode.from_tensor(tensor) for tensor in (X, W, SCALES))
        assert conv(x, 0, w, scales, None).shape == (2, 8, 6, 6)
        with pytest.raises(NumericsError, match="takes 3"):
            conv(x, 0, w[:, :3], scales, None)


@pytest.mark.parametrize(("target", "message"), [("onnxrt", "did you mean"), ("neutron", "not stated")])
def test_targets_without_arithmetic(target: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        conv(out=(*OUT[:5], target))
    assert isinstance(caught.value, QBenchError)
