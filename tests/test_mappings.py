"""The one table of QAT classes and patterns, and patterns of the user's own."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import assert_exact, conv_bn, images, prepared
from torch import Tensor, nn
from torch.nn import functional as F

import qbench
import qbench.nn.intrinsic as nni
import qbench.nn.intrinsic.qat as nniqat
import qbench.nn.qat as nnqat
from qbench import mappings
from qbench.errors import ConfigError, FusionError
from qbench.nn.intrinsic.fused import as_types
from qbench.nn.qat.body import QatModule
from qbench.nn.qat.kinds import BatchNormKind
from qbench.nn.qat.layer import QatLayer

# Models that are not fused leave their BatchNorm in float, and preparation says so.
pytestmark = pytest.mark.filterwarnings("ignore:prepare_qat leaves:qbench.errors.QBenchWarning")


@pytest.fixture(autouse=True)
def own_patterns_only() -> Iterator[None]:
    """Each test starts without registered patterns, and takes its own away."""
    before, mappings._REGISTERED[:] = list(mappings._REGISTERED), []
    yield
    mappings._REGISTERED[:] = before


# What comes with qbench.


@pytest.mark.parametrize("kind", mappings.QAT_CLASSES, ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_every_class_is_importable_and_extends_the_layer_that_it_quantizes(kind: type[QatModule]) -> None:
    module = nniqat if issubclass(kind.float_type, nni.Fused) else nnqat
    assert getattr(module, kind.__name__) is kind
    assert mappings.default_mapping()[kind.float_type] is kind
    if not issubclass(kind, QatLayer):
        assert issubclass(kind, kind.float_type)
        return
    stands_alone = issubclass(kind, BatchNormKind)  # no BatchNorm itself, see there
    assert stands_alone or issubclass(kind, kind.linear_type)
    if issubclass(kind.float_type, nni.Fused):
        assert kind.float_type is getattr(nni, kind.__name__)
        assert kind.float_type in mappings.wrappers()
        parts = [as_types(part) for part in kind.float_type.part_types]
        assert parts[0][0] is kind.linear_type
        has_activation = nn.ReLU in parts[-1]
        assert (kind.activation is not None) == has_activation
        assert (kind.bn_type() is not None) == (stands_alone or len(parts) - has_activation == 2)
        if kind.bn_type() is not None and kind.bn_type() is not kind.linear_type:
            assert [found.__name__.removeprefix("Frozen") for found in parts[1]] == [kind.bn_type().__name__] * 2


def test_each_float_type_has_one_class_and_long_chains_come_first() -> None:
    floats = [kind.float_type for kind in mappings.QAT_CLASSES]
    assert len(set(floats)) == len(floats)
    lengths = [len(wrapper.part_types) for wrapper in mappings.wrappers()]
    assert lengths == sorted(lengths, reverse=True)


# Arguments of modules, in the order of the function's, that are not the defaults.
ARGUMENTS: dict[type[nn.Module], tuple[Any, ...]] = {
    nn.Hardtanh: (-2.0, 3.0),
    nn.GELU: (),
    nn.ELU: (0.7,),
    nn.LeakyReLU: (0.2,),
    nn.AdaptiveAvgPool2d: ((2, 3),),
    nn.AvgPool2d: (3, 2, 1, True, False, 5),
    nn.AdaptiveAvgPool1d: (3,),
    nn.AdaptiveAvgPool3d: ((2, 3, 1),),
    nn.AvgPool1d: (3, 2, 1, True, False),
    nn.AvgPool3d: (3, 2, 1, True, False, 5),
    nn.LPPool1d: (2, 2, 1),
    nn.LPPool2d: (2, 2, 1),
    nn.LocalResponseNorm: (2, 1e-2, 0.5, 2.0),
    nn.Softmax: (-1,),
    nn.Softmin: (-1,),
    nn.LogSoftmax: (-1,),
    nn.CELU: (0.7,),
    nn.GLU: (-2,),
    nn.Softplus: (2.0, 5.0),
    nn.Softshrink: (0.3,),
    nn.Hardshrink: (0.3,),
    nn.Threshold: (0.2, -0.1),
    qbench.nn.Clamp: (-0.5, 1.5),
    qbench.nn.Mean: ((-1, 2), True),
}


def test_the_functions_of_one_tensor_compute_what_the_modules_do() -> None:
    everything = torch.linspace(-4, 8, 144).reshape(1, 4, 6, 6)
    for call, kind in mappings.MODULE_CALLS.items():
        arguments = ARGUMENTS.get(kind, ())
        x = everything[0] if kind.__name__.endswith("1d") else everything
        found = getattr(x.clone(), call)(*arguments) if isinstance(call, str) else call(x.clone(), *arguments)
        assert torch.equal(found, kind(*arguments)(x)), call


@pytest.mark.parametrize("call", mappings.TENSOR_OPS, ids=str)
def test_the_functions_of_two_tensors_compute_what_the_modules_do(call: Any) -> None:
    kind = mappings.TENSOR_OPS[call]
    dims = 3 if call in (torch.bmm, "bmm") else 2
    pairs: list[tuple[Any, Any]] = [tuple(torch.randn(2, *[5] * dims))]
    if kind is not qbench.nn.MatMul:
        pairs.append((torch.randn(50), 0.7))
    if call in (operator.sub, operator.truediv, operator.add, operator.mul):
        pairs.append((0.7, torch.randn(50)))
    for x, y in pairs:
        copied = x.clone() if isinstance(x, Tensor) else x
        found = getattr(copied, call)(y) if isinstance(call, str) else call(copied, y)
        assert torch.equal(found, kind()(x, y))


@pytest.mark.parametrize("call", sorted([*mappings.LIST_OPS, *mappings.NEGATIONS], key=str), ids=str)
def test_lists_and_signs(call: Any) -> None:
    tensors = list(torch.randn(3, 4, 5))
    if call in mappings.NEGATIONS:
        found = tensors[0].neg() if call == "neg" else call(tensors[0])
        assert torch.equal(found, qbench.nn.Mul()(tensors[0], -1))
        return
    for dim in (0, 1, -1):
        assert torch.equal(call(tensors, dim), mappings.LIST_OPS[call](dim)(*tensors))


def test_every_operation_in_place_is_known_as_one() -> None:
    written = {call for call in (*mappings.TENSOR_OPS, *mappings.MODULE_CALLS) if str(call).rstrip("'").endswith("_")}
    assert {call for call in written if isinstance(call, str)} <= mappings.IN_PLACE_CALLS
    assert {*mappings.TENSOR_OPS, *mappings.MODULE_CALLS} >= mappings.IN_PLACE_CALLS


# Patterns of the user's own.


class ConvBnHardswish2d(nni.Fused):
    """Not computed inside a convolution by any target: quantized before the activation, too."""

    part_types = (nn.Conv2d, nn.BatchNorm2d, nn.Hardswish)


class QatConvBnHardswish2d(nniqat.ConvBn2d):
    """Its QAT form."""

    float_type = ConvBnHardswish2d
    activation = nn.Hardswish


class ConvBnMish2d(nni.Fused):
    """A chain of the user's."""

    part_types = (nn.Conv2d, nn.BatchNorm2d, nn.Mish)


class QatConvBnMish2d(nniqat.ConvBn2d):
    """Its QAT form."""

    float_type = ConvBnMish2d
    activation = nn.Mish


PATTERNS = [(QatConvBnHardswish2d, nn.Hardswish, F.hardswish), (QatConvBnMish2d, nn.Mish, F.mish)]


class Net(nn.Module):
    """The chain with the activation as a module and as a function."""

    def __init__(self, activation: type[nn.Module], function: Any) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(3, 8)
        self.conv2, self.bn2 = conv_bn(8, 8, groups=8)
        self.act = activation()
        self.function = function
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv1(x)))
        return self.head(self.function(self.bn2(self.conv2(x))))


@pytest.mark.parametrize(("qat_class", "activation", "function"), PATTERNS, ids=["hardswish", "mish"])
def test_a_pattern_is_fused_trained_and_exact_after_convert(
    qat_class: type[QatLayer], activation: type[nn.Module], function: Any
) -> None:
    assert qbench.register_pattern(qat_class) is qat_class
    model = Net(activation, function)
    fused = qbench.fuse(model)
    assert type(fused.conv1) is type(fused.conv2) is qat_class.float_type
    qat = prepared(model, images())
    assert type(qat.conv1) is type(qat.conv2) is qat_class
    assert qbench.preparation_report(qat).left_in_float == ()
    # No target computes it inside the convolution, so it reads codes.
    assert qat.conv1.pre_activation_quantizer.seen_data
    assert_exact(qat, qbench.convert(qat, (images(),)), images(seed=3))
    restored = qat.conv1.to_float()
    assert type(restored) is qat_class.float_type
    assert torch.equal(restored[0].weight, qat.conv1.weight)


def test_by_hand_and_without_registration() -> None:
    with pytest.raises(FusionError, match="no pattern is"):
        qbench.fuse_modules(Net(nn.Mish, F.mish), ["conv1", "bn1", "act"])
    qbench.register_pattern(QatConvBnMish2d)
    fused = qbench.fuse_modules(Net(nn.Mish, F.mish), ["conv1", "bn1", "act"])
    assert type(fused.conv1) is ConvBnMish2d


def test_a_pattern_is_looked_for_before_shorter_ones_and_others_stay() -> None:
    qbench.register_pattern(QatConvBnMish2d)
    model = nn.Sequential(*conv_bn(3, 4), nn.Mish(), *conv_bn(4, 4), nn.ReLU(), *conv_bn(4, 4))
    fused = qbench.fuse(model)
    assert [type(part) for part in fused if not isinstance(part, nn.Identity)] == [
        ConvBnMish2d,
        nni.ConvBnReLU2d,
        nni.ConvBn2d,
    ]


def test_a_wrapper_whose_class_is_gone_is_left_in_float_and_reported() -> None:
    qbench.register_pattern(QatConvBnMish2d)
    fused = qbench.fuse(Net(nn.Mish, F.mish))
    mappings._REGISTERED.clear()
    qat = qbench.prepare_qat(fused, qconfig=qbench.get_qconfig())
    left = {found.path: found.reason for found in qbench.preparation_report(qat).left_in_float}
    assert set(left) == {"conv1", "conv2"}
    assert "qbench.register_pattern" in left["conv1"]


def test_a_cell_that_is_run_twice_replaces_its_class() -> None:
    for _ in range(2):

        @qbench.register_pattern
        class Again(nniqat.ConvBn2d):
            float_type = ConvBnMish2d
            activation = nn.Mish

    assert list(mappings._REGISTERED) == [Again]


class Overlapping(nni.Fused):
    """One of its chains is that of ConvBnReLU2d."""

    part_types = (nn.Conv2d, nn.BatchNorm2d, (nn.Mish, nn.ReLU))


class QatOverlapping(nniqat.ConvBn2d):
    """Its QAT form."""

    float_type = Overlapping
    activation = nn.Mish


class Another(nnqat.Conv2d):
    """A second class for a type that has one."""

    float_type = nn.Conv2d


class NoParts(nni.Fused):
    """Says no parts."""


class QatNoParts(nniqat.ConvBn2d):
    """Its QAT form."""

    float_type = NoParts


class Inherits(nniqat.ConvBn2d):
    """Says no float type of its own."""


REFUSED = [
    (QatOverlapping, ("ConvBnReLU2d already handles ConvBnReLU2d", "mapping=")),
    (Another, ("Conv2d already handles Conv2d", "mapping={Conv2d: Another}")),
    (QatNoParts, ("NoParts names no part_types", "part_types = (nn.Conv2d")),
    (Inherits, ("Inherits", "its own float_type")),
    (ConvBnMish2d, ("expected a QAT class",)),
    (nn.Conv2d, ("expected a QAT class",)),
    ("ConvBn2d", ("expected a QAT class",)),
]


@pytest.mark.parametrize(("given", "words"), REFUSED, ids=lambda value: getattr(value, "__name__", None))
def test_refused(given: Any, words: tuple[str, ...]) -> None:
    qbench.register_pattern(QatConvBnHardswish2d)
    with pytest.raises(ConfigError) as error:
        qbench.register_pattern(given)
    assert all(word in str(error.value) for word in words), error.value
    assert list(mappings._REGISTERED) == [QatConvBnHardswish2d]


def test_a_refused_class_does_not_take_its_predecessor_away() -> None:
    qbench.register_pattern(QatConvBnMish2d)
    clashing = type("QatConvBnMish2d", (nniqat.ConvBn2d,), {"float_type": Overlapping, "__module__": __name__})
    with pytest.raises(ConfigError):
        qbench.register_pattern(clashing)
    assert list(mappings._REGISTERED) == [QatConvBnMish2d]


class ConvBnBn2d(nni.Fused):
    """A chain that the body does not compute."""

    part_types = (nn.Conv2d, nn.BatchNorm2d, nn.Mish, nn.Hardswish)


class QatConvBnBn2d(nniqat.ConvBn2d):
    """Its QAT form."""

    float_type = ConvBnBn2d
    activation = nn.Mish


class LinearFirst(nni.Fused):
    """A chain of another layer."""

    part_types = (nn.Linear, nn.Mish)


class QatLinearFirst(nniqat.ConvBn2d):
    """A QAT class of a convolution for it."""

    float_type = LinearFirst


@pytest.mark.parametrize(
    ("qat_class", "parts", "words"),
    [
        (QatConvBnBn2d, [*conv_bn(3, 4), nn.Mish(), nn.Hardswish()], ("Mish, Hardswish", "at most an activation")),
        (QatLinearFirst, [nn.Linear(3, 4), nn.Mish()], ("starts with Linear", "Conv2d")),
    ],
    ids=["two activations", "another layer"],
)
def test_a_chain_that_the_class_cannot_compute(
    qat_class: type[QatLayer], parts: list[nn.Module], words: tuple[str, ...]
) -> None:
    qbench.register_pattern(qat_class)
    with pytest.raises(FusionError) as error:
        qbench.prepare_qat(qbench.fuse(nn.Sequential(*parts)), qconfig=qbench.get_qconfig())
    assert all(word in str(error.value) for word in ("0: ", *words)), error.value
