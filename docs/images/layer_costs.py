"""Time and memory of a training step per layer: float against QAT, plain, on the fast path, and with low memory.

    python docs/images/layer_costs.py              draws layer_costs.svg beside this file from docs/layer_costs.json
    python docs/images/layer_costs.py --measure    measures first, as `qbench profile` does, and writes that file

Each layer has a column for each of `FORMS`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from pathlib import Path
from typing import Any

from make_figures import EDGE, Figure

DATA = Path(__file__).parents[1] / "layer_costs.json"
NETWORKS = ("resnet18", "mobilenet_v2")
FORMS = ("float", "plain path", "fast path", "fast path, low memory")
COLORS = (EDGE["float"], EDGE["grid"], EDGE["error"], EDGE["code"])
LEFT, RIGHT, PANEL = 64, 956, 128


def measure(batch_size: int, image_size: int, rounds: int, threads: int | None) -> dict[str, Any]:
    """What the figure shows: seconds and bytes by network, layer and form."""
    from qbench.profiling.command import profile_named

    networks = {}
    for name in NETWORKS:
        plain, *others = (
            profile_named(
                name,
                batch_size=batch_size,
                image_size=image_size,
                rounds=rounds,
                threads=threads,
                fast_path=fast_path,
                low_memory=low_memory,
            )
            for fast_path, low_memory in ((False, False), (True, False), (True, True))
        )
        further = [{row.path: row.in_qat for row in other.rows} for other in others]
        rows = [(row, (row.in_float, row.in_qat, *(costs[row.path] for costs in further))) for row in plain.rows]
        networks[name] = {
            "settings": dict(plain.settings),
            "rounds": rounds,
            "step_ms": round(1000 * plain.float_step.seconds, 1),
            "ratios": [round(profile.ratio[1], 3) for profile in (plain, *others)],
            "rows": [
                {
                    "path": row.path,
                    "kind": row.kind,
                    "ms": [round(1000 * cost.seconds, 3) for cost in costs],
                    "mib": [round(cost.saved / 2**20, 4) for cost in costs],
                }
                for row, costs in rows
            ],
        }
    return networks


def layer_costs() -> Figure:
    """The figure of docs/layer_costs.json."""
    networks = json.loads(DATA.read_text(encoding="utf-8"))
    height = 56 + len(networks) * (2 * (PANEL + 34) + 62)
    figure = Figure(980, height, "Time and saved memory of each layer in a training step: float and three forms of QAT")
    for index, (form, color) in enumerate(zip(FORMS, COLORS, strict=True)):
        x = LEFT + 150 * index
        figure.parts.append(f'<rect x="{x}" y="24" width="12" height="12" fill="{color}"/>')
        figure.text(x + 18, 35, form, anchor="start")
    top = 56
    for name, network in networks.items():
        _network(figure, top, name, network)
        top += 2 * (PANEL + 34) + 62
    return figure


def _network(figure: Figure, top: float, name: str, network: dict[str, Any]) -> None:
    settings = network["settings"]
    where = f"{settings['device']}, {settings['threads']} thread{'s' if settings['threads'] > 1 else ''}"
    title = f"{name}, images {settings['inputs']}, {where}, medians of {network['rounds']} rounds"
    figure.text(24, top + 16, title, anchor="start", bold=True)
    layers = [row for row in network["rows"] if row["kind"]]
    saved = [sum(row["mib"][form] for row in network["rows"]) for form in range(len(FORMS))]
    panels = (
        ("ms", "ms, forward and backward; a whole step", network["step_ms"], "ms", network["ratios"]),
        ("mib", "MiB saved for backward; a whole step", saved[0], "MiB", [own / saved[0] for own in saved[1:]]),
    )
    for index, (key, label, whole, unit, ratios) in enumerate(panels):
        y = top + 34 + index * (PANEL + 34)
        forms = ", ".join(f"{form} {ratio:.2f} ×" for form, ratio in zip(FORMS[1:], ratios, strict=True))
        figure.text(LEFT, y + 8, f"{label}: float {whole:.0f} {unit}, {forms}", anchor="start", size=12)
        _panel(figure, y + 14, [row[key] for row in layers])
    _stages(figure, top + 34 + 2 * (PANEL + 34) - 10, [_stage(row["path"]) for row in layers])


def _panel(figure: Figure, top: float, values: list[list[float]]) -> None:
    """Columns, one a form of each layer, and an axis with its largest value."""
    largest = max(map(max, values)) or 1.0
    slot = (RIGHT - LEFT) / len(values)
    for form, color in enumerate(COLORS):
        width = 0.84 * slot / len(COLORS)
        path = "".join(
            f"M{LEFT + (index + 0.08) * slot + form * width:.1f} {top + PANEL:g}"
            f"v{-PANEL * value[form] / largest:.1f}h{width:.1f}V{top + PANEL:g}z"
            for index, value in enumerate(values)
        )
        figure.parts.append(f'<path d="{path}" fill="{color}"/>')
    figure.parts.append(f'<path d="M{LEFT} {top}V{top + PANEL}H{RIGHT}" fill="none" stroke="#adb5bd"/>')
    figure.text(LEFT - 6, top + 8, f"{largest:.3g}", size=12, anchor="end")
    figure.text(LEFT - 6, top + PANEL, "0", size=12, anchor="end")


def _stage(path: str) -> str:
    """`layer1` of `layer1.0.conv1`, `3` of `features.3.conv.0`."""
    first, _, rest = path.partition(".")
    return rest.partition(".")[0] if first == "features" else first


def _stages(figure: Figure, y: float, names: list[str]) -> None:
    """Names of the stages under their layers; a stage that is too narrow for its name goes without one."""
    slot, start = (RIGHT - LEFT) / len(names), 0
    for name, members in itertools.groupby(names):
        count = len(list(members))
        if start:
            x = LEFT + start * slot
            figure.parts.append(f'<path d="M{x:.1f} {y - 12}v8" stroke="#adb5bd"/>')
        if 5.5 * len(name) < count * slot:
            figure.text(round(LEFT + (start + count / 2) * slot, 1), y, name, size=10)
        start += count


FIGURES = {"layer_costs": layer_costs}


def main() -> None:
    """Measure if asked to, and write the figure beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    if options.measure:
        found = measure(options.batch_size, options.image_size, options.rounds, options.threads)
        text = json.dumps(found, indent=1)
        text = re.sub(r"\[[^][{}]+\]", lambda numbers: " ".join(numbers[0].split()), text)
        DATA.write_text(text + "\n", encoding="utf-8")
    for name, draw in FIGURES.items():
        (Path(__file__).parent / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
