"""fuse and fuse_modules: what becomes of a float model, bit for bit, and what is left alone."""

from __future__ import annotations

import copy
import operator
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import (
    Branchy,
    Calls,
    DropsInTraining,
    Gated,
    SmallNet,
    TwoHeads,
    Untraceable,
    conv_bn,
    count,
    evaluate,
    images,
    leaves,
    loose_batch_norms,
    randomise_statistics,
)
from torch import Tensor, nn
from torch.nn import functional as F

import qbench
import qbench.nn.intrinsic as nni
from qbench import mappings
from qbench._torchvision import classification_model, import_torchvision
from qbench.errors import FusionError

# Models that are not fused leave their BatchNorm in float, and preparation says so.
pytestmark = pytest.mark.filterwarnings("ignore:prepare_qat leaves:qbench.errors.QBenchWarning")


def values(model: nn.Module) -> Counter[bytes]:
    """Every parameter and buffer by its bytes, whatever it is called."""
    return Counter(tensor.detach().numpy().tobytes() for tensor in model.state_dict().values())


def notes(fused: nn.Module) -> dict[str, str]:
    """Reasons that `fuse` left for the report of `prepare_qat`."""
    report = qbench.preparation_report(qbench.prepare_qat(fused, qconfig=qbench.get_qconfig()))
    return {left.path: left.reason for left in report.left_in_float if left.kind == "forward"}


def assert_same_outputs(model: nn.Module, fused: nn.Module, *inputs: Any) -> None:
    """Bit for bit. Inputs are copied: some forwards write to them."""
    first, second = (leaves(evaluate(m, *copy.deepcopy(inputs))) for m in (model, fused))
    assert len(first) == len(second) > 0
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Model → wrappers and functional modules that fusion must make; every BatchNorm must end in a wrapper.
TORCHVISION: dict[str, dict[str, int]] = {
    "resnet18": {"ConvBnReLU2d": 9, "ConvBn2d": 11, "AddReLU": 8},
    "resnet50": {"ConvBnReLU2d": 33, "ConvBn2d": 20, "AddReLU": 16},
    "mobilenet_v2": {"ConvBnReLU2d": 35, "ConvBn2d": 17, "Add": 10},
    "googlenet": {"ConvBnReLU2d": 57, "Cat": 9},
    "shufflenet_v2_x0_5": {"ConvBnReLU2d": 37, "ConvBn2d": 19, "Cat": 16, "Mean": 1},
    "mobilenet_v3_small": {"ConvBn2d": 29, "ConvBnReLU2d": 5, "ConvReLU2d": 9, "Mul": 9, "Add": 6},
    "efficientnet_b0": {"ConvBn2d": 49, "Mul": 16, "Add": 9},
}
SLOW = {"googlenet", "shufflenet_v2_x0_5", "mobilenet_v3_small", "efficientnet_b0"}
MODELS = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in TORCHVISION]


@pytest.mark.parametrize("name", MODELS)
def test_torchvision_models_fuse_whole_and_compute_the_same(name: str) -> None:
    model = randomise_statistics(classification_model(name, 10))
    before, kinds = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    fused = qbench.fuse(model)
    assert count(fused) == TORCHVISION[name]
    assert loose_batch_norms(fused) == 0
    assert_same_outputs(model, fused, images(2, 64))
    assert values(fused) == values(model)
    # The user's model is what it was, and shares nothing with the fused one.
    assert [type(module) for module in model.modules()] == kinds
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in fused.parameters()}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [SmallNet, Gated, TwoHeads, DropsInTraining, Untraceable], ids=lambda m: m.__name__)
def test_small_models_compute_the_same_in_both_modes(make: type[nn.Module], training: bool) -> None:
    model = randomise_statistics(make()).train(training)
    fused = qbench.fuse(model)
    assert {module.training for module in fused.modules()} == {training}
    for mode in (True, False, True):
        first, second = [], []
        for tested, found in ((model, first), (fused, second)):
            torch.manual_seed(3)
            found.extend(leaves(tested.train(mode)(images())))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    # The statistics moved alike, too.
    assert values(fused) == values(model)


@pytest.mark.parametrize("roundtrip", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
@pytest.mark.parametrize("make", [SmallNet, Gated, TwoHeads], ids=lambda m: m.__name__)
def test_fused_models_survive_copies(make: type[nn.Module], roundtrip: Callable[[nn.Module], nn.Module]) -> None:
    fused = qbench.fuse(randomise_statistics(make()))
    fused.note = "kept"
    copied = roundtrip(roundtrip(fused))
    assert_same_outputs(fused, copied, images())
    assert count(copied) == count(fused)
    assert copied.note == "kept"
    assert list(copied.state_dict()) == list(fused.state_dict())
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert all(bool(p.any()) for name, p in fused.named_parameters() if name.endswith("weight"))


def test_a_graph_keeps_hooks_attributes_and_modules_that_its_forward_does_not_call() -> None:
    model = SmallNet()
    model.auxiliary = nn.Linear(3, 3)
    model.classes = ["a", "b"]
    seen: list[torch.Size] = []
    model.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    fused = qbench.fuse(model)
    fused(images())
    assert fused.classes == ["a", "b"]
    assert seen == [torch.Size([4, 10])]
    assert isinstance(fused.auxiliary, nn.Linear)
    assert fused.classes is not model.classes


SEQUENTIALS: dict[str, tuple[list[nn.Module], list[type[nn.Module]]]] = {
    "conv bn relu": ([*conv_bn(3, 4), nn.ReLU()], [nni.ConvBnReLU2d, nn.Identity, nn.Identity]),
    "conv bn relu6": ([*conv_bn(3, 4), nn.ReLU6()], [nni.ConvBnReLU2d, nn.Identity, nn.Identity]),
    "conv relu": ([nn.Conv2d(3, 4, 3), nn.ReLU()], [nni.ConvReLU2d, nn.Identity]),
    "conv bn": ([*conv_bn(3, 4)], [nni.ConvBn2d, nn.Identity]),
    "conv bn gelu": ([*conv_bn(3, 4), nn.GELU()], [nni.ConvBn2d, nn.Identity, nn.GELU]),
    "bn conv": ([nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)], [nn.BatchNorm2d, nn.Conv2d]),
    "bn conv bn": ([nn.BatchNorm2d(3), *conv_bn(3, 4)], [nn.BatchNorm2d, nni.ConvBn2d, nn.Identity]),
    "conv pool bn": ([nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.BatchNorm2d(4)], []),
    "linear relu": (
        [nn.Flatten(), nn.Linear(432, 8), nn.ReLU(), nn.Linear(8, 4)],
        [nn.Flatten, nni.LinearReLU, nn.Identity, nn.Linear],
    ),
    "linear bn relu": (
        [nn.Flatten(), nn.Linear(432, 8), nn.BatchNorm1d(8), nn.ReLU()],
        [nn.Flatten, nni.LinearBnReLU1d, nn.Identity, nn.Identity],
    ),
    "transposed": (
        [nn.ConvTranspose2d(3, 4, 2), nn.BatchNorm2d(4), nn.ReLU()],
        [nni.ConvTransposeBnReLU2d, nn.Identity, nn.Identity],
    ),
    "nothing": ([nn.Flatten(), nn.LayerNorm(432)], []),
}


@pytest.mark.parametrize("name", SEQUENTIALS)
def test_any_sequential(name: str) -> None:
    parts, expected = SEQUENTIALS[name]
    model = randomise_statistics(nn.Sequential(*parts))
    fused = qbench.fuse(model)
    assert [type(part) for part in fused] == (expected or [type(part) for part in parts])
    assert type(fused) is nn.Sequential
    assert_same_outputs(model, fused, images())


@pytest.mark.parametrize(
    ("parts", "shape", "wrapper"),
    [
        ([nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU()], (2, 3, 9), nni.ConvBnReLU1d),
        ([nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)], (2, 3, 9), nni.ConvBn1d),
        ([nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4), nn.ReLU()], (2, 3, 5, 5, 5), nni.ConvBnReLU3d),
        ([nn.Conv3d(3, 4, 3), nn.ReLU6()], (2, 3, 5, 5, 5), nni.ConvReLU3d),
    ],
    ids=["1d", "1d without relu", "3d", "3d relu6"],
)
def test_other_dimensions(parts: list[nn.Module], shape: tuple[int, ...], wrapper: type[nn.Module]) -> None:
    model = randomise_statistics(nn.Sequential(*parts))
    fused = qbench.fuse(model)
    assert type(fused[0]) is wrapper
    assert_same_outputs(model, fused, torch.randn(shape))


def _layers(width: int = 3) -> dict[str, nn.Module]:
    conv, bn = conv_bn(3, width)
    return {"conv": conv, "bn": bn, "relu": nn.ReLU(), "other": nn.Conv2d(3, width, 1)}


# A forward, and what count() finds after fusion.
FORWARDS: dict[str, tuple[Callable[..., Any], dict[str, int]]] = {
    "torch.relu": (lambda m, x: torch.relu(m.bn(m.conv(x))), {"ConvBnReLU2d": 1}),
    "x.relu()": (lambda m, x: m.bn(m.conv(x)).relu(), {"ConvBnReLU2d": 1}),
    "x.relu_()": (lambda m, x: m.bn(m.conv(x)).relu_(), {"ConvBnReLU2d": 1}),
    "F.relu(inplace=True)": (lambda m, x: F.relu(m.bn(m.conv(x)), inplace=True), {"ConvBnReLU2d": 1}),
    "F.relu(x, True)": (lambda m, x: F.relu(m.bn(m.conv(x)), True), {"ConvBnReLU2d": 1}),
    "F.relu6": (lambda m, x: F.relu6(m.bn(m.conv(x))), {"ConvBnReLU2d": 1}),
    "x + y": (lambda m, x: m.bn(m.conv(x)) + m.other(x), {"ConvBn2d": 1, "Add": 1}),
    "torch.add": (lambda m, x: torch.add(m.conv(x), m.other(x)), {"Add": 1}),
    "x.add(y)": (lambda m, x: m.conv(x).add(m.other(x)), {"Add": 1}),
    "x.add_(y)": (lambda m, x: m.conv(x).add_(m.other(x)), {"Add": 1}),
    "x += y": (lambda m, x: operator.iadd(m.conv(x), m.other(x)), {"Add": 1}),
    "x + x": (lambda m, x: (lambda y: y + y)(m.conv(x)), {"Add": 1}),
    "relu(x + y)": (lambda m, x: F.relu(m.conv(x) + m.other(x)), {"AddReLU": 1}),
    "ReLU()(x + y)": (lambda m, x: m.relu(m.conv(x) + m.other(x)), {"AddReLU": 1}),
    "x - y": (lambda m, x: m.conv(x) - m.other(x), {"Sub": 1}),
    "torch.sub": (lambda m, x: torch.sub(m.conv(x), m.other(x)), {"Sub": 1}),
    "x.sub(y)": (lambda m, x: m.conv(x).sub(m.other(x)), {"Sub": 1}),
    "x.sub_(y)": (lambda m, x: m.conv(x).sub_(m.other(x)), {"Sub": 1}),
    "x -= y": (lambda m, x: operator.isub(m.conv(x), m.other(x)), {"Sub": 1}),
    "x * y": (lambda m, x: m.conv(x) * m.other(x), {"Mul": 1}),
    "x *= y": (lambda m, x: operator.imul(m.conv(x), m.other(x)), {"Mul": 1}),
    "cat": (lambda m, x: torch.cat([m.conv(x), m.other(x)], 1), {"Cat": 1}),
    "cat dim=": (lambda m, x: torch.cat((m.conv(x), m.other(x)), dim=-1), {"Cat": 1}),
    "concat": (lambda m, x: torch.concat([m.conv(x), m.other(x), x], dim=1), {"Cat": 1}),
    "cat tensors=": (lambda m, x: torch.cat(tensors=[m.conv(x), m.other(x)], dim=1), {"Cat": 1}),
    "cat axis=": (lambda m, x: torch.cat([m.conv(x), m.other(x)], axis=1), {"Cat": 1}),
    "x.mean": (lambda m, x: m.conv(x).mean([2, 3]), {"Mean": 1}),
    "x.mean keepdim": (lambda m, x: m.conv(x).mean((-1, -2), keepdim=True), {"Mean": 1}),
    "torch.mean": (lambda m, x: torch.mean(m.conv(x), dim=1), {"Mean": 1}),
    "mean of everything": (lambda m, x: m.conv(x).mean(), {}),
    "mean in float64": (lambda m, x: m.conv(x).mean([2, 3], dtype=torch.float64), {}),
    "sub alpha": (lambda m, x: torch.sub(m.conv(x), m.other(x), alpha=2), {}),
    # One operand may be a number.
    "x - 1": (lambda m, x: m.conv(x) - 1, {"Sub": 1}),
    "1 - x": (lambda m, x: 1 - m.conv(x), {"Sub": 1}),
    "x + 1": (lambda m, x: m.conv(x) + 1, {"Add": 1}),
    "2 * x": (lambda m, x: 2 * m.conv(x), {"Mul": 1}),
    "relu(x + 1)": (lambda m, x: F.relu(m.conv(x) + 1), {"AddReLU": 1}),
    "x / 3": (lambda m, x: m.conv(x) / 3, {"Div": 1}),
    "x / y": (lambda m, x: m.conv(x) / (m.other(x).abs() + 1), {"Div": 1, "Add": 1}),
    "-x": (lambda m, x: -m.conv(x), {"Mul": 1}),
    "x.div_(2)": (lambda m, x: m.conv(x).div_(2), {"Div": 1}),
    "x @ y": (lambda m, x: m.conv(x) @ m.other(x).transpose(-1, -2), {"MatMul": 1}),
    "x * parameter": (lambda m, x: m.conv(x) * m.other.bias.reshape(-1, 1, 1), {"Mul": 1}),
    "x + a number from sizes": (lambda m, x: m.conv(x) + x.shape[2] // 2, {"Add": 1}),
    "stack": (lambda m, x: torch.stack([m.conv(x), m.other(x)], 1), {"Stack": 1}),
    "clamp": (lambda m, x: m.conv(x).clamp(-1, max=0.5), {"Clamp": 1}),
    "clamp(min, max)": (lambda m, x: m.conv(x).clamp(-1, 0.5), {"Clamp": 1}),
    "bilinear": (lambda m, x: F.interpolate(m.conv(x), scale_factor=2, mode="bilinear"), {"Interpolate": 1}),
    "bilinear to a size": (
        lambda m, x: F.interpolate(m.conv(x), size=x.shape[-2:], mode="bilinear", align_corners=True),
        {"Interpolate": 1},
    ),
    "nearest": (lambda m, x: F.interpolate(m.conv(x), scale_factor=2), {}),
    "area": (lambda m, x: F.interpolate(m.conv(x), (5, 4), None, "area"), {"Interpolate": 1}),
    "layer norm": (lambda m, x: F.layer_norm(m.conv(x), (12,), eps=1e-2), {"NormalizeLayer": 1}),
    "group norm": (lambda m, x: F.group_norm(m.conv(x), 3, m.other.bias), {"NormalizeGroups": 1}),
    "x * True": (lambda m, x: m.conv(x) * True, {}),
    "dim of a node": (lambda m, x: m.conv(x).softmax(x.dim() - 1), {}),
    "add alpha": (lambda m, x: torch.add(m.conv(x), m.other(x), alpha=2), {}),
    # The BatchNorm does not fold: another user reads what is before it.
    "conv with two users": (lambda m, x: (lambda y: m.bn(y) + y)(m.conv(x)), {"Add": 1}),
    "bn with two users": (lambda m, x: (lambda y: m.relu(y) + y)(m.bn(m.conv(x))), {"ConvBn2d": 1, "Add": 1}),
    "conv called twice": (lambda m, x: m.bn(m.conv(x)) + m.conv(x), {"Add": 1}),
    # One ReLU object behind two layers: each gets its own.
    "reused relu": (
        lambda m, x: m.relu(m.bn(m.conv(x))) + m.relu(m.other(x)),
        {"ConvBnReLU2d": 1, "ConvReLU2d": 1, "Add": 1},
    ),
    "relu twice in a row": (lambda m, x: m.relu(m.relu(m.conv(x))), {"ConvReLU2d": 1}),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_forwards(name: str) -> None:
    call, expected = FORWARDS[name]
    model = randomise_statistics(Calls(call, **_layers()))
    fused = qbench.fuse(model)
    assert count(fused) == expected
    assert_same_outputs(model, fused, images())


# Calls of activations that stand alone, and what they become: a module of PyTorch's own, with the call's arguments.
ACTIVATIONS: dict[str, tuple[Callable[..., Any], nn.Module | None]] = {
    "F.hardswish": (lambda m, x: F.hardswish(m.conv(x)), nn.Hardswish()),
    "F.hardswish in place": (lambda m, x: F.hardswish(m.conv(x), inplace=True), nn.Hardswish(inplace=True)),
    "F.silu(x, True)": (lambda m, x: F.silu(m.conv(x), True), nn.SiLU(inplace=True)),
    "F.hardsigmoid": (lambda m, x: F.hardsigmoid(m.conv(x)), nn.Hardsigmoid()),
    "x.sigmoid": (lambda m, x: m.conv(x).sigmoid(), nn.Sigmoid()),
    "x.sigmoid_": (lambda m, x: m.conv(x).sigmoid_(), nn.Sigmoid()),
    "torch.tanh": (lambda m, x: torch.tanh(m.conv(x)), nn.Tanh()),
    "F.gelu": (lambda m, x: F.gelu(m.conv(x)), nn.GELU()),
    "F.gelu tanh": (lambda m, x: F.gelu(m.conv(x), approximate="tanh"), nn.GELU("tanh")),
    "F.leaky_relu": (lambda m, x: F.leaky_relu(m.conv(x), 0.2), nn.LeakyReLU(0.2)),
    "F.leaky_relu slope=": (lambda m, x: F.leaky_relu(m.conv(x), negative_slope=0.3), nn.LeakyReLU(0.3)),
    "F.hardtanh": (lambda m, x: F.hardtanh(m.conv(x), -0.5, 0.5), nn.Hardtanh(-0.5, 0.5)),
    "F.relu6 of a sum": (lambda m, x: F.relu6(m.conv(x) + m.other(x)), nn.ReLU6()),
    # It keeps the grid of its input, so it stays a call.
    "F.relu of the input": (lambda m, x: m.conv(F.relu(x)), None),
    # Somebody else reads what is written to, or the call has an argument that the module does not have.
    "in place, read later": (lambda m, x: (lambda y: (F.silu(y, inplace=True), y)[1])(m.conv(x)), None),
    "in place on the input": (lambda m, x: m.conv(torch.sigmoid_(x)), None),
    "out=": (lambda m, x: torch.sigmoid(m.conv(x), out=m.other(x)), None),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_that_stand_alone_become_modules(name: str) -> None:
    call, expected = ACTIVATIONS[name]
    model = Calls(call, **_layers())
    fused = qbench.fuse(model)
    made = [module for path, module in fused.named_modules() if path and path not in ("bn", "relu")]
    activations = [repr(module) for module in made if type(module).__module__ == "torch.nn.modules.activation"]
    assert activations == ([] if expected is None else [repr(expected)])
    assert_same_outputs(model, fused, images())


def _reads_what_silu_wrote(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    z = m.silu(y)
    return y + m.other(z)


def test_a_tensor_that_a_module_writes_to_is_read_from_the_module() -> None:
    """The QAT form of the module does not write, so the other readers must not rely on it."""
    model = Calls(_reads_what_silu_wrote, conv=nn.Conv2d(3, 4, 1), other=nn.Conv2d(4, 4, 1), silu=nn.SiLU(inplace=True))
    fused = qbench.fuse(model)
    assert_same_outputs(model, fused, images())
    fused.silu.inplace = False
    assert_same_outputs(model, fused, images())


def test_functions_of_one_tensor_become_modules() -> None:
    model = Calls(lambda m, x: F.avg_pool2d(F.adaptive_avg_pool2d(m.conv(x), (4, 4)), 2, stride=2), **_layers())
    fused = qbench.fuse(model)
    kinds = Counter(type(module) for module in fused.modules())
    assert (kinds[nn.AdaptiveAvgPool2d], kinds[nn.AvgPool2d]) == (1, 1)
    assert_same_outputs(model, fused, images())


def test_a_pool_whose_size_follows_from_a_tensor_stays_a_function() -> None:
    model = Calls(lambda m, x: F.avg_pool2d(m.conv(x), x.size(2)) + m.other(x), **_layers())
    fused = qbench.fuse(model)
    assert not any(isinstance(module, nn.AvgPool2d) for module in fused.modules())
    assert_same_outputs(model, fused, images())


# Numbers computed from sizes are added and multiplied, too; none of these is an operation on tensors.
SHAPES: dict[str, Callable[..., Any]] = {
    "x.size(0) + 1": lambda m, x: m.conv(x).new_zeros(x.size(0) + 1),
    "x.size(0) + x.size(1)": lambda m, x: x.new_zeros(x.size(0) + x.size(1)),
    "shape": lambda m, x: (lambda b, c, h, w: m.conv(x).reshape(b * c, h * w))(*(x.shape[i] for i in range(4))),
    "shape[2] * shape[3]": lambda m, x: m.conv(x).reshape(-1, x.shape[2] * x.shape[3]),
    "size()[2] * size()[3]": lambda m, x: m.conv(x).reshape(-1, x.size()[2] * x.size()[3]),
    "numel() * dim()": lambda m, x: x.new_zeros(x.numel() * x.dim()),
    "ndim + ndim": lambda m, x: x.new_zeros(x.ndim + x.ndim),
    "floor divisions": lambda m, x: x.new_zeros(x.size(2) // 2 + x.size(3) // 2),
    "remainders": lambda m, x: x.new_zeros(x.size(2) % 5 + x.size(3) % 5),
    "negatives": lambda m, x: x.new_zeros(-(-x.size(2) + -x.size(3))),
    "powers": lambda m, x: x.new_zeros(x.size(0) ** 2 + x.size(1) ** 2),
    "strides": lambda m, x: x.new_zeros(x.stride(2) + x.stride(3)),
    "sizes of sizes": lambda m, x: x.new_zeros((x.size(0) + x.size(1)) * (x.size(0) + x.size(1))),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shape_arithmetic_never_becomes_a_module(name: str) -> None:
    model = Calls(SHAPES[name], **_layers())
    fused = qbench.fuse(model)
    assert not count(fused)
    assert_same_outputs(model, fused, images())


def _iadd_read_later(m: Any, x: Tensor) -> Tensor:
    a = m.conv(x)
    b = operator.iadd(a, m.other(x))
    return a - 2 * b


def _iadd_of_a_statement(m: Any, x: Tensor) -> Tensor:
    a = m.conv(x)
    same = a
    a += m.other(x)
    return same * 2 - a


def _iadd_seen_through_a_view(m: Any, x: Tensor) -> Tensor:
    a = m.conv(x)
    view = a.flatten(1)
    a += m.other(x)
    return view - 1


def _iadd_to_a_view(m: Any, x: Tensor) -> Tensor:
    a = m.conv(x)
    half = a[:, :2]
    half += m.other(x)[:, :2]
    return a - 1


def _iadd_to_the_input(m: Any, x: Tensor) -> Tensor:
    x += m.other(x)
    return m.conv(x)


def _iadd_to_a_view_of_the_input(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    view = x.flatten(2)
    view += m.other(x).flatten(2)
    return m.conv(x), view


def _iadd_through_a_module(m: Any, x: Tensor) -> Tensor:
    a = m.conv(x)
    b = m.same(a)
    b += m.other(x)
    return a - 1


def _iadd_to_a_chunk(m: Any, x: Tensor) -> Tensor:
    a = m.conv(x)
    first = torch.chunk(a, 3, 1)[0]
    first += m.other(x)[:, :1]
    return a - 1


@pytest.mark.parametrize(
    "call",
    [
        _iadd_read_later,
        _iadd_of_a_statement,
        _iadd_seen_through_a_view,
        _iadd_to_a_view,
        _iadd_to_the_input,
        _iadd_to_a_view_of_the_input,
        _iadd_through_a_module,
        _iadd_to_a_chunk,
    ],
    ids=lambda call: call.__name__,
)
def test_a_write_that_somebody_else_reads_is_left_alone(call: Callable[..., Any]) -> None:
    model = Calls(call, same=nn.Identity(), **_layers())
    fused = qbench.fuse(model)
    assert "Add" not in count(fused)
    assert_same_outputs(model, fused, images())
    inputs = images(), images()
    evaluate(model, inputs[0])
    evaluate(fused, inputs[1])
    assert torch.equal(*inputs)  # what the caller sees of its tensor is the same, too


def test_what_cannot_be_traced_is_noted_and_its_children_are_fused() -> None:
    model = Untraceable()
    fused = qbench.fuse(model)
    assert type(fused) is Untraceable
    assert type(fused.body[0]) is nni.ConvBnReLU2d
    (reason,) = notes(fused).values()
    assert reason.startswith("its forward cannot be traced")


def test_functional_dropout_follows_the_mode_of_the_graph() -> None:
    """A plain trace would freeze it; the convolution, its BatchNorm, the ReLU and the sum are found all the same."""
    model = DropsInTraining()
    for start in (True, False):
        fused = qbench.fuse(model.train(start))
        assert count(fused) == {"ConvBnReLU2d": 1, "Add": 1} and not notes(fused)
        for roundtrip in (lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
            again = roundtrip(fused)
            assert_same_outputs(model, again, images())
            for training in (True, False):
                torch.manual_seed(5)
                expected = copy.deepcopy(model).train(training)(images(16))
                torch.manual_seed(5)
                got = copy.deepcopy(again).train(training)(images(16))
                assert torch.equal(got, expected), training


@pytest.mark.parametrize(
    ("forward", "kept"),
    [
        (lambda m, x: F.dropout(m.conv(x), training=not m.training) + x, False),
        (lambda m, x: F.dropout(m.conv(x), p=0.3 if m.training else 0.1, training=True) + x, False),
        (lambda m, x: (m.conv(x) + x if m.training else m.conv(x) + x + x), True),
        (lambda m, x: (torch.sub if m.training else torch.add)(m.conv(x), x), True),
        (lambda m, x: m.conv(x).add(x, alpha=2 if m.training else 1) + x, True),
    ],
    ids=["inverted", "two probabilities", "more in training", "another function", "a method's constant"],
)
def test_what_differs_between_modes(forward: Callable[..., Any], kept: bool) -> None:
    model = Calls(forward, conv=nn.Conv2d(3, 3, 3, padding=1))
    fused = qbench.fuse(model)
    assert (type(fused) is Calls) == kept and ("Add" in count(fused)) != kept
    assert ["differs between training and eval" in note for note in notes(fused).values()] == [True] * kept
    for training in (True, False):
        torch.manual_seed(5)
        expected = model.train(training)(images(16))
        torch.manual_seed(5)
        assert torch.equal(fused.train(training)(images(16)), expected), training


class NormThenAct(nn.BatchNorm2d):
    """As timm writes it: one module, BatchNorm and activation."""

    def __init__(self, features: int, act: nn.Module, drop: nn.Module | None = None) -> None:
        super().__init__(features)
        self.drop, self.act = drop or nn.Identity(), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class ActThenNorm(NormThenAct):
    """The same attributes in another order."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.BatchNorm2d.forward(self, self.act(x))


@pytest.mark.parametrize(
    ("norm", "expected", "noted"),
    [
        (NormThenAct(4, nn.ReLU(inplace=True)), {"ConvBnReLU2d": 1}, False),
        (NormThenAct(4, nn.Identity()), {"ConvBn2d": 1}, False),
        (NormThenAct(4, nn.SiLU()), {"ConvBn2d": 1}, False),
        (NormThenAct(4, nn.ReLU(), nn.Dropout2d(0.5)), {}, True),
        (ActThenNorm(4, nn.Tanh()), {}, True),
    ],
    ids=["relu", "none", "silu", "dropout between", "other order"],
)
def test_a_batch_norm_with_an_activation_inside(norm: nn.Module, expected: dict[str, int], noted: bool) -> None:
    model = randomise_statistics(Calls(lambda m, x: m.norm(m.conv(x)), conv=nn.Conv2d(3, 4, 3), norm=norm))
    fused = qbench.fuse(model)
    wrappers = {name: n for name, n in count(fused).items() if name.startswith("Conv")}
    assert wrappers == expected
    assert [note for note in notes(fused) if note == "norm"] == ["norm"] * noted
    assert_same_outputs(model, fused, images())
    torch.manual_seed(3)
    wanted = model.train()(images(16))
    torch.manual_seed(3)
    assert torch.equal(fused.train()(images(16)), wanted)


def test_a_sum_into_what_a_product_made_is_a_module() -> None:
    """A residual block with a scale per channel, as in ConvNeXt: nobody else reads what is written to."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.drop(m.scale * m.conv(x))
        y += x
        return y

    model = Calls(forward, conv=nn.Conv2d(3, 3, 1), drop=nn.Dropout(0.1))
    model.scale = nn.Parameter(torch.rand(3, 1, 1))
    fused = qbench.fuse(model)
    assert count(fused) == {"Mul": 1, "Add": 1}
    assert_same_outputs(model, fused, images())


def test_stochastic_depth_stays_python() -> None:
    depth = import_torchvision().ops.StochasticDepth
    model = Calls(lambda m, x: m.drop(m.bn(m.conv(x))) + x, **_layers(), drop=depth(0.5, "row"))
    fused = qbench.fuse(model)
    assert type(fused.drop) is depth
    assert count(fused) == {"ConvBn2d": 1, "Add": 1}
    torch.manual_seed(5)
    expected = model.train()(images(16))
    torch.manual_seed(5)
    assert torch.equal(fused.train()(images(16)), expected)
    assert_same_outputs(model, fused, images())


class OwnForward(nn.Conv2d):
    """Computes something else than a convolution."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class OwnBatchNorm(nn.BatchNorm2d):
    """Might compute anything."""


@pytest.mark.parametrize(
    "parts",
    [[OwnForward(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()], [nn.Conv2d(3, 4, 3), OwnBatchNorm(4)]],
    ids=["conv", "batch norm"],
)
def test_subclasses_are_not_fused(parts: list[nn.Module]) -> None:
    model = randomise_statistics(nn.Sequential(*parts))
    fused = qbench.fuse(model)
    # A BatchNorm behind a layer that is not known may still take the ReLU.
    assert set(count(fused)) <= {"BnReLU2d"}
    assert type(fused[0]) is type(parts[0])
    assert_same_outputs(model, fused, images())


def test_a_module_that_is_registered_twice_is_not_fused_and_noted() -> None:
    model = SmallNet()
    model.again = model.conv2
    fused = qbench.fuse(model)
    assert fused.again is fused.conv2
    assert type(fused.conv2) is nn.Conv2d
    assert "more than once" in notes(fused)[""]
    assert_same_outputs(model, fused, images())


def test_a_fused_model_is_fused_again_without_effect() -> None:
    fused = qbench.fuse(SmallNet())
    again = qbench.fuse(fused)
    assert count(again) == count(fused)
    assert list(again.state_dict()) == list(fused.state_dict())
    assert_same_outputs(fused, again, images())


@pytest.mark.parametrize(
    ("bn", "words"),
    [
        (nn.BatchNorm2d(8, track_running_stats=False), ("running statistics", "track_running_stats=True")),
        (nn.BatchNorm2d(16), ("puts out 8 channels", "has 16")),
    ],
    ids=["no statistics", "channels"],
)
def test_a_batch_norm_that_cannot_be_folded(bn: nn.Module, words: tuple[str, ...]) -> None:
    model = nn.Sequential()
    model.add_module("block", nn.Sequential(nn.Conv2d(3, 8, 3), bn, nn.ReLU()))
    with pytest.raises(FusionError, match=r"block\.0") as by_fuse:
        qbench.fuse(model)
    with pytest.raises(FusionError, match=r"block\.0") as by_hand:
        qbench.fuse_modules(model, ["block.0", "block.1"])
    for error in (by_fuse, by_hand):
        assert all(word in str(error.value) for word in words)


def test_example_inputs_are_compared_in_eval_and_the_modes_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomise_statistics(TwoHeads()).train()
    model.left.eval()
    before = [module.training for module in model.modules()]
    fused = qbench.fuse(model, example_inputs=(images(),))
    assert [module.training for module in model.modules()] == before
    assert fused.right.training
    assert not fused.left.training
    # A faulty entry of the table is found by it.
    monkeypatch.setitem(mappings.TENSOR_OPS, operator.add, qbench.nn.Mul)
    with pytest.raises(FusionError, match="changed the output"):
        qbench.fuse(Calls(FORWARDS["x + y"][0], **_layers()), example_inputs=(images(),))


def test_fuse_takes_a_module() -> None:
    with pytest.raises(FusionError, match=r"got function, expected a torch\.nn\.Module"):
        qbench.fuse(lambda x: x)


# By hand.


class Eager(Branchy):
    """Control flow that no tracer follows."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.head = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())

    def forward(self, x: Tensor, cond: bool = True) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x))) if cond else self.bn2(self.conv2(x))
        while y.shape[-1] > 10:
            y = y[..., 1:-1, 1:-1]
        return self.head(self.conv3(y))


def test_fuse_modules_by_hand() -> None:
    model = randomise_statistics(Eager()).eval()
    kinds = [type(module) for module in model.modules()]
    chains = [["conv1", "bn1", "relu"], ["conv2", "bn2"], ["head.0", "head.1"]]
    fused = qbench.fuse_modules(model, chains)
    assert type(fused) is Eager
    assert count(fused) == {"ConvBnReLU2d": 1, "ConvBn2d": 1, "ConvReLU2d": 1}
    assert [type(m) for m in (fused.bn1, fused.relu, fused.bn2, fused.head[1])] == [nn.Identity] * 4
    for cond in (True, False):
        assert_same_outputs(model, fused, images(), cond)
    assert values(fused) == values(model)
    assert [type(module) for module in model.modules()] == kinds


def test_fuse_modules_takes_one_chain_and_changes_the_model_itself_on_request() -> None:
    model = Eager()
    assert qbench.fuse_modules(model, ["conv1", "bn1", "relu"], inplace=True) is model
    assert type(model.conv1) is nni.ConvBnReLU2d
    copied = qbench.fuse_modules(model, [])
    assert copied is not model
    assert count(copied) == count(model)


@pytest.mark.parametrize(
    ("chain", "words"),
    [
        (["conv1", "bn_1"], ("no module 'bn_1'", "'bn1'")),
        (["body.conv1", "bn1"], ("no module 'body.conv1'", "'conv1'")),
        (["nowhere", "bn1"], ("no module 'nowhere'",)),
        (["conv1", "relu", "bn1"], ("no pattern is (Conv2d, ReLU, BatchNorm2d)", "d|FrozenBatchNorm2d, ReLU|ReLU6")),
        (["bn1", "conv1"], ("no pattern is (BatchNorm2d, Conv2d)", "register_pattern")),
        (["conv1"], ("no pattern is (Conv2d)",)),
    ],
    ids=["near name", "near path", "no near name", "order", "no such start", "one part"],
)
def test_fuse_modules_refuses(chain: list[str], words: tuple[str, ...]) -> None:
    model = Eager()
    with pytest.raises(FusionError) as error:
        qbench.fuse_modules(model, chain, inplace=True)
    assert all(word in str(error.value) for word in words), error.value
    assert not count(model)


class Dense(nn.Module):
    """Each layer reads a list of what all layers before it put out, as in DenseNet."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        convs = (nn.Conv2d(n, 4, 1) for n in (4, 8))
        self.layers = nn.ModuleList(Calls(lambda m, xs: m.conv(torch.cat(xs, 1)), conv=conv) for conv in convs)

    def forward(self, x: Tensor) -> Tensor:
        found = [self.first(x)]
        for layer in self.layers:
            found.append(layer(found))
        return torch.cat(found, 1)


def test_lists_of_tensors_that_a_forward_is_given_are_joined_by_a_module() -> None:
    model, x = Dense(), images()
    fused = qbench.fuse(model)
    assert count(fused) == {"Cat": 3}
    assert_same_outputs(model, fused, x)
    prepared = qbench.prepare_qat(fused, qconfig=qbench.get_qconfig(), example_inputs=(x,))
    coverage = qbench.quantization_coverage(prepared)
    assert coverage.float_operations == () and coverage.linked_layers == 2
    for _ in range(2):
        prepared.train()(x)
    program = qbench.convert(prepared.eval(), (x,))
    assert torch.equal(program.module()(x), prepared(x))
    assert sum(node.target is torch.ops.aten.cat.default for node in program.graph.nodes) == 3
