"""Fixed BatchNorms: ours, and those of other libraries that are known by their name and tensors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models import assert_exact, images, prepared
from torch import Tensor, nn

import qbench
import qbench.nn as qnn
from qbench._torchvision import import_torchvision
from qbench.nn import intrinsic as nni
from qbench.nn import qat as nnqat
from qbench.nn.frozen import known_types
from qbench.nn.intrinsic import qat as nniqat

from .support import batch, same_bits


def foreign(channels: int) -> nn.Module:
    """A frozen BatchNorm of another library: the same name and the same four tensors, another class."""

    class FrozenBatchNorm2d(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.eps = 1e-3
            for name in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(name, torch.rand(channels) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return (x - self.running_mean.reshape(-1, 1, 1)) * (
                self.weight / (self.running_var + self.eps).sqrt()
            ).reshape(-1, 1, 1) + self.bias.reshape(-1, 1, 1)

    return FrozenBatchNorm2d()


def moved(frozen: nn.Module) -> nn.Module:
    for buffer in frozen.buffers():
        buffer.copy_(torch.rand(buffer.shape) + 0.5)
    return frozen


@pytest.mark.parametrize(
    ("frozen", "plain", "shape"),
    [
        (qnn.FrozenBatchNorm1d, nn.BatchNorm1d, (4, 5)),
        (qnn.FrozenBatchNorm1d, nn.BatchNorm1d, (4, 5, 6)),
        (qnn.FrozenBatchNorm2d, nn.BatchNorm2d, (4, 5, 6, 3)),
        (qnn.FrozenBatchNorm3d, nn.BatchNorm3d, (4, 5, 2, 3, 2)),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_it_is_a_batch_norm_in_eval_in_both_modes(
    frozen: type[nn.Module], plain: type[nn.Module], shape: tuple[int, ...], training: bool
) -> None:
    module, reference = moved(frozen(5, eps=1e-3)).train(training), plain(5, eps=1e-3).eval()
    assert not list(module.parameters())
    reference.load_state_dict({**module.state_dict(), "num_batches_tracked": torch.tensor(3)})
    torch.testing.assert_close(module(batch(shape)), reference(batch(shape)), rtol=1e-5, atol=1e-6)
    back = frozen(5, eps=1e-3)
    back.load_state_dict(reference.state_dict())  # num_batches_tracked has no place in it
    assert same_bits(back(batch(shape)), module(batch(shape)))
    assert "5, eps=0.001" in repr(pickle.loads(pickle.dumps(module)))


def test_another_librarys_is_known_by_name_and_tensors() -> None:
    assert qnn.FrozenBatchNorm2d in known_types(foreign(4))
    assert known_types(nn.BatchNorm2d(4)) == (nn.BatchNorm2d,)

    class FrozenBatchNorm2d(nn.Module):
        """The name alone does not make one."""

    assert known_types(FrozenBatchNorm2d()) == (FrozenBatchNorm2d,)


def test_that_of_torchvision() -> None:
    theirs, ours = import_torchvision().ops.misc.FrozenBatchNorm2d(6), qnn.FrozenBatchNorm2d(6)
    moved(theirs)
    ours.load_state_dict(theirs.state_dict())
    assert same_bits(ours(batch((2, 6, 4, 4))), theirs(batch((2, 6, 4, 4))))
    model = nn.Sequential(nn.Conv2d(3, 6, 3), theirs, nn.ReLU(), nn.MaxPool2d(2), copy.deepcopy(theirs))
    assert type(qbench.fuse(model)[0]) is nni.ConvBnReLU2d
    qat = prepared(model, images())
    assert [type(qat[i]) for i in (0, 4)] == [nniqat.ConvBnReLU2d, nnqat.FrozenBatchNorm2d]
    assert_exact(qat, qbench.convert(qat, (images(),)), images(seed=3))


@pytest.mark.parametrize("make", [lambda: moved(qnn.FrozenBatchNorm2d(6)), lambda: foreign(6)], ids=["ours", "foreign"])
def test_it_always_folds(make: object) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), make(), nn.ReLU6(), nn.ConvTranspose2d(6, 6, 3, groups=2), make())  # type: ignore[operator]
    qat = prepared(copy.deepcopy(model), images())
    assert [type(qat[i]) for i in (0, 3)] == [nniqat.ConvBnReLU2d, nniqat.ConvTransposeBn2d]
    qat.apply(qbench.disable_observer)
    assert same_bits(qat.train()(images()), qat.eval()(images()))  # no statistics of a batch anywhere
    back = qat[0].to_float()
    assert type(back[1]) is type(model[1])
    assert all(same_bits(a, b) for a, b in zip(back[1].buffers(), model[1].buffers(), strict=True))


def test_standing_alone_it_keeps_the_names_of_its_tensors() -> None:
    frozen = moved(qnn.FrozenBatchNorm2d(6))
    qat = nnqat.FrozenBatchNorm2d.from_float(copy.deepcopy(frozen), qbench.get_qconfig())
    assert set(frozen.state_dict()) <= set(qat.state_dict())
    assert not list(qat.parameters())
    back = qat.to_float()
    assert type(back) is qnn.FrozenBatchNorm2d
    assert same_bits(back(batch((2, 6, 4, 4))), frozen(batch((2, 6, 4, 4))))
