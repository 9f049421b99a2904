"""A QAT checkpoint of torch.ao, trained for two steps, in the qbench model: every key accounted for, every bit kept."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from models import images
from torch import Tensor, nn
from torch_ao_models import QUIET, Block, ao

import qbench
from qbench._torchvision import import_torchvision
from qbench.checkpoints import CheckpointReport
from qbench.errors import ConfigError, PreparationError

pytestmark = QUIET


def trained(model: nn.Module, x: Tensor, backend: str = "qnnpack", steps: int = 2) -> nn.Module:
    """torch.ao's eager QAT of a fused model."""
    model.qconfig = ao.get_default_qat_qconfig(backend)
    model = ao.prepare_qat(model.train())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model


def ours(model: nn.Module, x: Tensor, backend: str = "qnnpack") -> nn.Module:
    return qbench.prepare_qat(model, qconfig=ao.get_default_qat_qconfig(backend), example_inputs=(x,))


def pair(backend: str = "qnnpack") -> tuple[nn.Module, nn.Module]:
    """Trained with torch.ao, and fresh here."""
    x = images()
    return trained(Block().train().fuse_model(), x, backend), ours(Block().train().fuse_model(), x, backend)


# The quantizer of torch.ao whose grid each of ours takes. conv1, sigmoid's input and the sum meet in one Cat.
PLACES = {
    "quant": "conv1.input_quantizers.0",
    "conv2": "conv2.output_quantizer",
    "skip_add": "skip_add.output_quantizer",
    "join": "join.output_quantizer",
    "sigmoid": "sigmoid.output_quantizer",
    "fc": "fc.output_quantizer",
}


@pytest.mark.parametrize("backend", ["fbgemm", "qnnpack", "x86", "onednn"])
def test_weights_statistics_and_grids_are_the_sources(backend: str) -> None:
    source, model = pair(backend)
    state = source.state_dict()
    report = qbench.load_qat_checkpoint(model, state)
    here = model.state_dict()
    for key, value in state.items():
        if "fake_quant" not in key and "post_process" not in key:
            assert torch.equal(here[key], value), key
    lowest = -64 if backend in ("fbgemm", "x86") else -128
    for theirs, mine in PLACES.items():
        assert torch.equal(here[f"{mine}.scale"], state[f"{theirs}.activation_post_process.scale"][0]), theirs
        offset = here[f"{mine}.zero_point"] - state[f"{theirs}.activation_post_process.zero_point"][0]
        assert (int(offset), model.get_submodule(mine).seen_data) == (lowest, True), theirs
    assert [found.key for found in report.keys] == list(state)


def test_every_key_is_reported_once_with_its_place() -> None:
    source, model = pair()
    report = qbench.load_qat_checkpoint(model, source.state_dict())
    keys = {found.key: found for found in report.keys}
    assert len(report.taken) + len(report.translated) + len(report.ignored) == len(keys) == len(source.state_dict())
    here = model.state_dict()
    assert {found.to for found in (*report.taken, *report.translated)} <= set(here)
    assert keys["conv1.bn.running_var"].to == "conv1.bn.running_var"
    assert keys["quant.activation_post_process.scale"].to == "conv1.input_quantizers.0.scale"
    assert keys["quant.activation_post_process.zero_point"].note.startswith("codes numbered -128")
    assert "conv1.output_quantizer has the grid of join: both became one quantizer" in str(report)
    assert all(found.note for found in report.ignored)
    assert "weight follows" in keys["fc.weight_fake_quant.scale"].note


def test_the_grid_of_an_average_is_that_of_its_input_and_said_so() -> None:
    source, model = pair()
    report = qbench.load_qat_checkpoint(model, source.state_dict())
    assert [found.path for found in report.missing] == ["pool.output_quantizer"]
    assert torch.equal(model.pool.output_quantizer.scale, model.join.output_quantizer.scale)


@pytest.mark.parametrize("moved", [False, True])
def test_a_grid_that_the_target_demands_is_not_taken_from_elsewhere(moved: bool) -> None:
    x = images()
    source, fused = trained(Block().train().fuse_model(), x, "onednn"), Block().train().fuse_model()
    fused.qconfig = qbench.get_qconfig("tflite")
    model = qbench.prepare_qat(fused, example_inputs=(x,))
    state, key = source.state_dict(), "sigmoid.activation_post_process.scale"
    assert float(state[key]) == 1 / 256  # torch.ao fixes it, too
    if moved:
        state[key] = 1.5 * state[key]
    report = qbench.load_qat_checkpoint(model, state)
    ignored = {found.key: found.note for found in report.ignored}.get(key, "")
    missing = {found.path: found.note for found in report.missing}.get("sigmoid.output_quantizer", "")
    if moved:
        assert ignored == "sigmoid.output_quantizer has a grid that is known without it: scale 0.00390625"
        assert missing == "has the grid that is known before any data"
    else:
        assert not ignored and not missing
    quantizer = model.eval().sigmoid.output_quantizer
    assert (float(quantizer.scale), int(quantizer.zero_point), quantizer.seen_data) == (1 / 256, -128, True)
    with torch.no_grad():
        assert model(x).isfinite().all()


def test_the_loaded_model_evaluates_and_deploys_at_once() -> None:
    source, model = pair()
    x = images()
    qbench.load_qat_checkpoint(model, source.state_dict())
    with torch.no_grad():
        out, expected = model.eval()(x), source.eval()(x)
    # torch.ao observes weights otherwise, so outputs agree to a step of the grid and not to the bit.
    step = float(model.fc.output_quantizer.scale)
    assert float((out - expected).abs().max()) <= 4 * step
    assert len(out.unique()) > 10


def test_training_goes_on_from_the_sources_range() -> None:
    source, model = pair()
    qbench.load_qat_checkpoint(model, source.state_dict())
    low = source.fc.activation_post_process.activation_post_process.min_val
    assert torch.equal(model.fc.output_quantizer.observer.min_val, low)
    model.train()(images())
    moved = model.fc.output_quantizer.observer.min_val
    assert 0 < abs(float(moved - low)) < 0.05 * abs(float(low))


def test_switches_are_taken() -> None:
    source, model = pair()
    source.apply(ao.disable_observer)
    source.fc.activation_post_process.disable_fake_quant()
    qbench.load_qat_checkpoint(model, source.state_dict())
    fc, conv2 = model.fc.output_quantizer, model.conv2.output_quantizer
    assert (fc.observer_enabled, fc.fake_quant_enabled) == (False, False)
    assert (conv2.observer_enabled, conv2.fake_quant_enabled) == (False, True)


def test_the_checkpoint_survives_a_wrapper_and_a_file(tmp_path: Any) -> None:
    source, model = pair()
    torch.save({f"module.{key}": value for key, value in source.state_dict().items()}, tmp_path / "qat.pt")
    state = torch.load(tmp_path / "qat.pt")
    report = qbench.load_qat_checkpoint(model, state)
    assert [found.key for found in report.keys] == list(state)
    assert torch.equal(model.fc.weight, source.fc.weight)


def test_old_names_of_batch_norm() -> None:
    source, model = pair()
    old = {"bn.weight": "gamma", "bn.bias": "beta", "bn.running_mean": "running_mean", "bn.running_var": "running_var"}
    state = {}
    for key, value in source.state_dict().items():
        name = next((new for new in old if key.startswith("conv") and key.endswith(f".{new}")), None)
        state[key.replace(name, old[name]) if name else key] = value
    report = qbench.load_qat_checkpoint(model, state)
    assert {found.key: found.to for found in report.taken}["conv1.gamma"] == "conv1.bn.weight"
    assert torch.equal(model.conv1.bn.running_var, source.conv1.bn.running_var)


def faulty(change: str) -> Any:
    source, _ = pair()
    state = dict(source.state_dict())
    if change == "lacks":
        del state["fc.weight"]
    elif change == "has more":
        state["extra.weight"] = torch.zeros(3)
    elif change == "shape":
        state["fc.weight"] = torch.zeros(3)
    elif change == "inside":
        return {"state_dict": state, "epoch": 3}
    elif change == "float":
        return Block().state_dict()
    elif change == "converted":
        return ao.convert(source.eval()).state_dict()
    elif change == "list":
        return [1]
    return state


REFUSED = {
    "lacks": "the checkpoint has no fc.weight",
    "has more": "extra.weight has no place in the model.*strict=False",
    "shape": r"fc.weight is \(3,\), the model's \(10, 16\)",
    "inside": r"checkpoint\['state_dict'\]",
    "float": "no QAT checkpoint of torch.ao or MQBench.*load_state_dict",
    "converted": "converted model.*before torch.ao's convert",
    "list": "got list, expected the state dict",
}


@pytest.mark.parametrize("change", REFUSED)
@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor:UserWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_what_does_not_fit_is_refused_and_the_model_unchanged(change: str) -> None:
    state, model = faulty(change), ours(Block().train().fuse_model(), images())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=REFUSED[change]):
        qbench.load_qat_checkpoint(model, state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("change", ["lacks", "has more", "shape"])
def test_not_strict_loads_the_rest_and_reports(change: str) -> None:
    state, model = faulty(change), ours(Block().train().fuse_model(), images())
    report = qbench.load_qat_checkpoint(model, state, strict=False)
    assert torch.equal(model.conv1.weight, state["conv1.weight"])
    assert ("fc.weight" in {found.path for found in report.missing}) is (change == "lacks")
    assert len(report.keys) == len(state)


def test_another_width_is_refused_with_the_right_one() -> None:
    source, _ = pair("fbgemm")
    model = ours(Block().train().fuse_model(), images(), "qnnpack")
    with pytest.raises(ConfigError, match=r"codes are 0 … 127, the model's -128 … 127.*activation_bits=7"):
        qbench.load_qat_checkpoint(model, source.state_dict())
    report = qbench.load_qat_checkpoint(model, source.state_dict(), strict=False)
    assert not model.fc.output_quantizer.seen_data
    notes = {found.key: found.note for found in report.ignored}
    assert "activation_bits=7" in notes["fc.activation_post_process.scale"]


def test_an_unprepared_model_is_refused() -> None:
    source, _ = pair()
    with pytest.raises(PreparationError, match="was not made by prepare_qat"):
        qbench.load_qat_checkpoint(Block(), source.state_dict())
    waiting = qbench.prepare_qat(Block().train().fuse_model(), qconfig=qbench.get_qconfig())
    with pytest.raises(PreparationError, match="links of this model are not known yet"):
        qbench.load_qat_checkpoint(waiting, source.state_dict())


class TwoInputs(nn.Module):
    """Two stubs: which input is which cannot be told from a state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.quant_a, self.quant_b = ao.QuantStub(), ao.QuantStub()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.add = torch.ao.nn.quantized.FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        return self.add.add(self.a(self.quant_a(x)), self.b(self.quant_b(x * 2)))


def test_inputs_that_cannot_be_told_are_named_by_the_caller() -> None:
    x = images()
    source, model = trained(TwoInputs(), x), ours(TwoInputs(), x)
    report = qbench.load_qat_checkpoint(model, source.state_dict())
    notes = {found.key: found.note for found in report.ignored}
    assert "names={'quant_a': 'a.input_quantizers.0'}" in notes["quant_a.activation_post_process.scale"]
    assert {found.path for found in report.missing} == {"a.input_quantizers.0", "b.input_quantizers.0"}
    names = {"quant_a": "a.input_quantizers.0", "quant_b": "b.input_quantizers.0"}
    report = qbench.load_qat_checkpoint(model, source.state_dict(), names=names)
    assert report.missing == ()
    assert torch.equal(model.b.input_quantizers["0"].scale, source.quant_b.activation_post_process.scale[0])


@pytest.mark.parametrize("names", [{"nobody": "a.input_quantizers.0"}, {"quant_a": "nowhere"}])
def test_wrong_names_are_refused(names: dict[str, str]) -> None:
    x = images()
    source, model = trained(TwoInputs(), x), ours(TwoInputs(), x)
    with pytest.raises(ConfigError, match=r"'(nobody|nowhere)' is no quantizer of the (checkpoint|model); .* are"):
        qbench.load_qat_checkpoint(model, source.state_dict(), names=names)


def test_fx_mode_gives_weights_and_numbers_its_quantizers() -> None:
    quantize_fx = importlib.import_module("torch.ao.quantization.quantize_fx")
    x = images()
    source = quantize_fx.prepare_qat_fx(Block().train(), ao.get_default_qat_qconfig_mapping("qnnpack"), (x,))
    source(x)
    model = ours(Block().train().fuse_model(), x)
    report = qbench.load_qat_checkpoint(model, source.state_dict())
    assert torch.equal(model.conv1.weight, source.conv1.weight)
    assert torch.equal(model.conv2.bn.running_mean, source.conv2.bn.running_mean)
    notes = {found.key: found.note for found in report.ignored}
    assert "names={'activation_post_process_0'" in notes["activation_post_process_0.scale"]
    assert not model.fc.output_quantizer.seen_data
    names = {"activation_post_process_0": "conv1.input_quantizers.0"}
    qbench.load_qat_checkpoint(model, source.state_dict(), names=names)
    theirs = source.activation_post_process_0.scale[0]
    assert torch.equal(model.conv1.input_quantizers["0"].scale, theirs)


def symmetric(low: int, high: int) -> Any:
    act = ao.FakeQuantize.with_args(
        observer=ao.MovingAverageMinMaxObserver, quant_min=low, quant_max=high,
        dtype=torch.qint8, qscheme=torch.per_tensor_symmetric,
    )  # fmt: skip
    return ao.QConfig(activation=act, weight=ao.default_per_channel_weight_fake_quant)


@pytest.mark.parametrize(("low", "high"), [(-128, 127), (-127, 127)])
def test_symmetric_codes_keep_their_zero_point(low: int, high: int) -> None:
    x, qconfig = images(), symmetric(low, high)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))
    source = ao.QuantWrapper(copy.deepcopy(model)).train()
    source.qconfig = qconfig
    source = ao.prepare_qat(source)
    source(x)
    here = qbench.prepare_qat(ao.QuantWrapper(model), qconfig=qconfig, example_inputs=(x,))
    report = qbench.load_qat_checkpoint(here, source.state_dict())
    assert report.missing == ()
    quantizer = here.module[1].output_quantizer
    assert (quantizer.spec.qmin, int(quantizer.zero_point)) == (low, 0)
    assert torch.equal(quantizer.scale, source.module[1].activation_post_process.scale[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v2", "mobilenet_v3_large", "shufflenet_v2_x0_5", "googlenet", "inception_v3"]
)
def test_checkpoints_of_torchvision_models(name: str) -> None:
    factory = getattr(import_torchvision().models.quantization, name)
    options = {"init_weights": False, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    x, models = images(2, 96), []
    for _ in range(2):
        model = factory(weights=None, num_classes=10, **options).train()
        model.fuse_model(is_qat=True)
        models.append(model)
    source = trained(models[0], x, "qnnpack")
    model = ours(models[1], x, "qnnpack")
    report = qbench.load_qat_checkpoint(model, source.state_dict())
    assert isinstance(report, CheckpointReport)
    assert all("computes averages" in found.note for found in report.missing), report.missing
    state = source.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items() if key in state)
    model.eval()(x)  # every quantizer has a grid: one without would warn, and warnings are errors
