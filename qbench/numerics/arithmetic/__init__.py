"""The integer arithmetic of targets, one file each, and what they share."""

from __future__ import annotations

from qbench.numerics.arithmetic.base import Arithmetic, Grid, Limit, Window

__all__ = ["Arithmetic", "Grid", "Limit", "Window"]
