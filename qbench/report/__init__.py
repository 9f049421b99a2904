"""What a step of the flow found: data in `qbench.report.data`, its formatting in `qbench.report.text`."""

from __future__ import annotations

from qbench.report.data import CodeSpread, Comparison, LayerComparison, RunSummary, Verification

__all__ = ["CodeSpread", "Comparison", "LayerComparison", "RunSummary", "Verification"]
