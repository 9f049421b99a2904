"""How many codes differ between the forms of whole models: trained, converted, reloaded, run by each runtime.

    python benchmarks/exactness/models.py --models resnet18 mobilenet_v2 --image-size 224 --out runs/exactness.json

Each model is trained a little on the real images of digits (weights and BatchNorm statistics move), converted, written
to files and compared on held-out images by `qbench.verify`, which reloads every file in a fresh process. A zero counts
only together with how varied the codes were that it is over.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qbench
from qbench import data
from qbench.export.files import write_text
from qbench.models import build_model
from qbench.observers import MinMaxObserver
from qbench.report.data import Verification

# Ten outputs an image would give too few codes to compare; the digits are the first ten classes.
OUTPUTS = 1000


def trained_model(name: str, image_size: int, steps: int, batch: int, seed: int) -> tuple[nn.Module, torch.Tensor]:
    """A QAT model after `steps` steps of SGD, in eval, and held-out images that no step saw, (batch, 3, size, size)."""
    torch.manual_seed(seed)
    images = data.load("digits", image_size)
    model = build_model(name, OUTPUTS)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            # Few steps: statistics that still lag would leave the codes in a corner of their range.
            module.momentum = 0.5
    loader = iter(data.batches(images.train, batch))
    held_out = next(iter(data.batches(images.held_out, batch)))[0]
    pixels, _ = next(loader)
    # The range of everything seen: a moving average would still stand at the first batches.
    qconfig = qbench.get_qconfig(observer=MinMaxObserver)
    model = qbench.prepare_qat(qbench.fuse(model), qconfig=qconfig, example_inputs=(pixels,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.002, momentum=0.9)
    for step in range(steps):
        if step == steps // 2:
            model.apply(qbench.freeze_bn_stats)  # ranges then cover what eval computes
        pixels, labels = next(loader)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.train()(pixels), labels).backward()
        optimizer.step()
    return model.eval(), held_out


def measure(name: str, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Counts of one model and one seed, as plain values."""
    started = time.perf_counter()
    model, images = trained_model(name, options.image_size, options.steps, options.batch, seed)
    program = qbench.convert(model, (images,))
    found = qbench.verify(model, program, (images,))
    print(f"\n{name}, seed {seed}, {options.image_size} px, {options.steps} steps of {options.batch} images\n{found}")
    return {"model": name, "seed": seed, **figures(found), "seconds": round(time.perf_counter() - started, 1)}


def figures(found: Verification) -> dict[str, Any]:
    """The figures of a verification as plain values."""
    return {
        "compared": {key: comparison.compared for key, comparison in found.comparisons.items()},
        "different": found.mismatches,
        "largest_step": found.largest_steps,
        "fewest_distinct_codes": min(spread.distinct for spread in found.spread),
        "largest_saturated_share": max(spread.saturated_share for spread in found.spread),
        "notes": list(found.notes),
    }


def main() -> None:
    """Measure what the command line asks for and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "mobilenet_v2"])
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/exactness.json"))
    options = parser.parse_args()
    rows = [measure(name, options, seed) for name in options.models for seed in options.seeds]
    settings = {"image_size": options.image_size, "steps": options.steps, "batch": options.batch}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    found = {**settings, "torch": torch.__version__, "rows": rows}
    print(f"\nwritten to {write_text(options.out, json.dumps(found, indent=2) + chr(10))}")


if __name__ == "__main__":
    main()
