"""How many codes differ between the forms of whole models: trained, converted, integer, run by each runtime.

    python benchmarks/exactness/models.py --out runs/exactness.jsonl

Each model is trained a little on the real images of digits (weights and BatchNorm statistics move), converted, written
to files and compared on held-out images by `qbench.verify`, which reloads every file in a fresh process and compares
the integer program with the runtime: outputs and the codes of every activation. A zero counts only together with how
varied the codes were that it is over. A model and seed that the output file already holds is not measured again.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qbench
from qbench import data
from qbench.models import build_model
from qbench.observers import MinMaxObserver
from qbench.report.data import Verification
from qbench.report.text import columns

# Ten outputs an image would give too few codes to compare; the digits are the first ten classes.
OUTPUTS = 1000
MODELS = (
    "resnet18",
    "resnet50",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "regnet_y_400mf",
    "shufflenet_v2_x1_0",
    "googlenet",
)


def trained_model(name: str, image_size: int, steps: int, batch: int, seed: int) -> tuple[nn.Module, torch.Tensor]:
    """A QAT model after `steps` steps of SGD, in eval, and held-out images that no step saw, (batch, 3, size, size)."""
    torch.manual_seed(seed)
    images = data.load("digits", image_size)
    model = build_model(name, OUTPUTS)
    head = getattr(model, "aux1", None)
    if head is not None:  # GoogLeNet's auxiliary heads only train
        model.aux_logits, model.aux1, model.aux2 = False, None, None
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            # Few steps: statistics that still lag would leave the codes in a corner of their range.
            module.momentum = 0.5
        if type(module).__name__ == "SqueezeExcitation":
            # As initialized, every gate of an image is nearly the same number; trained ones open and close.
            for layer in (module.fc1, module.fc2):
                layer.weight.data *= 5.0
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
        nn.utils.clip_grad_norm_(model.parameters(), 50.0)  # ResNet-50 diverges without
        optimizer.step()
    observe_again(model, [next(loader)[0], next(loader)[0]])
    return model.eval(), held_out


@torch.no_grad()
def observe_again(model: nn.Module, batches: list[torch.Tensor]) -> None:
    """Ranges of what the trained model computes: those of the first steps are many times wider after so few of them."""
    for module in model.modules():
        if isinstance(module, MinMaxObserver):
            module.min_val.fill_(torch.inf)
            module.max_val.fill_(-torch.inf)
    for pixels in batches:
        model.train()(pixels)


def measure(name: str, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Counts of one model and one seed, as plain values."""
    started = time.perf_counter()
    model, images = trained_model(name, options.image_size, options.steps, options.batch, seed)
    images = images[: options.images]
    program = qbench.convert(model, (images,))
    found = qbench.verify(model, program, (images,), options.runtimes)
    print(f"\n{name}, seed {seed}, {options.image_size} px, {options.steps} steps of {options.batch} images\n{found}")
    return {"model": name, "seed": seed, **figures(found), "seconds": round(time.perf_counter() - started, 1)}


def figures(found: Verification) -> dict[str, Any]:
    """The figures of a verification as plain values."""
    firsts = {key: found.first_different(key) for key in found.by_layer}
    return {
        "compared": {key: comparison.compared for key, comparison in found.comparisons.items()},
        "different": found.mismatches,
        "largest_step": found.largest_steps,
        "promises": found.promises,
        "first_different": {key: row.name for key, row in firsts.items() if row is not None},
        "inexact": {
            key: sorted({row.inexact for row in rows if row.inexact}) for key, rows in found.by_layer.items()
        },
        "fewest_distinct_codes": min(spread.distinct for spread in found.spread),
        "largest_saturated_share": max(spread.saturated_share for spread in found.spread),
        "not_varied": [spread.name for spread in found.spread if not spread.varied],
        "activations": len(found.spread),
        "cpu": list(found.cpu),
        "notes": list(found.notes),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Model × runtime × (codes, mismatches)."""
    keys = [key for key in rows[0]["compared"] if key != "parameters"] if rows else []
    lines = [("model", "seed", "parameters", *keys, "varied")]
    for row in rows:
        different, compared = row["different"], row["compared"]
        cells = [f"{different.get(key, '-')} of {compared.get(key, 0):,}" for key in ("parameters", *keys)]
        varied = f"{row['activations'] - len(row['not_varied'])} of {row['activations']}"
        lines.append((row["model"], str(row["seed"]), *cells, varied))
    return "\n".join(columns(lines))


def main() -> None:
    """Measure what the command line asks for; every row is appended to the output file when it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--images", type=int, default=8, help="held-out images that are compared, at most --batch")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime", "executorch"])
    parser.add_argument("--out", type=Path, default=Path("runs/exactness.jsonl"))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {key: getattr(options, key) for key in ("image_size", "steps", "batch", "images", "runtimes")}
    settings["torch"] = torch.__version__
    lines = options.out.read_text(encoding="utf-8").splitlines() if options.out.exists() else []
    rows = [row for row in map(json.loads, lines) if row["settings"] == settings]
    done = {(row["model"], row["seed"]) for row in rows}
    for name in options.models:
        for seed in options.seeds:
            if (name, seed) in done:
                continue
            rows.append({"settings": settings, **measure(name, options, seed)})
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            gc.collect()
    wanted = [row for row in rows if row["model"] in options.models and row["seed"] in options.seeds]
    print(f"\n{table(wanted)}\n\nrows in {options.out}")


if __name__ == "__main__":
    main()
