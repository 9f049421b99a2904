"""Every rule on a small program: what it emits, that the codes are ONNX Runtime's, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from qdq_programs import INPUT, OUTPUT, export, fake_quantize, import_quietly, make_layer
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.errors import ConfigError, PassError
from qbench.passes import FUSION_RULES, fuse_qdq

SECOND = (0.031, -11, -128, 127, torch.int8)
POSITIVE = (0.013, -128, -128, 127, torch.int8)
FINE = (0.005, -20, -128, 127, torch.int8)
NARROW = (0.3, 1, -8, 7, torch.int8)
UNSIGNED = (0.02, 131, 0, 255, torch.uint8)


class Call(nn.Module):
    """`q(call(dq(q(x)), …))` on one grid per input."""

    def __init__(self, call: Callable[..., Any], *grids: tuple, output: tuple = OUTPUT) -> None:
        super().__init__()
        self.call, self.grids, self.output = call, grids or (INPUT,), output

    def forward(self, *inputs: Tensor) -> Any:
        real = [fake_quantize(x, grid) for x, grid in zip(inputs, self.grids, strict=True)]
        result = self.call(*real)
        if isinstance(result, tuple):
            return tuple(fake_quantize(part, self.output) for part in result)
        return fake_quantize(result, self.output)


IMAGE = (2, 6, 8, 8)
GATE = (2, 6, 1, 1)
DEEP = (4, 16, 8, 8)
BOTH = (INPUT, SECOND)

# name: (model, input shapes, rule, operator that takes over)
CASES: dict[str, tuple[nn.Module, tuple[tuple[int, ...], ...], str, str]] = {
    "add": (Call(torch.add, *BOTH), (IMAGE, IMAGE), "elementwise", "add_q8ta_q8ta_q8to"),
    "add relu": (
        Call(lambda a, b: F.relu(a + b), *BOTH, output=POSITIVE), (IMAGE, IMAGE), "elementwise", "add_q8ta_q8ta_q8to"
    ),
    "mul by a gate": (Call(torch.mul, *BOTH), (IMAGE, GATE), "elementwise", "mul_q8ta_q8ta_q8to"),
    "sub": (Call(torch.sub, *BOTH), (IMAGE, IMAGE), "elementwise", "sub_q8ta_q8ta_q8to"),
    "cat": (Call(lambda a, b: torch.cat([a, b], 1), *BOTH), (IMAGE, IMAGE), "cat", "cat_q8ta_q8to"),
    "cat on one grid": (
        Call(lambda a, b: torch.cat([a, b], 1), INPUT, INPUT, output=INPUT), (IMAGE, IMAGE), "cat", "cat_q8ta_q8to"
    ),
    "global average": (
        Call(lambda x: F.adaptive_avg_pool2d(x, 1), output=FINE), (DEEP,), "average", "global_avg_pool_q8ta_q8to"
    ),
    "mean": (Call(lambda x: x.mean([2, 3]), output=FINE), (DEEP,), "average", "global_avg_pool_q8ta_q8to"),
    "average pool": (Call(lambda x: F.avg_pool2d(x, 3, 2, 1)), (IMAGE,), "average", "avg_pool2d_q8ta_q8to"),
    "adaptive average to a part": (Call(lambda x: F.adaptive_avg_pool2d(x, 4)), (IMAGE,), "average", "avg_pool2d"),
    "hardswish": (Call(F.hardswish), (IMAGE,), "table", "unary_q8ta_q8to"),
    "hardsigmoid": (Call(F.hardsigmoid, output=FINE), (IMAGE,), "table", "unary_q8ta_q8to"),
    "sigmoid": (Call(torch.sigmoid, output=FINE), (IMAGE,), "table", "unary_q8ta_q8to"),
    "silu": (Call(F.silu), (IMAGE,), "table", "unary_q8ta_q8to"),
    "tanh": (Call(torch.tanh), (IMAGE,), "table", "unary_q8ta_q8to"),
    "leaky relu": (Call(lambda x: F.leaky_relu(x, 0.2)), (IMAGE,), "table", "unary_q8ta_q8to"),
    "relu on one grid": (Call(F.relu, output=INPUT), (IMAGE,), "clamp", "unary_q8ta_q8to"),
    "relu6 on two grids": (Call(F.relu6), (IMAGE,), "clamp", "unary_q8ta_q8to"),
    "max pool": (Call(lambda x: F.max_pool2d(x, 3, 2, 1), output=INPUT), (IMAGE,), "view", "max_pool2d_q8ta"),
    "max pool with a ceiling": (
        Call(lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True), output=INPUT), (IMAGE,), "view", "max_pool2d_q8ta"
    ),
    "views": (
        Call(lambda x: x.flatten(1).reshape(-1, 6, 64).transpose(1, 2), output=INPUT), (IMAGE,), "view", "transpose"
    ),
    "zero pad": (Call(lambda x: F.pad(x, (1, 2, 0, 1)), output=INPUT), (IMAGE,), "view", "pad"),
    "dropout in eval": (
        Call(lambda x: F.dropout(x, training=False).flatten(1), output=INPUT), (IMAGE,), "view", "flatten"
    ),
    "dropout in place, in eval": (
        Call(lambda x: F.dropout(x, training=False, inplace=True).flatten(1), output=INPUT), (IMAGE,), "view", "flatten"
    ),
    "chunk": (Call(lambda x: x.chunk(2, 1), output=INPUT), (IMAGE,), "view", "chunk"),
    "nearest": (
        Call(lambda x: F.interpolate(x, size=(16, 16)), output=INPUT), (IMAGE,), "view", "upsample_nearest2d"
    ),
    "a narrow range": (Call(torch.add, *BOTH, output=NARROW), (IMAGE, IMAGE), "elementwise", "add_q8ta_q8ta_q8to"),
    "unsigned codes": (
        Call(torch.add, UNSIGNED, UNSIGNED, output=UNSIGNED), (IMAGE, IMAGE), "elementwise", "add_q8ta_q8ta_q8to"
    ),
}  # fmt: skip


def make(case: str) -> tuple[nn.Module, list[Tensor], str, str]:
    torch.manual_seed(len(case))
    model, shapes, rule, operator = CASES[case]
    return model, [torch.randn(shape) * 2 for shape in shapes], rule, operator


def leaves(values: Any) -> list[np.ndarray]:
    return [value.detach().numpy() for value in (values if isinstance(values, (tuple, list)) else (values,))]


@pytest.mark.parametrize("case", CASES)
def test_the_rule_fuses_and_nothing_is_left_in_float(case: str) -> None:
    model, inputs, rule, operator = make(case)
    program = export(model, *inputs)
    report = fuse_qdq(program, target="onnxruntime")
    assert rule in report.by_rule, str(report)
    assert report.integer and not report.missed, [str(miss) for miss in report.missed]
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert any(operator in name for name in called)
    assert not fuse_qdq(program, target="onnxruntime").fused
    step = model.output[0]
    for ours, float_form in zip(leaves(program.module()(*inputs)), leaves(model(*inputs)), strict=True):
        assert np.abs(ours - float_form).max() <= step * 1.01
        assert np.unique(ours).size > 12


@pytest.mark.parametrize("case", CASES)
def test_codes_are_those_of_onnx_runtime(case: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from qbench.export import to_onnx
    from qbench.export.runtimes import run_onnx

    model, inputs, _, _ = make(case)
    program = export(model, *inputs)
    to_onnx(program, tmp_path / "model.onnx")
    fuse_qdq(program, target="onnxruntime")
    (theirs,) = run_onnx(tmp_path / "model.onnx", [[x.numpy() for x in inputs]], 1)
    ours = leaves(program.module()(*inputs))
    assert sum(int((a != b).sum()) for a, b in zip(ours, theirs, strict=True)) == 0
    assert len(ours) == len(theirs)


# name: (model, input shapes, words of the refusal)
REFUSED: dict[str, tuple[nn.Module, tuple[tuple[int, ...], ...], str]] = {
    "alpha": (Call(lambda a, b: torch.add(a, b, alpha=2), *BOTH), (IMAGE, IMAGE), "alpha is 2"),
    "a quotient": (Call(lambda x: torch.div(x, 1.5, rounding_mode="floor")), (IMAGE,), "it rounds its quotient"),
    "a mean over channels": (Call(lambda x: x.mean([1])), (IMAGE,), r"a mean over dims \[1\]"),
    "windows of several sizes": (Call(lambda x: F.adaptive_avg_pool2d(x, 3)), (IMAGE,), "windows of several sizes"),
    "a fill that is not 0": (
        Call(lambda x: F.pad(x, (1, 1), value=1.0), output=INPUT), (IMAGE,), "it does not keep the grid: a fill"
    ),
    "an unknown operator": (Call(torch.cumsum, output=OUTPUT), (IMAGE,), "no rule starts at this operator"),
    "a float reader": (Call(lambda x: (F.hardswish(x) + F.hardswish(x).exp())), (IMAGE,), "is read by aten::"),
    "in place": (Call(lambda x: x.add_(x), output=OUTPUT), (IMAGE,), "no rule starts at|writes to"),
}  # fmt: skip
REFUSED["an unknown operator"][0].call = lambda x: torch.cumsum(x, 1)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_stays_in_float_with_its_reason(case: str) -> None:
    model, shapes, reason = REFUSED[case]
    inputs = [torch.randn(shape) for shape in shapes]
    program = export(model, *inputs)
    before = program.module()(*inputs)
    report = fuse_qdq(program, target="onnxruntime")
    assert not report.integer
    assert any(re.search(reason, str(entry)) for entry in (*report.left_float, *report.missed)), str(report)
    # What is quantized anew may move by one step where the division of the input rounds to the other side.
    assert float((program.module()(*inputs) != before).float().mean()) < 0.02


@pytest.mark.parametrize("scale", [1e-7, 1e9], ids=str)
@pytest.mark.parametrize(
    "call",
    [lambda x: F.adaptive_avg_pool2d(x, 1), lambda x: x.mean((2, 3)), lambda x: F.avg_pool2d(x, 8)],
    ids=["adaptive", "mean", "one window"],
)
def test_an_average_that_the_runtime_would_refuse_while_it_runs_stays_in_float(
    call: Callable[[Tensor], Tensor], scale: float, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    from qbench.export import to_onnx
    from qbench.export.runtimes import run_onnx

    images = torch.randn(DEEP) * 3
    program = export(Call(call, output=(scale, 3, -128, 127, torch.int8)), images)
    before = program.module()(images)
    report = to_onnx(program, tmp_path / "model.onnx")
    assert [node.op for node in report.float_nodes] == ["ReduceMean"]
    ((theirs,),) = run_onnx(tmp_path / "model.onnx", [[images.numpy()]], 1)
    assert np.array_equal(theirs, before.numpy()), "both ends of the range, or zero"
    report = fuse_qdq(program, target="onnxruntime")
    assert not report.integer and "s / (s_out · count) is" in str(report)
    assert torch.equal(program.module()(images), before)


def test_a_target_without_arithmetic_is_refused_with_those_that_have_one() -> None:
    model, inputs, _, _ = make("add")
    with pytest.raises(ConfigError, match=r"target neutron has no stated arithmetic.*onnxruntime, xnnpack, tosa"):
        fuse_qdq(export(model, *inputs), target="neutron")


def test_a_program_that_does_not_say_its_target_needs_one() -> None:
    model, inputs, _, _ = make("add")
    with pytest.raises(ConfigError, match=r"fuse_qdq\(program, target='onnxruntime'\)"):
        fuse_qdq(export(model, *inputs))


def test_something_else_is_refused() -> None:
    with pytest.raises(PassError, match="expected a torch"):
        fuse_qdq(nn.Linear(2, 2), target="onnxruntime")  # type: ignore[arg-type]


def test_only_the_given_rules_are_applied() -> None:
    model, inputs, _, _ = make("add")
    boundary = tuple(rule for rule in FUSION_RULES if rule.name == "boundary")
    report = fuse_qdq(export(model, *inputs), boundary, target="onnxruntime")
    assert report.by_rule == {"boundary": 3} and [entry.op for entry in report.left_float] == ["aten.add.Tensor"]


def test_a_dynamic_batch_stays_dynamic() -> None:
    layer, x = make_layer("conv2d")
    model = nn.Sequential(layer, nn.MaxPool2d(2), nn.Flatten()).eval()
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=False)
    fuse_qdq(program, target="xnnpack")
    for size in (1, 2, 5):
        assert program.module()(torch.randn(size, *x.shape[1:])).shape[0] == size


@pytest.mark.slow
@pytest.mark.parametrize("per_channel", [True, False])
def test_programs_of_the_pt2e_flow(per_channel: bool) -> None:
    import warnings

    quantizer = import_quietly("executorch.backends.xnnpack.quantizer.xnnpack_quantizer")
    ao = import_quietly("torchao.quantization.pt2e.quantize_pt2e")
    pt2e = import_quietly("torchao.quantization.pt2e")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.second, self.linear = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(512, 10)

        def forward(self, x: Tensor) -> Tensor:
            y = F.max_pool2d(torch.relu(self.bn(self.first(x))), 2)
            return self.linear(torch.flatten(torch.relu(self.second(y) + y), 1))

    torch.manual_seed(0)
    x = torch.randn(4, 3, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = quantizer.get_symmetric_quantization_config(is_qat=True, is_per_channel=per_channel)
        module = torch.export.export(Net(), (x,), strict=False).module()
        module = ao.prepare_qat_pt2e(module, quantizer.XNNPACKQuantizer().set_global(config))
        for _ in range(3):
            module(x)
        pt2e.move_exported_model_to_eval(module)
        module = ao.convert_pt2e(module)
    before = module(x)
    report = fuse_qdq(module, target="xnnpack")
    assert report.by_rule == {"boundary": 1, "convolution": 2, "view": 2, "elementwise": 1, "linear": 1}
    assert report.integer and not report.missed
    step = next(node.args[1] for node in reversed(module.graph.nodes) if "dequantize" in str(node.target))
    assert float((module(x) - before).abs().max()) <= 2.01 * step


def test_a_layer_and_its_class_are_documented() -> None:
    """The page on fusion lists every rule by its name."""
    page = (Path(__file__).parents[2] / "docs" / "fusion.md").read_text(encoding="utf-8")
    assert [rule.name for rule in FUSION_RULES if f"| `{rule.name}` |" not in page] == []


