"""Does it matter that training sees the bias error? Bias-aware against bias-blind training, everything else equal.

    python benchmarks/ablation.py --out runs/ablation.jsonl --summary docs/ablation.json

    aware   BN's batch statistics   y = BN(conv(x̂, Ŵ/k)) + (b̂ − b_f)        then, BN frozen   y = conv(x̂, Ŵ, b̂)
    blind   BN's batch statistics   y = BN(conv(x̂, Ŵ/k))                    then, BN frozen   y = conv(x̂, Ŵ, b_f)

Both are deployed as conv(x̂, Ŵ, b̂). A *view* is what training itself computes in eval: with b̂ where it was aware, with
b_f where it was blind. The blind form is a forward hook on each bias quantizer that hands its input on; the scales of
bias and weight, the ranges, the float start, the order of the images and the schedule are the same.

A cell is one training: net × bits × bias × aware or blind × seed. Each is a line of `--out` as soon as it is measured,
so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import itertools
import json
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from ablation_models import NETS
from ablation_report import MOST_SEEDS, summarize, tables
from torch import Tensor, nn

import qbench
from qbench import data, training
from qbench.data import ImageData
from qbench.errors import ConfigError
from qbench.export.files import write_text
from qbench.export.onnx import open_session
from qbench.fake_quantize import BiasQuantizer
from qbench.job import versions
from qbench.nn.qat.layer import QatLayer
from qbench.preparation import quantized_modules
from qbench.training import Score, Settings

# Bits and scale of a bias, by the name that the tables use.
BIASES = {
    "32 input·weight": (32, "input_weight"),
    "32 own": (32, "own"),
    "16 own": (16, "own"),
    "8 own": (8, "own"),
}
BITS = (8, 4)


@dataclass(frozen=True)
class Plan:
    """What all cells have in common.

    Attributes:
        image_size: Height and width in pixels.
        float_epochs: Passes of the float training.
        float_lr: Its highest learning rate.
        qat_epochs: Passes of the quantization-aware training.
        qat_lr: Its highest learning rate.
        onnx_seeds: For so many seeds, from the first one on, the ONNX file is written and run.
    """

    image_size: int = 8
    float_epochs: float = 20
    float_lr: float = 0.05
    qat_epochs: float = 6
    qat_lr: float = 0.01
    onnx_seeds: int = 2

    def float_training(self, seed: int) -> Settings:
        """How the float model is trained."""
        return Settings(epochs=self.float_epochs, lr=self.float_lr, seed=seed)

    def qat_training(self, seed: int) -> Settings:
        """How the prepared model is trained: ranges stand still from the middle on, BN soon after."""
        return Settings(
            epochs=self.qat_epochs,
            lr=self.qat_lr,
            schedule="cosine",
            freeze_observers_at=0.5,
            freeze_bn_at=0.6,
            seed=seed,
        )


@dataclass(frozen=True)
class Cell:
    """One training. The seed is that of the first weights, of the order of the images and of what is held out."""

    net: str
    bits: int
    bias: str
    aware: bool
    seed: int

    @property
    def qconfig(self) -> qbench.QConfig:
        """What the net is quantized to."""
        bias_bits, scale = BIASES[self.bias]
        return qbench.get_qconfig(
            weight_bits=self.bits, activation_bits=self.bits, bias_bits=bias_bits, bias_scale=scale
        )

    def __str__(self) -> str:
        kind = "aware" if self.aware else "blind"
        return f"{self.net:9} W{self.bits}A{self.bits}  bias {self.bias:15}  {kind}  seed {self.seed:2}"


@contextlib.contextmanager
def float_bias(model: nn.Module) -> Iterator[None]:
    """While this holds, the layers of a prepared model add their folded bias in float, `b̂ = b_f`.

    Only what a bias quantizer hands out changes: its scale and the floor that it sets to the weight's scale do not.
    """
    found = [module for module in model.modules() if isinstance(module, BiasQuantizer)]
    hooks = [module.register_forward_hook(lambda _module, args, _output: args[0]) for module in found]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def view(model: nn.Module, cell: Cell) -> contextlib.AbstractContextManager[None]:
    """The context in which the cell trains, and in which its training-time view is taken."""
    return contextlib.nullcontext() if cell.aware else float_bias(model)


@functools.lru_cache(maxsize=2)
def images_of(size: int, seed: int) -> ImageData:
    """The digits; each seed holds out another quarter."""
    return data.load("digits", size, split_seed=seed)


@functools.lru_cache(maxsize=2)
def float_start(net: str, seed: int, plan: Plan) -> tuple[nn.Module, Score]:
    """The trained float net that all cells of a net and a seed start from, and its score on the held-out images."""
    images = images_of(plan.image_size, seed)
    torch.manual_seed(seed)
    model = NETS[net]()
    training.fit(model, images.train, plan.float_training(seed), label="float", show_progress=False)
    return model, training.evaluate(model, data.batches(images.held_out, len(images.held_out)))  # type: ignore[arg-type]


def trained(cell: Cell, plan: Plan) -> nn.Module:
    """The prepared model of a cell after its training, in eval mode, without hooks."""
    images = images_of(plan.image_size, cell.seed)
    start, _ = float_start(cell.net, cell.seed, plan)
    fused = qbench.fuse(copy.deepcopy(start).eval()).train()
    model = qbench.prepare_qat(fused, qconfig=cell.qconfig, example_inputs=(images.example,))
    with view(model, cell):
        training.fit(model, images.train, plan.qat_training(cell.seed), label="QAT", show_progress=False)
    return model.eval()


@torch.no_grad()
def layer_outputs(model: nn.Module, pixels: Tensor) -> list[Tensor]:
    """Output of every quantized module, in order of execution; the last are the model's own, (images, classes)."""
    found: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _module, _args, output: found.append(output))
        for _, module in quantized_modules(model)
    ]
    try:
        model(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def bias_error_in_steps(model: nn.Module) -> float:
    """Mean of |b̂ − b_f| / s_out over the channels of all layers: the bias error in steps of the output's codes."""
    errors = []
    for _, layer in quantized_modules(model):
        if isinstance(layer, QatLayer):
            _, bias, _ = layer.quantized_parameters()
            errors.append((layer.parameter_codes().bias_value - bias).abs() / layer.output_quantizer.scale)
    return float(torch.cat(errors).mean())


def different(first: Tensor, second: Tensor) -> int:
    """How many codes differ; equal grids, so equal values are equal codes."""
    return int((first != second).sum())


def measure(cell: Cell, plan: Plan) -> dict[str, Any]:
    """Train a cell and measure it on all held-out images."""
    started = time.perf_counter()
    model = trained(cell, plan)
    images = images_of(plan.image_size, cell.seed)
    pixels, labels = next(iter(data.batches(images.held_out, len(images.held_out))))  # type: ignore[arg-type]
    with view(model, cell):
        seen = layer_outputs(model, pixels)
    deployed = layer_outputs(model, pixels)
    program = qbench.convert(model, (pixels,))
    with torch.no_grad():
        logits = program.module()(pixels)
    row = {
        **asdict(cell),
        "float": _score(float_start(cell.net, cell.seed, plan)[1]),
        "view": _score(_score_of(seen[-1], labels)),
        "deployed": _score(_score_of(logits, labels)),
        "codes": sum(output.numel() for output in deployed),
        "changed": sum(different(*pair) for pair in zip(seen, deployed, strict=True)),
        "output_codes": logits.numel(),
        "output_changed": different(seen[-1], logits),
        "decisions_changed": different(seen[-1].argmax(1), logits.argmax(1)),
        "eval_vs_program": different(deployed[-1], logits),
        "bias_error": bias_error_in_steps(model),
    }
    if cell.seed < plan.onnx_seeds:
        row["onnxruntime"] = _run_onnx(program, pixels, labels, logits)
    return {**row, "seconds": round(time.perf_counter() - started, 2)}


def _run_onnx(
    program: torch.export.ExportedProgram, pixels: Tensor, labels: Tensor, logits: Tensor
) -> dict[str, Any]:
    """Score of the ONNX file in ONNX Runtime, and the output codes in which it differs from the program."""
    with tempfile.TemporaryDirectory(prefix="qbench-ablation-") as folder:
        path = Path(folder) / "model.onnx"
        qbench.export.to_onnx(program, path)
        session = open_session(path, threads=1)
        (outputs,) = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})
    ran = torch.from_numpy(outputs)
    return {**_score(_score_of(ran, labels)), "changed": different(ran, logits)}


def _score_of(outputs: Tensor, labels: Tensor) -> Score:
    return training.evaluate(lambda _images: outputs, [(outputs, labels)])


def _score(score: Score) -> dict[str, float]:
    return {"top1": score.top1, "loss": score.loss}


class Results:
    """The lines of a JSON lines file: the first says under which plan, the others are cells.

    Args:
        path: The file; made if it does not exist.
        plan: Plan of this run.

    Raises:
        ConfigError: the file is of another plan.
    """

    def __init__(self, path: Path, plan: Plan) -> None:
        self.path = path
        header: dict[str, Any] = {"plan": asdict(plan)}
        lines = _whole_lines(path)
        if lines and lines[0]["plan"] != header["plan"]:
            raise ConfigError(
                f"{path} holds cells of the plan {lines[0]['plan']}, and this run's is {header['plan']}; give it a "
                "file of its own: --out runs/other.jsonl"
            )
        self.header = lines[0] if lines else {**header, "versions": versions(), "machine": platform.machine()}
        self.rows: list[dict[str, Any]] = lines[1:]
        path.parent.mkdir(parents=True, exist_ok=True)
        # What an interrupted run left of a line is dropped.
        write_text(path, "".join(json.dumps(line) + "\n" for line in (self.header, *self.rows)))

    def __contains__(self, cell: Cell) -> bool:
        wanted = asdict(cell)
        return any(all(row[key] == value for key, value in wanted.items()) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Keep a measured cell, on the disk too."""
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines that were written to their end."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def cells(nets: list[str], biases: list[str], bits: list[int], seeds: int) -> list[Cell]:
    """All cells, those of one float start together."""
    product = itertools.product(range(seeds), nets, bits, biases, (True, False))
    return [Cell(net, width, bias, aware, seed) for seed, net, width, bias, aware in product]


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, Plan]:
    """The command line."""
    plan = Plan()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--bits", nargs="+", type=int, choices=BITS, default=list(BITS))
    parser.add_argument("--biases", nargs="+", choices=BIASES, default=list(BIASES))
    parser.add_argument("--seeds", type=int, default=10, help=f"how many, 2 to {MOST_SEEDS}")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation.jsonl"), help="cells, one a line")
    parser.add_argument("--summary", type=Path, help="figures of all conditions (default: beside --out)")
    for name, value in asdict(plan).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = parser.parse_args(arguments)
    if not 2 <= options.seeds <= MOST_SEEDS:
        parser.error(f"--seeds {options.seeds}: expected 2 to {MOST_SEEDS}")
    return options, Plan(**{name: getattr(options, name) for name in asdict(plan)})


def main(arguments: list[str] | None = None) -> None:
    """Measure what is missing, write the summary and print the tables."""
    options, plan = parse(arguments)
    torch.set_num_threads(1)
    results = Results(options.out, plan)
    for cell in cells(options.nets, options.biases, options.bits, options.seeds):
        if cell not in results:
            row = measure(cell, plan)
            results.add(row)
            print(f"{cell}  top-1 {row['deployed']['top1']:.4f}  {row['seconds']:5.1f} s", flush=True)
    summary = {**results.header, "conditions": summarize(results.rows)}
    path = options.summary or options.out.with_suffix(".json")
    write_text(path, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    print(f"\n{tables(summary['conditions'])}\nwritten to {path}")


if __name__ == "__main__":
    main()
