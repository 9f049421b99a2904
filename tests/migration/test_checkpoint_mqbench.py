"""A checkpoint in MQBench's format. MQBench itself does not install beside this PyTorch, so the test writes its keys.

Names: ModelTC/MQBench, mqbench/custom_quantizer/model_quantizer.py (`<node>_post_act_fake_quantizer`), torch's own
nn.intrinsic.qat modules for layers (`weight_fake_quant`, `bn`), mqbench/fake_quantize/{fixed,lsq}.py for the entries.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from models import images
from torch import Tensor, nn

import qbench
from qbench.errors import ConfigError

GENERATOR = torch.Generator().manual_seed(3)


class Block(nn.Module):
    """torchvision's basic block: one ReLU for two uses, a sum in place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x
        return self.relu(out)


class Inverted(nn.Module):
    """MobileNetV2's: chains that end in ReLU6, and a plain sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU6())
        self.last = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.conv(x))


class Net(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.layer1 = nn.Sequential(Block(width), Block(width))
        self.layer2 = nn.Sequential(Inverted(width), Inverted(width))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.pool(self.relu(self.bn1(self.conv1(x))))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


# Node of MQBench's graph → the quantizer here; None: MQBench has one where this model needs none.
PLACES = {
    "x": "conv1.input_quantizers.0",
    "conv1": "conv1.output_quantizer",
    "pool": None,
    "layer1_0_conv1": "layer1.0.conv1.output_quantizer",
    "layer1_0_conv2": "layer1.0.conv2.output_quantizer",
    "layer1_0_relu_1": "layer1.0.add.output_quantizer",
    "layer1_1_conv1": "layer1.1.conv1.output_quantizer",
    "layer1_1_conv2": "layer1.1.conv2.output_quantizer",
    "layer1_1_relu_1": "layer1.1.add.output_quantizer",
    "layer2_0_conv_2": "layer2.0.conv.0.output_quantizer",
    "layer2_0_last": "layer2.0.last.output_quantizer",
    "add_2": "layer2.0.add.output_quantizer",
    "layer2_1_conv_2": "layer2.1.conv.0.output_quantizer",
    "layer2_1_last": "layer2.1.last.output_quantizer",
    "add_3": "layer2.1.add.output_quantizer",
    "flatten": "avgpool.output_quantizer",
}

# MQBench quantizes inputs of layers: what the model puts out stays float there.
LAST = "fc.output_quantizer"


@functools.cache
def fused() -> nn.Module:
    return qbench.fuse(Net().train())


@functools.cache
def kept(options: tuple[tuple[str, Any], ...]) -> nn.Module:
    return qbench.prepare_qat(fused(), qconfig=qbench.get_qconfig(**dict(options)), example_inputs=(images(),))


def prepared(**options: Any) -> nn.Module:
    return copy.deepcopy(kept(tuple(options.items())))


def quantizer(kind: str, bits: int = 8, channels: int | None = None) -> dict[str, Tensor]:
    """The entries of one fake-quantize module: `affine`, `symmetric`, or `learned` (a symmetric one after training)."""
    size = () if channels is None else (channels,)
    low, high = -torch.rand(size, generator=GENERATOR) - 0.1, torch.rand(size, generator=GENERATOR) + 0.2
    steps = 2**bits - 1
    if kind == "affine":
        scale = (high - low) / steps
        zero_point = (0 - torch.round(low / scale)).clamp(0, steps)
    else:
        scale = torch.maximum(-low, high) / (steps / 2)
        zero_point = torch.zeros(size)
    if kind == "learned":
        scale = scale * 1.37
    found = {
        "fake_quant_enabled": torch.tensor([1], dtype=torch.uint8),
        "observer_enabled": torch.tensor([0], dtype=torch.uint8),
        "scale": scale.reshape(-1),
        "zero_point": zero_point.reshape(-1).to(torch.float if kind == "learned" else torch.int32),
        "activation_post_process.eps": torch.tensor([torch.finfo(torch.float32).eps]),
        "activation_post_process.min_val": low,
        "activation_post_process.max_val": high,
    }
    return found | ({"eps": found["activation_post_process.eps"]} if kind == "learned" else {})


def checkpoint(kind: str, bits: int = 8) -> dict[str, Tensor]:
    """MQBench's state dict of `Net` after training: layers in the order of the model, then activation quantizers."""
    state: dict[str, Tensor] = {}
    skip = ("quantizer", "_extra_state")
    for key, value in prepared().state_dict().items():
        if any(word in key for word in skip):
            continue
        state[key] = torch.rand(value.shape, generator=GENERATOR) if value.is_floating_point() else value + 7
        if key.endswith("weight") and ".bn" not in key:
            path = key.removesuffix("weight")
            entries = quantizer("symmetric", channels=len(value))
            state |= {f"{path}weight_fake_quant.{entry}": tensor for entry, tensor in entries.items()}
    for name in PLACES:
        state |= {f"{name}_post_act_fake_quantizer.{entry}": t for entry, t in quantizer(kind, bits).items()}
    return state


@pytest.mark.parametrize(("kind", "lowest"), [("affine", 0), ("symmetric", -128), ("learned", -128)])
def test_weights_and_grids_are_the_sources(kind: str, lowest: int) -> None:
    state, model = checkpoint(kind), prepared()
    report = qbench.load_qat_checkpoint(model, state)
    here = model.state_dict()
    plain = [key for key in state if "fake_quant" not in key]
    assert len(plain) == 50
    assert all(torch.equal(here[key], state[key]) for key in plain)
    for node, mine in PLACES.items():
        source = f"{node}_post_act_fake_quantizer"
        if mine is not None:
            assert torch.equal(here[f"{mine}.scale"], state[f"{source}.scale"][0]), node
            offset = here[f"{mine}.zero_point"] - state[f"{source}.zero_point"][0]
            found = model.get_submodule(mine)
            assert (int(offset), found.seen_data, found.observer_enabled) == (-128 - lowest, True, False), node
    assert (report.source, [found.path for found in report.missing]) == ("MQBench", [LAST])
    assert [found.key for found in report.keys] == list(state)


def test_the_report_says_how_each_place_was_found() -> None:
    model = prepared()
    report = qbench.load_qat_checkpoint(model, checkpoint("affine"))
    keys = {found.key.removesuffix("_post_act_fake_quantizer.scale"): found for found in report.keys}
    assert keys["layer1_0_relu_1"].note == "the activation after this block's sum"
    assert keys["add_3"].note == "by order of execution"
    assert keys["x"].note == "the only input of the model"
    assert keys["flatten"].note == "hands on what it reads"
    assert (keys["pool"].outcome, keys["pool"].to) == ("ignored", "")
    assert "conv1.output_quantizer has the grid of conv1: hands on what it reads" in keys["pool"].note
    assert "codes of the model's width assumed" in str(qbench.load_qat_checkpoint(model, checkpoint("learned")))


def test_one_forward_gives_the_last_layer_its_grid_and_moves_no_other() -> None:
    model, x = prepared(), images()
    qbench.load_qat_checkpoint(model, checkpoint("affine"))
    before = {path: model.get_submodule(path).scale.clone() for path in PLACES.values() if path}
    model.train()(x)
    assert all(torch.equal(model.get_submodule(path).scale, scale) for path, scale in before.items())
    assert model.eval()(x).shape == (4, 10)  # a quantizer without a grid would warn, and warnings are errors


def test_codes_of_the_caller_come_before_what_is_found() -> None:
    state, model = checkpoint("learned"), prepared()
    qbench.load_qat_checkpoint(model, state, codes=(0, 255))
    assert {int(q.zero_point) for path in PLACES.values() if path for q in [model.get_submodule(path)]} == {-128}


@pytest.mark.parametrize("kind", ["affine", "symmetric"])
def test_another_width_is_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"quantizer conv1: its codes are .*activation_bits=4"):
        qbench.load_qat_checkpoint(prepared(), checkpoint(kind, bits=4))
    report = qbench.load_qat_checkpoint(prepared(activation_bits=4), checkpoint(kind, bits=4))
    assert [found.path for found in report.missing] == [LAST]


def test_a_node_that_is_not_here_is_named() -> None:
    state = checkpoint("affine")
    state |= {f"softmax_post_act_fake_quantizer.{entry}": t for entry, t in quantizer("affine").items()}
    report = qbench.load_qat_checkpoint(prepared(), state)
    found = next(k for k in report.ignored if k.key == "softmax_post_act_fake_quantizer.scale")
    assert "names={'softmax'" in found.note or "no quantizer follows" in found.note


def test_a_quantizer_that_saw_nothing_gives_no_grid() -> None:
    state, model = checkpoint("affine"), prepared()
    prefix = "layer1_0_conv2_post_act_fake_quantizer."
    state[f"{prefix}activation_post_process.min_val"] = torch.tensor(float("inf"))
    state[f"{prefix}activation_post_process.max_val"] = torch.tensor(float("-inf"))
    report = qbench.load_qat_checkpoint(model, state)
    assert [found.path for found in report.missing] == ["layer1.0.conv2.output_quantizer", LAST]
    assert {found.note for found in report.keys if found.key.startswith(prefix)} == {"it saw no data"}


@pytest.mark.parametrize("method", ["lsq", "lsq_plus", "tqt"])
def test_learned_scales_go_where_scales_are_learned(method: str) -> None:
    state, model = checkpoint("learned"), prepared(method=method)
    if method == "tqt":  # as MQBench's TQT leaves them
        state = {k: 2.0 ** torch.floor(torch.log2(v)) if k.endswith(".scale") else v for k, v in state.items()}
    report = qbench.load_qat_checkpoint(model, state)
    for node, mine in PLACES.items():
        if mine is not None:
            found = model.get_submodule(mine)
            assert torch.equal(found.scale, state[f"{node}_post_act_fake_quantizer.scale"][0]), node
            assert int(found.zero_point) == 0
    keys = {found.key: found for found in report.keys}
    weight = keys["layer1.0.conv1.weight_fake_quant.scale"]
    assert (weight.outcome, weight.to) == ("translated", "layer1.0.conv1.weight_quantizer.start")
    assert weight.to in model.state_dict()


def test_learned_weight_scales_are_those_of_the_folded_weight() -> None:
    """The source rounds k·W at its scale; with a power of two for k, dividing by it loses no bit."""
    state = checkpoint("learned")
    for key in state:
        if key.endswith(".bn.running_var"):
            state[key] = torch.ones_like(state[key]) - 1e-5
        if key.endswith(".bn.weight"):
            state[key] = 2.0 ** torch.randint(-2, 3, state[key].shape, generator=GENERATOR)
    model = prepared(method="lsq")
    qbench.load_qat_checkpoint(model, state)
    layer = model.layer1[0].conv1
    folded = layer.quantized_parameters()[0].qparams.scale.detach()
    assert torch.allclose(folded, state["layer1.0.conv1.weight_fake_quant.scale"], rtol=1e-6)
    assert torch.equal(model.fc.weight_quantizer.scale.detach(), state["fc.weight_fake_quant.scale"])


def test_the_first_training_step_keeps_a_learned_grid() -> None:
    state, model = checkpoint("learned"), prepared(method="lsq")
    qbench.load_qat_checkpoint(model, state)
    before = model.layer2[0].last.output_quantizer.scale.clone()
    model.train()(images())
    assert torch.equal(model.layer2[0].last.output_quantizer.scale, before)
