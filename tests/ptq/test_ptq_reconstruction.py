"""Learned rounding: blocks come nearer to the float output, and the codes are those of the weight, everywhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qbench
from qbench.errors import ConfigError
from qbench.fake_quantize import FakeQuantize
from qbench.nn.qat.layer import QatLayer
from qbench.numerics.qparams import QSpec
from qbench.ptq.dropping import dropping, mixed
from qbench.ptq.rounding import (
    LearnedRounding,
    bake,
    inverse_rectified_sigmoid,
    rectified_sigmoid,
    regularizer,
    spans_range,
)
from qbench.qconfig import QConfig
from tests.models import SmallNet, assert_exact, conv_bn, images, randomise_statistics, train

# Neighbouring pixels alike, as in photographs: where inputs are white noise, rounding to nearest is all but the best.
BATCHES = [F.interpolate(images(size=4, seed=seed), 12, mode="bilinear") + 0.5 for seed in (1, 2, 3)]
POWER_OF_TWO = QSpec(bits=4, symmetric=True, axis=0, power_of_two=True)
STEPS = {"steps": 50, "rate": 0.05}


def calibrated(model: nn.Module, qconfig: QConfig | None = None, **options: object) -> nn.Module:
    options = {"weight_bits": 4, **options}
    qconfig = qconfig or qbench.get_qconfig(**options)  # type: ignore[arg-type]
    qat = qbench.prepare_qat(
        qbench.fuse(randomise_statistics(model).train()), qconfig=qconfig, example_inputs=(images(),)
    )
    qbench.ptq.calibrate(qat, BATCHES)
    return qat


def layers(model: nn.Module) -> dict[str, QatLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QatLayer)}


def codes(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.quantized_parameters()[0].codes() for name, layer in layers(model).items()}


def different(first: dict[str, Tensor], second: dict[str, Tensor]) -> int:
    return sum(int((first[name] != second[name]).sum()) for name in first)


def chain() -> nn.Module:
    return nn.Sequential(
        *conv_bn(3, 8), nn.ReLU(), *conv_bn(8, 8, groups=8), nn.ReLU6(), *conv_bn(8, 6, 1),
        nn.ConvTranspose2d(6, 4, 2, groups=2), nn.Flatten(), nn.Linear(676, 5),
    )  # fmt: skip


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, object]]] = {
    "residual": (SmallNet, {}),
    "depthwise, transposed, linear": (chain, {}),
    "per tensor": (chain, {"qconfig": QConfig("academic", weight=QSpec(bits=4, symmetric=True))}),
    "asymmetric": (chain, {"qconfig": QConfig("academic", weight=QSpec(bits=4, axis=0))}),
    "lsq": (chain, {"method": "lsq"}),
    "power of two": (chain, {"qconfig": QConfig("academic", weight=POWER_OF_TWO)}),
}


@pytest.mark.parametrize("name", CASES)
def test_errors_fall_and_the_codes_are_those_of_the_weight(name: str) -> None:
    torch.manual_seed(0)
    make, options = CASES[name]
    model = calibrated(make(), **options)  # type: ignore[arg-type]
    nearest, statistics = codes(model.eval()), {k: v.clone() for k, v in model.named_buffers() if "running" in k}
    model.train()
    report = qbench.ptq.reconstruct(model, BATCHES, **STEPS)  # type: ignore[arg-type]
    assert not report.skipped
    assert [block.path for block in report.blocks] == list(layers(model))
    assert "codes moved" not in str(report)
    assert all(block.after <= block.before for block in report.blocks)
    assert sum(block.after for block in report.blocks) < 0.95 * sum(block.before for block in report.blocks)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, statistics[key]) for key, value in model.named_buffers() if key in statistics)
    learned = codes(model.eval())
    assert different(nearest, learned) == sum(block.flipped for block in report.blocks) > 0
    # Up or down: never further than the next code.
    assert all(int((learned[n].int() - nearest[n].int()).abs().max()) <= 1 for n in learned)
    program = qbench.convert(model, (images(),))
    assert different(learned, {n: layer.parameter_codes().weight for n, layer in layers(model).items()}) == 0
    assert_exact(model, program, images())
    # In training the same weights have the same codes, before a step moves them.
    model.train()
    assert different(learned, codes(model)) == 0


def test_training_goes_on() -> None:
    torch.manual_seed(0)
    model = calibrated(SmallNet())
    qbench.ptq.reconstruct(model, BATCHES, steps=5)
    before = codes(model.eval())
    train(model, images(), steps=3)
    assert different(before, codes(model.eval())) > 0
    assert_exact(model, qbench.convert(model, (images(),)), images())


def test_a_block_of_several_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(*conv_bn(3, 6), nn.ReLU(), *conv_bn(6, 6)), nn.ReLU(), nn.Conv2d(6, 4, 1))
    qat = calibrated(model)
    report = qbench.ptq.reconstruct(qat, BATCHES, blocks=["0"], steps=150, rate=0.02)
    (block,) = report.blocks
    assert block.layers == ("0.0", "0.3")
    assert block.after < block.before
    assert [(skipped.path, skipped.reason[:17]) for skipped in report.skipped] == [("2", "it is in no block")]
    assert "codes flipped" in str(report)
    assert_exact(qat.eval(), qbench.convert(qat, (images(),)), images())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"weight_observer": "mse"}, "searches the range"),
        ({"weight_observer": "power_of_two"}, "searches the range"),
        ({"method": "dorefa"}, "a function of its weight"),
    ],
)
def test_what_cannot_be_learned_is_named_and_stays(options: dict[str, object], reason: str) -> None:
    torch.manual_seed(0)
    model = calibrated(nn.Sequential(nn.Conv2d(3, 4, 3)), **options)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = qbench.ptq.reconstruct(model, BATCHES, steps=3)
    assert not report.blocks
    assert reason in report.skipped[0].reason
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_worse_rounding_is_not_kept() -> None:
    torch.manual_seed(0)
    model = calibrated(nn.Sequential(nn.Conv2d(3, 4, 3)))
    weight = model[0].weight.detach().clone()
    # A wild rate and no regularizer: V is left somewhere.
    report = qbench.ptq.reconstruct(model, BATCHES, steps=1, rate=1e3)
    assert report.blocks[0].refused.startswith("learned rounding has an error")
    assert report.blocks[0].after == report.blocks[0].before
    assert torch.equal(model[0].weight, weight)


def test_the_equations() -> None:
    h = torch.linspace(0.0, 1.0, 11)
    torch.testing.assert_close(rectified_sigmoid(inverse_rectified_sigmoid(h)), h)
    assert rectified_sigmoid(torch.tensor([-50.0, 50.0])).tolist() == [0.0, 1.0]
    v = inverse_rectified_sigmoid(torch.tensor([0.25, 0.5]))
    # 1 − |2h − 1|^β: 1 − 0.5² and 1.
    torch.testing.assert_close(regularizer(v, 2.0), torch.tensor((0.75 + 1.0) / 2))
    assert float(regularizer(torch.tensor([-50.0, 50.0]), 2.0)) == 0.0


def test_rounding_starts_at_the_float_weight() -> None:
    torch.manual_seed(0)
    layer = calibrated(nn.Sequential(*conv_bn(3, 8)))[0].eval()
    grid = layer.quantized_parameters()[0]
    rounding = LearnedRounding(layer)
    folded = grid.folded_float()
    free = ~rounding.fixed
    torch.testing.assert_close(rounding.fake_quantize(folded, grid.qparams)[free], folded[free])
    assert int(rounding.fixed.sum()) >= 8
    assert bool(rounding.fixed[spans_range(folded, grid.qparams)].all())
    assert bake(layer, torch.round(folded / grid.qparams.spread(grid.qparams.scale, folded))) == 0


def test_refused() -> None:
    torch.manual_seed(0)
    model = calibrated(SmallNet())
    for options, said in (
        ({"blocks": ["conv9"]}, "did you mean 'conv"),
        ({"blocks": ["pool"]}, "holds no QAT layer"),
        ({"blocks": ["", "conv1"]}, "lies in block"),
        ({"steps": 0}, "steps=0"),
    ):
        with pytest.raises(ConfigError, match=said):
            qbench.ptq.reconstruct(model, BATCHES, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="0 batches"):
        qbench.ptq.reconstruct(model, [])


class TestDropping:
    def test_each_value_is_one_of_the_two(self) -> None:
        torch.manual_seed(0)
        exact, rounded = torch.randn(1000), torch.arange(1000.0)
        out, flag, index = mixed((exact, True, torch.tensor([1])), (rounded, True, torch.tensor([2])), 0.25)
        assert bool(((out == exact) | (out == rounded)).all()) and flag and index == 2
        assert 200 < int((out == exact).sum()) < 300
        for chance, expected in ((0.0, rounded), (1.0, exact)):
            assert torch.equal(mixed(exact, rounded, chance), expected)

    def test_activations_of_the_block_are_in_float_inside_and_on_their_grids_after(self) -> None:
        model = calibrated(chain()).eval()
        x = BATCHES[0]
        with torch.no_grad():
            quantized = model(x)
            with dropping(model, 1.0):
                exact = model(x)
            for module in model.modules():
                if isinstance(module, FakeQuantize) and not module.stateless:
                    module.fake_quant_enabled = False
            # Without grids of the inputs there is no bias error either: what is left is half a step of each bias.
            assert torch.allclose(exact, model(x), rtol=0, atol=1e-3) and not torch.equal(exact, quantized)
            model.apply(qbench.enable_fake_quant)
            assert torch.equal(model(x), quantized)

    @pytest.mark.parametrize("blocks", [None, ["0"]], ids=["layers", "a block of three"])
    def test_learning_with_it(self, blocks: list[str] | None) -> None:
        torch.manual_seed(0)
        block = nn.Sequential(*conv_bn(3, 8), nn.ReLU(), *conv_bn(8, 8), nn.ReLU(), *conv_bn(8, 4))
        model = calibrated(nn.Sequential(block, nn.ReLU()), activation_bits=4)
        report = qbench.ptq.reconstruct(model, BATCHES, blocks=blocks, drop=0.5, **STEPS)  # type: ignore[arg-type]
        assert len(report.blocks) == (3 if blocks is None else 1)
        assert any(block.after < block.before for block in report.blocks)
        assert not any(module._forward_hooks for module in model.modules())
        assert_exact(model.eval(), qbench.convert(model, (images(),)), images(seed=3))

    @pytest.mark.parametrize("drop", [-0.1, 1.5, float("nan")])
    def test_no_chance(self, drop: float) -> None:
        with pytest.raises(ConfigError, match=r"drop=.* is no chance; drop=0.5"):
            qbench.ptq.reconstruct(calibrated(SmallNet()), BATCHES, drop=drop)
