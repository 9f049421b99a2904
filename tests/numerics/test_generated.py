"""Generated code apart from the layers that use it: the way to it, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from qbench.numerics.generated import Generated, Tensors


def halved(out: Tensor, x: Tensor, shift: Tensor | None, count: int) -> Tensors:
    """`out` becomes `x/2`; the sums of `x`, nothing, and `x·count` (with `shift`)."""
    out.copy_(x * 0.5)
    return x.sum(1), None, x * count if shift is None else x * count + shift


def sample(count: int) -> Sequence[Tensor | None]:
    x = torch.arange(24.0).view(4, 6)
    return torch.zeros_like(x), x, None


def made() -> Generated:
    code = Generated(halved, (3,), sample)
    assert code.ready()
    return code


def check(code: Generated, rows: int, columns: int) -> None:
    x, out = torch.randn(rows, columns, requires_grad=True), torch.zeros(rows, columns)
    before = out._version, x._version
    sums, nothing, tripled = code(out, x, None)
    assert sums is not None and tripled is not None and nothing is None
    assert torch.equal(out, x * 0.5) and torch.equal(tripled, x * 3)
    torch.testing.assert_close(sums, x.sum(1).detach())
    assert not (out.requires_grad or sums.requires_grad or tripled.requires_grad)
    assert out._version > before[0] and x._version == before[1]


def test_later_calls_go_straight_to_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    code = made()
    check(code, 4, 6)
    check(code, 9, 7)

    def dynamo(*_: object) -> object:
        raise AssertionError("by way of dynamo")

    monkeypatch.setattr(code, "_compiled", dynamo)
    check(code, 4, 6)
    check(code, 9, 7)
    assert not code.failed


def test_what_was_written_to_is_no_longer_what_autograd_saved() -> None:
    code = made()
    check(code, 4, 6)
    out, factor = torch.zeros(4, 6), torch.ones(4, 6, requires_grad=True)
    product = (out * factor).sum()
    code(out, torch.randn(4, 6), None)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_an_error_in_a_call_ends_in_the_eager_function(monkeypatch: pytest.MonkeyPatch) -> None:
    code = made()

    def dynamo(*_: object) -> object:
        raise RuntimeError("no compiler any more")

    monkeypatch.setattr(code, "_compiled", dynamo)
    check(code, 5, 5)
    assert code.failed == "RuntimeError: no compiler any more"
