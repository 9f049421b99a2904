"""Every operator keeps the contract of torch.library: schema, fake kernel, dynamic shapes."""

from __future__ import annotations

import pytest
import torch

import qbench.ops  # noqa: F401  (defines the operators)

OUT = (0.05, 3, -128, 127, torch.int8, "onnxruntime")
GEOMETRY = {1: ([1], [1], [1], 1), 2: ([2, 1], [1, 0], [1, 2], 1), 3: ([1], [0], [1], 1)}


def codes(*shape: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    info = torch.iinfo(dtype)
    return torch.randint(info.min, info.max + 1, shape, dtype=dtype)


def layer(*shape: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return codes(*shape), torch.rand(outputs) * 0.01 + 0.001, torch.randint(-999, 999, (outputs,), dtype=torch.int32)


def calls() -> list[tuple[str, tuple[object, ...]]]:
    """Name and arguments of one call of every operator."""
    torch.manual_seed(0)
    listed: list[tuple[str, tuple[object, ...]]] = [
        ("quantize_q8to", (torch.randn(2, 3, 4), *OUT)),
        ("requantize_q8ta_q8to", (codes(2, 3, 4), 0.05, 3, *OUT)),
        ("requantize_q8ta_q8to", (codes(2, 3, 4), 0.02, 3, *OUT)),
        ("linear_q8ta_q8csw_q8to", (codes(2, 3, 4), 0.1, -4, *layer(5, 4, outputs=5), *OUT)),
        ("unary_q8ta_q8to", (codes(2, 3, 4), codes(256))),
        ("global_avg_pool_q8ta_q8to", (codes(2, 3, 4, 5), 0.1, -4, [2, 3], True, *OUT)),
        ("global_avg_pool_q8ta_q8to", (codes(2, 3, 4, 5), 0.1, -4, [-1], False, *OUT)),
        ("avg_pool2d_q8ta_q8to", (codes(2, 3, 7, 7), 0.1, 4, [3, 3], [2, 2], [1, 1], True, False, None, *OUT)),
        ("cat_q8ta_q8to", ([codes(2, 3), codes(2, 1)], [0.05, 0.02], [3, 0], 1, *OUT)),
    ]
    for name in ("add", "sub", "mul"):
        listed.append((f"{name}_q8ta_q8ta_q8to", (codes(2, 3, 4), 0.1, -4, codes(3, 1), 0.2, 5, *OUT)))
    listed.append(("matmul_q8ta_q8ta_q8to", (codes(2, 3, 5), 0.1, -4, codes(5, 4), 0.2, 5, *OUT)))
    listed.append(("matmul_q8ta_q8ta_q8to", (codes(2, 1, 3, 5), 0.1, -4, codes(4, 5, 3), 0.2, 5, *OUT)))
    for dims, (stride, padding, dilation, groups) in GEOMETRY.items():
        x, size = codes(2, 4, *[7] * dims), [3] * dims
        forward = (x, 0.1, -4, *layer(6, 4, *size, outputs=6), stride, padding, dilation, groups, *OUT)
        listed.append((f"conv{dims}d_q8ta_q8csw_q8to", forward))
        turned = (x, 0.1, -4, *layer(4, 3, *size, outputs=6), [2], [1], [1], 2, [1], *OUT)
        listed.append((f"conv_transpose{dims}d_q8ta_q8csw_q8to", turned))
        listed.append((f"max_pool{dims}d_q8ta", (x, [3], [2], [1], [1], True)))
    return listed


@pytest.mark.parametrize(("name", "arguments"), calls(), ids=lambda value: value if isinstance(value, str) else "")
def test_opcheck(name: str, arguments: tuple[object, ...]) -> None:
    torch.library.opcheck(getattr(torch.ops.qbench, name).default, arguments)
