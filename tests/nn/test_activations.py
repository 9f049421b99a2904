"""Activations that stand alone: out of place, on grids of their own, exact after convert; networks that have them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import assert_exact, conv_bn, images, is_q, leaves, op_name, prepared, train
from torch import Tensor, nn
from torch.nn import functional as F

import qbench
import qbench.nn.qat as nnqat
from qbench._torchvision import classification_model
from qbench.mappings import default_mapping

ACTIVATIONS: list[nn.Module] = [
    nn.Hardswish(),
    nn.Hardsigmoid(),
    nn.SiLU(),
    nn.Sigmoid(),
    nn.Tanh(),
    nn.GELU(),
    nn.GELU("tanh"),
    nn.LeakyReLU(0.1),
    nn.ELU(),
    nn.Mish(),
    nn.ReLU6(),
    nn.Hardtanh(-0.5, 0.75),
]
IN_PLACE = [type(module) for module in ACTIVATIONS if hasattr(module, "inplace")]
every = pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)


@every
def test_in_a_chain_both_quantizers_stand_and_convert_is_exact(activation: nn.Module) -> None:
    # A target that fuses ReLU6 fuses it into the wrapper: only behind a pool does it stand alone.
    model = nn.Sequential(*conv_bn(3, 8), nn.AvgPool2d(2), copy.deepcopy(activation), *conv_bn(8, 4), nn.Flatten())
    qat = prepared(model, images(16))
    assert type(qat[3]) is default_mapping()[type(activation)]
    assert qbench.preparation_report(qat).left_in_float == qbench.preparation_report(qat).float_operations == ()
    assert qat[3].sources == (qat[2].output_quantizer,)
    assert qat[4].sources == (qat[3].output_quantizer,)
    program = qbench.convert(qat, (images(),))
    assert_exact(qat, program, images(seed=3))
    # Input, conv, pool, activation, conv.
    assert sum(map(is_q, program.graph.nodes)) == 5
    assert not any(op_name(node).endswith("_") for node in program.graph.nodes)


@pytest.mark.parametrize("kind", IN_PLACE, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("made", ["from_float", "by hand"])
def test_nothing_is_written_to_the_input(kind: type[nn.Module], made: str) -> None:
    qat_class: Any = default_mapping()[kind]
    qconfig = qbench.get_qconfig()
    source = qconfig.make_activation()
    qat = qat_class.from_float(kind(inplace=True), qconfig) if made == "from_float" else qat_class(
        inplace=True, qconfig=qconfig
    )
    qat.connect((source,))
    x = source(images()).requires_grad_()
    before, version = x.detach().clone(), x._version
    qat(x).square().sum().backward()
    assert torch.equal(x, before) and x._version == version
    expected = torch.autograd.grad(kind()(before.requires_grad_()).square().sum(), before)[0]
    assert torch.allclose(x.grad, expected, atol=0.2)  # up to the rounding of the output
    assert qat.to_float().inplace is False


class SharedInput(nn.Module):
    """A convolution whose output a product and, behind a function in float, an in-place activation read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv_bn(3, 8)
        self.gate = nn.Hardsigmoid(inplace=True)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return self.head(y * self.gate(torch.sin(y)))


class Functional(nn.Module):
    """Every way of writing an operation as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.c = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardswish(self.a(x), inplace=True) - F.leaky_relu(self.b(x), 0.1)
        gate = self.c(y.mean([2, 3], keepdim=True)).sigmoid()
        y = F.silu(y * gate)
        return self.fc(y.mean([2, 3]))


def test_functional_operations_are_quantized_and_exact() -> None:
    qat = prepared(Functional(), images(16))
    report = qbench.preparation_report(qat)
    kinds = sorted(found.qat_type for found in report.quantized)
    modules = ["Conv2d"] * 3 + ["Hardswish", "LeakyReLU", "Linear", "Mean", "Mean", "Mul", "SiLU", "Sigmoid", "Sub"]
    assert kinds == sorted(modules)
    assert report.float_operations == report.left_in_float == ()
    assert [found.path for found in report.float_inputs] == ["a", "b"]
    assert_exact(qat, qbench.convert(qat, (images(),)), images(seed=3))


def test_an_activation_on_what_is_computed_in_float_reads_a_float_input_at_its_own_quantizer() -> None:
    qat = prepared(SharedInput(), images(16))
    report = qbench.preparation_report(qat)
    assert [(found.path, found.reason) for found in report.float_inputs if found.path == "gate"] == [
        ("gate", "aten.sin leaves the grid")
    ]
    assert_exact(qat, qbench.convert(qat, (images(),)), images(seed=3))


@pytest.mark.parametrize("call", [nnqat.Sub, nnqat.Mul])
def test_operations_on_two_tensors_read_two_grids(call: type[nnqat.QatOp]) -> None:
    qconfig = qbench.get_qconfig()
    op = call(qconfig=qconfig)
    grids = qconfig.make_activation(), qconfig.make_activation()
    op.connect(grids)
    x, y = (grid(images(seed=seed)) for seed, grid in enumerate(grids))
    out = op(x, y)
    assert out.unique().numel() > 100
    step = float(op.output_quantizer.deployed_qparams().scale)
    assert float((out - op.float_type()(x, y)).abs().max()) <= 0.51 * step


# Every module of these networks is quantized, and only the image arrives in float.
NETWORKS = {
    "mobilenet_v3_large": {"Hardswish": 21, "Hardsigmoid": 8, "Mul": 8, "AdaptiveAvgPool2d": 9},
    "efficientnet_b0": {"SiLU": 49, "Sigmoid": 16, "Mul": 16, "AdaptiveAvgPool2d": 17},
    "regnet_y_400mf": {"Sigmoid": 16, "Mul": 16, "AddReLU": 16},
    "shufflenet_v2_x1_0": {"Cat": 16, "Mean": 1},
    "googlenet": {"Cat": 9, "AdaptiveAvgPool2d": 1},
    "resnet50": {"AddReLU": 16, "AdaptiveAvgPool2d": 1},
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the bias of:qbench.errors.QBenchWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_quantized_whole_and_exact(name: str) -> None:
    torch.manual_seed(0)
    x, held_out = images(8, 96, seed=1), images(8, 96, seed=2)
    qat = qbench.prepare_qat(
        qbench.fuse(classification_model(name, 100)), qconfig=qbench.get_qconfig(), example_inputs=(x,)
    )
    report = qbench.preparation_report(qat)
    assert report.left_in_float == report.float_operations == report.unreached == ()
    assert {found.reason for found in report.float_inputs} == {"an input of the model, or made in float"}
    kinds = [found.qat_type for found in report.quantized]
    assert {kind: kinds.count(kind) for kind in NETWORKS[name]} == NETWORKS[name]
    train(qat, x, steps=2, rate=0.01)
    program = qbench.convert(qat, (held_out,))
    assert_exact(qat, program, held_out)
    assert leaves(program.module()(held_out))[0].unique().numel() >= 25  # of 800 outputs
