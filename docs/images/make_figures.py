"""Draw the figures of the documentation: `python docs/images/make_figures.py` rewrites the SVG files beside it.

The coordinates are pixels. Text may hold subscripts, written as `s_{in}`. Colours say what a box holds:
floats grey, values on a grid teal, the bias error orange, integers violet.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

FILL = {"float": "#f1f3f5", "grid": "#d3f1ec", "error": "#ffe3c2", "code": "#e4dcfb"}
EDGE = {"float": "#868e96", "grid": "#0b8276", "error": "#c65d00", "code": "#5f3dc4"}
INK = "#212529"
SUBSCRIPT = re.compile(r"_\{([^}]*)\}")


def rich(text: str, size: float) -> str:
    """Text with its subscripts as tspans, lowered and smaller; what follows is raised back to the line."""
    out, end, raise_by = "", 0, 0.0
    for match in SUBSCRIPT.finditer(text):
        out += _span(text[end : match.start()], raise_by, size)
        out += _span(match[1], size * 0.3, size * 0.72)
        raise_by, end = -size * 0.3, match.end()
    return out + _span(text[end:], raise_by, size)


def _span(text: str, dy: float, size: float) -> str:
    return f'<tspan dy="{dy:.1f}" font-size="{size:.1f}">{escape(text)}</tspan>' if text else ""


class Figure:
    """An SVG of a fixed size on a white card, so that it reads the same on a light and on a dark page."""

    def __init__(self, width: int, height: int, title: str) -> None:
        markers = "".join(
            f'<marker id="{kind}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            'orient="auto-start-reverse" markerUnits="userSpaceOnUse">'
            f'<path d="M0 0L8 4L0 8z" fill="{color}"/></marker>'
            for kind, color in EDGE.items()
        )
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img" font-family="Helvetica, Arial, \'DejaVu Sans\', sans-serif" fill="{INK}">',
            f"<title>{escape(title)}</title><defs>{markers}</defs>",
            f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="10" '
            'fill="#ffffff" stroke="#dee2e6"/>',
        ]

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 14,
        anchor: str = "middle",
        color: str = INK,
        bold: bool = False,
    ) -> None:
        """One line of text, anchored at (x, y)."""
        style = f'text-anchor="{anchor}" fill="{color}"' + (' font-weight="bold"' if bold else "")
        self.parts.append(f'<text x="{x}" y="{y}" {style}>{rich(text, size)}</text>')

    def box(self, x: float, y: float, width: float, lines: list[str], kind: str = "float", height: float = 48) -> None:
        """A box centred at (x, y); the first line is the name, the others are smaller."""
        self.parts.append(
            f'<rect x="{x - width / 2}" y="{y - height / 2}" width="{width}" height="{height}" rx="6" '
            f'fill="{FILL[kind]}" stroke="{EDGE[kind]}" stroke-width="1.4"/>'
        )
        top = y - (len(lines) - 1) * 8.5 + 4.5
        for index, line in enumerate(lines):
            self.text(x, top + index * 17, line, size=14 if index == 0 else 12)

    def plus(self, x: float, y: float, kind: str = "float") -> None:
        """The circle of an addition."""
        self.parts.append(
            f'<circle cx="{x}" cy="{y}" r="13" fill="{FILL[kind]}" stroke="{EDGE[kind]}" stroke-width="1.4"/>'
            f'<path d="M{x - 6} {y}H{x + 6}M{x} {y - 6}V{y + 6}" stroke="{INK}" stroke-width="1.6"/>'
        )

    def arrow(self, *points: tuple[float, float], kind: str = "float", dashed: bool = False) -> None:
        """A polyline through the points, with a head at the last one."""
        path = "M" + "L".join(f"{x} {y}" for x, y in points)
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self.parts.append(
            f'<path d="{path}" fill="none" stroke="{EDGE[kind]}" stroke-width="1.5"{dash} marker-end="url(#{kind})"/>'
        )

    def frame(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        """A dashed frame around what belongs together."""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="none" stroke="{EDGE[kind]}" '
            f'stroke-width="1.3" stroke-dasharray="6 4"/>'
        )

    def svg(self) -> str:
        """The text of the file, one element a line."""
        return "\n".join([*self.parts, "</svg>"]) + "\n"


def why() -> Figure:
    """Where the bias error is added decides whether training can see it."""
    figure = Figure(900, 436, "A bias error added before batch norm is removed by the batch mean; qbench adds it after")
    orange, teal, violet = EDGE["error"], EDGE["grid"], EDGE["code"]

    y = 78
    figure.text(24, y - 42, "On the hardware", anchor="start", bold=True, color=violet)
    figure.box(86, y, 120, ["input codes", "scale s_{in}"], "code")
    figure.box(290, y, 170, ["integer convolution", "weight codes, scale s_{w}"], "code")
    figure.plus(474, y, "error")
    figure.box(640, y, 170, ["bias codes, int32", "scale s_{b} = s_{in}·s_{w}"], "error")
    figure.arrow((146, y), (203, y), kind="code")
    figure.arrow((375, y), (459, y), kind="code")
    figure.arrow((555, y), (489, y), kind="error")
    figure.text(740, y - 3, "the bias is rounded too:", anchor="start", size=12.5, color=orange)
    figure.text(740, y + 15, "error  e = b̂ − b_{f}", anchor="start", size=13.5, color=orange)

    for y, inside in ((208, True), (352, False)):
        color = orange if inside else teal
        title = "Training, error added before batch norm" if inside else "Training with qbench: added after batch norm"
        plus, norm = (444, 580) if inside else (632, 490)
        figure.text(24, y - 42, title, anchor="start", bold=True, color=color)
        figure.box(86, y, 120, ["x̂", "input on its grid"], "grid")
        figure.box(290, y, 170, ["convolution", "weight Ŵ / k"], "grid")
        figure.box(norm, y, 130, ["batch norm", "minus batch mean"])
        figure.plus(plus, y, "error")
        figure.text(plus, y - 32, "e", size=16, color=orange)
        figure.arrow((plus, y - 27), (plus, y - 15), kind="error")
        figure.box(800, y, 140, ["ReLU, quantizer", "output on its grid"], "grid")
        figure.arrow((146, y), (203, y))
        stops = [(plus - 14, plus + 13), (norm - 67, norm + 65)]
        before = 375
        for arrive, leave in sorted(stops):
            figure.arrow((before, y), (arrive, y))
            before = leave
        figure.arrow((before, y), (728, y))
    notes = [
        (256, orange, "e is one constant per channel, so the batch mean takes all of it away again: training never"),
        (274, orange, "sees it, and running_mean drifts to absorb it."),
        (400, teal, "The loss, and every layer after this one, sees the rounding that the hardware will do. In eval"),
        (418, teal, "the same numbers go into one call, conv(x̂, Ŵ, b̂), and these codes are the ones deployed."),
    ]
    for y, color, note in notes:
        figure.text(24, y, note, anchor="start", size=12.5, color=color)
    return figure


def layer() -> Figure:
    """The two graphs of one layer: while training, and in eval, with frozen BN or deployed."""
    figure = Figure(980, 668, "The forward of a conv-BN-activation layer: training with batch statistics, and eval")
    _layer_train(figure, 152)
    figure.parts.append('<path d="M24 334H956" stroke="#dee2e6" stroke-width="1.5"/>')
    _layer_eval(figure, 484)
    return figure


def _layer_train(figure: Figure, y: float) -> None:
    figure.text(24, y - 118, "train, batch statistics", anchor="start", bold=True, size=15)
    _weight_and_bias(figure, y, conv_left=256)
    figure.box(336, y, 160, ["conv(x̂, Ŵ / k) + b"], "grid")
    figure.box(522, y, 140, ["batch norm", "of this batch; γ, β"])
    figure.plus(660, y, "error")
    figure.frame(244, y - 38, 362, 76, "float")
    figure.text(602, y - 44, "what BN normalises", size=12, color=EDGE["float"], anchor="end")
    figure.arrow((416, y), (451, y))
    figure.arrow((592, y), (646, y))
    figure.arrow((673, y), (703, y))
    figure.box(660, y + 130, 130, ["e = b̂ − b_{f}"], "error", height=40)
    figure.arrow((546, y + 130), (594, y + 130), kind="error")
    figure.arrow((660, y + 110), (660, y + 15), kind="error")
    figure.text(670, y + 68, "the bias error, outside", size=12, anchor="start", color=EDGE["error"])
    _epilogue(figure, y)


def _layer_eval(figure: Figure, y: float) -> None:
    figure.text(24, y - 118, "eval, frozen BN, deployed", anchor="start", bold=True, size=15)
    _weight_and_bias(figure, y, conv_left=290)
    figure.box(400, y, 220, ["conv(x̂, Ŵ, b̂)", "one call"], "grid")
    figure.arrow((510, y), (703, y))
    figure.arrow((450, y + 106), (450, y + 26), kind="error")
    figure.text(460, y + 68, "b̂ = f32(q_{b} · s_{b})", size=13, anchor="start", color=EDGE["error"])
    _epilogue(figure, y)


def _weight_and_bias(figure: Figure, y: float, conv_left: float) -> None:
    """What both graphs have: the input, the weight quantizer above, the bias quantizer below."""
    figure.box(80, y, 112, ["x̂", "linked input"], "grid")
    figure.arrow((136, y), (conv_left - 1, y))
    figure.box(104, y - 82, 160, ["W", "k = γ / √(σ²_{r} + ε)"], height=46)
    figure.box(350, y - 82, 260, ["weight quantizer", "codes of W_{f} = k·W,  scale s_{w}"], "grid", height=46)
    figure.arrow((184, y - 82), (219, y - 82))
    figure.arrow((350, y - 59), (350, y - 26), kind="grid")
    figure.box(112, y + 130, 176, ["b_{f} = β + k·(b − μ_{r})"], height=40)
    figure.box(450, y + 130, 192, ["bias quantizer", "q_{b} at s_{b} = f32(s_{in}·s_{w})"], "error", height=48)
    figure.arrow((200, y + 130), (353, y + 130))
    figure.arrow((80, y + 24), (80, y + 74), (310, y + 74), (310, y + 118), (353, y + 118), kind="grid", dashed=True)
    figure.text(90, y + 66, "s_{in}", size=13, anchor="start", color=EDGE["grid"])
    figure.arrow((232, y - 59), (232, y + 142), (353, y + 142), kind="grid", dashed=True)
    figure.text(238, y + 106, "s_{w}", size=13, anchor="start", color=EDGE["grid"])


def _epilogue(figure: Figure, y: float) -> None:
    figure.box(756, y, 104, ["activation"])
    figure.box(894, y, 112, ["output", "quantizer"], "grid")
    figure.arrow((808, y), (837, y))
    figure.arrow((950, y), (972, y), kind="grid")


def flow() -> Figure:
    """The forms of a model and the functions between them."""
    figure = Figure(980, 262, "float, fuse, prepare_qat, train, convert, export: the forms of a model")
    y = 70
    steps = [
        (70, 100, "float", "your model", "float"),
        (238, 140, "fused", "chains are wrappers", "float"),
        (432, 130, "QAT", "quantizers, links", "grid"),
        (616, 136, "trained QAT", "the codes are fixed", "grid"),
        (840, 200, "Q/DQ program", "torch ExportedProgram", "grid"),
    ]
    for x, width, name, note, kind in steps:
        figure.box(x, y, width, [name, note], kind)
    names = ["fuse", "prepare_qat", "train", "convert"]
    for name, (left, left_width, *_), (right, right_width, *_) in zip(names, steps, steps[1:], strict=False):
        start, end = left + left_width / 2, right - right_width / 2
        figure.arrow((start, y), (end - 1, y))
        figure.text((start + end) / 2, y - 32, name, size=12.5, bold=True)
    figure.text(840, y - 36, "float bias, on its integer grid", size=12)
    below = y + 132
    figure.box(160, below, 220, ["the same with int32 bias", "passes.quantize_bias"], "code")
    figure.box(500, below, 220, ["ONNX Runtime", "export.to_onnx"], "code")
    figure.box(840, below, 200, ["ExecuTorch (XNNPACK)", "export.to_executorch"], "code")
    figure.arrow((840, y + 24), (840, below - 26), kind="code")
    figure.arrow((780, y + 24), (780, y + 66), (500, y + 66), (500, below - 26), kind="code")
    figure.arrow((780, y + 24), (780, y + 66), (160, y + 66), (160, below - 26), kind="code")
    note = "the same weight, bias and zero point codes in every one"
    figure.text(176, y + 58, note, anchor="start", size=12.5, color=EDGE["code"])
    return figure


def ablation() -> Figure:
    """What docs/ablation.json found: codes that a blind training did not see change, and what awareness gained."""
    file = Path(__file__).parents[1] / "ablation.json"
    conditions = json.loads(file.read_text(encoding="utf-8"))["conditions"]
    seeds = max(len(one["seeds"]) for one in conditions)
    figure = Figure(980, 92 + 24 * len(conditions), f"Bias-aware against bias-blind training, {seeds} seeds")
    figure.text(24, 32, "net, grid, bias", anchor="start", bold=True)
    figure.text(250, 32, "codes that deployment changes, blind", anchor="start", bold=True)
    figure.text(775, 32, "deployed top-1, aware − blind, points", bold=True)
    bottom = 60 + 24 * len(conditions)
    for points in range(-4, 5, 2):
        x = _points(points)
        width = 1.4 if points == 0 else 0.7
        figure.parts.append(f'<path d="M{x:.1f} 46V{bottom - 14}" stroke="#adb5bd" stroke-width="{width}"/>')
        figure.text(x, bottom + 4, f"{points:+d}".replace("-", "−") if points else "0", size=12)
    for index, one in enumerate(conditions):
        _ablation_row(figure, 60 + 24 * index, one)
    figure.text(24, bottom + 22, "dot: one seed; bar: mean ± standard deviation", anchor="start", size=12)
    return figure


def _points(value: float) -> float:
    """Where a difference of so many points stands."""
    return 775 + 42 * max(-4.5, min(4.5, value))


def _ablation_row(figure: Figure, y: float, one: dict[str, Any]) -> None:
    names = [one["net"], f"W{one['bits']}A{one['bits']}", one["bias"]]
    for x, name in zip((24, 96, 144), names, strict=True):
        figure.text(x, y + 4.5, name, anchor="start", size=12.5)
    share = 100 * one["blind"]["changed"]["mean"]
    bar = f'x="250" y="{y - 6}" width="{12 * share:.1f}" height="12"'
    figure.parts.append(f'<rect {bar} fill="{EDGE["error"]}" opacity="0.7"/>')
    label = f"{share:.2f} %" if share >= 0.01 else "under 0.01 %" if share else "0"
    figure.text(256 + 12 * share, y + 4.5, label, anchor="start", size=12)
    paired = one["paired"]["top1"]
    for value in paired["each"]:
        x = _points(100 * value)
        figure.parts.append(f'<circle cx="{x:.1f}" cy="{y}" r="2.6" fill="{EDGE["grid"]}" opacity="0.45"/>')
    low, mean, high = (_points(100 * (paired["mean"] + sign * paired["sd"])) for sign in (-1, 0, 1))
    figure.parts.append(
        f'<path d="M{low:.1f} {y}H{high:.1f}M{mean:.1f} {y - 7}V{y + 7}" stroke="{EDGE["code"]}" stroke-width="1.6"/>'
    )


FIGURES = {"why": why, "layer": layer, "flow": flow, "ablation": ablation}


def main() -> None:
    """Write every figure beside this file."""
    for name, draw in FIGURES.items():
        (Path(__file__).parent / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
