"""Formatting: exact lines for small values, and 80 columns for every table."""

from __future__ import annotations

import dataclasses

import pytest

from qbench.report import CodeSpread, Comparison, RunSummary, Verification, text


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (125, "2 min 05 s")],
)
def test_duration(seconds: float, expected: str) -> None:
    assert text.duration(seconds) == expected


@pytest.mark.parametrize(
    ("n_bytes", "expected"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_499, "999.5 kB"), (11_400_000, "11.4 MB"), (2e9, "2.0 GB")],
)
def test_size(n_bytes: int, expected: str) -> None:
    assert text.size(n_bytes) == expected


@pytest.mark.parametrize(
    ("share", "digits", "expected"),
    [(0, 2, "0.00 %"), (1, 2, "100.00 %"), (0.98664, 2, "98.66 %"), (1e-6, 2, "<0.01 %"), (1e-7, 3, "<0.001 %")],
)
def test_a_share_above_zero_never_reads_as_zero(share: float, digits: int, expected: str) -> None:
    assert text.percent(share, digits) == expected


@pytest.mark.parametrize(("share", "expected"), [(0.0, "0.00"), (-0.00222, "-0.22"), (0.01, "+1.00"), (-1e-9, "0.00")])
def test_points(share: float, expected: str) -> None:
    assert text.points(share) == expected


@pytest.mark.parametrize(
    ("comparison", "expected"),
    [
        (Comparison("conv1", 11689512, 0), "conv1: 0 of 11,689,512 differ (exact)"),
        (Comparison("conv1", 10000, 7, 2), "conv1: 7 of 10,000 differ (0.070 %, by 2 at most)"),
        (Comparison("conv1", 0, 0), "conv1: 0 of 0 differ (nothing compared)"),
    ],
)
def test_comparison_line(comparison: Comparison, expected: str) -> None:
    assert str(comparison) == expected


def test_columns_align_numbers_to_the_right() -> None:
    assert text.columns([("a", "1"), ("long", "100")], right=frozenset({1})) == ["a       1", "long  100"]


def test_verification_lists_layers_that_differ_spread_and_notes() -> None:
    found = Verification(
        parameters=Comparison("parameters", 110, 1, 1),
        eval_vs_program=Comparison("eval_vs_program", 40, 0),
        layers=(Comparison("conv1", 100, 0), Comparison("layer1.0.conv2", 10, 1, 1)),
        spread=(CodeSpread("conv1", 1000, 60, 49), CodeSpread("fc", 1000, 200, 0)),
        notes=("executorch was not asked for",),
    )
    assert str(found).splitlines() == [
        "what is compared                  codes  different",
        "trained codes vs converted codes    110          1  0.909 %, by 1 at most",
        "QAT eval vs Q/DQ program             40          0  exact",
        "- layer1.0.conv2: 1 of 10 differ (10.000 %, by 1 at most)",
        "- codes of 2 tensors: at least 60 distinct (conv1), at most 4.90 % saturated",
        "  (conv1)",
        "- executorch was not asked for",
    ]


SUMMARY = RunSummary(
    model="resnet18",
    data="digits",
    target="onnxruntime",
    float_top1=0.98667,
    qat_top1=0.98444,
    deployed_top1={"onnxruntime": 0.98444, "executorch": 0.98889},
    mismatches={"parameters": 0, "eval_vs_program": 0, "program_vs_onnxruntime": 3, "program_vs_executorch": 0},
    codes_compared=11_703_012,
    seconds={"float": 24.2, "qat": 41.0, "convert": 8.8, "export": 22.0, "verify": 30.0, "score": 6.0, "total": 134.0},
    compared={
        "parameters": 11_689_512,
        "eval_vs_program": 4500,
        "program_vs_onnxruntime": 4500,
        "program_vs_executorch": 4500,
    },
    largest_steps={"program_vs_onnxruntime": 1},
    held_out=450,
    notes=("fc stays in float because nobody gave it a quantizer, and this note is long enough to be wrapped",),
    files={"model.onnx": 11_400_000, "model.pt2": 11_900_000, "model.pte": 11_300_000, "qat.pt": 45_000_000},
    settings={"widths": {"weight": 8, "activation": 8, "bias": 32}},
)


def test_run_table_line_by_line() -> None:
    assert text.run_table(SUMMARY, "runs/demo").splitlines() == [
        "resnet18 on digits for onnxruntime (bits: weight 8, activation 8, bias 32)",
        "",
        "  top-1 on 450 held-out images           to float",
        "  float model                   98.67 %",
        "  QAT model                     98.44 %     -0.22",
        "  ONNX Runtime                  98.44 %     -0.22",
        "  ExecuTorch                    98.89 %     +0.22",
        "",
        "  what is compared                       codes  different",
        "  trained codes vs converted codes  11,689,512          0  exact",
        "  QAT eval vs Q/DQ program               4,500          0  exact",
        "  Q/DQ program vs ONNX Runtime           4,500          3  0.067 %, by 1 at most",
        "  Q/DQ program vs ExecuTorch             4,500          0  exact",
        "",
        "  time 2 min 14 s: train float 24 s, fine-tune QAT 41 s, convert 8.8 s,",
        "    export 22 s, verify 30 s, score 6.0 s",
        "",
        "  files in runs/demo: model.onnx 11.4 MB, model.pt2 11.9 MB, model.pte 11.3 MB,",
        "    qat.pt 45.0 MB, summary.json, report.html",
        "",
        "- fc stays in float because nobody gave it a quantizer, and this note is long",
        "  enough to be wrapped",
    ]
    assert str(SUMMARY).startswith("resnet18 on digits")


@pytest.mark.parametrize("folder", [None, "runs/demo", "a/long/path/" * 4])
def test_run_table_fits_in_80_columns(folder: str | None) -> None:
    long_names = dataclasses.replace(SUMMARY, model="path/to/some/model_definitions.py:build_the_model")
    assert max(map(len, text.run_table(long_names, folder).splitlines())) <= 80
