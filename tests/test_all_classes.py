"""Every QAT class goes the whole way; what computes in float is never left out of the report; the table of the docs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Calls, Gated, SmallNet, assert_exact, images
from nn.test_classes import example, float_modules, name
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import qbench
from qbench.fake_quantize import FakeQuantize
from qbench.graph.scale_preserving import is_scale_preserving
from qbench.mappings import QAT_CLASSES
from qbench.nn.qat.body import QatModule

PATTERNS = Path(__file__).parents[1] / "docs" / "patterns.md"

# The families that are new in kind: their conversion is tested always, that of all classes with the slow tests.
SOME = (
    *("qat.BatchNorm1d", "qat.FrozenBatchNorm2d", "intrinsic.BnReLU2d", "intrinsic.ConvTransposeBnReLU1d", "qat.Div"),
    *("qat.Stack", "qat.Interpolate", "qat.NormalizeLayer", "qat.LayerNorm", "qat.PReLU", "qat.Softmax"),
    *("qat.Embedding", "qat.EmbeddingBag", "qat.MatMul"),
)


def converted(qat: type[QatModule]) -> tuple[nn.Module, torch.export.ExportedProgram, tuple[Tensor, ...]]:
    """A model of one module, trained enough to have seen data, and its program."""
    inputs = example(qat)
    model = qbench.fuse(next(float_modules(qat)))
    model = qbench.prepare_qat(model, qconfig=qbench.get_qconfig(), example_inputs=inputs)
    model.train()
    for _ in range(2):
        model(*inputs)
    model.eval()
    return model, qbench.convert(model, inputs), inputs


@pytest.mark.parametrize(
    "qat",
    [pytest.param(kind, marks=() if name(kind) in SOME else pytest.mark.slow, id=name(kind)) for kind in QAT_CLASSES],
)
def test_eval_is_the_program(qat: type[QatModule]) -> None:
    model, program, inputs = converted(qat)
    assert_exact(model, program, *inputs)
    integer = qbench.integer_model(model, inputs, dynamic_shapes=None)
    # What has no integer form is named, with the module's path or a node; nothing raises.
    assert all(found.reason for found in integer.report.left_float)
    assert integer(*inputs).shape == model(*inputs).shape


@pytest.mark.slow
@pytest.mark.parametrize("qat", QAT_CLASSES, ids=name)
def test_onnx_runtime_gives_the_codes_of_the_program(qat: type[QatModule], tmp_path: Path) -> None:
    model, program, inputs = converted(qat)
    if name(qat) == "qat.AdaptiveAvgPool3d":
        with pytest.raises(qbench.errors.ExportError, match="_adaptive_avg_pool3d"):
            qbench.export.to_onnx(program, tmp_path / "model.onnx")
        return
    qbench.export.to_onnx(program, tmp_path / "model.onnx")
    session = qbench.export.onnx.open_session(tmp_path / "model.onnx")
    names = [given.name for given in session.get_inputs()]
    (found,) = session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))
    quantizer: Any = model.output_quantizer
    steps = ((torch.from_numpy(found) - program.module()(*inputs)) / quantizer.scale).abs().round()
    assert steps.max() <= 1 and (steps > 0).float().mean() < 0.01  # float arithmetic may cross the middle of a step


# Nothing is left in float in silence.


class Careless(nn.Module):
    """Computes in float wherever there is no module for it, behind and before quantized layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)
        self.bilinear = nn.Bilinear(4, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sin(x.clamp(-1, 1).sqrt().nan_to_num()) + 0.1
        y = self.conv(x).exp().log1p().mean((2, 3))
        y = torch.cumsum(self.head(y) / y.norm(), 0)
        return self.bilinear(y, torch.where(y > 0, y, y * 2)).erf()


FORWARDS = {
    "careless": Careless,
    "residual": SmallNet,
    "gated": Gated,
    "normalised": lambda: Calls(lambda m, x: m.c(F.normalize(m.c(x)) ** 3), c=nn.Conv2d(3, 3, 1)),
    "squeezed": lambda: Calls(lambda m, x: torch.sum(m.c(x), 1).std(-1), c=nn.Conv2d(3, 3, 1)),
}


@pytest.mark.filterwarnings("ignore:prepare_qat leaves:qbench.errors.QBenchWarning")
@pytest.mark.parametrize("fused", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", FORWARDS)
def test_every_operator_that_computes_in_float_is_named(case: str, fused: bool) -> None:
    model = FORWARDS[case]()
    model = qbench.prepare_qat(
        qbench.fuse(model) if fused else model, qconfig=qbench.get_qconfig(), example_inputs=(images(),)
    )
    model.train()(images())
    named = {found.operator for found in qbench.preparation_report(model).float_operations}
    inside = {path for path, part in model.named_modules() if isinstance(part, (QatModule, FakeQuantize))}
    program = torch.export.export(model.eval(), (images(),), strict=False)
    seen = 0
    for node in program.graph.nodes:
        owners = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
        computes = node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
        if not computes or not inside.isdisjoint(owners):
            continue
        for operator in dispatched(node):
            seen += 1
            assert operator in named, f"{operator} in {node.target} of {owners} is not in the report"
    assert (seen > 0) == (not fused or case in ("careless", "normalised", "squeezed"))


class Dispatched(TorchDispatchMode):
    """Names of the operators that compute real values from real values."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        leaves = [leaf for leaf in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        is_real = isinstance(out, Tensor) and out.is_floating_point() and any(t.is_floating_point() for t in leaves)
        if is_real and not is_scale_preserving(func, args, kwargs):
            self.names.append(str(func._overloadpacket))
        return out


def dispatched(node: fx.Node) -> list[str]:
    """What an operator of a program, which may be a composite one, is dispatched to."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
    with Dispatched() as mode:
        node.target(*args, **kwargs)  # type: ignore[operator]
    return mode.names


# The documentation's table.


def test_the_table_of_the_documentation_names_every_class() -> None:
    text = PATTERNS.read_text(encoding="utf-8")
    table = text[text.index("## What there is") :]
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    listed = {found for row in rows for found in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert listed == {kind.__name__ for kind in QAT_CLASSES}
