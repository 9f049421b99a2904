"""Models written for torch.ao are prepared as they are: its wrappers, FloatFunctionals and stubs, names kept."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from models import images
from torch import Tensor, nn
from torch_ao_models import QUIET, Block, ao, functional, nni

import qbench
from qbench._torchvision import import_torchvision
from qbench.errors import PreparationError
from qbench.nn import intrinsic, ops
from qbench.nn.functional_calls import OPERATIONS
from qbench.nn.qat.body import QatModule
from qbench.torch_ao import adopt

pytestmark = QUIET


def prepared(model: nn.Module, x: Tensor, **options: Any) -> nn.Module:
    return qbench.prepare_qat(model, qconfig=qbench.get_qconfig(), example_inputs=(x,), **options)


def kinds(model: nn.Module) -> dict[str, str]:
    return {path: type(module).__name__ for path, module in model.named_modules() if isinstance(module, QatModule)}


EXPECTED = {
    "conv1": "ConvBnReLU2d",
    "conv2": "ConvBn2d",
    "skip_add": "AddReLU",
    "gate": "Mul",
    "join": "Cat",
    "sigmoid": "Sigmoid",
    "pool": "AdaptiveAvgPool2d",
    "fc": "Linear",
}


@pytest.mark.parametrize("fuse", [Block.fuse_model, qbench.fuse], ids=["torch.ao fuses", "qbench fuses"])
def test_every_part_becomes_its_qat_form_under_its_own_name(fuse: Any) -> None:
    x = images()
    model = prepared(fuse(Block().train()), x)
    assert kinds(model) == EXPECTED
    report = qbench.preparation_report(model)
    assert (report.left_in_float, report.float_operations, report.unreached) == ((), (), ())
    assert [found.path for found in report.float_inputs] == ["conv1"]
    assert not [module for module in model.modules() if type(module).__module__.startswith("torch.ao")]


def test_both_ways_of_fusing_give_the_same_model() -> None:
    float_model, x = Block().train(), images()
    by_torch_ao = prepared(copy.deepcopy(float_model).fuse_model(), x)
    by_qbench = prepared(qbench.fuse(float_model), x)
    assert list(by_torch_ao.state_dict()) == list(by_qbench.state_dict())
    assert torch.equal(by_torch_ao(x), by_qbench(x))
    assert torch.equal(by_torch_ao.eval()(x), by_qbench.eval()(x))


def test_the_float_model_is_untouched_and_its_output_kept() -> None:
    model, x = Block().eval(), images()
    before, expected = {name: type(module) for name, module in model.named_modules()}, model(x)
    assert torch.equal(qbench.fuse(model, example_inputs=(x,))(x), expected)
    prepared(qbench.fuse(model), x)
    assert {name: type(module) for name, module in model.named_modules()} == before


@pytest.mark.slow
def test_the_program_has_the_values_of_the_trained_model() -> None:
    x = images()
    model = prepared(Block().train().fuse_model(), x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    found = qbench.verify(model.eval(), qbench.convert(model, (x,)), (x,), runtimes=())
    assert found.exact == {"parameters": True, "eval_vs_program": True}


def test_copies_and_pickles_compute_the_same() -> None:
    x = images()
    model = prepared(Block().train().fuse_model(), x)
    model(x)
    model.eval()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))


CALLS = {
    "add": lambda f, x, y: f.add(x, y),
    "add_relu": lambda f, x, y: f.add_relu(x, y),
    "mul": lambda f, x, y: f.mul(x, y),
    "cat": lambda f, x, y: f.cat([x, y], 1),
    "add_scalar": lambda f, x, y: f.add_scalar(x, 2.0),
    "mul_scalar": lambda f, x, y: f.mul_scalar(x, 0.5),
    "matmul": lambda f, x, y: f.matmul(x, y),
}


class Pair(nn.Module):
    """One FloatFunctional between two convolutions and a third."""

    def __init__(self, *calls: str, traceable: bool = True) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.f = functional()
        self.calls, self.traceable = calls, traceable

    def forward(self, x: Tensor) -> Tensor:
        if not self.traceable and x.sum() > 1e9:
            return x
        y = x
        for call in self.calls:
            y = CALLS[call](self.f, self.a(x), self.b(x))
        return y


@pytest.mark.parametrize("traceable", [True, False])
@pytest.mark.parametrize("call", CALLS)
def test_operation_is_found_by_tracing_and_by_running(call: str, traceable: bool) -> None:
    x, model = images(), Pair(call, traceable=traceable).eval()
    adopted, notes = adopt(copy.deepcopy(model), [(x,)])
    assert (type(adopted.f), notes) == (getattr(ops, OPERATIONS[call]), {})
    assert torch.equal(adopted(x), model(x))
    qat = qbench.prepare_qat(model, qconfig=qbench.get_qconfig(observer="min_max"), example_inputs=(x,))
    report = qbench.preparation_report(qat)
    assert (report.left_in_float, [found for found in report.float_operations if found.reads]) == ((), [])
    qat.train()(x)
    step = float(qat.f.output_quantizer.scale)
    assert float((qat.eval()(x) - model(x)).detach().abs().max()) < 20 * step


def test_what_was_never_seen_stays_and_is_named() -> None:
    model = Pair("add", traceable=False)
    qat = qbench.prepare_qat(model, qconfig=qbench.get_qconfig())
    left = {found.path: found.reason for found in qbench.preparation_report(qat).left_in_float}
    assert "example_inputs" in left["f"]


def test_what_fuse_could_not_tell_is_found_by_prepare_and_not_reported() -> None:
    x, model = images(), Pair("mul", traceable=False)
    qat = prepared(qbench.fuse(model), x)
    left = {found.path for found in qbench.preparation_report(qat).left_in_float}
    assert (kinds(qat)["f"], "f" in left) == ("Mul", False)


def test_a_functional_that_nobody_calls_says_so_when_it_is_called() -> None:
    x, model = images(), Pair()
    qat = qbench.prepare_qat(model, qconfig=qbench.get_qconfig(), example_inputs=(x,))
    assert qbench.preparation_report(qat).left_in_float == ()
    with pytest.raises(PreparationError, match=r"add.*was not called when the model was prepared.*qbench\.nn\.Add"):
        qat.f.add(x, x)


def test_one_functional_for_two_operations_is_refused() -> None:
    with pytest.raises(PreparationError, match="f: this FloatFunctional serves add, mul; one quantizer"):
        prepared(Pair("add", "mul"), images())


def test_an_override_names_a_functional() -> None:
    x, rules = images(), [qbench.Override("skip_add", exclude=True), qbench.Override("fc", weight_bits=4)]
    model = qbench.prepare_by_target(Block().train(), example_inputs=(x,), overrides=rules)
    assert kinds(model) == {path: kind for path, kind in EXPECTED.items() if path != "skip_add"}
    assert (type(model.skip_add), model.fc.weight_quantizer.spec.bits) == (ops.AddReLU, 4)


def test_an_operation_refuses_the_method_of_another() -> None:
    x = images()
    with pytest.raises(PreparationError, match=r"qbench\.nn\.Mul"):
        qbench.nn.Add().mul(x, x)
    with pytest.raises(PreparationError, match=r"joins along 1; put a qbench\.nn\.Cat\(2\)"):
        qbench.nn.Cat(1).cat([x, x], 2)


def test_hooks_and_a_qconfig_of_a_wrapper_stay() -> None:
    x, seen = images(), []
    model = Block().train().fuse_model()
    model.conv1.register_forward_hook(lambda module, args, out: seen.append(type(module).__name__))
    model.conv2.qconfig = None
    model = prepared(model, x)
    seen.clear()
    model(x)
    assert seen == ["ConvBnReLU2d"]
    assert isinstance(model.conv2, intrinsic.ConvBn2d)


WRAPPERS = [
    (nni.ConvReLU2d(nn.Conv2d(3, 4, 1), nn.ReLU()), ["ConvReLU2d"]),
    (nni.ConvBn2d(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), ["ConvBn2d"]),
    (nni.LinearReLU(nn.Linear(12, 4), nn.ReLU()), ["LinearReLU"]),
    (nni.LinearTanh(nn.Linear(12, 4), nn.Tanh()), ["Linear", "Tanh"]),
    (nni.LinearLeakyReLU(nn.Linear(12, 4), nn.LeakyReLU()), ["Linear", "LeakyReLU"]),
]


@pytest.mark.parametrize(("wrapper", "expected"), WRAPPERS, ids=lambda value: type(value).__name__)
def test_a_wrapper_at_the_root(wrapper: nn.Module, expected: list[str]) -> None:
    assert list(kinds(prepared(wrapper, images())).values()) == expected


def test_what_torch_ao_has_prepared_is_refused_with_the_way_out() -> None:
    model = Block().train().fuse_model()
    model.qconfig = ao.get_default_qat_qconfig("qnnpack")
    done = ao.prepare_qat(model)
    with pytest.raises(PreparationError, match=r"torch.ao has prepared.*load_qat_checkpoint"):
        qbench.prepare_qat(done, qconfig=qbench.get_qconfig())


def test_a_model_without_torch_ao_is_handed_back_as_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    parts = list(model)
    adopted, notes = adopt(model)
    assert (adopted is model, list(model) == parts, notes) == (True, True, {})


MODELS = [
    "resnet18", "mobilenet_v2", "mobilenet_v3_large", "shufflenet_v2_x0_5", "googlenet", "inception_v3", "resnet50",
    "resnext101_32x8d", "resnext101_64x4d", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "shufflenet_v2_x2_0",
]  # fmt: skip


def quantizable(name: str) -> Any:
    models = import_torchvision().models.quantization
    options = {"init_weights": False, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    return getattr(models, name)(weights=None, num_classes=10, **options).train()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["fuse_model", "fuse"])
@pytest.mark.parametrize("name", MODELS)
def test_torchvision_quantizable_models_are_prepared_unmodified(name: str, way: str) -> None:
    model, x = quantizable(name), images(2, 96)
    if way == "fuse_model":
        model.fuse_model(is_qat=True)
    else:
        model = qbench.fuse(model)
    model = prepared(model, x)
    report = qbench.preparation_report(model)
    assert (report.left_in_float, report.unreached) == ((), ())
    if way == "fuse":
        assert report.float_operations == ()
    layers = sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in quantizable(name).modules())
    assert sum(hasattr(module, "weight_quantizer") for module in model.modules()) == layers


@pytest.mark.slow
def test_every_quantizable_model_of_torchvision_is_in_the_list() -> None:
    torchvision = import_torchvision()
    names = torchvision.models.list_models(module=torchvision.models.quantization)
    assert sorted(name.removeprefix("quantized_") for name in names) == sorted(MODELS)


@pytest.mark.slow
def test_a_quantizable_model_trains_deploys_and_counts_zero() -> None:
    """Parameters 0, eval against program 0, integer program against ONNX Runtime 0, at 96 pixels."""
    model, x = quantizable("resnet18"), images(4, 96)
    model.fuse_model(is_qat=True)
    model.qconfig = ao.get_default_qat_qconfig("onednn")
    model = qbench.prepare_qat(model, example_inputs=(x,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.arange(4)).backward()
        optimizer.step()
    found = qbench.verify(model.eval(), qbench.convert(model, (x,)), (x,), runtimes=("onnxruntime",))
    print(found)
    # The Q/DQ program itself is not promised to give the runtime's codes.
    promised = {name: found.exact[name] for name in ("parameters", "eval_vs_program", "integer_vs_onnxruntime")}
    assert promised == dict.fromkeys(promised, True), str(found)
