"""Integer evaluation in one call: what it computes, what it leaves alone, what it refuses."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qbench
from qbench.errors import ConfigError, NumericsError
from qbench.evaluation import IntegerModel
from qbench.passes import fuse_qdq


class Net(nn.Module):
    """A residual block, a pool and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.relu(self.branch(x) + x).mean([2, 3]))


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 10, 10)
    model = qbench.prepare_qat(qbench.fuse(Net()), qconfig=qbench.get_qconfig("onnxruntime"), example_inputs=(x,))
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.05)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(8, 3, 10, 10)).square().mean().backward()
        optimizer.step()
    return model, x


def test_it_is_convert_and_the_fusion_pass(trained: tuple[nn.Module, Tensor]) -> None:
    model, x = trained
    deployed = qbench.integer_model(model, (x,))
    program = qbench.convert(model, (x,))
    fuse_qdq(program)
    assert deployed.report.integer and deployed.report.target == "onnxruntime"
    assert torch.equal(deployed(x), program.module()(x))
    assert deployed(x).unique().numel() > 15


@pytest.mark.parametrize("size", [1, 2, 7])
def test_codes_are_those_of_onnx_runtime_at_every_batch(
    trained: tuple[nn.Module, Tensor], size: int, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    from qbench.export.runtimes import run_onnx

    model, _ = trained
    x = torch.randn(size, 3, 10, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qbench.export.to_onnx(qbench.convert(model, (x,)), tmp_path / "model.onnx")
    ((theirs,),) = run_onnx(tmp_path / "model.onnx", [[x.numpy()]], 1)
    # Made from a batch of one, and of another size than it is given.
    ours = qbench.integer_model(model, (torch.randn(1, 3, 10, 10),))(x).numpy()
    assert int((ours != theirs).sum()) == 0 and np.unique(ours).size > 3


def test_targets_have_forms_of_their_own(trained: tuple[nn.Module, Tensor]) -> None:
    model, _ = trained
    x = torch.randn(64, 3, 10, 10)
    forms = {name: qbench.integer_model(model, (x,), target=name) for name in ("onnxruntime", "xnnpack", "tosa")}
    assert [form.report.target for form in forms.values()] == list(forms)
    outputs = [form(x) for form in forms.values()]
    step = float(model.head.output_quantizer.deployed_qparams().scale)
    for output in outputs:
        assert float((output - outputs[0]).abs().max()) <= 2.01 * step


def test_the_model_is_left_alone(trained: tuple[nn.Module, Tensor]) -> None:
    model, x = copy.deepcopy(trained)
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    deployed = qbench.integer_model(model, (x,))
    first = deployed(x)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    assert torch.equal(deployed(x), first)


def test_no_gradient_flows(trained: tuple[nn.Module, Tensor]) -> None:
    model, x = trained
    assert not qbench.integer_model(model, (x,))(x.requires_grad_()).requires_grad
    x.requires_grad_(False)


def test_a_model_that_fixes_its_batch_keeps_it() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.reshape(2, 6))

    x = torch.randn(2, 6)
    model = qbench.prepare_qat(qbench.fuse(Fixed()), qconfig=qbench.get_qconfig(), example_inputs=(x,))
    model.train()(x)
    assert qbench.integer_model(model, (x,))(x).shape == (2, 4)


def test_it_does_not_train(trained: tuple[nn.Module, Tensor]) -> None:
    model, x = trained
    deployed = qbench.integer_model(model, (x,))
    assert isinstance(deployed.eval(), IntegerModel)
    with pytest.raises(ConfigError, match=r"qbench.integer_model\(model, example_inputs\)"):
        deployed.train()


def test_wrong_inputs(trained: tuple[nn.Module, Tensor]) -> None:
    model, x = trained
    with pytest.raises(ConfigError, match=r"integer_model\(model, \(x,\)\)"):
        qbench.integer_model(model, x)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="target neutron has no stated arithmetic"):
        qbench.integer_model(model, (x,), target="neutron")
    unseen = qbench.prepare_qat(qbench.fuse(Net()), qconfig=qbench.get_qconfig(), example_inputs=(x,))
    with pytest.raises(NumericsError, match=r"seen no data|no data"):
        qbench.integer_model(unseen, (x,))
