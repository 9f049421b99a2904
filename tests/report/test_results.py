"""Values that hold results: what they refuse, what they add up, and their round trip through JSON."""

from __future__ import annotations

import json

import pytest

from qbench.report import CodeSpread, Comparison, RunSummary, Verification


def verification(**changes: object) -> Verification:
    """Parameters and values exact, one runtime a code off."""
    fields: dict[str, object] = {
        "parameters": Comparison("parameters", 100, 0),
        "eval_vs_program": Comparison("eval_vs_program", 40, 0),
        "runtimes": (Comparison("onnxruntime", 40, 3, 2), Comparison("executorch", 40, 0)),
    }
    return Verification(**{**fields, **changes})  # type: ignore[arg-type]


def summary() -> RunSummary:
    return RunSummary(
        model="resnet18",
        data="digits",
        target="onnxruntime",
        float_top1=0.98,
        qat_top1=0.978,
        deployed_top1={"onnxruntime": 0.978},
        mismatches={"parameters": 0},
        codes_compared=7,
        seconds={"float": 1.5},
        notes=("fc: left in float — no quantizer",),
        settings={"lr": 0.1, "workers": None},
    )


@pytest.mark.parametrize(
    ("compared", "different", "step"),
    [(3, 4, 1), (3, -1, 0), (3, 1, 0), (3, 0, 1), (3, 2, -1)],
)
def test_a_comparison_that_contradicts_itself_is_refused(compared: int, different: int, step: int) -> None:
    with pytest.raises(ValueError, match="conv1"):
        Comparison("conv1", compared, different, step)


@pytest.mark.parametrize(
    ("compared", "different", "exact", "share"), [(0, 0, False, 0.0), (8, 0, True, 0.0), (8, 2, False, 0.25)]
)
def test_nothing_compared_is_not_exact(compared: int, different: int, exact: bool, share: float) -> None:
    comparison = Comparison("conv1", compared, different, min(different, 1))
    assert (comparison.exact, comparison.share) == (exact, share)


def test_total_adds_codes_and_takes_the_largest_step() -> None:
    parts = (Comparison("a", 10, 1, 5), Comparison("b", 20, 3, 2), Comparison("c", 5, 0))
    assert Comparison.total("all", parts) == Comparison("all", 35, 4, 5)
    assert Comparison.total("none", ()) == Comparison("none", 0, 0)


def test_verification_names_every_comparison() -> None:
    found = verification()
    assert found.mismatches == {
        "parameters": 0,
        "eval_vs_program": 0,
        "program_vs_onnxruntime": 3,
        "program_vs_executorch": 0,
    }
    assert found.exact == {
        "parameters": True,
        "eval_vs_program": True,
        "program_vs_onnxruntime": False,
        "program_vs_executorch": True,
    }
    assert found.largest_steps["program_vs_onnxruntime"] == 2
    assert found.codes_compared == 220


def test_a_runtime_that_did_not_run_has_no_count() -> None:
    assert set(verification(runtimes=()).mismatches) == {"parameters", "eval_vs_program"}


@pytest.mark.parametrize(
    ("distinct", "saturated", "varied"), [(50, 49, True), (49, 0, False), (50, 50, False), (256, 0, True)]
)
def test_codes_are_varied_by_the_rule_for_exactness_figures(distinct: int, saturated: int, varied: bool) -> None:
    assert CodeSpread("conv1", 1000, distinct, saturated).varied is varied


def test_summary_survives_json() -> None:
    assert RunSummary.from_json(summary().to_json()) == summary()


def test_summary_json_has_the_named_fields_first_and_is_readable() -> None:
    text = summary().to_json()
    keys = list(json.loads(text))
    assert {"float_top1", "qat_top1", "deployed_top1", "mismatches", "codes_compared", "seconds"} <= set(keys)
    assert keys.index("float_top1") < keys.index("settings")
    assert "fc: left in float — no quantizer" in text
    assert text.endswith("}\n")
