"""QAT checkpoints of torch.ao and MQBench, taken over into a prepared qbench model."""

from qbench.checkpoints.loading import load_qat_checkpoint
from qbench.checkpoints.report import CheckpointReport, KeyOutcome, MissingValue

__all__ = ["CheckpointReport", "KeyOutcome", "MissingValue", "load_qat_checkpoint"]
