"""Time and saved memory of a training step: every form of a network over its float twin, in one process, interleaved.

    step        zero_grad → forward → cross entropy → backward → SGD, on random images of a fixed size
    time        median over the rounds of (time of the form / time of float in the same round), with its quartiles
    saved       bytes of distinct storages that autograd saves for backward, without parameters, buffers and images;
                over those of float
    peak        most memory during a step, in a process of its own (`peaks`)

`benchmarks.speed.run` measures all networks, one process each; this command is for a quick look:

    python -m benchmarks.speed.train_step --models resnet18 mobilenet_v2 --sizes 8x128 16x224 --json train_step.json

In every round each form takes one step, so that what disturbs the machine disturbs them alike. A form that cannot be
made is listed with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.speed import memory
from benchmarks.speed.rows import LAYOUTS, Job, Row, machine
from benchmarks.speed.variants import FORMS, Images, float_network, made
from qbench.profiling import saved_for_backward

#: Forms that others are compared with, where both are measured in one process.
BASES = ("float", "float compiled", "qbench plain", "qbench fast")
#: What a form is compared with beside float.
_BASE_OF = {"qbench compiled": "float compiled", "qbench low memory": "qbench fast"}
#: A network that every form can be made of, to load the form's libraries with.
_SMALL, _SMALL_SIZE = "resnet18", {"batch": 2, "px": 32}


class Trainer:
    """A network and what a step of it needs.

    Args:
        model: In training mode.
        images: (batch, 3, px, px).
        labels: (batch,).
        amp: Whether the forward runs under autocast.

    Attributes:
        start_seconds: What making the form and its first two steps took, a compiler's work included.
    """

    start_seconds = 0.0

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, amp: bool) -> None:
        self.model, self.images, self.labels, self.amp = model, images, labels, amp
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def loss(self) -> Tensor:
        """One forward."""
        self.optimizer.zero_grad(set_to_none=True)
        kind = self.images.device.type
        with torch.autocast(kind, torch.float16 if kind == "cuda" else torch.bfloat16, enabled=self.amp):
            logits = self.model(self.images)
            logits = logits[0] if isinstance(logits, tuple) else logits
            return nn.functional.cross_entropy(logits, self.labels)

    def step(self) -> None:
        """One step."""
        self.loss().backward()
        self.optimizer.step()

    def seconds(self) -> float:
        """Time of one step."""
        _wait(self.images)
        started = time.perf_counter()
        self.step()
        _wait(self.images)
        return time.perf_counter() - started

    def saved_bytes(self) -> int:
        """What autograd saves for backward."""
        loss, total = saved_for_backward(self.loss, *self.model.parameters(), *self.model.buffers(), self.images)
        loss.backward()
        return total


def _wait(tensor: Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize()


class Setting(argparse.Namespace):
    """What the networks are run with."""

    batch: int
    px: int
    layout: str
    amp: bool
    device: str


def trainer(form: str, name: str, model: nn.Module, setting: Setting) -> Trainer:
    """A form of a float network that has taken two steps."""
    layout = LAYOUTS[setting.layout]
    torch.manual_seed(0)
    shape = (setting.batch, 3, setting.px, setting.px)
    images: Images = (torch.randn(shape, device=setting.device).contiguous(memory_format=layout),)
    labels = torch.randint(0, 1000, (setting.batch,), device=setting.device)
    started = time.perf_counter()
    found = Trainer(made(FORMS[form], name, model, images, layout), images[0], labels, setting.amp)
    found.step()
    found.step()
    found.start_seconds = time.perf_counter() - started
    return found


def trainers(name: str, forms: list[str], setting: Setting) -> tuple[dict[str, Trainer], dict[str, str]]:
    """The forms that can be made and have taken two steps, and why the others cannot."""
    torch.manual_seed(0)
    model = float_network(name).to(setting.device)
    found, refused = {}, {}
    for form in forms:
        try:
            found[form] = trainer(form, name, model, setting)
        except Exception as error:  # a peer may raise anything
            refused[form] = reason(error)
    return found, refused


def reason(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def measure(name: str, forms: list[str], setting: Setting, rounds: int) -> Iterator[Row]:
    """One row a form: its time, over each of `BASES` that is among the forms, and what it saves for backward."""
    found, refused = trainers(name, forms, setting)
    times: dict[str, list[float]] = {form: [] for form in found}
    for _ in range(rounds):
        for form, trainer in found.items():
            times[form].append(trainer.seconds())
    saved = {form: trainer.saved_bytes() for form, trainer in found.items() if "compiled" not in form}
    for form in forms:
        row = {"model": name, "form": form, **vars(setting)}
        if form in refused:
            yield {**row, "refused": refused[form]}
            continue
        over = {base: _ratio(times[form], times[base]) for base in BASES if base in times}
        low, middle, high = over["float"]
        row |= {"seconds": statistics.median(times[form]), "ratio": middle, "quartiles": [low, high], "over": over}
        row["start_seconds"] = found[form].start_seconds
        if form in saved:
            row |= {"saved_mib": saved[form] / 2**20, "saved_ratio": saved[form] / saved["float"]}
        yield row


def _ratio(own: list[float], base: list[float]) -> list[float]:
    """Lower quartile, median and upper quartile of the ratios of rounds."""
    ratios = [one / other for one, other in zip(own, base, strict=True)]
    return statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3


def steps(job: Job) -> Iterator[Row]:
    """The part `step`: every form in this process, interleaved, with those that they are compared with."""
    bases = [_BASE_OF[form] for form in job.forms if form in _BASE_OF]
    for row in measure(job.model, list(dict.fromkeys(["float", *bases, *job.forms])), _setting(job), job.rounds):
        yield job.row(row.pop("form"), **row)


def peaks(job: Job) -> Iterator[Row]:
    """The part `peak`: the most memory during a step of one form, to be measured in a process of its own.

    `above_mib` is what network, optimizer and step took: the peak without what was in use before they were made, when
    the libraries of the form had been loaded (but for the compiler, whose memory counts where it is used).
    """
    setting = _setting(job)
    for form in job.forms:
        try:
            if "compiled" not in form:
                trainer(form, _SMALL, float_network(_SMALL).to(job.device), Setting(**{**vars(setting), **_SMALL_SIZE}))
            memory.reset_peak(job.device)
            before = memory.in_use(job.device)
            found = trainer(form, job.model, float_network(job.model).to(job.device), setting)
            memory.reset_peak(job.device)
            found.step()
        except Exception as error:  # a peer may raise anything
            yield job.row(form, refused=reason(error))
            continue
        peak = memory.peak(job.device)
        yield job.row(form, peak_mib=peak, above_mib=peak - before)


def _setting(job: Job) -> Setting:
    return Setting(batch=job.batch, px=job.px, layout=job.layout, amp=job.amp, device=job.device)


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| network | batch × px | layout | form | step over float | quartiles | saved over float |"]
    lines.append("| --- | --- | --- | --- | --: | --: | --: |")
    for row in rows:
        size = f"{row['batch']} × {row['px']}" + (", AMP" if row["amp"] else "")
        head = f"| {row['model']} | {size} | {row['layout']} | {row['form']} |"
        if "refused" in row:
            lines.append(f"{head} – | {row['refused']} | – |".replace("\n", " "))
            continue
        low, high = row["quartiles"]
        saved = f"{row['saved_ratio']:.2f}" if "saved_ratio" in row else "–"
        lines.append(f"{head} {row['ratio']:.2f} | {low:.2f}–{high:.2f} | {saved} |")
    return "\n".join(lines)


def main(report: Callable[[str], None] = print) -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0"])
    parser.add_argument("--sizes", nargs="+", default=["8x128", "16x224"], metavar="BATCHxPX")
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--amp", action="store_true")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    forms = ["float", *(form for form in options.forms if form != "float")]
    rows = []
    for name in options.models:
        for size in options.sizes:
            batch, px = map(int, size.split("x"))
            for layout in options.layouts:
                setting = Setting(batch=batch, px=px, layout=layout, amp=options.amp, device=options.device)
                with contextlib.suppress(KeyboardInterrupt):
                    for row in measure(name, forms, setting, options.rounds):
                        rows.append(row)
                        report(table([row]).splitlines()[-1])
                torch.compiler.reset()
    report("\n" + table(rows))
    if options.json is not None:
        options.json.write_text(json.dumps({**machine(options.device), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
