"""Every path of training with what people train with: autocast, checkpointing, DDP, gradient accumulation, compile."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qbench
from qbench.nn.qat.layer import QatLayer
from qbench.numerics import saved_codes

Step = Callable[[nn.Module, Tensor], Tensor]

PATHS = {
    "plain": (),
    "low memory": (qbench.enable_low_memory,),
    "fast": (qbench.enable_fast_path,),
    "fast, low memory": (qbench.enable_fast_path, qbench.enable_low_memory),
}
paths = pytest.mark.parametrize("path", PATHS)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.body(x))
        found: Tensor = self.head(x.mean((2, 3)))
        return found


@functools.cache
def _prepared() -> nn.Module:
    torch.manual_seed(0)
    images = (torch.randn(2, 3, 10, 10),)
    return qbench.prepare_qat(qbench.fuse(Net()), qconfig=qbench.get_qconfig(), example_inputs=images).train()


def prepared(path: str) -> nn.Module:
    model = copy.deepcopy(_prepared())
    for switch in PATHS[path]:
        model.apply(switch)
    return model


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(4, 3, 10, 10, generator=generator) for _ in range(count)]


def trained(model: nn.Module, step: Step = lambda model, x: model(x), images: list[Tensor] | None = None) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for x in images or batches():
        optimizer.zero_grad()
        step(model, x).float().square().mean().backward()
        optimizer.step()
    return model


def same_state(ours: nn.Module, theirs: nn.Module) -> bool:
    pairs = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def autocast(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        found: Tensor = model(x)
    return found


def checkpointed(model: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(model, x, use_reentrant=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
def test_low_memory_changes_no_gradient_under_autocast(fast: bool) -> None:
    without, within = ("fast", "fast, low memory") if fast else ("plain", "low memory")
    expected, found = trained(prepared(without), autocast), trained(prepared(within), autocast)
    assert same_state(found, expected)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in found.parameters())


@paths
def test_a_checkpointed_step_has_nearly_the_gradients_of_a_plain_one(path: str) -> None:
    # The recomputation sees running statistics that the forward has moved: its bias errors are others.
    plain, ours = prepared(path), prepared(path)
    for model, step in ((plain, lambda model, x: model(x)), (ours, checkpointed)):
        step(model, batches()[0]).square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), ours.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert (a.grad - b.grad).norm() <= 0.05 * a.grad.norm() + 1e-6, name


@paths
def test_a_model_under_ddp_trains_as_without(path: str, tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        inner = prepared(path)
        trained(nn.parallel.DistributedDataParallel(inner))
    finally:
        torch.distributed.destroy_process_group()
    assert same_state(inner, trained(prepared(path)))


@paths
def test_gradients_accumulate(path: str) -> None:
    model, twice = prepared(path), prepared(path)
    x = batches()[0]
    model(x).square().mean().backward()
    for _ in range(2):
        twice(x).square().mean().backward()
    # The second forward has other ranges and running statistics: the gradient is near to the double, not equal.
    for (name, a), b in zip(model.named_parameters(), twice.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert (2 * a.grad - b.grad).norm() <= 0.2 * b.grad.norm() + 1e-4, name


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo, of its own doing
@pytest.mark.parametrize("path", ["fast", "low memory"])
def test_a_model_that_is_compiled_whole_takes_its_steps_one_by_one(path: str) -> None:
    model = prepared(path)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    expected = trained(prepared("plain"), images=batches(1))
    trained(compiled, images=batches(1))  # type: ignore[arg-type]
    for (name, a), b in zip(expected.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)


def test_low_memory_says_once_where_it_does_nothing(caplog: pytest.LogCaptureFixture) -> None:
    saved_codes.say_once.cache_clear()
    model = prepared("low memory").double()
    with caplog.at_level(logging.INFO, "qbench"):
        for x in batches():
            model(x.double()).sum().backward()
    assert [record.message for record in caplog.records] == [
        "low memory: torch.float64 on cpu is saved as it is; it works for float32 on a CPU"
    ]
    assert any(isinstance(m, QatLayer) for m in model.modules())
