"""Values that hold results. They compute nothing but sums of themselves, and know nothing of models or formatting.

A *mismatch* is a code that differs between two forms of the same model:

    exact       :=  compared > 0  and  different == 0          (nothing compared is not exactness)
    saturated   :=  codes of values beyond the grid's range / all codes
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Comparison:
    """How many codes (or values on a grid) differ between two forms of the same thing.

    Attributes:
        name: What was compared: the path of a layer, the name of a runtime, or the name of the whole comparison.
        compared: How many codes were compared.
        different: How many of them differ.
        largest_step: The largest difference, in codes (steps of the grid); at least 1 where any differs, else 0.
    """

    name: str
    compared: int
    different: int
    largest_step: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.different <= self.compared:
            raise ValueError(f"{self.name}: {self.different} different of {self.compared} compared")
        if (self.different == 0) != (self.largest_step == 0) or self.largest_step < 0:
            raise ValueError(f"{self.name}: {self.different} different, yet the largest step is {self.largest_step}")

    @property
    def exact(self) -> bool:
        """Something was compared and nothing differs."""
        return self.compared > 0 and self.different == 0

    @property
    def share(self) -> float:
        """Different codes over compared ones, in [0, 1]; 0 where nothing was compared."""
        return self.different / self.compared if self.compared else 0.0

    @classmethod
    def total(cls, name: str, parts: tuple[Comparison, ...]) -> Comparison:
        """One comparison that sums `parts` (layers, batches)."""
        return cls(
            name=name,
            compared=sum(part.compared for part in parts),
            different=sum(part.different for part in parts),
            largest_step=max((part.largest_step for part in parts), default=0),
        )

    def __str__(self) -> str:
        from qbench.report import text

        return text.comparison_line(self)


@dataclass(frozen=True)
class LayerComparison(Comparison):
    """The codes of one activation in two forms of a model.

    Attributes:
        inexact: Why a difference is no broken promise: which operator before (or at) it the target computes in float;
            empty where 0 is promised.
    """

    inexact: str = ""


@dataclass(frozen=True)
class CodeSpread:
    """How varied the codes of one tensor were while they were compared: a zero count over constant codes says nothing.

    Attributes:
        name: Path of the layer whose output (or weight) it is.
        codes: How many codes were seen.
        distinct: How many different ones.
        saturated: How many stand for a value beyond the grid's range (the zeros of a ReLU are not).
    """

    name: str
    codes: int
    distinct: int
    saturated: int

    @property
    def saturated_share(self) -> float:
        """Saturated codes over all codes, in [0, 1]."""
        return self.saturated / self.codes if self.codes else 0.0

    @property
    def varied(self) -> bool:
        """At least 50 distinct codes and under 5 % of them saturated: what an exactness figure needs to count."""
        return self.distinct >= 50 and self.saturated_share < 0.05


@dataclass(frozen=True)
class Verification:
    """What `qbench.verify` found, on the same inputs for every form of the model.

    Attributes:
        parameters: Weight and bias codes, trained against converted.
        eval_vs_program: Output values of the trained model in eval against the reloaded Q/DQ program.
        runtimes: Outputs of the Q/DQ program against those of each runtime that ran, one comparison each, named as the
            runtime is (`"onnxruntime"`, `"executorch"`).
        integer: The integer program for a runtime's target against that runtime: outputs and codes of activations.
        layers: `parameters` layer by layer, named by module path.
        by_layer: Key of `comparisons` → codes of each activation, in the order of the program.
        spread: How varied the compared codes were, by layer; empty where it was not looked at.
        doubts: Key of `comparisons` → why even a zero there is not called exact.
        timings: How long each form ran, in seconds, by its name.
        cpu: Features of the CPU that decide which integer kernels ran.
        seconds: Wall-clock time of the whole verification.
        notes: What was not compared, and why (a runtime that is not installed, say).
    """

    parameters: Comparison
    eval_vs_program: Comparison
    runtimes: tuple[Comparison, ...] = ()
    integer: tuple[Comparison, ...] = ()
    layers: tuple[Comparison, ...] = ()
    by_layer: Mapping[str, tuple[LayerComparison, ...]] = field(default_factory=dict)
    spread: tuple[CodeSpread, ...] = ()
    doubts: Mapping[str, str] = field(default_factory=dict)
    timings: Mapping[str, float] = field(default_factory=dict)
    cpu: tuple[str, ...] = ()
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def comparisons(self) -> dict[str, Comparison]:
        """Every comparison: `parameters`, `eval_vs_program`, each `program_vs_<runtime>`, `integer_vs_<runtime>`."""
        return {
            "parameters": self.parameters,
            "eval_vs_program": self.eval_vs_program,
            **{f"program_vs_{runtime.name}": runtime for runtime in self.runtimes},
            **{f"integer_vs_{runtime.name}": runtime for runtime in self.integer},
        }

    @property
    def mismatches(self) -> dict[str, int]:
        """Different codes by key of `comparisons`. A runtime that did not run has no key (see `notes`)."""
        return {key: comparison.different for key, comparison in self.comparisons.items()}

    @property
    def exact(self) -> dict[str, bool]:
        """Whether something was compared, nothing differs and nothing is in doubt, by key of `comparisons`."""
        return {key: value.exact and key not in self.doubts for key, value in self.comparisons.items()}

    @property
    def promises(self) -> dict[str, bool]:
        """By key of the comparisons that promise a zero, whether it is one; without those that compared nothing.

        An integer program promises it for codes that depend on no operator which the target computes in float.
        """
        own = {"parameters": self.parameters, "eval_vs_program": self.eval_vs_program}
        kept = {key: value.exact for key, value in own.items() if value.compared}
        for key in (f"integer_vs_{runtime.name}" for runtime in self.integer):
            promised = tuple(row for row in self.by_layer.get(key, ()) if not row.inexact)
            if promised:
                kept[key] = Comparison.total(key, promised).exact and key not in self.doubts
        return kept

    @property
    def kept(self) -> bool:
        """Whether there is a promise, and every one is kept."""
        return bool(self.promises) and all(self.promises.values())

    @property
    def codes_compared(self) -> int:
        """Codes and values compared, all comparisons together."""
        return sum(comparison.compared for comparison in self.comparisons.values())

    @property
    def largest_steps(self) -> dict[str, int]:
        """The largest difference in codes, by key of `comparisons`."""
        return {key: comparison.largest_step for key, comparison in self.comparisons.items()}

    def summary_fields(self) -> dict[str, Any]:
        """What of this a `RunSummary` holds, by its field."""
        return {
            "mismatches": self.mismatches,
            "codes_compared": self.codes_compared,
            "compared": {key: comparison.compared for key, comparison in self.comparisons.items()},
            "largest_steps": self.largest_steps,
            "spread": {
                part.name: {"codes": part.codes, "distinct": part.distinct, "saturated": part.saturated}
                for part in self.spread
            },
            "promises": self.promises,
            "by_layer": {key: tuple(map(asdict, rows)) for key, rows in self.by_layer.items()},
            "cpu": self.cpu,
        }

    def first_different(self, key: str) -> LayerComparison | None:
        """The first activation, in the order of the program, with a different code; None where there is none."""
        return next((row for row in self.by_layer.get(key, ()) if row.different), None)

    def __str__(self) -> str:
        from qbench.report import text

        return text.verification_table(self)


@dataclass(frozen=True)
class RunSummary:
    """What one `qbench train` did; `to_json` is the text of `summary.json`.

    Attributes:
        model: As given on the command line.
        data: As given on the command line.
        target: Name of the target.
        float_top1: Share of held-out images that the float model ranks right, in [0, 1].
        qat_top1: The same of the trained QAT model in eval.
        deployed_top1: The same of the files, by runtime that ran them.
        mismatches: Different codes, by key of `Verification.comparisons`.
        codes_compared: Codes and values compared, all comparisons together.
        seconds: Wall-clock time by step: `float`, `qat`, `convert`, `export`, `verify`, `score`, `total`.
        compared: Codes compared, by the same keys as `mismatches`.
        largest_steps: Largest difference in codes, by the same keys.
        held_out: How many held-out images the top-1 figures are over.
        layers: By path: `codes` and `different` of its weight and bias, and the fields of
            `qbench.report.conversion.DeployedLayer`.
        spread: How varied the codes of each layer's output were:
            `{path: {"codes": …, "distinct": …, "saturated": …}}`.
        promises: Whether each promised zero is one, by the keys of `mismatches` that promise it.
        by_layer: For the comparisons of activations, by the same keys: `name`, `compared`, `different`,
            `largest_step`, `inexact` of each activation in the order of the program.
        cpu: Features of the CPU that decide which integer kernels ran.
        notes: What was left out or left in float, in words.
        files: Bytes of each written file, by its name.
        settings: The options of the run.
        versions: Versions of the libraries that took part.
    """

    model: str
    data: str
    target: str
    float_top1: float
    qat_top1: float
    deployed_top1: Mapping[str, float]
    mismatches: Mapping[str, int]
    codes_compared: int
    seconds: Mapping[str, float]
    compared: Mapping[str, int] = field(default_factory=dict)
    largest_steps: Mapping[str, int] = field(default_factory=dict)
    held_out: int = 0
    layers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    spread: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    promises: Mapping[str, bool] = field(default_factory=dict)
    by_layer: Mapping[str, tuple[Mapping[str, Any], ...]] = field(default_factory=dict)
    cpu: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    files: Mapping[str, int] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The summary as JSON text, keys in the order of the fields, ending in a newline."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> RunSummary:
        """Read back what `to_json` wrote."""
        fields = json.loads(text)
        rows = {key: tuple(value) for key, value in fields.get("by_layer", {}).items()}
        return cls(**{**fields, "notes": tuple(fields["notes"]), "cpu": tuple(fields.get("cpu", ())), "by_layer": rows})

    def __str__(self) -> str:
        from qbench.report import text

        return text.run_table(self)
