"""Exactness: what trains is what is deployed, bit for bit, for every kind of layer and configuration.

A zero counts only if the model was trained a little, the codes were varied, and the file was read back by a process
that knows nothing of the model. All variants are written to one folder and run by one fresh process.
"""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import (
    Branchy,
    Gated,
    SmallNet,
    TwoHeads,
    conv_bn,
    deployed_layers,
    evaluate,
    images,
    is_dq,
    leaves,
    randomise_statistics,
    train,
)
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

import qbench
import qbench.nn.intrinsic as nni
import qbench.nn.intrinsic.qat as nniqat
from qbench import mappings
from qbench._torchvision import classification_model
from qbench.nn.qat.body import QatModule
from qbench.nn.qat.layer import QatLayer

# A gamma of next to nothing makes the floor of the weight scale large beside it, and convert says so.
pytestmark = [
    pytest.mark.filterwarnings("ignore:prepare_qat leaves:qbench.errors.QBenchWarning"),
    pytest.mark.filterwarnings("ignore:the bias of 1 layer:qbench.errors.QBenchWarning"),
]

INT8 = qbench.get_qconfig()


def qconfig(**options: Any) -> qbench.QConfig:
    return qbench.get_qconfig(**options)


def specs(**specs_: qbench.QSpec) -> qbench.QConfig:
    return qbench.QConfig(**specs_)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A model, its inputs, and what is done to it before and after training.

    `codes` is how many distinct codes each layer must have put out for its zero to count.
    """

    make: Callable[[], nn.Module]
    qconfig: qbench.QConfig = INT8
    inputs: Callable[[int], Tensor] = lambda seed: images(16, seed=seed)
    fuse: bool = True
    before: Callable[[nn.Module], Any] = lambda model: None
    after: Callable[[nn.Module], Any] = lambda model: None
    codes: int = 50


def sequence(*parts: nn.Module) -> Callable[[], nn.Module]:
    """A model of these parts, which are made anew by copying."""
    return lambda: copy.deepcopy(nn.Sequential(*parts))


def _gamma(value: float) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        with torch.no_grad():
            model.conv1.bn.weight[2] = value

    return change


def _mixed(model: nn.Module) -> None:
    model.conv2.qconfig = qconfig(weight_bits=4, activation_bits=6)
    model.fc.qconfig = qconfig(bias_bits=8, bias_scale="own")


def _freeze(model: nn.Module) -> None:
    model.apply(qbench.freeze_bn_stats).apply(qbench.disable_observer)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        sum(out.square().mean() for out in leaves(model(images(8)))).backward()
        optimizer.step()


def _signal(channels: int, *shape: int) -> Callable[[int], Tensor]:
    return lambda seed: torch.randn(8, channels, *shape, generator=torch.Generator().manual_seed(seed))


INT8_PER_TENSOR = qbench.QSpec(bits=8, symmetric=True, narrow=True)

VARIANTS: dict[str, Variant] = {
    # The networks, and the widths and scales that a QConfig has.
    "residual": Variant(SmallNet),
    "residual, in training mode": Variant(SmallNet, after=lambda m: m.train()),
    "not fused": Variant(SmallNet, fuse=False),
    "gate": Variant(Gated),
    "concat, two outputs": Variant(TwoHeads),
    "branch": Variant(Branchy),
    "gamma 0": Variant(SmallNet, after=_gamma(0.0)),
    "negative gamma": Variant(SmallNet, before=_gamma(-0.7)),
    "tiny gamma": Variant(SmallNet, after=_gamma(1e-30)),
    "4-bit weights": Variant(TwoHeads, qconfig(weight_bits=4)),
    "2-bit weights": Variant(TwoHeads, qconfig(weight_bits=2)),
    "4-bit activations": Variant(TwoHeads, qconfig(activation_bits=4), codes=8),
    "4-bit both": Variant(TwoHeads, qconfig(weight_bits=4, activation_bits=4), codes=8),
    "own bias of 8 bits": Variant(TwoHeads, qconfig(bias_bits=8, bias_scale="own")),
    "own power-of-two bias of 8 bits": Variant(TwoHeads, qconfig(bias_bits=8, bias_scale="own_pow2")),
    "own bias of 32 bits": Variant(TwoHeads, qconfig(bias_scale="own")),
    "16-bit bias": Variant(TwoHeads, qconfig(bias_bits=16)),
    "24-bit bias": Variant(TwoHeads, qconfig(bias_bits=24)),
    "mixed": Variant(SmallNet, before=_mixed, codes=8),
    "xnnpack": Variant(TwoHeads, qconfig(target="xnnpack")),
    "neutron": Variant(TwoHeads, qconfig(target="neutron")),
    "weights per tensor": Variant(TwoHeads, specs(weight=INT8_PER_TENSOR)),
    "weights of power-of-two scales": Variant(
        TwoHeads, specs(weight=dataclasses.replace(INT8_PER_TENSOR, axis=0, power_of_two=True))
    ),
    "symmetric activations": Variant(TwoHeads, specs(activation=qbench.QSpec(bits=8, symmetric=True))),
    "unsigned activations": Variant(TwoHeads, specs(activation=qbench.QSpec(bits=8, signed=False))),
    "power-of-two activations": Variant(TwoHeads, specs(activation=qbench.QSpec(bits=8, power_of_two=True)), codes=40),
    "running min-max": Variant(TwoHeads, qconfig(observer=qbench.observers.MinMaxObserver)),
    "frozen statistics and ranges": Variant(TwoHeads, after=_freeze),
    # The layers.
    "depthwise": Variant(sequence(*conv_bn(3, 6, groups=3), nn.ReLU6(), *conv_bn(6, 6, groups=6), nn.Conv2d(6, 8, 1))),
    "stride, dilation, same": Variant(
        sequence(
            nn.Conv2d(3, 6, 3, padding="same", dilation=2), nn.ReLU(), nn.Conv2d(6, 6, 3, stride=2), nn.Conv2d(6, 4, 2)
        )
    ),
    "padding by reflection and circle": Variant(
        sequence(
            nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"),
            nn.BatchNorm2d(6),
            nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"),
        )
    ),
    "transposed with groups": Variant(
        sequence(
            nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.ConvTranspose2d(6, 4, 2),
        ),
        inputs=_signal(4, 7, 7),
    ),
    "1d": Variant(
        sequence(nn.Conv1d(4, 8, 5), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 4, 3, bias=False)),
        inputs=_signal(4, 40),
    ),
    "3d": Variant(
        sequence(nn.Conv3d(2, 6, 3, bias=False), nn.BatchNorm3d(6), nn.ReLU(), nn.Conv3d(6, 4, 2)),
        inputs=_signal(2, 6, 6, 6),
    ),
    "linear with batch norm": Variant(
        sequence(nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32, bias=False), nn.Linear(32, 16)),
        inputs=lambda seed: torch.randn(64, 12, generator=torch.Generator().manual_seed(seed)),
    ),
    "linear on sequences": Variant(
        sequence(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 16)), inputs=_signal(6, 12)
    ),
    "batch norm without affine, own eps": Variant(
        sequence(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False, eps=1e-2), nn.Conv2d(8, 4, 1))
    ),
    "averages": Variant(
        sequence(*conv_bn(3, 8), nn.ReLU(), nn.AvgPool2d(3, 2, 1), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(2)),
        codes=30,
    ),
    "one pixel": Variant(sequence(nn.Conv2d(3, 64, 12), nn.ReLU(), nn.Conv2d(64, 64, 1))),
}  # fmt: skip


@dataclasses.dataclass
class Done:
    """A variant after training: the model, its held-out inputs, and what the fresh process read and computed."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    outputs: list[Tensor]
    reloaded: ExportedProgram


WORKER = """
import sys, pathlib, torch
from qbench.graph.qdq import quantized_decomposed
torch.set_num_threads(1)
quantized_decomposed()
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.pt2")):
    module = torch.export.load(path).module()
    out = module(*torch.load(path.with_suffix(".inputs"), weights_only=True))
    torch.save(torch.utils._pytree.tree_leaves(out), path.with_suffix(".outputs"))
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Done]:
    """Every variant trained, converted, saved, and run by one fresh process."""
    folder = tmp_path_factory.mktemp("programs")
    models: dict[str, tuple[nn.Module, tuple[Tensor, ...]] | Exception] = {}
    for index, (name, variant) in enumerate(VARIANTS.items()):
        torch.manual_seed(index)
        try:
            model = _trained(variant)
            held_out = (variant.inputs(99),)
            torch.export.save(qbench.convert(model, held_out), folder / f"{index}.pt2")
        except Exception as error:  # shown by the tests of this variant, not by those of all
            models[name] = error
            continue
        torch.save(held_out, folder / f"{index}.inputs")
        models[name] = model.eval(), held_out
    run = subprocess.run([sys.executable, "-c", WORKER, str(folder)], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr

    def get(name: str) -> Done:
        index, made = list(VARIANTS).index(name), models[name]
        if isinstance(made, Exception):
            raise made
        outputs = torch.load(folder / f"{index}.outputs", weights_only=True)
        return Done(*made, outputs, torch.export.load(folder / f"{index}.pt2"))

    return get


def _trained(variant: Variant) -> nn.Module:
    model = randomise_statistics(variant.make())
    if variant.before is _mixed:
        variant.before(model)
    model = qbench.fuse(model) if variant.fuse else model
    examples = [(variant.inputs(0), cond) for cond in (True, False)] if isinstance(model, Branchy) else None
    model = qbench.prepare_qat(model, qconfig=variant.qconfig, example_inputs=examples or (variant.inputs(0),))
    if variant.before is not _mixed:
        variant.before(model)
    if isinstance(model, Branchy):
        train(model, variant.inputs(0), False, steps=2, rate=0.01)
    for seed in (0, 1):
        train(model, variant.inputs(seed), steps=4, rate=0.01)
    variant.after(model)
    return model


@pytest.mark.parametrize("name", VARIANTS)
def test_the_reloaded_program_computes_what_the_model_does(done: Callable[[str], Done], name: str) -> None:
    one = done(name)
    expected = leaves(evaluate(one.model, *one.inputs))
    for found, wanted in zip(one.outputs, expected, strict=True):
        assert torch.equal(found, wanted), f"{int((found != wanted).sum())} of {wanted.numel()} values differ"


@pytest.mark.parametrize("name", VARIANTS)
def test_the_reloaded_codes_are_those_of_training(done: Callable[[str], Done], name: str) -> None:
    one = done(name)
    model, deployed = one.model, deployed_layers(one.reloaded)
    layers = {path: module for path, module in model.named_modules() if isinstance(module, QatLayer)}
    assert set(layers) - set(deployed) == ({"conv2"} if name == "branch" else set())
    for path, found in deployed.items():
        trained = layers[path].parameter_codes()
        assert torch.equal(found.weight, trained.weight), path
        groups = getattr(layers[path], "groups", 1)
        own = layers[path].qconfig.bias.scale != "input_weight"
        scale = trained.bias_scale if own else found.bias_scale(groups if found.axis == 1 else 1)
        assert torch.equal(trained.bias.float() * scale, found.bias), path
        assert int(trained.bias.abs().max()) <= min(2 ** (layers[path].qconfig.bias.bits - 1) - 1, 2**22)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_codes_are_varied(done: Callable[[str], Done], name: str) -> None:
    """So that the zeros above mean something: distinct codes and few that saturate, layer by layer."""
    one = done(name)
    for path, (distinct, saturated) in spread(one.model, *one.inputs).items():
        assert distinct >= VARIANTS[name].codes, f"{path}: {distinct} distinct codes"
        assert saturated < 0.05, f"{path}: {saturated:.1%} saturated"


def spread(model: nn.Module, *inputs: Any) -> dict[str, tuple[int, float]]:
    """Distinct codes of each QAT module's output, and the share of values beyond the ends of its grid."""
    found: dict[str, tuple[int, float]] = {}
    handles = []
    for path, module in model.named_modules():
        if isinstance(module, QatModule):

            def hook(quantizer: Any, args: tuple[Tensor, ...], out: Tensor, path: str = path) -> None:
                scale, zero = float(quantizer.scale), int(quantizer.zero_point)
                steps = torch.round(args[0] / scale) + zero
                beyond = (steps < quantizer.spec.qmin - 1) | (steps > quantizer.spec.qmax + 1)
                found[path] = out.unique().numel(), float(beyond.float().mean())

            handles.append(module.output_quantizer.register_forward_hook(hook))
    evaluate(model, *inputs)
    for handle in handles:
        handle.remove()
    return found


# Patterns of the user's own, whose activation reads codes.


class ConvBnHardswish2d(nni.Fused):
    """A user's chain."""

    part_types = (nn.Conv2d, nn.BatchNorm2d, nn.Hardswish)


class QatConvBnHardswish2d(nniqat.ConvBn2d):
    """Its QAT form."""

    float_type = ConvBnHardswish2d
    activation = nn.Hardswish


def test_a_users_pattern_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mappings, "_REGISTERED", [])
    qbench.register_pattern(QatConvBnHardswish2d)
    variant = Variant(
        sequence(*conv_bn(3, 8), nn.Hardswish(), *conv_bn(8, 8, groups=8), nn.Hardswish(), nn.Conv2d(8, 4, 1))
    )
    model = _trained(variant)
    program = qbench.convert(model, (images(8, seed=99),))
    found = qbench.verify(model, program, (images(8, seed=99),), runtimes=())
    assert found.exact == {"parameters": True, "eval_vs_program": True}
    assert all(one.varied for one in found.spread)


# Whole networks.


def _network(name: str, size: int, batch: int, steps: int) -> tuple[nn.Module, Tensor]:
    """Trained on patches of smooth noise; the held-out images are of the same kind."""
    torch.manual_seed(0)

    def smooth(seed: int, count: int) -> Tensor:
        noise = torch.randn(count, 3, size // 8, size // 8, generator=torch.Generator().manual_seed(seed))
        fine = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed + 1))
        return nn.functional.interpolate(noise, size=(size, size), mode="bilinear") + 0.3 * fine

    model = qbench.fuse(classification_model(name, 100))
    model = qbench.prepare_qat(model, qconfig=INT8, example_inputs=(smooth(1, 2),))
    train(model, smooth(1, batch), steps=steps, rate=0.02, momentum=0.9)
    return model, smooth(5, batch)


def layer_outputs(model: nn.Module, *inputs: Any) -> dict[str, Tensor]:
    """Output of each QAT module's quantizer in eval."""
    found: dict[str, Tensor] = {}
    handles = [
        module.output_quantizer.register_forward_hook(
            lambda q, args, out, path=path: found.__setitem__(path, out.clone())
        )
        for path, module in model.named_modules()
        if isinstance(module, QatModule)
    ]
    evaluate(model, *inputs)
    for handle in handles:
        handle.remove()
    return found


class Recorded(fx.Interpreter):
    """Runs a program's module and keeps what comes out of the dq at the end of each deployed module."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        stack = list((n.meta.get("nn_module_stack") or {}).values())
        if is_dq(n) and stack and stack[-1][0].endswith(".output"):
            self.found[stack[-1][0].removesuffix(".output")] = out
        return out


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_networks_are_exact_layer_by_layer(name: str) -> None:
    model, held_out = _network(name, 64, batch=8, steps=6)
    program = qbench.convert(model, (held_out,))
    found = qbench.verify(model, program, (held_out,), runtimes=())
    assert found.exact == {"parameters": True, "eval_vs_program": True}
    assert found.eval_vs_program.compared == 800
    wanted = layer_outputs(model, held_out)
    recorded = Recorded(program.module())
    with torch.no_grad():
        recorded.run(held_out)
    assert set(recorded.found) == set(wanted)
    differing = {path: int((recorded.found[path] != out).sum()) for path, out in wanted.items()}
    assert not any(differing.values()), differing
    assert sum(out.numel() for out in wanted.values()) > 1_000_000
    poor = {one.name: (one.distinct, one.saturated_share) for one in found.spread if not one.varied}
    assert not poor


class InFloat64(fx.Interpreter):
    """Runs a program with sums that are not rounded, as those of integers are not."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = target._schema.name.rpartition("::")[2]
        if name == "quantize_per_tensor" and args[0].dtype == torch.float64:
            x, scale, zero_point, low, high, dtype = args
            inverse = 1.0 / torch.tensor(scale, dtype=torch.float32).double()
            return torch.clamp(torch.round(x * inverse) + zero_point, low, high).to(dtype)
        if not name.startswith(("quantize", "dequantize")):
            args = torch.utils._pytree.tree_map_only(Tensor, Tensor.double, args)
        return super().call_function(target, args, kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_networks_at_224_pixels_and_both_runtimes(name: str) -> None:
    model, held_out = _network(name, 224, batch=8, steps=6)
    program = qbench.convert(model, (held_out,))
    found = qbench.verify(model, program, (held_out,))
    print(f"\n{name}, 224 px\n{found}")
    assert found.exact["parameters"]
    assert found.exact["eval_vs_program"]
    assert {runtime.name for runtime in found.runtimes} == {"onnxruntime", "executorch"}
    # Behind many layers a barely trained network turns the few codes that float sums round differently into many. The
    # program that sums in float64 shows how many that is without any runtime: a runtime may not add much to it.
    with torch.no_grad():
        single, double = (kind(program.module()).run(held_out) for kind in (fx.Interpreter, InFloat64))
    (one,), (other,) = leaves(single), leaves(double)
    share = float((one != other).float().mean())
    print(f"float32 sums against float64 sums: {share:.2%} of the outputs differ")
    assert all(runtime.compared == 800 and runtime.share < share + 0.1 for runtime in found.runtimes)
    assert all(runtime.largest_step < 26 for runtime in found.runtimes)  # a tenth of the codes
    poor = {one.name: (one.distinct, one.saturated_share) for one in found.spread if not one.varied}
    assert not poor
