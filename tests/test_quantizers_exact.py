"""Every quantizer in each role, trained on handwritten digits: trained, converted, exported, and run by ONNX Runtime.

What must be 0: parameters that differ between model and program, values that differ between QAT eval and program, codes
that differ between the integer program and ONNX Runtime.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qbench
from qbench import data

pytest.importorskip("onnxruntime")
pytest.importorskip("sklearn.datasets")

pytestmark = pytest.mark.filterwarnings("ignore:the bias of .* layer:qbench.errors.QBenchWarning")


def network() -> nn.Module:
    """Every kind of layer: convolution, depthwise and pointwise ones and linear layers, with BatchNorm and without."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6(),
        nn.Conv2d(16, 24, 1), nn.BatchNorm2d(24), nn.MaxPool2d(2),
        nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(24 * 16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


ACTIVATION = ("lsq", "lsq_plus", "pact", "dorefa", "dsq", "tqt")
WEIGHT = ("lsq", "dorefa", "dsq", "tqt")
ROLES: dict[str, dict[str, object]] = {
    **{f"activation {name}": {"activation_method": name} for name in ACTIVATION},
    **{f"weight {name}": {"weight_method": name} for name in WEIGHT},
    **{f"both {name}, 4 bits": {"method": name, "weight_bits": 4, "activation_bits": 6} for name in ACTIVATION},
    **{f"observer {name}": {"observer": name} for name in ("mse", "quantile", "percentile", "kl", "power_of_two")},
    **{f"weight observer {name}": {"weight_observer": name} for name in ("mse", "quantile", "power_of_two")},
    "lsq from mse, 16-bit bias": {"method": "lsq", "observer": "mse", "weight_observer": "mse", "bias_bits": 16},
}


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels to train on, and held-out ones."""
    found = data.load("digits", image_size=8)
    parts = []
    for part in (found.train, found.held_out):
        samples = [part[i] for i in range(len(part))]
        parts += [torch.stack([image for image, _ in samples]), torch.tensor([int(label) for _, label in samples])]
    return parts[0], parts[1], parts[2], parts[3]


def trained(options: dict[str, object], digits: tuple[Tensor, ...], epochs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    images, labels = digits[:2]
    config = qbench.get_qconfig(**options)  # type: ignore[arg-type]
    model = qbench.prepare_qat(qbench.fuse(network()), qconfig=config, example_inputs=(images[:4],))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            if len(batch) < 2:
                continue
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval()


def accuracy(model: nn.Module, digits: tuple[Tensor, ...]) -> float:
    with torch.no_grad():
        return float((model(digits[2]).argmax(1) == digits[3]).float().mean())


def check(role: str, digits: tuple[Tensor, ...]) -> None:
    model = trained(ROLES[role], digits)
    held_out = digits[2][:256]
    program = qbench.convert(model, (held_out,))
    found = qbench.verify(model, program, (held_out,), runtimes=("onnxruntime",))
    score = accuracy(model, digits)
    print(f"\n{role}: accuracy {score:.1%}\n{found}")
    assert score > 0.6
    assert found.exact["parameters"] and found.exact["eval_vs_program"], found
    assert found.exact["integer_vs_onnxruntime"], found


def test_one_network_learns_and_is_exact(digits: tuple[Tensor, ...]) -> None:
    check("both lsq, 4 bits", digits)


@pytest.mark.slow
@pytest.mark.parametrize("role", [role for role in ROLES if role != "both lsq, 4 bits"])
def test_every_quantizer_in_every_role(role: str, digits: tuple[Tensor, ...]) -> None:
    check(role, digits)


@pytest.mark.slow
def test_learned_scales_are_no_worse_than_fixed_ones_at_few_bits(digits: tuple[Tensor, ...]) -> None:
    options = {"weight_bits": 2, "activation_bits": 3}
    models = [trained({**options, "method": method}, digits, epochs=6) for method in ("fixed", "lsq")]
    fixed, learned = (accuracy(model, digits) for model in models)
    print(f"\n2-bit weights, 3-bit activations: fixed {fixed:.1%}, LSQ {learned:.1%}")
    assert learned > fixed - 0.05
