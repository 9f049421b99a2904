"""Post-training quantization, on the way to training: what can be found from some batches without labels."""

from __future__ import annotations

from qbench.ptq.bias_correction import BiasCorrectionReport, correct_biases
from qbench.ptq.calibration import CalibrationReport, calibrate
from qbench.ptq.equalization import EqualizationReport, equalize
from qbench.ptq.reconstruction import ReconstructionReport, reconstruct

__all__ = [
    "BiasCorrectionReport",
    "CalibrationReport",
    "EqualizationReport",
    "ReconstructionReport",
    "calibrate",
    "correct_biases",
    "equalize",
    "reconstruct",
]
