"""One network of the zoo, the whole way, in a process of its own: `python -m benchmarks.zoo.measure NAME OUT.json`.

    float → explicit attention → fuse → prepare → 2 steps → eval → convert → bias pass → ONNX → ONNX Runtime

What is found is written as one JSON object; a step that fails is named with its error, and what was found before stays.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qbench
from benchmarks.exactness.models import figures, observe_again
from benchmarks.zoo.networks import build
from qbench import data
from qbench.export.files import write_text
from qbench.export.program import copy_program
from qbench.observers import MinMaxObserver

STEPS = 2
#: Parameters from which one image makes a batch.
_LARGE = 150_000_000


class Measurement:
    """The row of one network, step by step.

    Attributes:
        row: What was found so far, as plain values.
    """

    def __init__(self, name: str) -> None:
        self.row: dict[str, Any] = {"model": name, "seconds": {}, "torch": torch.__version__}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a step; a failure in it is part of the row."""
        started = time.perf_counter()
        try:
            yield
        except Exception as error:
            self.row["failed"] = f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:400]}"
            raise
        finally:
            self.row["seconds"][name] = round(time.perf_counter() - started, 1)

    def run(self) -> None:
        """The whole way."""
        torch.manual_seed(0)
        with self.step("build"):
            model, size = build(self.row["model"])
            count = sum(parameter.numel() for parameter in model.parameters())
            batches = _images(size, 1 if count > _LARGE else 2)
            self.row.update(image_size=size, parameters=count, batch=len(batches[0]))
        with self.step("fuse"):
            fused = self._fused(model, batches[0])
        del model
        with self.step("prepare"):
            qconfig = qbench.get_qconfig(observer=MinMaxObserver)
            model = qbench.prepare_qat(fused, inplace=True, qconfig=qconfig, example_inputs=(batches[0],))
            self.row.update(_covered(model))
        with self.step("train"):
            _train(model, batches[:STEPS])
        with self.step("convert"):
            program = qbench.convert(model.eval(), (batches[-1],))
        with self.step("bias pass"):
            report = qbench.passes.quantize_bias(copy_program(program))
            self.row["biases"] = {"quantized": len(report.quantized), "refused": len(report.refused)}
        with self.step("verify"):
            self.row.update(figures(qbench.verify(model, program, (batches[-1],), ("onnxruntime",))))

    def _fused(self, model: nn.Module, images: Tensor) -> nn.Module:
        explicit = qbench.explicit_attention(model)
        self.row["attention_replaced"] = len(list(explicit.modules())) != len(list(model.modules()))
        fused = qbench.fuse(explicit)
        with torch.no_grad():
            first, second = (_tensors(m.eval()(images)) for m in (explicit, fused))
        self.row["fuse_is_exact"] = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        return fused


def _images(size: int, batch: int) -> list[Tensor]:
    """Batches of real images, (batch, 3, size, size): to train with, and one that is held out."""
    images = data.load("digits", size)
    train = iter(data.batches(images.train, batch))
    return [*(next(train)[0] for _ in range(STEPS)), next(iter(data.batches(images.held_out, batch)))[0]]


def _covered(model: nn.Module) -> dict[str, Any]:
    found = qbench.quantization_coverage(model)
    counts = ("batch_norms", "folded", "affine", "layers", "quantized_layers", "linked_layers", "quantized_parameters")
    return {
        **{name: getattr(found, name) for name in counts},
        "left_in_float": dict(Counter(f"{left.kind}: {left.reason}" for left in found.left_in_float)),
        "computed_in_float": dict(Counter(operation.operator for operation in found.float_operations)),
        "unreached": len(found.unreached),
    }


def _train(model: nn.Module, batches: list[Tensor]) -> None:
    """Steps of SGD towards the mean of what the model gives: weights, statistics and ranges move."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.5  # two steps: statistics that lag would leave the codes in a corner of their range
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for images in batches:
        optimizer.zero_grad(set_to_none=True)
        outputs = _tensors(model.train()(images))
        loss = torch.stack([(tensor - tensor.mean()).square().mean() for tensor in outputs]).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    model.apply(qbench.freeze_bn_stats)
    observe_again(model, batches)


def _tensors(outputs: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(outputs)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def main() -> None:
    """Measure one network and write its row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    measurement = Measurement(options.name)
    try:
        measurement.run()
    finally:
        peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        measurement.row["peak_mib"] = peak // 1024
        write_text(options.out, json.dumps(measurement.row))


if __name__ == "__main__":
    main()
