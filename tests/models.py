"""Small models that the tests of the flow share, and what is done to them everywhere: statistics, steps, counts."""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import qbench
from qbench.errors import QBenchWarning
from qbench.fake_quantize import FakeQuantize
from qbench.nn.intrinsic import Fused
from qbench.nn.qat.body import QatModule


def images(batch: int = 4, size: int = 12, channels: int = 3, seed: int = 7) -> Tensor:
    """(batch, channels, size, size), the same for the same arguments."""
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


def conv_bn(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> list[nn.Module]:
    options = {"padding": kernel // 2, "bias": False, **options}
    return [nn.Conv2d(inputs, outputs, kernel, **options), nn.BatchNorm2d(outputs)]


class SmallNet(nn.Module):
    """A residual block and a head: every kind of step that ResNet has, on 12 x 12 pixels."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(3, width)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.conv2, self.bn2 = conv_bn(width, width)
        self.conv3, self.bn3 = conv_bn(width, width)
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.bn1(self.conv1(x))))
        y = self.relu(self.bn2(self.conv2(x)))
        y = self.bn3(self.conv3(y))
        y += x
        y = self.relu(y)
        return self.fc(torch.flatten(self.gap(y), 1))


class Calls(nn.Module):
    """A forward that is a function of the module: one line a case."""

    def __init__(self, forward: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.call = forward

    def forward(self, x: Tensor) -> Any:
        return self.call(self, x)


class Branchy(nn.Module):
    """The branch of Python control flow that users have, without anything to fuse: two ways into one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(3, 8, 1)
        self.conv3 = nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor, cond: bool = True) -> Tensor:
        if cond:
            y = self.conv1(x)
        else:
            y = self.conv2(x)
        return self.conv3(y)


class Gated(nn.Module):
    """Squeeze-and-excitation: a gate that leaves the grid, and a product."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(*conv_bn(3, 8), nn.ReLU())
        self.squeeze = nn.AdaptiveAvgPool2d(1)
        self.excite = nn.Conv2d(8, 8, 1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.head(x * torch.sigmoid(self.excite(self.squeeze(x))))


class TwoHeads(nn.Module):
    """A concat of two branches, and outputs in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(*conv_bn(3, 8), nn.ReLU())
        self.right = nn.Sequential(*conv_bn(3, 8, 1))
        self.joined = nn.Conv2d(16, 8, 3)
        self.aux = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = torch.cat([self.left(x), self.right(x)], 1)
        return {"out": self.joined(y), "aux": self.aux(y)}


class Untraceable(nn.Module):
    """A root that fx cannot trace above a chain that it can."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*conv_bn(3, 8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        if float(x.abs().amax()) > 1e6:
            return self.body(x * 1e-6)
        return self.body(x) + 1


class DropsInTraining(nn.Module):
    """Functional dropout: a plain trace would freeze the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv_bn(3, 8)
        self.skip = nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(torch.relu(self.bn(self.conv(x))), 0.5, self.training)
        return y + self.skip(x)


def randomise_statistics(model: nn.Module, seed: int = 1) -> nn.Module:
    """Give every BatchNorm statistics and an affine that change something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for bn in model.modules():
            if isinstance(bn, _BatchNorm) and bn.running_mean is not None and bn.running_var is not None:
                bn.running_mean.copy_(torch.randn(bn.num_features, generator=generator) * 0.2)
                bn.running_var.copy_(torch.rand(bn.num_features, generator=generator) + 0.5)
                if bn.affine:
                    bn.weight.copy_(torch.rand(bn.num_features, generator=generator) + 0.5)
                    bn.bias.copy_(torch.randn(bn.num_features, generator=generator) * 0.2)
    return model


def count(model: nn.Module) -> Counter[str]:
    """Wrappers, QAT modules and functional modules by the name of their class."""
    own = [m for m in model.modules() if isinstance(m, (Fused, QatModule)) or type(m).__module__ == "qbench.nn.ops"]
    return Counter(type(module).__name__ for module in own)


def loose_batch_norms(model: nn.Module) -> int:
    """How many BatchNorms are in no wrapper."""
    inside = {part for wrapper in model.modules() if isinstance(wrapper, Fused) for part in wrapper}
    return sum(isinstance(module, _BatchNorm) and module not in inside for module in model.modules())


def evaluate(model: nn.Module, *inputs: Any) -> Any:
    """Outputs in eval without gradients; the modes are put back."""
    modes = {module: module.training for module in model.modules()}
    with torch.no_grad():
        out = model.eval()(*inputs)
    for module, mode in modes.items():
        module.training = mode
    return out


def leaves(out: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(out) if isinstance(leaf, Tensor)]


@contextmanager
def unobserved() -> Iterator[None]:
    """Silence about quantizers that have seen no data."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="quantizer .* has seen no data", category=QBenchWarning)
        yield


def train(model: nn.Module, *inputs: Any, steps: int = 5, rate: float = 0.05, momentum: float = 0.5) -> nn.Module:
    """Some steps that move weights and statistics, towards outputs that follow from nothing; returns `model` in eval.

    BatchNorm's momentum is raised, so that the statistics fit the weights after few steps.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = momentum
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    generator = torch.Generator().manual_seed(11)
    with unobserved():
        targets = [torch.randn(out.shape, generator=generator) for out in leaves(evaluate(model, *inputs))]
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        sum(F.mse_loss(out, target) for out, target in zip(leaves(model(*inputs)), targets, strict=True)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def quantizer_names(model: nn.Module) -> dict[FakeQuantize, str]:
    """The first path of every quantizer."""
    return {module: name for name, module in model.named_modules() if isinstance(module, FakeQuantize)}


def links(model: nn.Module) -> dict[str, tuple[str, ...] | None]:
    """Path of every QAT module → paths of the quantizers of its inputs."""
    names = quantizer_names(model)
    return {
        path: None if module.sources is None else tuple(names[source] for source in module.sources)
        for path, module in model.named_modules()
        if isinstance(module, QatModule)
    }


def assert_exact(model: nn.Module, program: torch.export.ExportedProgram, *inputs: Any) -> None:
    """The model in eval and its program give the same bits."""
    expected, found = leaves(evaluate(model, *inputs)), leaves(program.module()(*inputs))
    assert len(expected) == len(found) > 0
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other), f"{int((one != other).sum())} of {one.numel()} values differ"


# Reading a program without qbench's own readers, so that a test of the program does not share their faults.

LAYER_OPS = ("conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear")
VALUE_OPS = ("add", "mul", "cat", "avg_pool2d", "adaptive_avg_pool2d")


def op_name(node: fx.Node) -> str:
    """`"conv2d"` for aten.conv2d.default or .padding; "" for what is no operator."""
    target = node.target
    return target._schema.name.split("::")[1] if isinstance(target, torch._ops.OpOverload) else ""


def is_q(node: object) -> bool:
    return isinstance(node, fx.Node) and op_name(node) == "quantize_per_tensor"


def is_dq(node: object) -> bool:
    return isinstance(node, fx.Node) and op_name(node) == "dequantize_per_tensor"


def stored(program: torch.export.ExportedProgram, node: fx.Node) -> Tensor:
    """Value of a parameter or buffer of a program."""
    names = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs}
    return program.state_dict[names[node.name]].detach()


@dataclasses.dataclass(frozen=True)
class DeployedLayer:
    """What a program holds of one layer: codes and scales of the weight (channels along `axis`), bias, input scale."""

    node: fx.Node
    weight: Tensor
    weight_scale: Tensor
    axis: int | None
    bias: Tensor
    input_scale: Tensor

    def bias_scale(self, groups: int = 1) -> Tensor:
        """f32(s_in · s_w), one per output channel."""
        scale = self.weight_scale.repeat(groups) if self.axis == 1 else self.weight_scale
        return (self.input_scale * scale).expand(len(self.bias))


def deployed_layers(program: torch.export.ExportedProgram) -> dict[str, DeployedLayer]:
    """Every convolution and linear of a program by the path of its module."""
    found = {}
    for node in program.graph.nodes:
        if op_name(node) not in LAYER_OPS:
            continue
        source, weight, bias = node.args[:3]
        assert is_dq(source), f"{node}: no dq at the input, but {source.target}"
        codes = stored(program, weight.args[0])
        if op_name(weight) == "dequantize_per_channel":
            scale, axis = stored(program, weight.args[1]), weight.args[3]
            assert not stored(program, weight.args[2]).any()
        else:
            assert is_dq(weight), f"{node}: no dq at the weight, but {weight.target}"
            scale, axis = torch.tensor(weight.args[1]), None
        path = list(node.meta["nn_module_stack"].values())[-1][0]
        grid = torch.tensor(source.args[1], dtype=torch.float32)
        found[path] = DeployedLayer(node, codes, scale, axis, stored(program, bias), grid)
    return found


def prepared(model: nn.Module, *inputs: Any, **options: Any) -> nn.Module:
    """Fused, prepared and trained a little, in eval."""
    options = {"qconfig": qbench.get_qconfig(), "example_inputs": inputs, **options}
    return train(qbench.prepare_qat(qbench.fuse(model), **options), *inputs)
