"""A profile of a model: its rows are its layers, its columns add up, and it leaves everything as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Calls
from torch import Tensor, nn

import qbench
from qbench.errors import ConfigError, NumericsError, PreparationError
from qbench.profiling.timeline import OPTIMIZER, OUTSIDE
from qbench.report.profile import TrainingProfile

X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def residual(m: nn.Module, x: Tensor) -> Tensor:
    y = m.stem(x)
    for _ in range(2):  # the same layers twice
        y = m.relu(m.bn(m.conv(y)) + y)
    y = m.drop(torch.fft.rfft(y).real)
    return m.head(y.mean((2, 3)))


def net() -> nn.Module:
    torch.manual_seed(1)
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2))
    parts = {"conv": nn.Conv2d(8, 8, 3, padding=1), "bn": nn.BatchNorm2d(8), "relu": nn.ReLU(inplace=True)}
    return Calls(residual, stem=stem, **parts, drop=nn.Dropout(0.1), head=nn.Linear(8, 4))


def tiny() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))


def prepared(model: nn.Module, **options: Any) -> nn.Module:
    return qbench.prepare_qat(qbench.fuse(model), qconfig=qbench.get_qconfig(**options), example_inputs=(X,))


def test_rows_are_the_layers_and_add_up_to_the_step() -> None:
    found = qbench.profile_qat(net(), example_inputs=(X,), rounds=1)
    kinds = {row.path: (row.kind, row.qat_kind) for row in found.layers}
    assert kinds["stem.0"] == ("ConvBnReLU2d", "ConvBnReLU2d")
    assert kinds["stem.3"] == ("MaxPool2d", "MaxPool2d")
    assert {"conv", "bn", "drop", "head"} <= set(kinds) and "stem.1" not in kinds
    for row in found.layers:
        for cost in (row.in_float, row.in_qat):
            assert cost.forward > 0 and cost.backward > 0 and cost.update == 0
    for cost in (found.outside.in_float, found.outside.in_qat):
        assert cost.forward > 0 and cost.backward > 0 and cost.update == 0
    for cost in (found.optimizer.in_float, found.optimizer.in_qat):
        assert cost.update > 0 and cost.forward == cost.backward == cost.saved == 0
    assert (found.outside.path, found.optimizer.path) == (OUTSIDE, OPTIMIZER)
    for side, step in (("in_float", found.float_step), ("in_qat", found.qat_step)):
        costs = [getattr(row, side) for row in (*found.layers, found.outside, found.optimizer)]
        assert getattr(found.total, side).seconds == pytest.approx(sum(cost.seconds for cost in costs))
        assert step.saved == sum(cost.saved for cost in costs) > 0
        assert min(step.forward, step.backward, step.update) > 0
    assert found.ratio[0] == found.ratio[1] == pytest.approx(found.qat_step.seconds / found.float_step.seconds)


def test_saved_bytes_do_not_depend_on_rounds_and_fall_with_low_memory() -> None:
    once, again = (qbench.profile_qat(net(), example_inputs=(X,), rounds=rounds) for rounds in (1, 3))
    low = qbench.profile_qat(net(), example_inputs=(X,), rounds=1, low_memory=True)
    assert [(row.path, row.in_float.saved, row.in_qat.saved) for row in once.rows] == [
        (row.path, row.in_float.saved, row.in_qat.saved) for row in again.rows
    ]
    assert low.float_step.saved == once.float_step.saved
    assert low.qat_step.saved < once.qat_step.saved
    assert again.rounds == 3 and again.ratio[0] <= again.ratio[1] <= again.ratio[2]


def test_switches_reach_the_qat_form_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[bool, bool]] = set()
    forward = qbench.nn.intrinsic.qat.ConvBnReLU2d.forward

    def noting(layer: Any, *args: Any) -> Tensor:
        seen.add((layer.low_memory, layer.fast_path))
        layer.fast_path = False  # nothing is to be compiled here
        return forward(layer, *args)

    model = tiny()
    qat = prepared(model)
    monkeypatch.setattr(qbench.nn.intrinsic.qat.ConvBnReLU2d, "forward", noting)
    qbench.profile_qat(model, qat, example_inputs=(X,), rounds=1, low_memory=True, fast_path=True)
    assert (True, True) in seen
    assert not any(getattr(layer, "low_memory", False) or getattr(layer, "fast_path", False) for layer in qat.modules())


def test_nothing_is_changed() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.conv(x.mul_(2))

    torch.manual_seed(3)
    model = Calls(forward, conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4)).eval()
    qat = prepared(model).train()
    images, before = X.clone(), [copy.deepcopy(one.state_dict()) for one in (model, qat)]
    random = torch.get_rng_state()
    with torch.no_grad():
        qbench.profile_qat(model, qat, example_inputs=(images,), rounds=1)
    assert torch.equal(torch.get_rng_state(), random) and torch.equal(images, X)
    for one, state in zip((model, qat), before, strict=True):
        after = one.state_dict()
        assert after.keys() == state.keys() and all(torch.equal(after[key], state[key]) for key in state)
        assert all(parameter.grad is None for parameter in one.parameters())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in one.modules())
    assert not model.training and qat.training


def test_a_model_in_training_keeps_the_modes_of_its_modules() -> None:
    model, seen = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Dropout()), []
    model[1].eval()
    model[1].register_forward_pre_hook(lambda module, inputs: seen.append(module.training))
    for in_training, mode_of_dropout in ((True, False), (False, True)):
        model = model if in_training else model.eval()
        qat = prepared(model)  # its links are recorded in eval
        seen.clear()
        qbench.profile_qat(model, qat, example_inputs=(X,), rounds=1)
        assert seen and set(seen) == {mode_of_dropout}


def test_a_model_that_was_prepared_without_fusing_is_compared_with_itself() -> None:
    model = tiny()
    with pytest.warns(qbench.errors.QBenchWarning, match="BatchNorm"):
        qat = qbench.prepare_qat(model, qconfig=qbench.get_qconfig(), example_inputs=(X,))
    found = qbench.profile_qat(model, qat, example_inputs=(X,), rounds=1)
    assert [(row.path, row.kind) for row in found.layers][:3] == [("0", "Conv2d"), ("1", "BatchNorm2d"), ("2", "ReLU")]


def test_a_module_at_two_places_has_one_row() -> None:
    head = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(head), nn.Sequential(head))
    found = qbench.profile_qat(model, example_inputs=(X,), rounds=1)
    assert [row.path for row in found.layers] == ["0", "1.0"]


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor, number: int) -> dict[str, Any]:
        return {"found": (self.conv(x), number)}


@pytest.mark.parametrize(
    ("model", "inputs", "options", "path"),
    [
        (lambda: nn.Linear(12, 3), (X,), {}, "(the model)"),
        (tiny, (X,), {"qconfig": qbench.get_qconfig("xnnpack", method="lsq")}, "0"),
        (tiny, (X,), {"qconfig": qbench.get_qconfig(activation_bits=None, weight_bits=4)}, "0"),
        (tiny, (X,), {"autocast": torch.bfloat16}, "0"),
        (lambda: qbench.fuse(tiny()), (X,), {"loss": lambda y: y.abs().sum()}, "0"),
        (TwoInputs, (X, 3), {}, "conv"),
    ],
    ids=["a layer alone", "learned", "weight-only", "autocast", "fused", "other outputs"],
)
def test_other_models(
    model: Callable[[], nn.Module], inputs: tuple[Any, ...], options: dict[str, Any], path: str
) -> None:
    found = qbench.profile_qat(model(), example_inputs=inputs, rounds=1, **options)
    assert found.layers[0].path == path and found.layers[0].in_qat.backward > 0
    assert TrainingProfile.from_json(found.to_json()) == found


def own_qconfig() -> nn.Module:
    model = tiny()
    model.qconfig = qbench.get_qconfig()
    model[0].qconfig = None
    return model


def test_the_models_own_qconfig_holds() -> None:
    found = qbench.profile_qat(own_qconfig(), example_inputs=(X,), rounds=1)
    assert [row.path for row in found.layers] == ["0.0", "0.1", "0.2", "3"]


class Broken(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        raise NumericsError("its own words")


def compiled_in_place() -> nn.Module:
    model = tiny()
    model[0].compile()
    return model


@pytest.mark.parametrize(
    ("model", "options", "kind", "says"),
    [
        (tiny, {"example_inputs": ()}, ConfigError, r"got none, expected one tuple .*example_inputs=\(images,\)"),
        (tiny, {"example_inputs": None}, ConfigError, "got none, expected one tuple"),
        (tiny, {"example_inputs": X}, ConfigError, "got a Tensor, expected one tuple"),
        (tiny, {"example_inputs": (X[:, :2],)}, ConfigError, r"float model cannot .* \(4, 2, 12, 12\): .*channels"),
        (tiny, {"example_inputs": (X, X)}, ConfigError, "float model cannot take .* positional argument"),
        (tiny, {"rounds": 0}, ConfigError, "rounds=0: expected at least 1"),
        (tiny, {"loss": lambda y: y}, ConfigError, r"the loss is a tensor \(4, 2, 10, 10\); expected a scalar"),
        (tiny, {"loss": lambda y: 3.0}, ConfigError, "the loss is float; expected a scalar"),
        (lambda: Calls(lambda m, x: 3, c=nn.Linear(1, 1)), {}, ConfigError, "returns int without a tensor that"),
        (lambda: tiny, {}, ConfigError, "model is function; expected a torch.nn.Module"),
        (lambda: torch.compile(tiny()), {}, ConfigError, "model is compiled, .* give the module before torch.compile"),
        (compiled_in_place, {}, ConfigError, "model is compiled"),
        (nn.ReLU, {}, ConfigError, "ReLU has no parameter that is trained"),
        (lambda: nn.DataParallel(tiny()), {}, ConfigError, "wrapped in DataParallel; give model.module"),
        (lambda: prepared(tiny()), {}, ConfigError, r"model has QAT modules; expected profile_qat\(float_model, qat_"),
        (tiny, {"qat_model": 3}, ConfigError, "qat_model is int; expected a torch.nn.Module"),
        (tiny, {"qat_model": tiny()}, PreparationError, "nothing is quantized in Sequential; qat_model is what"),
        (lambda: Broken(1, 1), {}, NumericsError, "its own words"),
        (tiny, {"qat_model": prepared(net())}, ConfigError, "qat_model has a .* the fused float model nothing; give"),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1)),
            {"qat_model": prepared(tiny())},
            ConfigError,
            "has a ConvBnReLU2d at 0, the fused float model a Conv2d; give the model that it was prepared from",
        ),
        (
            tiny,
            {"qat_model": prepared(tiny()), "qconfig": qbench.get_qconfig()},
            ConfigError,
            "has its qconfig already; give one of the two",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_bad_input_is_refused(
    model: Callable[[], Any], options: dict[str, Any], kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind, match=says):
        qbench.profile_qat(model(), **{"example_inputs": (X,), **options})


def test_nothing_to_quantize_is_refused() -> None:
    model = Calls(lambda m, x: m.head(x, x), head=nn.Bilinear(12, 12, 2))
    with pytest.raises(PreparationError, match="nothing to quantize"):
        qbench.profile_qat(model, example_inputs=(X,))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_the_columns_add_up_as_well() -> None:
    state = torch.cuda.get_rng_state()
    found = qbench.profile_qat(net().cuda(), example_inputs=(X.cuda(),), rounds=3)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert all(row.in_qat.forward > 0 and row.in_qat.backward > 0 for row in found.layers)
    assert found.total.in_qat.seconds == pytest.approx(sum(row.in_qat.seconds for row in found.rows))
    assert 0 < found.qat_step.seconds < 10 and found.settings["device"] == torch.cuda.get_device_name()
