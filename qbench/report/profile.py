"""What a training step of a model costs, layer by layer, in float and in its QAT form: data and text.

    overhead = QAT − float        of the seconds of a layer, forward and backward
    saved                         bytes that autograd keeps from forward to backward, each storage counted once

Every moment of a step belongs to one row and every saved storage to the first that saved it, so that columns add up to
the whole step.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qbench.errors import ConfigError
from qbench.report.text import WIDTH, columns

#: Orders of the rows of a table.
ORDERS = ("overhead", "model")
#: Layers that a table shows at most where nothing else is said.
MOST = 20

# Over each pair of the columns with numbers.
_TITLES = ("ms a step", "QAT adds, ms", "saved, MiB")
_HEADER = ("layer", "kind", "float", "QAT", "forward", "backward", "float", "QAT")
#: Characters that a class has in a table.
_KIND = 15
_NUMBERS = frozenset(range(2, len(_HEADER)))


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a part of a training step costs.

    Attributes:
        forward: Seconds in forward.
        backward: Seconds in backward.
        update: Seconds in the optimizer.
        saved: Bytes saved for backward, parameters and buffers left out.
    """

    forward: float = 0.0
    backward: float = 0.0
    update: float = 0.0
    saved: int = 0

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.forward + self.backward + self.update

    @classmethod
    def total(cls, costs: Iterable[Cost]) -> Cost:
        """The sum of several."""
        rows = [dataclasses.astuple(cost) for cost in costs]
        return cls(*map(sum, zip(*rows, strict=True))) if rows else cls()


@dataclasses.dataclass(frozen=True)
class Row:
    """A layer of both models, or a part of the step that is none.

    Attributes:
        path: Of the layer; words for what is no layer.
        kind: Class of the float layer, its wrapper after `fuse`; empty for what is no layer.
        qat_kind: Class of the QAT layer; that of the float layer where nothing is quantized.
        in_float: Its cost in the float model.
        in_qat: Its cost in the QAT model.
    """

    path: str
    kind: str
    qat_kind: str
    in_float: Cost
    in_qat: Cost

    @property
    def overhead(self) -> float:
        """Seconds that the QAT form takes more."""
        return self.in_qat.seconds - self.in_float.seconds

    @classmethod
    def total(cls, path: str, rows: Iterable[Row]) -> Row:
        """The sum of several, under a name of its own."""
        rows = tuple(rows)
        return cls(path, "", "", Cost.total(row.in_float for row in rows), Cost.total(row.in_qat for row in rows))


@dataclasses.dataclass(frozen=True)
class TrainingProfile:
    """Where the time and the memory of a training step go, float against QAT; `print` shows a table.

    Attributes:
        model: Class of the float model.
        layers: Rows of the layers that ran, in the order of the model.
        outside: What is no layer's: the loss, and what the model computes between its layers.
        optimizer: The update of the parameters.
        float_step: A whole step of the float model that nobody watches, and all that it saves.
        qat_step: The same of the QAT model.
        ratio: Of these two steps, QAT over float in one round: lower quartile, median, upper quartile.
        rounds: How many rounds the medians are over.
        settings: Shapes of the inputs, device, threads, versions.
    """

    model: str
    layers: tuple[Row, ...]
    outside: Row
    optimizer: Row
    float_step: Cost
    qat_step: Cost
    ratio: tuple[float, float, float]
    rounds: int
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def rows(self) -> tuple[Row, ...]:
        """Every part of the step, in the order of the model: their sum is `total`."""
        return (*self.layers, self.outside, self.optimizer)

    @property
    def total(self) -> Row:
        """The whole step as it was watched: the sum of all rows."""
        return Row.total("whole step", self.rows)

    def ordered(self, order: str = "overhead") -> tuple[Row, ...]:
        """The layers in an order.

        Args:
            order: `"overhead"`, the largest first, or `"model"`.

        Raises:
            ConfigError: another order.
        """
        if order not in ORDERS:
            raise ConfigError(f"order={order!r}: expected one of {', '.join(ORDERS)}")
        if order == "model":
            return self.layers
        return tuple(sorted(self.layers, key=lambda row: row.overhead, reverse=True))

    def table(self, order: str = "overhead", most: int | None = MOST) -> str:
        """The profile as text.

        Args:
            order: As for `ordered`.
            most: Layers that get a line of their own, the others are summed in one; None for all.

        Raises:
            ConfigError: another order, or `most` below 0.
        """
        if most is not None and most < 0:
            raise ConfigError(f"most={most}: expected a number of layers from 0 on, or None for all")
        layers = self.ordered(order)
        shown, rest = layers[:most], layers[len(layers[:most]) :]
        more = [Row.total(f"{len(rest)} more layer{'s' if len(rest) > 1 else ''}", rest)] if rest else []
        return "\n".join([_headline(self), "", *_lines([*shown, *more], self), "", *_whole(self)])

    def to_json(self) -> str:
        """The profile as JSON text, seconds and bytes, ending in a newline."""
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> TrainingProfile:
        """Read back what `to_json` wrote."""
        found = json.loads(text)
        rows = {name: _row(found[name]) for name in ("outside", "optimizer")}
        steps = {name: Cost(**found[name]) for name in ("float_step", "qat_step")}
        layers = tuple(_row(fields) for fields in found["layers"])
        return cls(**{**found, **rows, **steps, "layers": layers, "ratio": tuple(found["ratio"])})

    def __str__(self) -> str:
        return self.table()


def _row(fields: Mapping[str, Any]) -> Row:
    costs = {name: Cost(**fields[name]) for name in ("in_float", "in_qat")}
    return Row(**{**fields, **costs})


def _headline(profile: TrainingProfile) -> str:
    settings = profile.settings
    words = [f"inputs {settings['inputs']}"] if "inputs" in settings else []
    words += [str(settings[name]) for name in ("dtype", "device") if name in settings]
    words += [f"{settings['threads']} thread(s)"] if "threads" in settings else []
    rounds = f"medians of {profile.rounds} rounds" if profile.rounds > 1 else "one round"
    return f"{profile.model}: {', '.join([*words, rounds])}"


def _lines(layers: Sequence[Row], profile: TrainingProfile) -> list[str]:
    """The table: layers, what is none, their sum."""
    rows = [*layers, profile.outside, profile.optimizer, profile.total]
    numbers = [_numbers(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(_HEADER[2:], *numbers, strict=True)]
    kinds = [_shortened(row.kind, _KIND) for row in rows]
    room = WIDTH - sum(width + 2 for width in widths) - max(map(len, (_HEADER[1], *kinds))) - 2
    longest = max(len(row.path) for row in (profile.outside, profile.optimizer, profile.total))
    paths = [_shortened(row.path, max(room, longest)) for row in rows]
    cells = [(path, kind, *line) for path, kind, line in zip(paths, kinds, numbers, strict=True)]
    table = columns([_HEADER, *cells], right=_NUMBERS)
    return [_title_line(widths, len(table[0])), *table]


def _title_line(widths: Sequence[int], length: int) -> str:
    """Titles over pairs of columns, each ending where its pair ends."""
    line = ""
    for index, title in enumerate(_TITLES):
        end = length - sum(width + 2 for width in widths[2 * index + 2 :])
        line = line.ljust(end - len(title)) + title
    return line


def _numbers(row: Row) -> tuple[str, ...]:
    whole = [_milliseconds(cost.seconds) for cost in (row.in_float, row.in_qat)]
    phases = ("forward", "backward")
    more = [_milliseconds(getattr(row.in_qat, phase) - getattr(row.in_float, phase), sign=True) for phase in phases]
    if row.in_qat.seconds == row.in_qat.update:  # the optimizer is in neither phase
        more = [""] * len(phases)
    saved = [f"{cost.saved / 2**20:.2f}" for cost in (row.in_float, row.in_qat)]
    return (*whole, *more, *saved)


def _milliseconds(seconds: float, *, sign: bool = False) -> str:
    """Milliseconds with two digits behind the point, one from 100 on."""
    value = 1000 * seconds
    return f"{value:{'+' if sign else ''}.{2 if abs(value) < 99.995 else 1}f}"


def _shortened(path: str, room: int) -> str:
    """A path in so many characters: its middle is left out."""
    if len(path) <= room:
        return path
    head = max((room - 2) // 3, 1)
    return f"{path[:head]}..{path[head + 2 - room :]}"


def _whole(profile: TrainingProfile) -> list[str]:
    """The steps that nobody watched, in words."""
    steps = profile.float_step, profile.qat_step
    low, middle, high = profile.ratio
    parts = [
        f"{phase} {' -> '.join(_milliseconds(getattr(step, phase)) for step in steps)}"
        for phase in ("forward", "backward", "update")
    ]
    saved = [step.saved for step in steps]
    ratio = f" ({saved[1] / saved[0]:.2f} x)" if saved[0] else ""
    return [
        f"a step that is not watched: {' -> '.join(_milliseconds(step.seconds) for step in steps)} ms, {middle:.2f} x "
        f"(quartiles {low:.2f} to {high:.2f})",
        f"  {', '.join(parts)} ms",
        f"saved for backward: {' -> '.join(f'{count / 2**20:.2f}' for count in saved)} MiB{ratio}",
    ]
