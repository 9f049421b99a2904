"""Every QAT class of the one mapping: from_float, to_float, what it extends, and what it refuses."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import qbench
import qbench.nn.intrinsic as nni
import qbench.nn.intrinsic.qat as nniqat
from qbench import nn as qnn
from qbench.errors import FusionError, PreparationError
from qbench.mappings import QAT_CLASSES
from qbench.nn import attention as written
from qbench.nn import qat as nnqat
from qbench.nn.intrinsic.fused import as_types
from qbench.nn.qat.attention import PositionBiasModule
from qbench.nn.qat.body import QatModule, QatOp
from qbench.nn.qat.embedding import TableModule
from qbench.nn.qat.kinds import BatchNormKind
from qbench.nn.qat.layer import QatLayer

from .support import batch, in_eval, on_grid, same_bits, trained, with_input

# One way to make each float part, and an input for it; a class with a new part must add it here.
PARTS: dict[type[nn.Module], Callable[[], nn.Module]] = {
    nn.Conv1d: lambda: nn.Conv1d(4, 6, 3, stride=2, groups=2),
    nn.Conv2d: lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2),
    nn.Conv3d: lambda: nn.Conv3d(4, 6, 2),
    nn.ConvTranspose1d: lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2, output_padding=1),
    nn.ConvTranspose2d: lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1),
    nn.ConvTranspose3d: lambda: nn.ConvTranspose3d(4, 6, 2, groups=2, dilation=2),
    nn.Linear: lambda: nn.Linear(4, 6),
    nn.BatchNorm1d: lambda: nn.BatchNorm1d(6, eps=1e-3),
    nn.BatchNorm2d: lambda: nn.BatchNorm2d(6, eps=1e-3),
    nn.BatchNorm3d: lambda: nn.BatchNorm3d(6, eps=1e-3),
    qnn.FrozenBatchNorm1d: lambda: qnn.FrozenBatchNorm1d(6, eps=1e-3),
    qnn.FrozenBatchNorm2d: lambda: qnn.FrozenBatchNorm2d(6, eps=1e-3),
    qnn.FrozenBatchNorm3d: lambda: qnn.FrozenBatchNorm3d(6, eps=1e-3),
    nn.ReLU: nn.ReLU,
    nn.ReLU6: nn.ReLU6,
    **{kind: kind for kind in (qnn.Add, qnn.AddReLU, qnn.Sub, qnn.Mul, qnn.Div, qnn.MatMul)},
    qnn.Cat: lambda: qnn.Cat(1),
    qnn.Stack: lambda: qnn.Stack(2),
    qnn.Mean: lambda: qnn.Mean(1, keepdim=True),
    qnn.Clamp: lambda: qnn.Clamp(-0.7),
    qnn.Interpolate: lambda: qnn.Interpolate(scale_factor=2, mode="bilinear", align_corners=True),
    nn.Upsample: lambda: nn.Upsample((7, 8), mode="bilinear"),
    nn.UpsamplingBilinear2d: lambda: nn.UpsamplingBilinear2d(scale_factor=2),
    qnn.NormalizeLayer: lambda: qnn.NormalizeLayer((5, 5), eps=1e-3),
    qnn.NormalizeGroups: lambda: qnn.NormalizeGroups(2, eps=1e-3),
    nn.AdaptiveAvgPool1d: lambda: nn.AdaptiveAvgPool1d(3),
    nn.AdaptiveAvgPool2d: lambda: nn.AdaptiveAvgPool2d((2, 3)),
    nn.AdaptiveAvgPool3d: lambda: nn.AdaptiveAvgPool3d((2, 3, 1)),
    nn.AvgPool1d: lambda: nn.AvgPool1d(2, stride=1, padding=1),
    nn.AvgPool2d: lambda: nn.AvgPool2d(2, stride=1, padding=1, count_include_pad=False),
    nn.AvgPool3d: lambda: nn.AvgPool3d(2, stride=1),
    nn.LPPool1d: lambda: nn.LPPool1d(2, 2, stride=1),
    nn.LPPool2d: lambda: nn.LPPool2d(2, 2),
    nn.LPPool3d: lambda: nn.LPPool3d(2, 2),
    nn.LayerNorm: lambda: nn.LayerNorm((5, 5)),
    nn.RMSNorm: lambda: nn.RMSNorm((5, 5)),
    nn.GroupNorm: lambda: nn.GroupNorm(2, 4),
    nn.InstanceNorm1d: lambda: nn.InstanceNorm1d(4, affine=True),
    nn.InstanceNorm2d: lambda: nn.InstanceNorm2d(4, affine=True),
    nn.InstanceNorm3d: lambda: nn.InstanceNorm3d(4, affine=True),
    nn.LocalResponseNorm: lambda: nn.LocalResponseNorm(2),
    nn.Embedding: lambda: nn.Embedding(30, 6, padding_idx=2),
    nn.EmbeddingBag: lambda: nn.EmbeddingBag(30, 6, mode="mean"),
    nn.ELU: lambda: nn.ELU(0.7),
    nn.GELU: lambda: nn.GELU("tanh"),
    nn.GLU: lambda: nn.GLU(1),
    nn.Hardshrink: lambda: nn.Hardshrink(0.3),
    nn.Hardtanh: lambda: nn.Hardtanh(-1.5, 0.7),
    nn.LeakyReLU: lambda: nn.LeakyReLU(0.2),
    nn.RReLU: lambda: nn.RReLU(0.2, 0.2),  # one slope: nothing random
    nn.PReLU: lambda: nn.PReLU(4, init=0.3),
    nn.Softmax: lambda: nn.Softmax(1),
    nn.Softmin: lambda: nn.Softmin(1),
    nn.LogSoftmax: lambda: nn.LogSoftmax(1),
    nn.Softshrink: lambda: nn.Softshrink(0.3),
    nn.Threshold: lambda: nn.Threshold(0.2, -0.1),
    written.ScaledLinear: lambda: written.ScaledLinear(4, 6, factor=0.3),
    written.CosineProduct: lambda: written.CosineProduct(nn.Parameter(torch.linspace(1, 2, 4).reshape(4, 1, 1))),
    written.Normalize: written.Normalize,
    written.MaskedSoftmax: written.MaskedSoftmax,
    written.RelativePositionBias: lambda: written.RelativePositionBias(
        nn.Parameter(torch.randn(9, 3)), torch.arange(16) % 9
    ),
    written.ContinuousPositionBias: lambda: written.ContinuousPositionBias(
        torch.randn(9, 2), torch.arange(16) % 9, nn.Linear(2, 5), nn.Linear(5, 3, bias=False)
    ),
    **{
        getattr(nn, name): getattr(nn, name)
        for name in (
            *("CELU", "Hardsigmoid", "Hardswish", "LogSigmoid", "Mish", "SELU", "SiLU", "Sigmoid"),
            *("Softmax2d", "Softplus", "Softsign", "Tanh", "Tanhshrink"),
        )
    },
}
DIMS = {
    **{nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3, nn.Linear: 0, written.ScaledLinear: 0},
    **{nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3},
    **{nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3},
    **{qnn.FrozenBatchNorm1d: 1, qnn.FrozenBatchNorm2d: 2, qnn.FrozenBatchNorm3d: 3},
}


def float_modules(qat: type[QatModule]) -> Iterator[nn.Module]:
    """The float module of a class, once per alternative of its chain."""
    if not issubclass(qat.float_type, nni.Fused):
        yield PARTS[qat.float_type]()
        return
    for kinds in itertools.product(*(as_types(part) for part in qat.float_type.part_types)):
        yield qat.float_type(*(PARTS[kind]() for kind in kinds))


def example(qat: type[QatModule]) -> tuple[Tensor, ...]:
    if issubclass(qat, PositionBiasModule):
        return ()  # computed from parameters alone
    if issubclass(qat, TableModule):
        return (torch.arange(24).reshape(4, 6),)
    if issubclass(qat, QatOp):
        two = (qnn.Add, qnn.Sub, qnn.Mul, qnn.Div, qnn.MatMul, qnn.Cat, written.CosineProduct)
        axes = next((int(end) for end in "13" if qat.__name__.endswith(f"{end}d")), 2)
        made = [batch((2, 4, *[5] * axes), seed=seed) for seed in range(2 if issubclass(qat, two) else 1)]
        return (made[0], made[1].abs() + 1) if issubclass(qat, qnn.Div) else tuple(made)
    return (batch((8, 6 if stands_alone(qat) else 4, *[5] * DIMS[qat.linear_type])),)


def stands_alone(qat: type[QatModule]) -> bool:
    """Whether it is made of a BatchNorm alone: then it derives from none, see `BatchNormKind`."""
    return issubclass(qat, BatchNormKind)


def name(qat: type[QatModule]) -> str:
    return f"{qat.__module__.removeprefix('qbench.nn.').split('.')[0]}.{qat.__name__}"


classes = pytest.mark.parametrize("qat", QAT_CLASSES, ids=name)
layers = pytest.mark.parametrize("qat", [qat for qat in QAT_CLASSES if issubclass(qat, QatLayer)], ids=name)
ops = pytest.mark.parametrize("qat", [qat for qat in QAT_CLASSES if issubclass(qat, QatOp)], ids=name)


class TestTable:
    def test_the_first_issue_is_there(self) -> None:
        public = {nnqat.Conv2d, nnqat.Linear, nnqat.Add, nnqat.AddReLU, nnqat.Cat, nnqat.Mul}
        public |= {nniqat.ConvBn2d, nniqat.ConvBnReLU2d, nniqat.ConvReLU2d, nniqat.LinearReLU}
        assert public <= set(QAT_CLASSES)

    def test_every_wrapper_has_one_qat_class(self) -> None:
        wrappers = {getattr(nni, name) for name in nni.__all__} - {nni.Fused}
        float_types = [qat.float_type for qat in QAT_CLASSES]
        assert wrappers == {kind for kind in float_types if issubclass(kind, nni.Fused)}
        assert len(set(float_types)) == len(float_types)

    def test_every_public_qat_class_is_in_the_mapping(self) -> None:
        bases = {QatModule, QatLayer, QatOp}
        found = {getattr(module, name) for module in (nnqat, nniqat) for name in module.__all__}
        assert {kind for kind in found if isinstance(kind, type) and issubclass(kind, QatModule)} - bases == set(
            QAT_CLASSES
        )

    @classes
    def test_it_is_a_subclass_of_the_torch_layer_it_extends(self, qat: type[QatModule]) -> None:
        first = as_types(qat.float_type.part_types[0])[0] if issubclass(qat.float_type, nni.Fused) else qat.float_type
        assert issubclass(qat, QatModule)
        if stands_alone(qat):
            assert qat.linear_type is first and not issubclass(qat, nn.modules.batchnorm._BatchNorm)
            return
        assert issubclass(qat, first)
        for module in float_modules(qat):
            made = qat.from_float(module, qbench.get_qconfig())
            assert isinstance(made, first)

    @classes
    def test_it_is_public_importable_and_documented(self, qat: type[QatModule]) -> None:
        assert pickle.loads(pickle.dumps(qat)) is qat
        assert qat.__doc__ and qat.__doc__ != QatModule.__doc__
        home = nniqat if issubclass(qat.float_type, nni.Fused) else nnqat
        assert getattr(home, qat.__name__) is qat

    @layers
    def test_it_is_class_data_only(self, qat: type[QatLayer]) -> None:
        assert {key for key in vars(qat) if not key.startswith("__")} <= {"float_type", "activation"} | (
            {"linear_type"} if stands_alone(qat) else set()
        )

    @layers
    def test_bn_type_and_activation_agree_with_the_chain(self, qat: type[QatLayer]) -> None:
        parts = getattr(qat.float_type, "part_types", (qat.float_type,))
        kinds = [as_types(part)[0] for part in parts]
        assert (qat.bn_type() is not None) == any("BatchNorm" in kind.__name__ for kind in kinds)
        assert (qat.activation is not None) == any(issubclass(kind, (nn.ReLU, nn.ReLU6)) for kind in kinds)


class TestRoundTrip:
    @classes
    def test_to_float_of_from_float_gives_the_outputs_bit_for_bit(self, qat: type[QatModule]) -> None:
        for module in float_modules(qat):
            module = trained(module) if issubclass(qat, QatLayer) else module
            inputs = example(qat)
            kept = copy.deepcopy(module)
            back = qat.from_float(module, qbench.get_qconfig()).to_float()
            assert type(back) is type(kept)
            for mode in (True, False):
                assert same_bits(back.train(mode)(*inputs), kept.train(mode)(*inputs))
            assert back.state_dict().keys() == kept.state_dict().keys()
            for key, value in back.state_dict().items():
                assert same_bits(value, kept.state_dict()[key])
            assert repr(back) == repr(kept)

    @classes
    def test_nothing_of_the_qat_form_is_left_behind(self, qat: type[QatModule]) -> None:
        for module in float_modules(qat):
            kept = copy.deepcopy(module)
            back = qat.from_float(module, qbench.get_qconfig()).to_float()
            for ours, theirs in zip(back.modules(), kept.modules(), strict=True):
                assert vars(ours).keys() == vars(theirs).keys()

    @layers
    def test_parameters_are_taken_over_not_copied(self, qat: type[QatLayer]) -> None:
        for module in float_modules(qat):
            parameters = [id(parameter) for parameter in module.parameters()]
            made = qat.from_float(module, qbench.get_qconfig())
            assert [id(parameter) for parameter in made.parameters()] == parameters
            assert [id(parameter) for parameter in made.to_float().parameters()] == parameters

    @layers
    def test_trained_parameters_come_back(self, qat: type[QatLayer]) -> None:
        for module in float_modules(qat):
            layer = with_input(qat.from_float(module, qbench.get_qconfig()), *example(qat))
            layer.train()
            out = layer(*example(qat))
            if out.requires_grad:  # a frozen BatchNorm alone has nothing to train
                (out * torch.randn_like(out)).sum().backward()
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter -= 0.1 * parameter.grad
            back = layer.to_float().eval()
            layer.apply(qbench.disable_fake_quant)
            torch.testing.assert_close(layer.eval()(*example(qat)), back(*example(qat)), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("training", [True, False])
    @classes
    def test_training_mode_is_kept(self, qat: type[QatModule], training: bool) -> None:
        for module in float_modules(qat):
            made = qat.from_float(module.train(training), qbench.get_qconfig())
            assert all(part.training == training for part in made.modules())
            assert all(part.training == training for part in made.to_float().modules())

    def test_to_float_of_a_frozen_layer_leaves_it_frozen(self) -> None:
        layer = nniqat.ConvBn2d.from_float(nni.ConvBn2d(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), qbench.get_qconfig())
        x = batch((2, 3, 5, 5))
        with_input(layer, x).train().apply(qbench.freeze_bn_stats)
        layer.to_float()
        layer(x)
        assert (layer.bn.running_mean == 0).all() and (layer.bn.running_var == 1).all()


class TestQConfig:
    @classes
    def test_that_of_the_module_is_honoured(self, qat: type[QatModule]) -> None:
        module = next(float_modules(qat))
        module.qconfig = qbench.get_qconfig("xnnpack", activation_bits=6)
        made = qat.from_float(module)
        assert made.qconfig is module.qconfig
        assert made.output_quantizer.spec.bits == 6

    @classes
    def test_that_of_the_call_comes_first(self, qat: type[QatModule]) -> None:
        module = next(float_modules(qat))
        module.qconfig = qbench.get_qconfig(activation_bits=6)
        assert qat.from_float(module, qbench.get_qconfig(activation_bits=5)).output_quantizer.spec.bits == 5

    @classes
    @pytest.mark.parametrize("wrong", [None, "onnxruntime", object()], ids=str)
    def test_without_one_it_says_how(self, qat: type[QatModule], wrong: object) -> None:
        module = next(float_modules(qat))
        if wrong is not None:
            module.qconfig = wrong
        with pytest.raises(PreparationError, match=r"set module\.qconfig = qbench\.get_qconfig\(\)"):
            qat.from_float(module)

    @layers
    def test_weight_axis_is_that_of_the_layer(self, qat: type[QatLayer]) -> None:
        made = qat.from_float(next(float_modules(qat)), qbench.get_qconfig())
        transposed = issubclass(qat, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
        assert made.weight_quantizer.spec.axis == (1 if transposed else 0)
        assert made.weight_quantizer.spec.qmin == -127


class TestConstructor:
    """A QAT layer can be written down like the torch layer it extends."""

    @pytest.mark.parametrize(
        "make",
        [
            lambda: nnqat.Conv2d(4, 6, 3, qconfig=qbench.get_qconfig()),
            lambda: nniqat.ConvBn2d(4, 6, 3, bias=False, qconfig=qbench.get_qconfig()),
            lambda: nniqat.ConvBnReLU2d(4, 6, 3, groups=2, qconfig=qbench.get_qconfig()),
            lambda: nniqat.ConvTransposeBnReLU2d(4, 6, 3, groups=2, qconfig=qbench.get_qconfig()),
            lambda: nniqat.LinearReLU(4, 6, qconfig=qbench.get_qconfig()),
            lambda: nniqat.LinearBn1d(4, 6, qconfig=qbench.get_qconfig()),
        ],
    )
    def test_it_works_like_from_float(self, make: Callable[[], QatLayer]) -> None:
        layer = make()
        torch.manual_seed(0)
        inputs = example(type(layer))
        twin = type(layer).from_float(copy.deepcopy(layer).to_float(), layer.qconfig)
        for one in (layer, twin):
            with_input(one.train(), *inputs)
        assert same_bits(layer(*inputs), twin(*inputs))
        assert layer.state_dict().keys() == twin.state_dict().keys()

    def test_operations(self) -> None:
        cat = nnqat.Cat(1, qconfig=qbench.get_qconfig())
        assert cat.dim == 1 and cat.to_float().dim == 1

    def test_qconfig_is_needed(self) -> None:
        with pytest.raises(TypeError, match="qconfig"):
            nnqat.Conv2d(4, 6, 3)  # type: ignore[call-arg]


class TestRefusals:
    @classes
    def test_a_module_of_another_type(self, qat: type[QatModule]) -> None:
        message = rf"{qat.__name__}\.from_float: got Bilinear, expected {qat.float_type.__name__}"
        with pytest.raises(FusionError, match=message):
            qat.from_float(nn.Bilinear(2, 3, 4), qbench.get_qconfig())

    def test_a_subclass_may_compute_something_else(self) -> None:
        class Standardised(nn.Conv2d):
            def forward(self, x: Tensor) -> Tensor:
                return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)

        with pytest.raises(FusionError, match="got Standardised, expected Conv2d"):
            nnqat.Conv2d.from_float(Standardised(3, 4, 3), qbench.get_qconfig())

    @pytest.mark.parametrize(
        ("wrapper", "parts", "message"),
        [
            (nni.ConvBn2d, lambda: (nn.Conv2d(3, 4, 3),), r"ConvBn2d\(Conv2d\): expected ConvBn2d\(Conv2d, Batch"),
            (nni.ConvBn2d, lambda: (nn.BatchNorm2d(4), nn.Conv2d(3, 4, 3)), r"ConvBn2d\(BatchNorm2d, Conv2d\): exp"),
            (nni.ConvBn2d, lambda: (nn.Conv1d(3, 4, 3), nn.BatchNorm2d(4)), r"ConvBn2d\(Conv1d, BatchNorm2d\): exp"),
            (nni.ConvReLU2d, lambda: (nn.Conv2d(3, 4, 3), nn.GELU()), r"expected ConvReLU2d\(Conv2d, ReLU\|ReLU6\|H"),
            (nni.LinearReLU, lambda: (nn.Linear(3, 4), nn.ReLU(), nn.ReLU()), r"LinearReLU\(Linear, ReLU, ReLU\)"),
            (nni.LinearReLU, lambda: (), r"LinearReLU\(\): expected LinearReLU\(Linear, ReLU\|ReLU6\|Hardtanh\)"),
            (
                nni.ConvBn2d,
                lambda: (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
                "no running statistics, so there is nothing to fold; make it with track_running_stats=True",
            ),
            (
                nni.ConvBnReLU2d,
                lambda: (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(5), nn.ReLU()),
                "Conv2d puts out 4 channels, BatchNorm2d has 5; they must be equal",
            ),
            (
                nni.LinearBn1d,
                lambda: (nn.Linear(3, 4), nn.BatchNorm1d(3)),
                "Linear puts out 4 channels, BatchNorm1d has 3; they must be equal",
            ),
        ],
    )  # fmt: skip
    def test_wrappers_check_their_parts(
        self, wrapper: type[nni.Fused], parts: Callable[[], tuple[nn.Module, ...]], message: str
    ) -> None:
        with pytest.raises(FusionError, match=message):
            wrapper(*parts())

    def test_parts_that_were_exchanged_later_are_checked_again(self) -> None:
        module = nni.ConvBn2d(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        module[1] = nn.BatchNorm2d(7)
        with pytest.raises(FusionError, match="puts out 4 channels, BatchNorm2d has 7"):
            nniqat.ConvBn2d.from_float(module, qbench.get_qconfig())

    def test_a_qat_class_on_the_wrong_linear_part(self) -> None:
        class Wrong(nniqat.ConvBn2d):
            float_type = nni.ConvBn1d

        with pytest.raises(FusionError, match="starts with Conv1d, but it computes a Conv2d"):
            Wrong.from_float(nni.ConvBn1d(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)), qbench.get_qconfig())

    def test_a_chain_that_is_too_long(self) -> None:
        class Long(nni.Fused):
            part_types = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Dropout)

        class QatLong(nniqat.ConvBn2d):
            float_type = Long

        module = Long(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout())
        with pytest.raises(FusionError, match="then at most a BatchNorm, then at most an activation"):
            QatLong.from_float(module, qbench.get_qconfig())


    @pytest.mark.parametrize("training", [True, False])
    def test_a_linear_with_batch_norm_on_three_axes(self, training: bool) -> None:
        # The float chain normalises axis 1 there; folding would scale axis 2 and be silently wrong.
        module = nni.LinearBn1d(nn.Linear(7, 5), nn.BatchNorm1d(5))
        x = batch((8, 5, 7))
        layer = with_input(nniqat.LinearBn1d.from_float(module, qbench.get_qconfig()), x).train(training)
        with pytest.raises(FusionError, match=r"input \(8, 5, 7\) has 3 axes.*flatten the input"):
            layer(x)


class TestWrappers:
    @pytest.mark.parametrize("wrapper", [getattr(nni, name) for name in nni.__all__ if name != "Fused"])
    def test_it_computes_what_the_chain_computes_with_the_users_own_modules(self, wrapper: type[nni.Fused]) -> None:
        parts = [PARTS[as_types(part)[0]]() for part in wrapper.part_types]
        module = wrapper(*parts)
        assert all(ours is theirs for ours, theirs in zip(module, parts, strict=True))
        first = as_types(wrapper.part_types[0])[0]
        x = batch((8, 6 if "BatchNorm" in first.__name__ else 4, *[5] * DIMS[first]))
        assert same_bits(module.eval()(x), nn.Sequential(*parts)(x))
        assert pickle.loads(pickle.dumps(wrapper)) is wrapper


@ops
class TestOperations:
    def make(self, qat: type[QatOp]) -> tuple[QatOp, tuple[Tensor, ...]]:
        inputs = example(qat)
        op = qat.from_float(next(float_modules(qat)), qbench.get_qconfig())
        sources = tuple(op.qconfig.make_activation().train() for _ in inputs)
        for source, x in zip(sources, inputs, strict=True):
            source(x)
        op.connect(sources, owned=tuple(range(len(inputs))))
        return op, inputs

    def test_output_is_the_operation_on_grids(self, qat: type[QatOp]) -> None:
        op, inputs = self.make(qat)
        op.train()(*inputs)
        op.eval()
        on_grids = []
        for source, x in zip(op.sources, inputs, strict=True):
            on_grids.append(on_grid(x, source))
        y = next(float_modules(qat))(*on_grids)
        assert torch.equal(op(*inputs), on_grid(y, op.output_quantizer))
        assert len(op(*inputs).unique()) > 20

    def test_gradients_pass_straight_through(self, qat: type[QatOp]) -> None:
        op, inputs = self.make(qat)
        op.train()(*inputs)
        op.apply(qbench.disable_observer)
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = op(*leaves)
        (out * torch.ones_like(out)).sum().backward()
        plain = [
            source(x.detach()).detach().requires_grad_() for source, x in zip(op.sources, inputs, strict=True)
        ]
        y = next(float_modules(qat))(*plain)
        quantizer = op.output_quantizer
        code = torch.round(y.double() / quantizer.scale.double()) + quantizer.zero_point
        y.backward(((code >= -128) & (code <= 127)).float())
        for ours, theirs in zip(leaves, plain, strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)

    def test_copies_keep_their_links(self, qat: type[QatOp]) -> None:
        op, inputs = self.make(qat)
        op.train()(*inputs)
        wanted = op.eval()(*inputs)
        twin = copy.deepcopy(op)
        assert same_bits(twin(*inputs), wanted)
        assert all(a is not b for a, b in zip(twin.sources, op.sources, strict=True))


def test_prints_what_it_is() -> None:
    layer = nniqat.ConvBnReLU2d.from_float(
        nni.ConvBnReLU2d(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU6()), qbench.get_qconfig(bias_bits=16)
    )
    with_input(layer, batch((2, 4, 5, 5)))
    in_eval(layer, batch((2, 4, 5, 5)))
    layer.apply(qbench.freeze_bn_stats)
    text = repr(layer)
    for piece in (
        "ConvBnReLU2d(", "4, 6, kernel_size=(3, 3)", "bn_frozen=True", "(bn): BatchNorm2d(6", "ReLU6()",
        "(weight_quantizer): FakeQuantize(int8 symmetric per channel (axis 0))",
        "(bias_quantizer): BiasQuantizer(int16 at input_weight scale)",
        "(output_quantizer): FakeQuantize(int8 asymmetric per tensor, scale=",
    ):  # fmt: skip
        assert piece in text, text
