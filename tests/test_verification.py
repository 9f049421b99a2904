"""verify: it counts nothing on a right program, something on every wrong one, and refuses what cannot be compared."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Branchy, SmallNet, TwoHeads, images, is_q, prepared, randomise_statistics
from torch import nn
from torch.export import ExportedProgram

import qbench
from qbench import verification
from qbench.errors import ExportError, MissingDependencyError, VerificationError
from qbench.export.runtimes import RUNTIMES
from qbench.nn.qat.layer import QatLayer
from qbench.passes.fusion_report import FloatOperator
from qbench.verification import flow, forms

# torch.export's own deepcopy of a program.
pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning")

Pair = tuple[nn.Module, ExportedProgram]


@pytest.fixture(scope="module")
def small() -> Pair:
    torch.manual_seed(0)
    model = prepared(randomise_statistics(SmallNet()), images(8))
    return model, qbench.convert(model, (images(8),))


def layers_of(model: nn.Module) -> dict[str, QatLayer]:
    return {path: module for path, module in model.named_modules() if isinstance(module, QatLayer)}


def test_what_trained_with_channels_last_is_deployed_as_everything_else() -> None:
    """Files have contiguous memory: XNNPACK refused such weights, and read inputs in the order of the example."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3)
    model = randomise_statistics(nn.Sequential(*layers)).to(memory_format=torch.channels_last)
    x = images(8, size=16).contiguous(memory_format=torch.channels_last)
    model = prepared(model, x)
    program = qbench.convert(model, (x,))
    assert all(layer.weight.is_contiguous(memory_format=torch.channels_last) for layer in layers_of(model).values())
    stored = [value for value in program.state_dict.values() if value.ndim == 4]
    assert len(stored) == 2 and all(value.is_contiguous() for value in stored)
    found = qbench.verify(model, program, [(images(8, size=16, seed=3),)])
    for key in ("parameters", "eval_vs_program", "integer_vs_onnxruntime", "integer_vs_executorch"):
        assert found.comparisons[key].compared > 500 and found.exact[key], key


def test_everything_is_compared_and_what_must_be_0_is_0() -> None:
    """The one run of both runtimes here; whole images are put out, so that many codes are compared."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3)
    )
    batches = [(images(8, size=32, seed=seed),) for seed in (3, 4)]
    model = prepared(randomise_statistics(model), images(8, size=32))
    program = qbench.convert(model.train(), (images(8, size=32),))
    modes = [module.training for module in model.modules()]
    found = qbench.verify(model, program, batches)
    assert [module.training for module in model.modules()] == modes
    values = 2 * 8 * 8 * 13 * 13
    keys = ["parameters", "eval_vs_program", "program_vs_onnxruntime", "program_vs_executorch"]
    integer = ["integer_vs_onnxruntime", "integer_vs_executorch"]
    assert list(found.mismatches) == list(found.comparisons) == [*keys, *integer]
    for key in integer:
        # Codes of the input, of both layers, and the output's values: every one.
        assert found.exact[key] and found.promises[key]
        inside = {row.name: row.compared for row in found.by_layer[key]}
        assert inside == {"0.inputs.0": 2 * 8 * 3 * 32 * 32, "0": 2 * 8 * 8 * 30 * 30, "4": values, "output": values}
        assert found.comparisons[key].compared == sum(inside.values())
        assert found.first_different(key) is None and f"integer/{key.rpartition('_')[2]}" in found.timings
    assert found.kept and found.doubts == {} and found.cpu
    assert sum("x64quantprecision=1" in note for note in found.notes) == 1
    assert sum("0 of" in note and "ships" in note for note in found.notes) == 2
    assert found.exact["parameters"]
    assert found.exact["eval_vs_program"]
    codes = sum(p.numel() for name, p in model.named_parameters() if name in ("0.weight", "4.weight")) + 8 + 8
    assert [found.comparisons[key].compared for key in keys] == [codes, values, values, values]
    for key in keys[2:]:
        assert found.comparisons[key].share < 0.5
        assert found.largest_steps[key] <= 1
    assert {layer.name for layer in found.layers} == {"0.weight", "0.bias", "4.weight", "4.bias"}
    assert {spread.name for spread in found.spread} == {"0", "4"}
    assert all(spread.varied for spread in found.spread)
    text = str(found)
    assert all(word in text for word in ("ONNX Runtime", "ExecuTorch", "exact", f"{codes:,}", "distinct"))
    assert found.seconds > 0


# What verify must see. Each row changes one thing in a right program.


def _bump_weight(program: ExportedProgram) -> None:
    codes = program.state_dict["conv2.weight_codes"].view(-1)
    codes[5] = codes[5] + (-1 if codes[5] > 0 else 1)


def _bump_bias(program: ExportedProgram) -> None:
    bias = program.state_dict["fc.bias"].detach()
    scale = program.state_dict["fc.weight_scale"] * _scale_before(program, "linear")
    bias[3] = (torch.round(bias[3] / scale[3]) + 1) * scale[3]


def _move_bias(program: ExportedProgram) -> None:
    """To what the nearest code is the same for: as a bias that was left in float."""
    bias = program.state_dict["conv1.bias"].detach()
    bias[2] += 0.3 * program.state_dict["conv1.weight_scale"][2] * _scale_before(program, "conv2d")


def _scale_before(program: ExportedProgram, name: str) -> float:
    (node,) = (node for node in program.graph.nodes if node.name == name)
    return float(node.args[0].args[1])


def _change_scale(program: ExportedProgram) -> None:
    """Of the last layer's output: nothing but values can show it."""
    *_, last = (node for node in program.graph.nodes if is_q(node))
    for node in (last, *last.users):
        node.args = (node.args[0], node.args[1] * 1.01, *node.args[2:])
    program.graph_module.recompile()


def _change_weight_scale(program: ExportedProgram) -> None:
    program.state_dict["conv1.weight_scale"].mul_(1.0005)


# Change → how many of each comparison must differ: exactly this many, or "some". One step of a bias may or may not
# reach a code of the output.
TAMPERED: dict[str, tuple[Callable[[ExportedProgram], None], int | str, str]] = {
    "a weight code": (_bump_weight, 1, "some"),
    "a bias code": (_bump_bias, 1, "any"),
    "a bias off its grid": (_move_bias, 1, "any"),
    "the scale of an activation": (_change_scale, 0, "some"),
    "the scale of a weight": (_change_weight_scale, "some", "some"),
}


LAYERS = {"a weight code": ["conv2.weight"], "a bias code": ["fc.bias"], "a bias off its grid": ["conv1.bias"]}


@pytest.mark.parametrize("name", TAMPERED)
def test_it_sees(small: Pair, name: str) -> None:
    model, program = small
    tamper, parameters, values = TAMPERED[name]
    changed = copy.deepcopy(program)
    with torch.no_grad():
        tamper(changed)
    found = qbench.verify(model, changed, (images(8, seed=3),), runtimes=())
    for expected, count in (
        (parameters, found.mismatches["parameters"]),
        (values, found.mismatches["eval_vs_program"]),
    ):
        assert expected == "any" or (count > 0 if expected == "some" else count == expected)
    different = [layer.name for layer in found.layers if layer.different]
    assert different == LAYERS.get(name, different)


def test_it_sees_a_model_that_was_trained_on(small: Pair) -> None:
    model, program = small
    later = copy.deepcopy(model)
    with torch.no_grad():
        later.conv3.weight.mul_(-1)
    counted = {c.name: c for c in verification.compare_parameters(layers_of(later), program)}
    assert counted["conv3.weight"].different > 0.9 * counted["conv3.weight"].compared
    assert all(c.exact for name, c in counted.items() if name != "conv3.weight" and name != "conv3.bias")


def test_a_runtime_that_is_missing_is_noted(small: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(program: Any, path: Any) -> None:
        raise MissingDependencyError("onnxruntime is not installed: pip install 'qbench[onnx]'")

    monkeypatch.setitem(RUNTIMES, "onnxruntime", dataclasses.replace(RUNTIMES["onnxruntime"], export=missing))
    model, program = small
    found = qbench.verify(model, program, (images(8, seed=3),), runtimes=("onnxruntime",))
    assert list(found.mismatches) == ["parameters", "eval_vs_program"]
    assert any("onnxruntime was not compared" in note and "pip install" in note for note in found.notes)
    assert "pip install" in str(found)


def test_several_outputs_are_compared() -> None:
    torch.manual_seed(0)
    model = prepared(TwoHeads(), images())
    program = qbench.convert(model, (images(),))
    found = qbench.verify(model, program, (images(seed=3),), runtimes=())
    out = model(images())
    assert found.eval_vs_program.compared == out["out"].numel() + out["aux"].numel()
    assert found.exact == {"parameters": True, "eval_vs_program": True}


def _other(path: str = "conv1") -> ExportedProgram:
    model = prepared(Branchy() if path == "conv1" else nn.Sequential(nn.Conv2d(3, 4, 3)), images())
    return qbench.convert(model, (images(),))


x = images(8, seed=3)
REFUSED: dict[str, tuple[Callable[[Pair], Any], type[Exception], tuple[str, ...]]] = {
    "a float model": (
        lambda small: qbench.verify(SmallNet(), small[1], (x,)),
        (VerificationError, qbench.errors.PreparationError),
        (),
    ),
    "a fused model": (
        lambda small: qbench.verify(qbench.fuse(SmallNet()), small[1], (x,)),
        (VerificationError, qbench.errors.PreparationError),
        (),
    ),
    "the program of a model with other layers": (
        lambda small: qbench.verify(small[0], _other("0"), (x,)),
        VerificationError,
        ("'0'", "qbench.convert(model, inputs)"),
    ),
    "the program of a model with layers of other shapes": (
        lambda small: qbench.verify(small[0], qbench.convert(_wider(), (x,)), (x,)),
        VerificationError,
        ("conv1.weight has shape (8, 3, 3, 3)", "(4, 3, 3, 3)"),
    ),
    "a float program": (
        lambda small: qbench.verify(small[0], torch.export.export(SmallNet().eval(), (x,)), (x,)),
        VerificationError,
        ("without codes", "qbench.convert(model, inputs)"),
    ),
    "a tensor": (
        lambda small: qbench.verify(*small, x),
        VerificationError,
        ("inputs is a tensor", "verify(model, program, (x,))"),
    ),
    "a list of tensors": (
        lambda small: qbench.verify(*small, [x]),
        VerificationError,
        ("a batch is Tensor", "[(x,), …]"),
    ),
    "a tuple of tuples": (lambda small: qbench.verify(*small, ((x,),)), VerificationError, ("a batch", "[(x,), …]")),
    "numbers": (lambda small: qbench.verify(*small, (1.0,)), VerificationError, ("a batch is tuple",)),
    "nothing": (lambda small: qbench.verify(*small, []), VerificationError, ("no inputs were given",)),
    "an unknown runtime": (
        lambda small: qbench.verify(*small, (x,), runtimes=("tensorrt",)),
        ExportError,
        ("no runtime 'tensorrt'", "'onnxruntime'"),
    ),
    "inputs of another shape": (
        lambda small: qbench.verify(*small, (images(3),), runtimes=()),
        ExportError,
        ("[3, 3, 12, 12]",),
    ),
}


def _wider() -> nn.Module:
    return prepared(SmallNet(4), x)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(small: Pair, name: str) -> None:
    call, kind, words = REFUSED[name]
    with pytest.raises(kind) as error:
        call(small)
    assert all(word in str(error.value) for word in words), error.value


def test_a_wrong_integer_operator_is_seen_and_named(
    small: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bias code off in the integer program: its layer is the first that differs, and the promise is broken."""
    pytest.importorskip("onnxruntime")
    fuse = forms.fuse_qdq

    def wrong(program: ExportedProgram, *, target: str) -> Any:
        report = fuse(program, target=target)
        with torch.no_grad():
            program.state_dict["conv2.bias"][3] += 200
        return report

    monkeypatch.setattr(forms, "fuse_qdq", wrong)
    model, program = small
    found = qbench.verify(model, program, (images(8, seed=3),), runtimes=("onnxruntime",))
    first = found.first_different("integer_vs_onnxruntime")
    assert first is not None and first.name == "conv2" and first.inexact == ""
    assert not found.promises["integer_vs_onnxruntime"] and not found.kept
    assert "a promised 0 is not 0 in conv2" in " ".join(str(found).split())


def test_a_difference_behind_a_float_operator_is_explained(small: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    fuse = forms.fuse_qdq

    def as_if_float(program: ExportedProgram, *, target: str) -> Any:
        """conv2 fused with a wrong bias, and reported as left in float."""
        report = fuse(program, target=target)
        with torch.no_grad():
            program.state_dict["conv2.bias"][3] += 200
        node = next(n for n in program.graph.nodes if n.op == "call_function" and "conv2.bias" in _stored(program, n))
        left = FloatOperator(node.name, "aten.conv2d", "conv2", "of a test")
        return dataclasses.replace(report, left_float=(left,))

    monkeypatch.setattr(forms, "fuse_qdq", as_if_float)
    model, program = small
    found = qbench.verify(model, program, (images(8, seed=3),), runtimes=("onnxruntime",))
    assert found.mismatches["integer_vs_onnxruntime"] > 0
    assert found.promises["integer_vs_onnxruntime"] and found.kept
    assert "onnxruntime: conv2 (aten.conv2d) stays in float: of a test" in " ".join(str(found).split())


def _stored(program: ExportedProgram, node: Any) -> set[str]:
    names = {**program.graph_signature.inputs_to_parameters, **program.graph_signature.inputs_to_buffers}
    return {names[source.name] for source in node.all_input_nodes if source.name in names}


def test_a_session_without_its_exact_setting_is_not_called_exact(small: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    model, program = small
    asked = dataclasses.replace(RUNTIMES["onnxruntime"], exact_settings=("session.no_such_setting=1",))
    monkeypatch.setitem(RUNTIMES, "onnxruntime", asked)
    monkeypatch.setattr(flow, "_has_vnni", lambda cpu: False)
    found = qbench.verify(model, program, (images(8, seed=3),), runtimes=("onnxruntime",))
    assert found.mismatches["integer_vs_onnxruntime"] == 0
    assert not found.exact["integer_vs_onnxruntime"] and not found.kept
    assert "not called exact, the session runs without session.no_such_setting=1" in " ".join(str(found).split())


def test_batches_are_taken_one_at_a_time_and_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A generator is never read ahead by more than the first batch, and parts of a batch count as the whole."""
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = prepared(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), images(8))
    batch = torch.export.Dim("batch", min=1, max=16)
    program = qbench.convert(model, (images(2),), dynamic_shapes=({0: batch},))
    alive: list[Any] = []

    def batches() -> Any:
        for seed in range(3):
            x = images(5, seed=seed)
            alive.append(weakref.ref(x))
            yield (x,)
            del x
            assert sum(ref() is not None for ref in alive) <= 1

    monkeypatch.setattr(forms, "CODES_AT_ONCE", 2 * (3 * 12 * 12 + 4 * 10 * 10))
    found = qbench.verify(model, program, batches(), runtimes=("onnxruntime",))
    rows = {row.name: row.compared for row in found.by_layer["integer_vs_onnxruntime"]}
    assert rows == {"0.inputs.0": 15 * 432, "0": 15 * 400, "output": 15 * 400} and found.kept
