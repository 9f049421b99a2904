"""prepare_by_target: fuse and prepare in one call, with overrides in terms of the float model."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qbench
from qbench import Override
from qbench.errors import ConfigError, LinkError, QBenchWarning
from qbench.preparation import quantized_modules
from tests.models import SmallNet, TwoHeads, images


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.act = nn.Hardswish()
        self.last = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.last(self.act(self.bn(self.conv(x)))) + x)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def prepare(model: nn.Module, *overrides: Override, target: str = "onnxruntime", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return qbench.prepare_by_target(model, target, example_inputs=(images(),), overrides=overrides, **options)


def widths(model: nn.Module) -> dict[str, tuple[int | None, int | None]]:
    """Bits of the weight and of the output of every QAT module, by path."""
    found = {}
    for path, module in quantized_modules(model):
        weight = getattr(module, "weight_quantizer", None)
        output = module.output_quantizer
        found[path] = (weight and weight.spec.bits, output and output.spec.bits)
    return found


PLAIN = {
    "stem": (8, 8), "blocks.0.conv": (8, 8), "blocks.0.act": (None, 8), "blocks.0.last.0": (8, 8),
    "blocks.0.add": (None, 8), "blocks.1.conv": (8, 8), "blocks.1.act": (None, 8), "blocks.1.last.0": (8, 8),
    "blocks.1.add": (None, 8), "head": (8, 8), "mean": (None, 8),
}  # fmt: skip
W4 = (4, 8)


def hits(model: nn.Module) -> list[tuple[str, tuple[str, ...]]]:
    return [(applied.rule, applied.modules) for applied in qbench.preparation_report(model).overrides]


def test_without_overrides_it_is_fuse_and_prepare() -> None:
    model = Nested()
    one, two = prepare(model), qbench.fuse(model)
    two = qbench.prepare_qat(two, qconfig=qbench.get_qconfig(), example_inputs=(images(),))
    assert widths(one) == widths(two) == PLAIN
    assert list(one.state_dict()) == list(two.state_dict())
    assert str(qbench.preparation_report(one)) == str(qbench.preparation_report(two))
    x = images(seed=3)
    assert torch.equal(one(x), two(x))


def test_the_model_is_left_alone() -> None:
    model = Nested()
    before = copy.deepcopy(model)
    prepare(model, Override("blocks", weight_bits=4))
    assert str(model) == str(before)
    pairs = zip(model.modules(), before.modules(), strict=True)
    assert all(vars(mine).keys() == vars(old).keys() for mine, old in pairs)


@pytest.mark.parametrize(
    ("overrides", "changed", "hit"),
    [
        # By name of a layer that became the first part of a wrapper, of a parent, of a pattern; by type.
        ([Override("blocks.0.conv", weight_bits=4)], {"blocks.0.conv": W4}, [("blocks.0.conv",)]),
        ([Override("blocks.1.last", weight_bits=4)], {"blocks.1.last.0": W4}, [("blocks.1.last.0",)]),
        (
            [Override("*.conv", weight_bits=4)],
            {"blocks.0.conv": W4, "blocks.1.conv": W4},
            [("blocks.0.conv", "blocks.1.conv")],
        ),
        (
            [Override("blocks.1", weight_bits=4)],
            {"blocks.1.conv": W4, "blocks.1.last.0": W4},
            [("blocks.1.conv", "blocks.1.act", "blocks.1.last.0", "blocks.1.add")],
        ),
        ([Override(nn.Linear, weight_bits=4)], {"head": W4}, [("head",)]),
        (
            [Override(Block, activation_bits=6)],
            {path: (width[0], 6) for path, width in PLAIN.items() if path.startswith("blocks")},
            [tuple(path for path in PLAIN if path.startswith("blocks"))],
        ),
        # Operations that fusing made out of functions have a path and a type, too.
        ([Override("blocks.0.add", activation_bits=6)], {"blocks.0.add": (None, 6)}, [("blocks.0.add",)]),
        (
            [Override(nn.Hardswish, activation_bits=5)],
            {"blocks.0.act": (None, 5), "blocks.1.act": (None, 5)},
            [("blocks.0.act", "blocks.1.act")],
        ),
        # Later ones win, field by field.
        (
            [Override("*", weight_bits=4), Override("blocks.*", weight_bits=6), Override("head", activation_bits=7)],
            {
                "stem": W4, "head": (4, 7), "blocks.0.conv": (6, 8), "blocks.0.last.0": (6, 8), "blocks.1.conv": (6, 8),
                "blocks.1.last.0": (6, 8),
            },
            None,
        ),
        ([Override("blocks", exclude=True), Override("blocks", exclude=False)], {}, None),
    ],
)  # fmt: skip
def test_widths(overrides: list[Override], changed: dict, hit: list[tuple[str, ...]] | None) -> None:
    model = prepare(Nested(), *overrides)
    assert widths(model) == PLAIN | changed
    if hit is not None:
        assert hits(model) == [(str(rule), paths) for rule, paths in zip(overrides, hit, strict=True)]


@pytest.mark.parametrize(
    ("override", "gone"),
    [
        (Override("blocks.0.conv", exclude=True), {"blocks.0.conv"}),
        (Override("blocks.0", exclude=True), {path for path in PLAIN if path.startswith("blocks.0")}),
        (Override("*.last.*", exclude=True), {"blocks.0.last.0", "blocks.1.last.0"}),
        (Override(nn.Hardswish, exclude=True), {"blocks.0.act", "blocks.1.act"}),
        (Override("blocks.1.add", exclude=True), {"blocks.1.add"}),
    ],
)
def test_exclude(override: Override, gone: set[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = prepare(Nested(), override)
    assert set(widths(model)) == set(PLAIN) - gone
    assert {path for _, paths in hits(model) for path in paths} == gone
    left = {found.path for found in qbench.preparation_report(model).left_in_float if found.on_purpose}
    assert gone <= left


def test_a_model_with_excluded_parts_is_trained_and_converted() -> None:
    model = prepare(Nested(), Override("blocks.0", exclude=True), Override("*.last.*", exclude=True))
    model(images()).sum().backward()
    program = qbench.convert(model.eval(), (images(),))
    assert int((program.module()(images()) != model(images())).sum()) == 0


def test_a_width_of_activations_may_name_the_activation_of_a_chain() -> None:
    model = prepare(SmallNet(), Override("relu", activation_bits=6))
    assert widths(model)["conv1"] == widths(model)["conv2"] == (8, 6)
    assert widths(model)["conv3"] == (8, 8)
    assert hits(model) == [("'relu', activation_bits=6", ("conv1", "conv2"))]
    assert model.conv1.input_quantizers["0"].spec.bits == 8


@pytest.mark.parametrize(
    ("override", "part"),
    [
        (Override("bn1", weight_bits=4), ("bn1", "conv1")),
        (Override("bn1", exclude=True), ("bn1", "conv1")),
    ],
)
def test_what_is_said_of_a_part_alone_is_said_in_vain(override: Override, part: tuple[str, str]) -> None:
    with pytest.warns(QBenchWarning, match="changes nothing: bn1 is computed inside conv1. Name the layer instead"):
        model = prepare(SmallNet(), override)
    (applied,) = qbench.preparation_report(model).overrides
    assert applied.modules == () and applied.parts == (part,)
    assert "not for parts of fused layers: bn1 in conv1" in str(qbench.preparation_report(model))


def test_an_override_of_what_has_no_codes_is_said_in_vain() -> None:
    with pytest.warns(QBenchWarning, match="changes nothing: it names modules without anything to quantize"):
        prepare(SmallNet(), Override("pool", activation_bits=4))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (Override("blocks.0.cnv", exclude=True), r"'blocks.0.cnv', .* hits no module; the nearest .*blocks.0.conv"),
        (Override("xyzzy", weight_bits=4), r"hits no module; names start with stem, blocks"),
        (Override(nn.LSTM, exclude=True), r"LSTM, exclude=True hits no module; the model has .*BatchNorm2d, Block"),
        (Override("head", weight_bits=9), r"override of head: weight of 9 bits.*weight_bits=8 is the nearest"),
        ("head", r"overrides: 'head' is not an Override; qbench.Override\('layer1.\*', weight_bits=4\) is"),
    ],
)  # fmt: skip
def test_refusals(override: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(Nested(), override)


def test_input_bits_reach_the_modules_before() -> None:
    model = prepare(Nested(), Override("blocks.1.conv", input_bits=4), Override("stem", input_bits=6))
    assert widths(model) == PLAIN | {"blocks.0.add": (None, 4)}
    assert model.stem.input_quantizers["0"].spec.bits == 6
    assert model.blocks[1].conv.sources[0].spec.bits == 4


def test_input_bits_of_a_layer_behind_an_excluded_one_are_its_own() -> None:
    model = prepare(Nested(), Override("blocks.0.act", exclude=True), Override("blocks.0.last", input_bits=4))
    assert model.blocks[0].last[0].input_quantizers["0"].spec.bits == 4


def test_later_overrides_win_over_input_bits() -> None:
    model = prepare(Nested(), Override("head", input_bits=4), Override("mean", activation_bits=6))
    assert widths(model)["mean"] == (None, 6)


@pytest.mark.parametrize(
    ("target", "overrides", "why"),
    [
        ("onnxruntime", [Override("head", input_bits=4)], "what a module with input_bits reads"),
        ("academic", [], "the first and the last layer of target academic"),
    ],
)
def test_what_needs_a_forward_says_so(target: str, overrides: list[Override], why: str) -> None:
    with pytest.raises(ConfigError, match=rf"{why} is seen in a recorded forward; .*example_inputs=\(x,\)"):
        qbench.prepare_by_target(Nested(), target, overrides=overrides)


def test_grids_that_must_be_one_and_differ_are_refused() -> None:
    with pytest.raises(LinkError, match="Give these modules the same qconfig"):
        prepare(TwoHeads(), Override("left", activation_bits=4))


class TestAcademic:
    def test_the_first_and_the_last_layer_keep_8_bits(self) -> None:
        model = prepare(Nested(), target="academic", weight_bits=2, activation_bits=3)
        found = widths(model)
        assert found["stem"] == (8, 3) and found["head"] == (8, 8) and found["mean"] == (None, 8)
        assert {width for path, width in found.items() if path.startswith("blocks")} == {(2, 3), (None, 3)}
        assert model.stem.input_quantizers["0"].spec.bits == 8
        assert [paths for _, paths in hits(model)] == [("stem",), ("head",)]

    def test_an_override_wins(self) -> None:
        model = prepare(Nested(), Override("head", weight_bits=4), target="academic", weight_bits=2)
        assert widths(model)["head"][0] == 4

    def test_wide_codes_are_left_as_asked(self) -> None:
        assert hits(prepare(Nested(), target="academic", weight_bits=8, activation_bits=8)) == []

    def test_weight_only(self) -> None:
        model = prepare(Nested(), target="academic", weight_bits=3, activation_bits=None)
        inner = {f"blocks.{i}.{part}": (3, None) for i in "01" for part in ("conv", "last.0")}
        assert widths(model) == {"stem": (8, None), "head": (8, None), **inner}


def test_a_qconfig_of_the_user_holds() -> None:
    net = Nested()
    net.blocks[0].qconfig = None
    net.head.qconfig = qbench.get_qconfig(weight_bits=5)
    model = prepare(net, Override("blocks", weight_bits=4), Override("head", activation_bits=6))
    assert "blocks.0.conv" not in widths(model)
    assert widths(model)["blocks.1.conv"] == W4 and widths(model)["head"] == (5, 6)
    model = prepare(net, Override("blocks.0", exclude=False))
    assert widths(model)["blocks.0.conv"] == (8, 8)


def test_without_example_inputs_the_report_keeps_the_overrides() -> None:
    model = qbench.prepare_by_target(Nested(), overrides=[Override("head", weight_bits=4)])
    assert not qbench.preparation_report(model).links_recorded
    model(images())
    assert qbench.preparation_report(model).links_recorded
    assert hits(model) == [("'head', weight_bits=4", ("head",))]
    assert "override 'head', weight_bits=4: 1 module(s): head" in str(qbench.preparation_report(model))


def test_the_model_is_copied_and_pickled_like_any_other() -> None:
    model = prepare(Nested(), Override("blocks", weight_bits=4)).eval()
    x = images(seed=2)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert widths(other) == widths(model) and hits(other) == hits(model)
        other.load_state_dict(model.state_dict())
    with pytest.warns(QBenchWarning, match="seen no data"):
        model(x)


def test_a_shared_module_is_named_by_any_of_its_paths() -> None:
    net = Nested()
    net.blocks[1] = net.blocks[0]
    model = prepare(net, Override("blocks.1", weight_bits=4))
    assert model.blocks[0].conv is model.blocks[1].conv
    assert model.blocks[0].conv.weight_quantizer.spec.bits == 4
